"""`eval perplexity` through the real engine: transformers' own figure for the same windows, exactly no distance from itself, and the true one from others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.cpu.native_twin import native
from tests.harness import SavedModel, log_softmax
from twinpilots import LLM
from twinpilots.benchmarks.perplexity import Evaluation, Window, evaluate, perplexity, windows
from twinpilots.progress import Progress

CONTEXT, STRIDE = 40, 17
TOKENS = np.random.default_rng(5).integers(3, zoo.VOCAB, 150).tolist()


def opened(model: SavedModel, **more: Any) -> LLM:
    return LLM(str(model.path), device="cpu", **{"max_num_seqs": 7, "max_model_len": CONTEXT + 1, **more})


def evaluated(llm: LLM, parts: list[Window], reference: LLM | None = None) -> Evaluation:
    with Progress("eval", enabled=False) as bar:
        return evaluate(llm, parts, reference, bar)


def reference_logs(model: SavedModel, parts: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """transformers in fp32, one window at a time: log-probabilities [scored tokens, vocab], and the scored tokens."""
    import torch

    network = zoo.load_reference(model.path)
    rows, targets = [], []
    with torch.no_grad():
        for part in parts:
            logits = network(input_ids=torch.tensor([part.tokens])).logits[0].float().numpy()
            rows.append(logits[part.scored_from - 1 : -1])
            targets += part.tokens[part.scored_from :]
    return log_softmax(np.concatenate(rows)), np.array(targets)


@pytest.mark.parametrize("prefix", [[], [1]], ids=["bare", "bos"])
def test_it_is_the_perplexity_that_transformers_finds(zoo_model: Any, prefix: list[int]) -> None:
    model, parts = zoo_model("llama"), windows(TOKENS, prefix, context=CONTEXT, stride=STRIDE)
    with opened(model) as llm:
        found = evaluated(llm, parts)
    logs, targets = reference_logs(model, parts)
    assert len(found.nll) == len(TOKENS) - (not prefix)
    assert found.nll == pytest.approx(-logs[np.arange(len(targets)), targets], abs=1e-3)
    assert perplexity(found.nll) == pytest.approx(float(np.exp(-logs[np.arange(len(targets)), targets].mean())), rel=1e-3)


def test_a_model_is_at_no_distance_from_itself_under_any_plan(zoo_model: Any) -> None:
    native()  # torch's products depend on the batch
    parts = windows(TOKENS, context=CONTEXT, stride=STRIDE)
    with opened(zoo_model("llama")) as llm, opened(zoo_model("llama"), max_num_seqs=3, threads=1) as other:
        found = evaluated(llm, parts, other)
        assert llm.generate([[5, 6, 7]], use_tqdm=False)[0].finished, "the engine goes on as before"
    assert found.kl is not None and found.same_best is not None and found.reference_nll is not None
    assert (found.kl == 0.0).all(), "the CPU's rows do not depend on the batch"
    assert found.same_best.all()
    assert (found.nll == found.reference_nll).all()


def test_the_distance_from_other_weights_is_the_true_one(zoo_model: Any) -> None:
    model, other, parts = zoo_model("llama"), zoo_model("llama", 3), windows(TOKENS, context=CONTEXT, stride=STRIDE)
    with opened(model) as llm, opened(other) as reference:
        found = evaluated(llm, parts, reference)
    (q, _), (p, _) = reference_logs(model, parts), reference_logs(other, parts)
    kl = (np.exp(p) * (p - q)).sum(1)
    assert found.kl is not None and found.same_best is not None
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-3)
    assert found.same_best.mean() == pytest.approx((p.argmax(1) == q.argmax(1)).mean(), abs=0.02)


def test_rows_before_the_first_that_is_asked_for_are_not_computed(zoo_model: Any) -> None:
    prompts, first = [TOKENS[:40], TOKENS[7:16], TOKENS[:20]], [27, 0, 19]

    def rows(llm: LLM, *more: Any) -> dict[tuple[int, int], np.ndarray]:
        return {(part.prompt, part.first + i): row.copy() for part in llm.prompt_logits(prompts, *more) for i, row in enumerate(part.rows)}

    with opened(zoo_model("llama")) as llm:
        whole, found = rows(llm), rows(llm, first)
    assert sorted(whole) == [(number, at) for number, prompt in enumerate(prompts) for at in range(len(prompt))]
    assert sorted(found) == [(number, at) for number, prompt in enumerate(prompts) for at in range(first[number], len(prompt))]
    for place, row in found.items():
        np.testing.assert_allclose(row, whole[place], rtol=1e-4, atol=1e-4)


def test_an_abandoned_evaluation_leaves_nothing_behind(zoo_model: Any) -> None:
    with opened(zoo_model("llama")) as llm:
        rows = llm.prompt_logits([[3, 4, 5], TOKENS[:20]])
        assert next(rows).first == 0
        rows.close()
        assert len(llm.generate([[5, 6, 7]], use_tqdm=False)) == 1
        with pytest.raises(ValueError, match="outside the vocabulary"):
            next(llm.prompt_logits([[3, 4], [zoo.VOCAB]]))
        assert len(llm.generate([[5, 6, 7]], use_tqdm=False)) == 1


@pytest.fixture(scope="module")
def readable(zoo_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo model with a tokenizer of one word per token, which puts BOS in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("readable") / "model"
    shutil.copytree(zoo_model("llama").path, path)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(zoo.VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "t1", "add_bos_token": True}))
    return path


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "twinpilots", "eval", "perplexity", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_command(readable: Path, zoo_model: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{token}" for token in TOKENS))
    asked = [str(readable), "--device", "cpu", "--text", str(text), "--context", str(CONTEXT), "--stride", str(STRIDE), "--num-tokens", "120"]
    done = run_cli(*asked, "--against", "native", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    logs, targets = reference_logs(zoo_model("llama"), windows(TOKENS[:120], [1], context=CONTEXT, stride=STRIDE))
    assert document["tokens"] == len(targets) == 120
    assert document["perplexity"] == pytest.approx(float(np.exp(-logs[np.arange(120), targets].mean())), rel=1e-3)
    assert (document["schema"], document["kl_mean"], document["kl_p99"], document["top1_agreement"]) == (1, 0.0, 0.0, 1.0)
    assert document["against"]["perplexity"] == document["perplexity"]


def test_bad_input_is_one_line(readable: Path, zoo_model: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for wrong, named in (
        ([str(readable), "--text", "/no/such/file"], "/no/such/file"),
        ([str(readable), "--context", "96"], "--context 96"),
        ([str(readable), "--text", str(empty), "--context", "40"], "0 tokens"),
        ([str(zoo_model("llama").path), "--context", "40"], "--tokenizer"),
    ):
        done = run_cli(*wrong, "--device", "cpu")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert named in done.stderr
