"""`bench kernels`: which cases, how much work they are, and what the percentages mean. No kernel runs here."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import pytest

from twinpilots.benchmarks import kernels
from twinpilots.commands import bench
from twinpilots.errors import UserError
from twinpilots.hardware import kernel_bench
from twinpilots.hardware.kernel_bench import KernelCase, Work, fits, supported_formats, whole_work
from twinpilots.hardware.peaks import Peaks
from twinpilots.kernels.native import ISA_NAMES
from twinpilots.model.dummy import dummy_spec

SPEC = replace(dummy_spec("llama-3-8b"), intermediate_size=11008)


def meter(read: float = 10e9, flops: float = 100e9) -> Any:
    return argparse.Namespace(read_bytes_per_s=read, flops_per_s=flops, num_samples=3)


def linear(kernel: Any, tokens: int, name: str = "bf16") -> KernelCase:
    return KernelCase(kernel=kernel, format=name, tokens=tokens)


def test_the_work_of_linears() -> None:
    weights = 4096 * 11008
    assert whole_work(SPEC, linear("linear-out", 8)) == (2 * weights, 2 * weights * 8)
    assert whole_work(SPEC, linear("linear-in", 1, "fp32")) == (4 * weights, 2 * weights)
    assert whole_work(SPEC, linear("mlp-block", 1)) == (3 * 2 * weights, 3 * 2 * weights), "gate, up and down"
    assert whole_work(dummy_spec("opt-6.7b"), linear("mlp-block", 1)) == (2 * 2 * 4096 * 16384, 2 * 2 * 4096 * 16384), "fc1 and fc2"


def test_the_work_of_attention() -> None:
    decode = KernelCase(kernel="decode-attention", format="bf16", tokens=1, sequences=8, context=1024)
    assert whole_work(SPEC, decode) == (8 * 1024 * 2 * 1024 * 2, 8 * 4 * 4096 * 1024)
    assert whole_work(SPEC, replace(decode, format="int8")) == (8 * 1024 * 2 * (1024 + 8 * 4), 8 * 4 * 4096 * 1024), "a scale per token, head, and k or v"
    prefill = KernelCase(kernel="prefill-attention", format="fp16", tokens=3, context=5)
    assert whole_work(SPEC, prefill) == (5 * 2 * 1024 * 2, 4 * 4096 * (3 + 4 + 5)), "the third query sees all five tokens, the first three"


def test_the_limit_is_the_longer_of_two_times_and_the_percentage_is_of_it() -> None:
    assert kernels.limit((10e9, 1e9), meter()) == (1.0, "read")
    assert kernels.limit((1e9, 300e9), meter()) == (3.0, "flops")
    case = linear("linear-out", 4)
    whole = whole_work(SPEC, case)
    half = Work(rows=(), num_bytes=whole[0] / 2, flops=whole[1] / 2)
    quiet, disturbed = kernels.Round(seconds=[0.02, 0.01], peaks=Peaks(8e9, 80e9)), kernels.Round(seconds=[0.03, 0.04, 0.05], peaks=Peaks(4e9, 100e9))
    row = kernels.kernel_row(SPEC, case, half, [quiet, disturbed], meter())
    assert row.seconds == pytest.approx(0.04), "the lower quartile of the runs, scaled to the whole"
    assert row.limit_frac == pytest.approx(whole[0] / 10e9 / 0.04)
    assert row.then_frac == pytest.approx((whole[0] / 8e9 / 0.02 + whole[0] / 4e9 / 0.06) / 2), "each round against what the machine gave then"
    document = kernels.document_of(SPEC, "avx2", 2, meter(), [row]) | {"left_out": ["mlp-block q6_k"]}
    (shown,) = json.loads(json.dumps(document))["rows"]
    assert shown["bytes_per_s"] == pytest.approx(whole[0] / 0.04)
    assert shown["flops_per_s"] == pytest.approx(whole[1] / 0.04)
    assert shown["limit_frac"] == pytest.approx(shown["limit_s"] / shown["seconds"])
    assert shown["bound"] == "read"
    text = kernels.document_text(document)
    assert text.startswith("limits on 2 threads (avx2)")
    assert text.splitlines()[-1].endswith("mlp-block q6_k")
    assert text.splitlines()[-3].split() == ["bf16", "M", "4", "40.000", f"{whole[0] / 0.04 / 1e9:.1f}", f"{whole[1] / 0.04 / 1e9:.0f}", "23", "read", "47"]


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"formats": None, "kernels": bench.KERNELS, "tokens": None, "model": None, "revision": None, **changes})


def test_the_grid() -> None:
    cases = kernels.chosen_cases(arguments())
    assert len(set(cases)) == len(cases)
    assert {case.tokens for case in cases if case.kernel == "linear-in"} == {1, 2, 4, 8, 16, 32, 64, 128, 512}
    assert {case.format for case in cases} >= {"fp32", "bf16", "fp16"}
    assert {case.kernel for case in cases} == set(bench.KERNELS)
    few = kernels.chosen_cases(arguments(formats=("bf16",), kernels=("mlp-block", "decode-attention"), tokens=(3, 5)))
    assert [(case.kernel, case.tokens) for case in few] == [("mlp-block", 3), ("mlp-block", 5)], "chosen token counts are of linears"
    with pytest.raises(UserError, match="'int9'"):
        kernels.chosen_formats(("bf16", "int9"))
    assert kernels.chosen_formats(("all",)) == (*supported_formats(), "int8")
    assert {case.kernel for case in cases if case.format == "int8"} == {"decode-attention", "prefill-attention"}, "a type of KV, not of weights"
    with pytest.raises(UserError, match="--revision main"):
        kernels.bench_spec(arguments(revision="main"))
    assert (kernels.bench_spec(arguments()).hidden_size, kernels.bench_spec(arguments()).intermediate_size) == (4096, 11008)


def test_what_does_not_fit_is_left_out() -> None:
    small = dummy_spec("smollm2-135m")  # 576 is no multiple of 256
    assert fits(small, linear("linear-out", 1, "q4_0"))
    assert not fits(small, linear("linear-out", 1, "q6_k"))
    assert not fits(small, linear("mlp-block", 1, "q6_k"))
    huge = KernelCase(kernel="decode-attention", format="fp32", tokens=1, sequences=16, context=4096)
    assert fits(SPEC, huge)
    assert not fits(dummy_spec("llama-2-7b"), huge)


def test_the_words_of_the_flags_are_those_of_the_code() -> None:
    assert bench.KERNELS == kernel_bench.KERNELS
    assert bench.ISAS == ISA_NAMES
