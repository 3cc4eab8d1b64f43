"""`make gpu-bench SLICE=i/n`: true shapes with random weights on a GPU whose memory is capped, every policy, other engines beside. Under nine minutes a slice.

Owns the order of the work, the time budget, the table and the result file; ``--plot FILE.png RESULT...`` draws several slices' results as one. Every model is
measured in a process of its own (`benchmarks/gpu_cases.py`). ``--device emulated:demo`` rehearses the same steps with small models. What the figures mean is
in docs/gpu-check.md, what they are worth in `benchmarks/gpu_judge.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import FIRST, FamilyTask
from benchmarks.gpu_judge import best_bound, judge, merged
from benchmarks.gpu_peers import Where, peer_results, set_aside_s
from benchmarks.gpu_points import Point, Slice, by_family, points_for
from benchmarks.gpu_rates import rates_text
from benchmarks.gpu_workers import (
    ROOT,
    TimedRun,
    Verdict,
    build_native,
    device_name,
    events_of,
    machine_document,
    mark,
    require_device,
    say,
    slug,
    write_document,
)  # fmt: skip
from twinpilots.commands.options import table
from twinpilots.errors import UserError
from twinpilots.plan.plan import POLICIES

SCHEMA = 1
BUDGET_S = 510.0  # of the nine minutes; starting and ending take the rest
STALL_S = 150.0  # without a word from a worker: filling and pinning 100 GB of host memory takes a minute at worst
MAX_DEATHS = 3  # of one model's workers, before its remaining cases are given up


@dataclass(kw_only=True)
class Run(TimedRun):
    """One slice: what is measured, and what was found."""

    part: Slice
    points: tuple[Point, ...]
    policies: tuple[str, ...]
    peers_at: Where
    families: list[dict[str, Any]] = field(default_factory=list)
    results: dict[Point, dict[str, dict[str, Any]]] = field(default_factory=dict)
    peers: dict[Point, dict[str, dict[str, Any]]] = field(default_factory=dict)
    native: str | None = None  # why there is no native library

    def record(self, point: Point, policy: str, result: Mapping[str, Any]) -> None:
        found = {name: result.get(name) for name in ("ok", "detail", "figures", "seconds")}
        self.results.setdefault(point, {})[policy] = found
        say(f"      {case_text(point, policy, found)}")


# -- steps -----------------------------------------------------------------------------------------------------------------------------------


def measure_families(run: Run) -> None:
    """Model after model; each gets the share of the time left that its points are of those to come."""
    reserved_s = set_aside_s(run.points, run.peers_at)
    families = by_family(run.points)
    for number, points in enumerate(families):
        share = len(points) / sum(map(len, families[number:]))
        say(f"{points[0].model}{f' {points[0].quantization}' if points[0].quantization else ''}: {len(points)} points, {run.left_s:.0f} s left")
        measure_family(run, points, max(0.0, run.left_s - reserved_s) * share)


def measure_family(run: Run, points: Sequence[Point], budget_s: float) -> None:
    """The urgent policies of all points, then the others of all. A worker that dies or hangs costs its case; another one goes on behind it."""
    deadline, deaths = time.monotonic() + budget_s, 0
    todo = [(number, policy) for policy in run.policies if policy in FIRST for number in range(len(points))]
    todo = sorted(todo) + [(number, policy) for number in range(len(points)) for policy in run.policies if policy not in FIRST]
    reason: str | None = None
    while todo and deaths < MAX_DEATHS and time.monotonic() < deadline:
        reason = run_worker(run, points, todo, deadline - time.monotonic())
        if reason is None:
            break
        deaths += 1
    for number, policy in todo:
        run.record(points[number], policy, {"ok": None, "detail": f"not run: {reason or 'the time was up'}"})


def run_worker(run: Run, points: Sequence[Point], todo: list[tuple[int, str]], budget_s: float) -> str | None:
    """Takes finished cases out of ``todo``. None when the worker came to its end, else what ended it: the case that it was at has failed then."""
    current: tuple[int, str] | None = None
    task = FamilyTask(device=run.device, points=[asdict(point) for point in points], cases=list(todo), budget_s=budget_s)
    for event in events_of("benchmarks.gpu_cases", "family", task, limit_s=budget_s + 5.0, stall_s=STALL_S):
        kind = event["event"]
        if kind == "rates":
            known = [family["model"] == points[0].model and family["quantization"] == points[0].quantization for family in run.families]
            if not any(known):
                run.families.append({"model": points[0].model, "quantization": points[0].quantization, "rates": event["rates"], "profile": event["profile"]})
                say(f"      rates: {rates_text(event['rates'])}")
        elif kind == "begin":
            current = (event["point"], event["policy"])
        elif kind == "case":
            case = (event["point"], event["policy"])
            run.record(points[case[0]], case[1], event)
            todo.remove(case)
            current = None
        elif kind == "end" and event["reason"] is not None:
            failed = current or (todo[0] if todo else None)  # before the first case: never try the same thing for ever
            if failed is not None:
                late = event["reason"].endswith("were up")
                run.record(points[failed[0]], failed[1], {"ok": None if late else False, "detail": event["reason"]})
                todo.remove(failed)
            return str(event["reason"])
    return None


def measure_peers(run: Run) -> None:
    for point, peer, result in peer_results(run.points, max(0.0, run.left_s - 5.0), run.peers_at):
        run.peers.setdefault(point, {})[peer] = result
        said = result["reason"] or f"{result['tokens_per_s']:.2f} tokens/s"
        say(f"      {point.name}: {peer} {said}")


# -- reports ---------------------------------------------------------------------------------------------------------------------------------


def case_text(point: Point, policy: str, result: Mapping[str, Any]) -> str:
    found = result["figures"]
    if found is None:
        return f"{mark(result['ok'])} {point.name} {policy}: {result['detail']}"
    busy = ", ".join(f"{name} {100 * seconds / found['seconds']:.0f} %" for name, seconds in found["busy_s"].items())
    rates = f"{found['tokens_per_s']:.2f} tokens/s, predicted {found['predicted']:.2f}, hardware bound {found['hardware_bound']:.2f}"
    return f"{mark(result['ok'])} {point.name} {policy}: {rates}, efficiency {found['efficiency']:.2f}; busy: {busy}"


def document(run: Run) -> dict[str, Any]:
    """The result file, without verdicts. Times in seconds, sizes in bytes, rates per second."""
    points = [
        {
            **asdict(point), "name": point.name, "results": run.results.get(point, {}), "peers": run.peers.get(point, {}),
        }
        for point in run.points
    ]  # fmt: skip
    return {
        "schema": SCHEMA, "benchmark": "gpu", "commit": run.commit, "date": date.today().isoformat(), "slice": f"{run.part.number}/{run.part.count}",
        **machine_document(run.device), "native": run.native or "built", "seconds": time.monotonic() - run.began, "families": run.families, "points": points,
    }  # fmt: skip


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its verdicts."""
    verdicts = judge(found)
    return {**found, "passed": all(verdict.ok is not False for verdict in verdicts), "verdicts": [asdict(verdict) for verdict in verdicts]}


def summary(found: Mapping[str, Any]) -> str:
    """Tokens/s of every policy at every point, the hardware bound beside, and the verdicts."""
    policies = [policy for policy in POLICIES if any(policy in point["results"] for point in found["points"])]
    rows = []
    for point in found["points"]:
        bound, cells = best_bound(point), []
        for policy in policies:
            result = point["results"].get(policy)
            cells.append("" if result is None else "-" if result["figures"] is None else f"{result['figures']['tokens_per_s']:.2f}")
        peers = [f"{peer} {each['tokens_per_s']:.2f}" for peer, each in point["peers"].items() if each["tokens_per_s"]]
        rows.append([point["name"], "-" if bound is None else f"{bound:.2f}", *cells, ", ".join(peers)])
    verdicts = [Verdict(**verdict) for verdict in found["verdicts"]]
    emulated = " (an emulated GPU: a rehearsal, no proof)" if found["emulated"] else ""
    return "\n".join(
        [
            "", f"gpu-bench {found['slice']} of {found['commit']} on {found['gpu']}{emulated}; tokens/s",
            table(["point", "hardware bound", *policies, "peers"], rows),
            *(f"{mark(verdict.ok)}  {verdict.name:<28}  {verdict.detail}" for verdict in verdicts), f"gpu-bench {'passed' if found['passed'] else 'FAILED'}",
        ]
    )  # fmt: skip


def result_name(run: Run) -> str:
    return f"{slug(device_name(run.device))}-bench-{date.today().isoformat()}-{run.part.number}of{run.part.count}"


# -- the command -----------------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    result.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="with --plot: JSON files of this benchmark")
    result.add_argument("--device", default="cuda:0", help="cuda:N, or emulated:PRESET for a rehearsal (default: cuda:0)")
    result.add_argument("--commit", default="unknown", help="what is measured, for the report: such a box may have no .git")
    result.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR", help="where the result goes (default: benchmarks/results)")
    result.add_argument("--slice", default="1/1", metavar="I/N", help="part I of N of the points (default: 1/1)")
    result.add_argument("--policies", default=",".join(POLICIES), metavar="A,B", help="of every point (default: all); auto and stream come first")
    result.add_argument("--points", default="", metavar="TEXT", help="only points with this in their name, as the table shows it")
    result.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a folder with a llama-batched-bench that was built for this card")
    result.add_argument("--peers", type=Path, metavar="DIR", help="a folder with the unpacked packages of FlexTensor and FreeToken (see docs/gpu-check.md)")
    result.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S", help=f"seconds for all of it (default: {BUDGET_S:.0f})")
    result.add_argument("--plot", type=Path, metavar="FILE", help="measure nothing: draw the results, judged as a whole, to this png")
    return result


def checked(args: argparse.Namespace) -> Run:
    """The run that the arguments describe. UserError for what is not here or not known."""
    if args.results:
        raise UserError(f"{args.results[0]} is a result, and results are drawn: add --plot FILE.png")
    policies = tuple(policy for policy in (*FIRST, *POLICIES) if policy in args.policies.split(","))
    if unknown := [policy for policy in args.policies.split(",") if policy not in POLICIES]:
        raise UserError(f"unknown policy {unknown[0]!r}; known: {', '.join(POLICIES)}")
    for folder in (args.llama_cpp, args.peers):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is no folder; other engines are looked for in one")
    require_device(args.device)
    part = Slice.of(args.slice)
    points = tuple(point for point in part.take(points_for(args.device)) if args.points in point.name)
    if not points:
        raise UserError(f"slice {args.slice} has no point with {args.points!r} in its name; points: {', '.join(p.name for p in points_for(args.device))}")
    return Run(
        device=args.device, commit=args.commit, part=part, points=points, policies=tuple(dict.fromkeys(policies)), budget_s=args.budget_s,
        peers_at=Where(device=args.device, llama_cpp=args.llama_cpp, packages=args.peers),
    )  # fmt: skip


def measure(run: Run) -> dict[str, Any]:
    """The whole slice; what goes wrong in one step hides nothing of the others."""
    for step in (lambda: setattr(run, "native", build_native()), lambda: measure_families(run), lambda: measure_peers(run)):
        try:
            step()
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, UserError) as error:
            say(f"FAIL  {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return judged(document(run))


def draw(paths: Sequence[Path], picture: Path) -> dict[str, Any]:
    """Several results as one: judged, drawn. UserError for files that are no such results."""
    from benchmarks.gpu_plot import plot

    documents = []
    for path in paths:
        try:
            documents.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if documents[-1].get("benchmark") != "gpu":
            raise UserError(f"{path} is no result of make gpu-bench")
    found = judged(merged(documents))
    plot(found, picture)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every verdict passed, 1 when one failed, 2 for bad arguments or no GPU."""
    args = parser().parse_args(argv)
    try:
        if args.plot is not None:
            found = draw(args.results, args.plot)
            say(f"{summary(found)}\ndrawn to {args.plot}")
            return 0 if found["passed"] else 1
        run = checked(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="twinpilots-cache-") as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # rates are measured anew: no profile of an earlier run, nor one left behind
        found = measure(run)
    say(summary(found))
    say(f"written to {write_document(found, args.out, result_name(run))}")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
