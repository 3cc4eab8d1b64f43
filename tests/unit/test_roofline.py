"""The roofline of whole models: what a row says, which targets count, and what a user may ask for. No model runs here."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from benchmarks import roofline
from benchmarks.roofline import DECODE, PREFILL, SUBJECTS, Runs, Subject
from twinpilots.errors import UserError
from twinpilots.hardware.peaks import Peaks
from twinpilots.model.dummy import dummy_spec


def meter(read: float, flops: float) -> Any:
    return argparse.Namespace(read_bytes_per_s=read, flops_per_s=flops, num_samples=9)


def rows(subject: Subject, decode_s: float, prefill_s: float, limits: Any) -> dict[str, dict[str, Any]]:
    def runs_of(seconds: float) -> Runs:  # of three rounds the middle one counts
        slow = Peaks(limits.read_bytes_per_s / 2, limits.flops_per_s / 2)  # what the machine gave around each run
        return Runs([3 * seconds, seconds, seconds / 2], [seconds, seconds / 2, seconds / 4], [slow, slow, slow])

    runs = {DECODE.name: runs_of(decode_s), PREFILL.name: runs_of(prefill_s)}
    return {row["metric"]: row for row in roofline.rows_of(subject, runs, limits)}


def test_decoding_is_held_against_one_sweep_over_weights_and_kv() -> None:
    spec = dummy_spec("llama-3.2-1b")
    sweep_bytes = spec.linear_bytes + spec.kv_bytes_per_token("bf16") * 33
    subject = Subject(model="dummy:llama-3.2-1b", weights="native", decode_target=0.8)
    row = rows(subject, 64 * sweep_bytes / 1e9 / 0.8, 1.0, meter(1e9, 1e18))["decode-1"]
    assert row["limit_tokens_per_s"] == pytest.approx(1e9 / sweep_bytes)
    assert row["limit_frac"] == pytest.approx(0.8, rel=1e-9), "the median of the runs"
    assert row["busy_limit_frac"] == pytest.approx(1.6)
    assert row["then_frac"] == pytest.approx(1.6), "against half the rate, as it was around the runs"
    assert row["target"] == 0.8


def test_a_prompt_is_held_against_the_multiply_add_peak() -> None:
    spec = dummy_spec("llama-3.2-1b")
    layers = sum(op.rows * op.row_elements for op in spec.ops(64) if op.layer >= 0)
    flops = 2 * layers * 512 + 2 * spec.vocab_size * spec.hidden_size + spec.num_layers * spec.attention_flops(512, 256)
    found = {weights: rows(Subject(model="dummy:llama-3.2-1b", weights=weights, decode_target=0.8), 1.0, flops / 1e12, meter(1e18, 1e12)) for weights in
             ("native", "int8", "int4-fast")}  # fmt: skip
    assert [found[weights]["prefill-512"]["limit_frac"] for weights in found] == pytest.approx([1.0] * 3)
    assert [(row["prefill-512"]["target"], row["prefill-512"]["met"]) for row in found.values()] == [(0.7, True), (None, None), (1.2, False)]


def test_quantised_weights_are_fewer_bytes() -> None:
    limits = {s.weights: rows(s, 1.0, 1.0, meter(1e9, 1e18))["decode-1"]["limit_tokens_per_s"] for s in SUBJECTS if s.model.startswith("dummy:")}
    assert 1.7 < limits["int8"] / limits["native"] < 2.0
    assert 2.5 < limits["int4-fast"] / limits["native"] < 3.2


def test_the_table_names_what_was_missed() -> None:
    subject = Subject(model="dummy:llama-3.2-1b", weights="native", decode_target=0.8)
    limits = meter(1e9, 1e12)
    found = rows(subject, 64 * 2.6 * 10, 0.001, limits)
    text = roofline.document_text(roofline.document_of(2, 3, list(found.values()), limits))
    decode, prefill = text.splitlines()[-2:]
    assert decode.split()[:3] == ["dummy:llama-3.2-1b", "native", "decode-1"]
    assert (decode.split()[-1], prefill.split()[-1]) == ("MISSED", "met")


def test_a_model_that_may_not_be_installed_is_run_only_when_named() -> None:
    def names(*arguments: str) -> set[tuple[str, str]]:
        return {(subject.model, subject.weights) for subject in roofline.chosen(roofline.parser().parse_args(arguments))}

    assert {model for model, _ in names()} == {"dummy:llama-3.2-1b", "smollm2-135m"}
    assert names("--model", "gemma-3-270m") == {("gemma-3-270m", "native"), ("gemma-3-270m", "packed")}
    assert names("--model", "gemma-3-270m", "--weights", "packed") == {("gemma-3-270m", "packed")}
    with pytest.raises(UserError, match="--weights packed: no model"):
        names("--weights", "packed")
    assert {Subject(model="m", weights="packed").options().get(name) for name in ("dtype", "quantization")} == {None}, "as the file has them"


@pytest.mark.parametrize(("arguments", "named"), [(["--model", "gpt-9"], "'gpt-9'"), (["--weights", "int3"], "'int3'")])
def test_bad_input_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error
