"""`python -m benchmarks.regret`: would a patient expert have set a faster plan by hand? Regret of `auto` on this box against a sweep of hand-set plans.

Owns the sweep, its rounds and the report. Every plan is loaded and run for real: each of the sweep a few times, the best of them by turns with `auto`, which
plans and adapts as it does for everybody. The sweep knows the memory limits and nothing of rates: where KV lies, how much of the rest of GPU memory holds
rows, which part of what is not resident the CPU computes in either phase, micro-batches; and each named policy's own plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from twinpilots.benchmarks.contender import Contender
from twinpilots.benchmarks.summary import Ratio, compare
from twinpilots.benchmarks.throughput import prompts
from twinpilots.commands.models import model_spec
from twinpilots.errors import UserError
from twinpilots.plan.draft import Draft, PlanOptions, chunk_choices, ring_rule
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.policies import RULES, build_policy
from twinpilots.plan.problem import Problem, fill
from twinpilots.plan.workload import Limits, Workload
from twinpilots.planner import HOST_SHARE
from twinpilots.profiling import measure_machine, stored_profile

SHARES = (0.25, 0.5, 0.75, 1.0)  # the CPU's part of the rows that are not resident
PREFILL_SHARES = (0.0, 0.25, 0.5, 0.75)
SCREENED = 1  # runs of every plan, after one that warms up
FINALISTS = 3
WANTED = 0.03


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the grid: sequences whose KV lies on the GPU, the CPU's part of what is not resident, micro-batches."""

    gpu_seqs: int
    decode: float
    prefill: float
    micro_batches: int

    def __str__(self) -> str:
        return f"{self.gpu_seqs} on the GPU, CPU {self.decode:.2f} of decode, {self.prefill:.2f} of prefill, {self.micro_batches} micro-batches"


@dataclass(frozen=True, kw_only=True)
class Hand:
    """A plan set by hand; ``point`` is None for a named policy's."""

    name: str
    plan: Plan
    point: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One workload. ``screened``: tokens/s of every plan of the sweep; ``finals``: each finalist's throughput in relation to auto's, in paired rounds."""

    num_seqs: int
    auto_tokens_per_s: float
    screened: Mapping[str, float]
    finals: Mapping[str, Ratio]

    @property
    def best(self) -> str:
        return max(self.finals, key=lambda name: self.finals[name].median)

    @property
    def regret(self) -> float:
        """How much more throughput the best plan of the sweep has than `auto`: negative where none is as fast."""
        return self.finals[self.best].median - 1

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best, "regret": self.regret}


# -- the sweep ---------------------------------------------------------------------------------------------------------------------------------


def coarse_sweep(problem: Problem) -> Iterator[Hand]:
    """Every named policy's plan, and a grid in which the CPU has the same part of both phases."""
    for policy in RULES:
        try:
            yield Hand(name=policy, plan=build_policy(policy, problem.spec, problem.profile, problem.workload, problem.limits, problem.options))
        except UserError:
            continue
    count = problem.workload.concurrency
    for gpu_seqs, share, batches in product(sorted({0, count // 2, count}), SHARES, (1, 2) if count > 1 else (1,)):
        yield from grid_plans(problem, Point(gpu_seqs=gpu_seqs, decode=share, prefill=share, micro_batches=batches))


def fine_sweep(problem: Problem, best: Point) -> Iterator[Hand]:
    """The best plan of the grid with other parts of prefill."""
    for share in PREFILL_SHARES:
        yield from grid_plans(problem, replace(best, prefill=share))


def grid_plans(problem: Problem, point: Point) -> Iterator[Hand]:
    """All sequences at once; GPU memory beside KV and buffers holds rows of every op alike. Nothing when that does not fit."""
    work, limits = problem.workload, problem.limits
    packet_bytes, depth = ring_rule(limits.gpu_bytes)
    chunk = chunk_choices(problem.spec, work, work.concurrency, limits.gpu_bytes)[0]
    draft = Draft(
        policy="auto", num_seqs=work.concurrency, gpu_seqs=point.gpu_seqs, pass_tokens=max(chunk, work.concurrency), uses_cpu=True, share_of_rest=True,
        micro_batches={"prefill": point.micro_batches, "decode": point.micro_batches}, packet_bytes=packet_bytes, ring_depth=depth,
    )  # fmt: skip
    shares: dict[Phase, float] = {"decode": point.decode, "prefill": point.prefill}
    plan = problem.plan(draft, fill(problem, draft), lambda phase, _: dict.fromkeys(problem.ops, shares[phase]))
    if problem.fits(plan):
        yield Hand(name=str(point), plan=plan, point=point)


# -- measuring ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contender is asked."""

    model: str
    device: str
    num_seqs: int
    input_len: int
    output_len: int
    folder: Path

    @property
    def workload(self) -> Workload:
        return Workload(num_requests=self.num_seqs, input_len=self.input_len, output_len=self.output_len, max_num_seqs=self.num_seqs)

    def contender(self, plan: Plan | None) -> Contender:
        """Loaded and warmed up. None: `auto`."""
        arguments: dict[str, Any] = {"model": self.model, "device": self.device, "max_num_seqs": self.num_seqs}
        if plan is not None:
            path = self.folder / "plan.json"
            path.write_text(plan.to_json(), encoding="utf-8")
            arguments["plan"] = str(path)
        contender = Contender(arguments, prompts(self.num_seqs, self.input_len), self.output_len)
        contender.run()
        return contender


def screened(job: Job, hands: Iterator[Hand], known: dict[str, tuple[Hand, float]]) -> None:
    """Tokens/s of each plan, the best of its runs: neighbours only ever take time."""
    for hand in hands:
        if hand.name in known:
            continue
        contender = job.contender(hand.plan)
        try:
            known[hand.name] = hand, max(contender.run().tokens_per_s for _ in range(SCREENED))
        finally:
            contender.close()
        sys.stderr.write(f"{known[hand.name][1]:8.1f} tokens/s  {hand.name}\n")


def outcome(job: Job, problem: Problem, rounds: int) -> Outcome:
    known: dict[str, tuple[Hand, float]] = {}
    screened(job, coarse_sweep(problem), known)
    of_grid = [(rate, hand.point) for hand, rate in known.values() if hand.point is not None]
    if of_grid:
        screened(job, fine_sweep(problem, max(of_grid, key=lambda pair: pair[0])[1]), known)
    best = sorted(known, key=lambda name: -known[name][1])[:FINALISTS]
    rates: dict[str, list[float]] = {name: [] for name in ("auto", *best)}
    with ExitStack() as stack:
        contenders = {}
        for name in rates:
            contenders[name] = job.contender(None if name == "auto" else known[name][0].plan)
            stack.callback(contenders[name].close)
        for number in range(rounds):
            for name in list(rates) if number % 2 == 0 else reversed(rates):
                rates[name].append(contenders[name].run().tokens_per_s)
    return Outcome(
        num_seqs=job.num_seqs, auto_tokens_per_s=median(rates["auto"]), screened={name: rate for name, (_, rate) in known.items()},
        finals={name: compare(rates[name], rates["auto"]) for name in best},
    )  # fmt: skip


def problem_of(job: Job) -> Problem:
    """What `auto` is asked, too: this model and machine, these limits."""
    spec = model_spec(job.model)
    profile = stored_profile(job.device, spec) or measure_machine(job.device, spec)
    limits = Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=int(profile.host_memory_bytes * HOST_SHARE))
    return Problem.of(spec, profile, job.workload, limits, PlanOptions())


def report(found: Sequence[Outcome]) -> str:
    lines = ["| sequences | auto, tokens/s | plans in the sweep | best by hand | regret | at least (95 %) |", "|---|---|---|---|---|---|"]
    for each in found:
        ratio = each.finals[each.best]
        regret = f"{100 * each.regret:+.1f} % | {100 * (ratio.lower_bound - 1):+.1f} %"
        lines.append(f"| {each.num_seqs} | {each.auto_tokens_per_s:.1f} | {len(each.screened)} | {each.best} | {regret} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="emulated:demo")
    parser.add_argument("--num-seqs", default="1,8,32", metavar="N,N", help="sequences at once, one workload each (default: 1,8,32)")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="paired rounds of auto and the best of the sweep (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of outcomes")
    options = parser.parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory(prefix="twinpilots-regret-") as folder:
        for count in map(int, options.num_seqs.split(",")):
            job = Job(
                model=options.model, device=options.device, num_seqs=count, input_len=options.input_len, output_len=options.output_len, folder=Path(folder),
            )  # fmt: skip
            found.append(outcome(job, problem_of(job), options.rounds))
    sys.stdout.write((json.dumps([each.as_dict() for each in found], indent=1) if options.json else report(found)) + "\n")
    return 0 if all(each.regret <= WANTED for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
