"""Whole models on the CPU alone, against what its memory and its multiply-adds allow. ``python -m benchmarks.roofline`` prints one table.

Owns the grid of models and weights, the targets and the order of runs: decoding one sequence, whose limit is one sweep over weights and KV per pass at the
best read rate, and a prompt of 512, whose limit is its operations at the multiply-add (fp32) peak. Both rates are sampled before and after every run; the best
of all samples is the limit. Where other tenants share the memory that moment may lie minutes from a run, so "then" holds each run against the best of the
samples around it. "in passes" is what is left of a rate's time when nothing but the passes' instructions is counted: the rest is scheduling, sampling and text.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers import LIMIT_SAMPLES, METRICS, Metric, limit_rate
from twinpilots.api import LLM
from twinpilots.commands.models import model_spec
from twinpilots.commands.options import positive_int, table
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import UserError
from twinpilots.hardware.peaks import PeakMeter, Peaks, timed_s
from twinpilots.model.packaged import GEMMA3
from twinpilots.request import SamplingParams

DECODE, PREFILL = (next(metric for metric in METRICS if metric.name == name) for name in ("decode-1", "prefill-512"))
MODEL_LEN = 640  # of the longest run, and some room
PREFILL_TARGETS = {"native": 0.7, "int4-fast": 1.2}  # of the multiply-add peak


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its weights in one precision. ``decode_target``: wanted share of the limit, where one is set. ``native`` is 16 bit, whatever the file
    holds; ``packed`` is as the file has them."""

    model: str
    weights: str
    decode_target: float | None = None

    def options(self) -> dict[str, Any]:
        return {"native": {"dtype": "bfloat16"}, "packed": {}}.get(self.weights, {"quantization": self.weights})

    def target(self, metric: Metric) -> float | None:
        return self.decode_target if metric is DECODE else PREFILL_TARGETS.get(self.weights)


SUBJECTS = tuple(
    Subject(model=model, weights=weights, decode_target=target)
    for model, targets in {"dummy:llama-3.2-1b": (0.8, 0.8, 0.65), "smollm2-135m": (0.75, 0.6, 0.45)}.items()
    for weights, target in zip(("native", "int8", "int4-fast"), targets, strict=True)
)

ON_REQUEST = tuple(Subject(model=GEMMA3, weights=weights) for weights in ("native", "packed"))  # run when named: its package may not be there


@dataclass
class Runs:
    """Seconds of each run of one metric, as a caller sees them and in the passes' instructions alone; and what the machine gave around it."""

    seconds: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    peaks: list[Peaks] = field(default_factory=list)


def measure(subject: Subject, threads: int, rounds: int, meter: PeakMeter) -> dict[str, Runs]:
    """One round to warm up, then ``rounds`` of both metrics in turn."""
    found = {metric.name: Runs() for metric in (DECODE, PREFILL)}
    with LLM(model=subject.model, device="cpu", threads=threads, max_num_seqs=1, max_model_len=MODEL_LEN, **subject.options()) as llm:
        for number in range(rounds + 1):
            for metric in (DECODE, PREFILL):
                before_it = meter.sample(LIMIT_SAMPLES)
                prompt = [[3 + (number * 7 + i) % 97 for i in range(metric.input_len)]]
                params = SamplingParams(temperature=0.0, max_tokens=metric.output_len, ignore_eos=True)
                before = llm.stats()["busy_s"]["cpu"]
                seconds = timed_s(lambda prompt=prompt, params=params: llm.generate(prompt, params, use_tqdm=False))  # type: ignore[misc]
                after_it = meter.sample(LIMIT_SAMPLES)
                if number:
                    found[metric.name].seconds.append(seconds)
                    found[metric.name].busy_s.append(llm.stats()["busy_s"]["cpu"] - before)
                    found[metric.name].peaks.append(Peaks(*map(max, before_it, after_it)))
    return found


def rows_of(subject: Subject, runs: Mapping[str, Runs], meter: PeakMeter) -> list[dict[str, Any]]:
    """One row per metric: median tokens/s, and its share of the limit."""
    options = subject.options()
    spec = model_spec(subject.model, dtype=options.get("dtype", "auto"), quantization=options.get("quantization"))
    rows = []
    for metric in (DECODE, PREFILL):
        limit, seconds, busy_s = limit_rate(spec, spec.linear_bytes, metric, meter), median(runs[metric.name].seconds), median(runs[metric.name].busy_s)
        frac, target = metric.rate(seconds) / limit, subject.target(metric)
        then = median(
            metric.rate(s) / limit_rate(spec, spec.linear_bytes, metric, p) for s, p in zip(runs[metric.name].seconds, runs[metric.name].peaks, strict=True)
        )
        rows.append({
            "model": subject.model, "weights": subject.weights, "metric": metric.name, "tokens_per_s": metric.rate(seconds), "limit_tokens_per_s": limit,
            "limit_frac": frac, "busy_limit_frac": metric.rate(busy_s) / limit, "then_frac": then, "target": target,
            "met": None if target is None else frac >= target,
        })  # fmt: skip
    return rows


def document_of(threads: int, rounds: int, rows: Sequence[Mapping[str, Any]], meter: PeakMeter) -> dict[str, Any]:
    """The JSON document."""
    limits = {"read_bytes_per_s": meter.read_bytes_per_s, "flops_per_s": meter.flops_per_s, "samples": meter.num_samples}
    return {"schema": 1, "benchmark": "roofline", "threads": threads, "rounds": rounds, "limits": limits, "rows": list(rows)}


def document_text(document: Mapping[str, Any]) -> str:
    limits = document["limits"]
    head = (
        f"{document['threads']} threads, medians of {document['rounds']} rounds; limits, the best of {limits['samples']} samples in between: "
        f"DRAM read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply-add (fp32) {limits['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    return (
        head
        + "\n"
        + table(["model", "weights", "", "tokens/s", "limit", "%", "in passes %", "then %", "wanted %", ""], [_cells(row) for row in document["rows"]])
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    rates = [f"{row['tokens_per_s']:.1f}", f"{row['limit_tokens_per_s']:.1f}", f"{100 * row['limit_frac']:.0f}", f"{100 * row['busy_limit_frac']:.0f}"]
    rates.append(f"{100 * row['then_frac']:.0f}")
    wanted = ["-", ""] if row["target"] is None else [f"{100 * row['target']:.0f}", "met" if row["met"] else "MISSED"]
    return [row["model"], row["weights"], row["metric"], *rates, *wanted]


def chosen(args: argparse.Namespace) -> list[Subject]:
    """UserError for a model or weights that no subject has."""
    for flag, asked, known in (("--model", args.model, _known("model")), ("--weights", args.weights, _known("weights"))):
        if asked is not None and asked not in known:
            raise UserError(f"{flag}: unknown {asked!r}; known: {', '.join(known)}")
    subjects = SUBJECTS if args.model is None else (*SUBJECTS, *ON_REQUEST)
    found = [s for s in subjects if args.model in (None, s.model) and args.weights in (None, s.weights)]
    if not found:
        raise UserError(f"--weights {args.weights}: {args.model or 'no model that runs without being named'} has none; name another --model or other --weights")
    return found


def _known(name: str) -> list[str]:
    """The models or the weights that there are."""
    return sorted({getattr(subject, name) for subject in (*SUBJECTS, *ON_REQUEST)})


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0], allow_abbrev=False)
    result.add_argument("--model", help=f"only this of {', '.join(_known('model'))}; {GEMMA3} is not run without being named")
    result.add_argument("--weights", help=f"only these of {', '.join(_known('weights'))}")
    cores = len(choose_cores(gpu=False, emulated=False).pilot)
    result.add_argument("--threads", type=positive_int, default=cores, metavar="N", help=f"default: {cores}, this machine's cores")
    result.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="rounds, after one to warm up (default: 5)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it ran, 2 for bad arguments."""
    args = parser().parse_args(argv)
    try:
        subjects = chosen(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with PeakMeter(args.threads, choose_cores(gpu=False, emulated=False).pilot) as meter:
        runs = []
        for subject in subjects:
            sys.stderr.write(f"{subject.model} {subject.weights}\n")
            runs.append((subject, measure(subject, args.threads, args.rounds, meter)))
            gc.collect()  # the weights of the last one
        document = document_of(args.threads, args.rounds, [row for subject, found in runs for row in rows_of(subject, found, meter)], meter)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(document_text(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
