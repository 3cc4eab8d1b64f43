"""`bench kernels` on the machine: the instructions do the whole work, the figures agree with each other, and the command is a good citizen."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.cpu.native_twin import native
from twinpilots.device.cpu import CpuPilot
from twinpilots.hardware.kernel_bench import KERNELS, KV_FORMATS, KernelBench, KernelCase, fits, supported_formats, whole_work
from twinpilots.hardware.peaks import PeakMeter, host_region_bytes
from twinpilots.kernels.abi import INSN
from twinpilots.kernels.native import ISA_NAMES
from twinpilots.model.dummy import dummy_spec

SPEC = dummy_spec("smollm2-135m")


def case_of(kernel: Any, name: str) -> KernelCase:
    attention = {"decode-attention": {"sequences": 3, "context": 40}, "prefill-attention": {"context": 40}}.get(kernel, {})
    return KernelCase(kernel=kernel, format=name, tokens=1 if kernel == "decode-attention" else 5, **attention)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_format_runs_and_its_work_is_counted(kernel: Any) -> None:
    names = supported_formats() if "attention" not in kernel else tuple(KV_FORMATS)
    cases = [case for case in (case_of(kernel, name) for name in names) if fits(SPEC, case)]
    pilot = CpuPilot(2)
    with KernelBench(pilot, SPEC, most_tokens=5, most_bytes=0) as bench:
        for case in cases:
            once = bench.work(case, 1.0)
            assert (once.num_bytes, once.flops) == whole_work(SPEC, case)
            assert len(once.rows) == (2 if kernel == "mlp-block" else 1)
            assert bench.seconds(case, once) > 0
            many = bench.work(case, 1e9)
            assert many.num_bytes >= min(0.75 * host_region_bytes(), 2000 * once.num_bytes), "more than the caches hold"
            assert many.num_bytes <= bench.region_bytes
    pilot.close()
    assert len(cases) >= 3


def test_a_slice_of_a_kernel_is_whole_units_of_it() -> None:
    pilot = CpuPilot(1)
    with KernelBench(pilot, SPEC, most_tokens=8, most_bytes=0) as bench:
        case = KernelCase(kernel="mlp-block", format="bf16", tokens=8)
        work = bench.work(case, 0.3)
        up, down = np.array(list(work.rows), INSN)["a"]
        assert up[6] == down[6] == 448, "seven units of 64 of 1536"
        assert work.flops == pytest.approx(whole_work(SPEC, case)[1] * 448 / 1536)
        assert bench.seconds(case, work) > 0
    pilot.close()


def test_the_meter_keeps_the_best() -> None:
    with PeakMeter(1) as meter:
        meter.sample()
        first = meter.read_bytes_per_s, meter.flops_per_s
        meter.sample()
        assert meter.read_bytes_per_s >= first[0] > 1e8
        assert meter.flops_per_s >= first[1] > 1e9
        assert meter.num_samples == 2


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "twinpilots", "bench", "kernels", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_the_command() -> None:
    done = run_cli("dummy:smollm2-135m", "--formats", "bf16,fp32", "--kernels", "linear-out,mlp-block", "--tokens", "1,3", "--seconds", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert [(row["kernel"], row["format"], row["tokens"]) for row in document["rows"]] == [
        (kernel, name, tokens) for kernel in ("linear-out", "mlp-block") for name in ("bf16", "fp32") for tokens in (1, 3)
    ]
    limits = document["limits"]
    for row in document["rows"]:
        assert row["limit_s"] == pytest.approx(max(row["bytes"] / limits["read_bytes_per_s"], row["flops"] / limits["flops_per_s"]))
        assert row["limit_frac"] == pytest.approx(row["limit_s"] / row["seconds"])
        assert 0 < row["limit_frac"] < 3
    assert limits["samples"] > 2 * len(document["rows"]), "the limits are measured between the rows"


def test_an_instruction_set_can_be_chosen() -> None:
    best = native().best_isa
    done = run_cli("--kernels", "linear-in", "--formats", "bf16", "--tokens", "1", "--seconds", "1", "--isa", "portable", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("limits on 1 thread (portable)")
    for missing in ISA_NAMES[best + 1 :]:
        refused = run_cli("--isa", missing)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert missing in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--formats", "int9"], "'int9'"), (["--formats", "bf16,bf16"], "once"), (["--kernels", "gemm"], "'gemm'"), (["--tokens", "0"], "--tokens"),
        (["--tokens", "5000"], "4096"), (["--tokens", "1,x"], "'x'"), (["dummy:nothing"], "dummy:nothing"), (["--isa", "sse9"], "sse9"),
        (["dummy:smollm2-135m", "--formats", "q6_k", "--kernels", "linear-out"], "linear-out q6_k"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], named: str) -> None:
    done = run_cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
