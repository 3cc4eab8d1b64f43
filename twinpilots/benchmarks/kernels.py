"""`twinpilots bench kernels`: each kernel's time beside the limit of the same run.

Owns the grid of cases, the order of measurements, the percentages, the table and the JSON document. The limit of a kernel is the longer of two times: to read
its bytes at the best DRAM rate, and to do its operations at the best multiply-add rate; both rates are sampled around every measurement, and the best of
all samples counts. Where other tenants share the memory that moment may lie minutes from a kernel's runs, so "then" holds each against the samples around it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from twinpilots.commands import options
from twinpilots.device.cpu import CpuPilot
from twinpilots.errors import UserError
from twinpilots.hardware.bench import typical_s
from twinpilots.hardware.kernel_bench import FAST, KERNELS, KV_FORMATS, LINEARS, KernelBench, KernelCase, Work, fits, supported_formats, whole_work
from twinpilots.hardware.peaks import PeakMeter, Peaks
from twinpilots.kernels import native
from twinpilots.machine import instruction_set as isa_in_use
from twinpilots.progress import Progress

if TYPE_CHECKING:
    from twinpilots.model.spec import ModelSpec

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
MADE_FORMATS = ("fp32", "bf16", "fp16", "q8_0", "q4_1", "q4_1" + FAST, "int8")  # what --dtype, --quantization and --kv-cache-dtype make; others come from files
DECODES = ((1, 1024), (1, 4096), (8, 1024), (8, 4096), (16, 1024), (16, 4096))  # (sequences, context)
PREFILLS = ((64, 64), (512, 512), (512, 2048))  # (query tokens, context)
ROUNDS = 2
MIN_RUNS = 2  # of a case in a round
FIRST_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Round:
    """One case's runs of one round, in seconds, and the best rates that the machine had right before and right after them."""

    seconds: Sequence[float]
    peaks: Peaks


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One case's result, scaled to the whole kernel. ``limit_s``: what the machine's best rates would take; ``then_frac``: of the rates around the runs."""

    case: KernelCase
    seconds: float
    num_bytes: float
    flops: float
    limit_s: float
    bound: Literal["read", "flops"]
    then_frac: float

    @property
    def limit_frac(self) -> float:
        return self.limit_s / self.seconds


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, then print the table or return the document."""
    spec = bench_spec(args)
    chosen = chosen_cases(args)
    cases = [case for case in chosen if fits(spec, case)]
    left_out = sorted({f"{case.kernel} {case.format}" for case in chosen} - {f"{case.kernel} {case.format}" for case in cases})
    if not cases:
        raise UserError(f"none of the chosen kernels and formats ({', '.join(left_out) or 'none'}) fits {spec.name}; choose other --formats or --kernels")
    with instruction_set(args.isa) as isa, Progress("bench", total=ROUNDS * len(cases), unit="measurements") as bar:
        pilot = CpuPilot(args.threads)
        try:
            with PeakMeter(pilot.threads, pilot.cores) as meter:
                rows = measure_cases(pilot, spec, cases, meter, args.seconds, bar)
                document = document_of(spec, isa, pilot.threads, meter, rows) | {"left_out": left_out}
        finally:
            pilot.close()
    if args.json:
        return document
    print(document_text(document))
    return None


def bench_spec(args: argparse.Namespace) -> ModelSpec:
    """The named model's widths; without one those that kernels are usually compared in: 4096 x 11008, 32 heads on 8 KV heads of 128."""
    from twinpilots.commands.models import model_spec

    if args.model is not None:
        return model_spec(args.model, revision=args.revision)
    if args.revision is not None:
        raise UserError(f"--revision {args.revision} was given without a model; name one or leave it out")
    return replace(model_spec("dummy:llama-3-8b"), intermediate_size=11008, name="4096 x 11008")


def chosen_cases(args: argparse.Namespace) -> list[KernelCase]:
    """The grid, less what the flags leave out. UserError for a format that no kernel here knows."""
    formats = chosen_formats(args.formats)
    kv_formats, weight_formats = [name for name in formats if name in KV_FORMATS], [name for name in formats if name in supported_formats()]
    tokens = args.tokens or TOKENS
    found = [KernelCase(kernel=kernel, format=name, tokens=count) for kernel in LINEARS for name in weight_formats for count in tokens]
    if args.tokens is None:
        found += [KernelCase(kernel="decode-attention", format=f, tokens=1, sequences=b, context=s) for f in kv_formats for b, s in DECODES]
        found += [KernelCase(kernel="prefill-attention", format=f, tokens=q, context=s) for f in kv_formats for q, s in PREFILLS]
    return [case for case in found if case.kernel in args.kernels]


def chosen_formats(names: Sequence[str] | None) -> tuple[str, ...]:
    known = tuple(dict.fromkeys((*supported_formats(), *KV_FORMATS)))
    if names is None:
        return tuple(name for name in MADE_FORMATS if name in known)
    if tuple(names) == ("all",):
        return known
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(f"--formats: no kernel here knows {unknown!r}; known are all, {', '.join(known)}")
    return tuple(names)


@contextmanager
def instruction_set(name: str | None) -> Iterator[str]:
    """The native kernels on this instruction set for a while, as on a machine that has no better one. None: the best. Gives the name of what is used."""
    library = native.load()
    if name is None:
        yield isa_in_use()
        return
    if library is None:
        raise UserError(f"--isa {name} needs the native library, which is not here: run python -m twinpilots.kernels.build, or leave it out")
    before = library.isa
    try:
        library.set_isa(native.ISA_NAMES.index(name))
    except ValueError as error:
        raise UserError(f"--isa {name}: {error}") from error
    try:
        yield name
    finally:
        library.set_isa(before)


def measure_cases(pilot: CpuPilot, spec: ModelSpec, cases: Sequence[KernelCase], meter: PeakMeter, budget_s: float, bar: Progress) -> list[KernelRow]:
    """Rounds over all cases, every second one backwards, so that a neighbour's busy minute does not hit one case alone."""
    for _ in range(FIRST_SAMPLES):
        meter.sample()
    case_s = budget_s / ROUNDS / len(cases)
    rounds: dict[KernelCase, list[Round]] = {case: [] for case in cases}
    most_bytes = max(whole_work(spec, case)[0] for case in cases)
    with KernelBench(pilot, spec, most_tokens=max(case.tokens * case.sequences for case in cases), most_bytes=most_bytes) as bench:
        works = {case: bench.work(case, case_s / MIN_RUNS / limit(whole_work(spec, case), meter)[0]) for case in cases}
        for number in range(ROUNDS):
            for case in cases if number % 2 == 0 else reversed(cases):
                before = meter.sample()
                seconds = timed_runs(bench, case, works[case], case_s)
                rounds[case].append(Round(seconds=seconds, peaks=Peaks(*map(max, before, meter.sample()))))
                bar.update(note=f"round {number + 1} of {ROUNDS}, {case.kernel} {case.format}")
    return [kernel_row(spec, case, works[case], rounds[case], meter) for case in cases]


def timed_runs(bench: KernelBench, case: KernelCase, work: Work, budget_s: float) -> list[float]:
    """As many runs as the budget allows, at least `MIN_RUNS`."""
    began = time.perf_counter()
    found: list[float] = []
    while len(found) < MIN_RUNS or time.perf_counter() - began < budget_s:
        found.append(bench.seconds(case, work))
    return found


def kernel_row(spec: ModelSpec, case: KernelCase, work: Work, rounds: Sequence[Round], meter: PeakMeter) -> KernelRow:
    """The whole kernel's share of what was run, against the limits."""
    whole = whole_work(spec, case)
    scale = whole[0] / work.num_bytes
    limit_s, bound = limit(whole, meter)
    seconds = scale * typical_s([run for one in rounds for run in one.seconds])
    then_frac = median(limit(whole, one.peaks)[0] / (scale * typical_s(one.seconds)) for one in rounds)
    return KernelRow(case=case, seconds=seconds, num_bytes=whole[0], flops=whole[1], limit_s=limit_s, bound=bound, then_frac=then_frac)


def limit(work: tuple[float, float], meter: PeakMeter | Peaks) -> tuple[float, Literal["read", "flops"]]:
    """The roofline: (seconds that (bytes, FLOPs) take at the machine's best rates, which of the two rates binds)."""
    read_s, compute_s = work[0] / meter.read_bytes_per_s, work[1] / meter.flops_per_s
    return (read_s, "read") if read_s >= compute_s else (compute_s, "flops")


def document_of(spec: ModelSpec, isa: str, threads: int, meter: PeakMeter, rows: Sequence[KernelRow]) -> dict[str, Any]:
    """The JSON document."""
    return {
        "schema": 1, "benchmark": "kernels", "model": spec.name,
        "widths": {
            "hidden": spec.hidden_size, "intermediate": spec.intermediate_size,
            "heads": spec.num_heads, "kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
        },
        "threads": threads, "isa": isa,
        "limits": {"read_bytes_per_s": meter.read_bytes_per_s, "flops_per_s": meter.flops_per_s, "samples": meter.num_samples},
        "rows": [_row(row) for row in rows],
    }  # fmt: skip


def _row(row: KernelRow) -> dict[str, Any]:
    case = row.case
    return {
        "kernel": case.kernel, "format": case.format, "tokens": case.tokens, "sequences": case.sequences, "context": case.context,
        "seconds": row.seconds, "bytes": row.num_bytes, "flops": row.flops, "bytes_per_s": row.num_bytes / row.seconds, "flops_per_s": row.flops / row.seconds,
        "limit_s": row.limit_s, "bound": row.bound, "limit_frac": row.limit_frac, "then_frac": row.then_frac,
    }  # fmt: skip


def document_text(document: Mapping[str, Any]) -> str:
    """The limits first, then a table per kernel."""
    limits, widths = document["limits"], document["widths"]
    lines = [
        f"limits on {document['threads']} thread{'s' * (document['threads'] > 1)} ({document['isa']}), the best of {limits['samples']} samples in between: "
        f"DRAM read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply-add (fp32) {limits['flops_per_s'] / 1e9:.0f} GFLOP/s",
        f"{document['model']}: hidden {widths['hidden']}, intermediate {widths['intermediate']}, {widths['heads']} heads on {widths['kv_heads']} KV heads "
        f"of {widths['head_dim']}; % of the limit that binds (read or flops); then %: of the samples right around the runs",
    ]
    for kernel in KERNELS:
        rows = [row for row in document["rows"] if row["kernel"] == kernel]
        if rows:
            lines += ["", options.table([kernel, "shape", "ms", "GB/s", "GFLOP/s", "%", "of", "then %"], [_cells(row) for row in rows])]
    if document["left_out"]:
        lines += ["", f"not measured, for the model's widths do not fit: {', '.join(document['left_out'])}"]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    shape = f"M {row['tokens']}" if row["kernel"] in LINEARS else f"{row['sequences']} x {row['tokens']} at {row['context']}"
    rates = [f"{row['seconds'] * 1e3:.3f}", f"{row['bytes_per_s'] / 1e9:.1f}", f"{row['flops_per_s'] / 1e9:.0f}"]
    return [row["format"], shape, *rates, f"{100 * row['limit_frac']:.0f}", row["bound"], f"{100 * row['then_frac']:.0f}"]
