"""`python -m benchmarks.weight_layout`: bf16 linears over weights as checkpoints store them, [out][in], against our panels, [unit][in][64], in one run.

Both lie in host memory and are read by the same threads on the same cores, by turns. The row-major kernel is the benchmark's own (row_major.cpp, compiled for
this very processor). Beside them: what unpacking panels would cost a GPU, in parts of the time in which the link brings the same bytes. Owns the contender,
the order of runs and the table. Knows nothing of why a layout is chosen: docs/execution.md does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.commands.models import model_spec
from twinpilots.commands.options import positive_int, table
from twinpilots.device.cpu import CpuPilot, choose_cores
from twinpilots.hardware.kernel_bench import KernelBench, KernelCase, Work, whole_work
from twinpilots.hardware.peaks import PeakMeter, host_region_bytes
from twinpilots.hardware.presets import PRESETS

ROWS = (1, 8, 64, 512)
MODEL = "dummy:llama-3.2-1b"
SOURCE = Path(__file__).with_name("row_major.cpp")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-Wno-psabi")
OUTPUTS_AT_ONCE = 4  # of row_major.cpp
SMALL = 0x3C00  # bf16: an ordinary small number


class RowMajor:
    """The contender: each thread of ``cores`` computes as many outputs as the others."""

    def __init__(self, cores: Sequence[int]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "row_major.so"
            subprocess.run([*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, str(SOURCE), "-o", str(library)], check=True)
            self._linear = ctypes.CDLL(str(library)).row_major_linear
        left = iter(cores)
        self._threads = ThreadPoolExecutor(len(cores), initializer=lambda: os.sched_setaffinity(0, {next(left)}))
        self._count = len(cores)

    def run(self, x: NDArray[np.float32], weights: Sequence[NDArray[np.uint16]], y: NDArray[np.float32]) -> None:
        """y[M, N] = x[M, K] @ w[N, K].T for each of ``weights`` in turn; the threads meet at the end only."""
        outputs, inputs = weights[0].shape
        edges = [outputs * i // self._count // OUTPUTS_AT_ONCE * OUTPUTS_AT_ONCE for i in range(self._count)] + [outputs]

        def part(first: int, last: int) -> None:
            sizes = [ctypes.c_int64(size) for size in (inputs, outputs, first, last)]
            for w in weights:
                self._linear(ctypes.c_void_p(x.ctypes.data), ctypes.c_int64(len(x)), ctypes.c_void_p(w.ctypes.data), *sizes, ctypes.c_void_p(y.ctypes.data))

        list(self._threads.map(part, edges, edges[1:]))

    def close(self) -> None:
        self._threads.shutdown()


class RowMajorRuns:
    """Weights that no cache holds, cycled through as `KernelBench` does."""

    def __init__(self, kernel: RowMajor, outputs: int, inputs: int) -> None:
        copies = max(1, host_region_bytes() // (2 * outputs * inputs) + 1)
        self._kernel, self._weights = kernel, np.full((copies, outputs, inputs), SMALL, np.uint16)
        self._next = 0

    def seconds(self, rows: int, times: int) -> float:
        """Of one linear, the mean of ``times``, each over other weights."""
        count, outputs, inputs = self._weights.shape
        x, y = np.ones((rows, inputs), np.float32), np.empty((rows, outputs), np.float32)
        weights = [self._weights[(self._next + i) % count] for i in range(times)]
        self._next += times
        began = time.perf_counter()
        self._kernel.run(x, weights, y)
        return (time.perf_counter() - began) / times


def measure(threads: int, rounds: int) -> dict[str, Any]:
    """The document: limits, and for every number of rows both layouts' seconds of one linear, medians of paired rounds."""
    spec = model_spec(MODEL)
    cores = choose_cores(gpu=False, emulated=False).pilot[:threads]
    pilot, contender = CpuPilot(threads, cores), RowMajor(cores)
    cases = {rows: KernelCase(kernel="linear-out", format="bf16", tokens=rows) for rows in ROWS}
    theirs = RowMajorRuns(contender, spec.intermediate_size, spec.hidden_size)
    found: dict[int, list[tuple[float, float]]] = {rows: [] for rows in ROWS}
    most_bytes = whole_work(spec, cases[1])[0]
    with PeakMeter(threads, cores) as meter, KernelBench(pilot, spec, most_tokens=max(ROWS), most_bytes=most_bytes) as bench:
        works: dict[int, Work] = {rows: bench.work(case, 4 if rows <= 8 else 1) for rows, case in cases.items()}
        for _ in range(rounds + 1):
            for rows, case in cases.items():
                meter.sample()
                ours = bench.seconds(case, works[rows]) * whole_work(spec, case)[0] / works[rows].num_bytes
                found[rows].append((ours, theirs.seconds(rows, 4 if rows <= 8 else 1)))
    contender.close()
    pilot.close()
    return {
        "schema": 1, "benchmark": "weight-layout", "model": MODEL, "threads": threads, "rounds": rounds,
        "limits": {"read_bytes_per_s": meter.read_bytes_per_s, "flops_per_s": meter.flops_per_s},
        "rows": [_row(spec.hidden_size * spec.intermediate_size, rows, runs[1:]) for rows, runs in found.items()],  # the first round warms up
        "gpu_unpack": unpack_costs(),
    }  # fmt: skip


def _row(weights: int, rows: int, runs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    ours, theirs = median(a for a, _ in runs), median(b for _, b in runs)
    return {
        "tokens": rows, "bytes": 2 * weights, "flops": 2 * weights * rows, "panels_s": ours, "row_major_s": theirs,
        "speedup": median(b / a for a, b in runs), "rounds": [b / a for a, b in runs],
    }  # fmt: skip


def unpack_costs() -> dict[str, float]:
    """Per preset, the time in which its GPU would read and write 16-bit weights once more, over the time in which its link brings them."""
    return {
        name: 2 * profile.link.up_bytes_per_s / profile.gpu.read_bytes_per_s
        for name, profile in PRESETS.items()
        if profile.gpu is not None and profile.link is not None and not profile.emulated
    }


def document_text(document: Mapping[str, Any]) -> str:
    limits = document["limits"]
    lines = [
        f"{document['model']}, one linear of bf16 weights, {document['threads']} threads, medians of {document['rounds']} rounds; limits of this run: "
        f"DRAM read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply-add (fp32) {limits['flops_per_s'] / 1e9:.0f} GFLOP/s",
        table(
            ["tokens", "row-major ms", "panels ms", "row-major % of limit", "panels % of limit", "panels are"],
            [_cells(row, limits) for row in document["rows"]],
        ),
        "unpacking panels on a GPU, if its kernels could not read them, over the link's time for the same bytes: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in document["gpu_unpack"].items()),
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    limit_s = max(row["bytes"] / limits["read_bytes_per_s"], row["flops"] / limits["flops_per_s"])
    shares = [f"{100 * limit_s / row[key]:.0f}" for key in ("row_major_s", "panels_s")]
    return [str(row["tokens"]), f"{1e3 * row['row_major_s']:.2f}", f"{1e3 * row['panels_s']:.2f}", *shares, f"{row['speedup']:.2f} x as fast"]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_layout", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    cores = len(choose_cores(gpu=False, emulated=False).pilot)
    parser.add_argument("--threads", type=positive_int, default=cores, metavar="N", help=f"default: {cores}, this machine's cores")
    parser.add_argument("--rounds", type=positive_int, default=15, metavar="N", help="rounds, after one to warm up (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    document = measure(args.threads, args.rounds)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(document_text(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
