"""`python -m benchmarks.truth`: predicted against true pass times on hardware that the planner never sees.

Part 1, on the virtual clock: random machines with habits that the cost model does not know (`hidden_machine`). The offline profiler measures each with its own
experiments, `auto` plans from that profile, and every pass is predicted before it runs: by the profile alone, and again after 50 passes of tracking. Part 2,
``--live`` (`truth_live`): emulated GPUs with random links and memory as black boxes, and this box's CPU.

    python -m benchmarks.truth [--json] [--machines N] [--first N] [--cases N] [--seed S] [--profile KIND] [--live]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.hidden_devices import KINDS
from benchmarks.hidden_machine import HiddenMachine, random_machine
from benchmarks.hidden_passes import run_passes
from benchmarks.hidden_rehearsal import profiled
from twinpilots.errors import LimitError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.model.spec import ModelSpec
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.load import decode_load
from twinpilots.plan.plan import Phase, Plan, Policy
from twinpilots.plan.pricing import phase_loads, waves_of
from twinpilots.plan.rebalance import Option
from twinpilots.plan.schedule import expand
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits, Workload

MODELS = ("smollm2-135m", "llama-3-8b", "qwen2.5-7b", "opt-30b")
SEQUENCES = (1, 4, 16, 64)
TRACKED, AFTER = 50, 10  # passes that the tracker sees, and those judged after them
JUDGED = (0, 16, 32, 48)  # passes that the profile alone is judged by
HOST_BYTES, CARD_BYTES = 1 << 40, 16 << 30  # what plans may take of the host; what the profiler finds on the card (plans get a part of the model's size)
WANTED_MEDIAN, WANTED_P90 = 0.05, 0.12
STEADY = 0.1  # change of a shared box's speed that is none


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan to make on one machine."""

    machine: str
    model: str
    num_seqs: int
    input_len: int
    memory_frac: float  # GPU memory as a part of the model's
    policy: Policy = "auto"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pass times of one phase of a case: by the profile alone, and after tracking (None: prefill is not tracked). Seconds are means (live: medians).
    ``likeness``: of each pass that ``errors`` has, which others are like it (the same bucket, sequences and tokens); () where all are."""

    case: Case
    phase: Phase
    bound_by: str
    predicted_s: float
    true_s: float
    errors: tuple[float, ...]
    tracked_errors: tuple[float, ...]
    likeness: tuple[int, ...] = ()
    box_change: float | None = None  # live: how far the box's own rates were from those at the time of the profile


class Never:
    """A runner that solves nothing: predictions are judged for one plan."""

    last_s = 0.0
    disturbs = False

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        pass

    def collect(self) -> None:
        return None


def random_cases(machine: HiddenMachine, seed: int, count: int) -> list[Case]:
    """Models in turn, so that every machine sees all of them; sequences in turn, so that every model sees all counts."""
    rng = random.Random(f"cases {seed} {machine.name}")
    first = rng.randrange(len(SEQUENCES))
    return [
        Case(
            machine=machine.name, model=MODELS[i % len(MODELS)], num_seqs=SEQUENCES[(first + i + i // len(MODELS)) % len(SEQUENCES)],
            input_len=round(math.exp(rng.uniform(math.log(32), math.log(1024)))), memory_frac=rng.uniform(0.1, 0.9),
        )
        for i in range(count)
    ]  # fmt: skip


def judge(machine: HiddenMachine, case: Case, spec: ModelSpec, profile: HardwareProfile, seed: int) -> list[Row]:
    """Plan, run and compare; no rows where no plan exists."""
    gpu_bytes = int(case.memory_frac * (spec.linear_bytes + spec.embedding_bytes))
    workload = Workload(num_requests=case.num_seqs, input_len=case.input_len, output_len=TRACKED + AFTER + 1, max_num_seqs=case.num_seqs)
    try:
        plan = solve(spec, profile, workload, Limits(gpu_bytes=gpu_bytes, host_bytes=HOST_BYTES), policy=case.policy, compare=False).plan
    except LimitError:
        return []
    return [*_decode(machine, case, spec, profile, plan, workload, seed), *_prefill(machine, case, spec, profile, plan, workload, seed)]


def _decode(
    machine: HiddenMachine, case: Case, spec: ModelSpec, profile: HardwareProfile, plan: Plan, workload: Workload, seed: int
) -> list[Row]:  # fmt: skip
    _, on_gpu, on_host = waves_of(plan, workload)
    bucket = plan.bucket_for("decode", on_gpu + on_host)
    loads = [decode_load(on_gpu, on_host, case.input_len + step, bucket) for step in range(TRACKED + AFTER)]
    schedule = expand(spec, plan, bucket, loads[0].shape)
    passes = run_passes(machine, spec, plan, schedule, loads, seed)
    offline, planner = (OnlinePlanner(spec, profile, Never(), adapts=adapts) for adapts in (False, True))
    before = [offline.predict(plan, bucket, loads[step]) for step in JUDGED]
    tracked = []
    for step, (load, found) in enumerate(zip(loads, passes, strict=True)):
        prediction = planner.predict(plan, bucket, load)
        if step >= TRACKED:
            tracked.append(prediction.seconds / found.seconds - 1.0)
        done = PassDone(
            plan=plan,
            bucket=bucket,
            load=load,
            schedule=schedule,
            work_s=found.work_s,
            seconds=found.seconds,
            driver_s=machine.between_s(load.num_seqs),
            remaining=len(loads) - step,
        )
        planner.after_pass(done, prediction)
    busy = before[0].busy_s
    return [_row(case, "decode", max(("cpu", "gpu", "link"), key=lambda name: getattr(busy, name)), before, [passes[step].seconds for step in JUDGED], tracked)]


def _prefill(
    machine: HiddenMachine, case: Case, spec: ModelSpec, profile: HardwareProfile, plan: Plan, workload: Workload, seed: int
) -> list[Row]:  # fmt: skip
    bucket, load, _ = phase_loads(workload, plan, "prefill")[0]
    passes = run_passes(machine, spec, plan, expand(spec, plan, bucket, load.shape), [load] * 2, seed + 1)
    prediction = OnlinePlanner(spec, profile, Never(), adapts=False).predict(plan, bucket, load)
    busy = prediction.busy_s
    return [_row(case, "prefill", max(("cpu", "gpu", "link"), key=lambda name: getattr(busy, name)), [prediction] * 2, [found.seconds for found in passes], [])]


def _row(case: Case, phase: Phase, bound_by: str, predictions: Sequence[Any], true_s: Sequence[float], tracked: Sequence[float]) -> Row:
    predicted = [prediction.seconds for prediction in predictions]
    return Row(
        case=case, phase=phase, bound_by=bound_by, predicted_s=sum(predicted) / len(predicted), true_s=sum(true_s) / len(true_s),
        errors=tuple(p / t - 1.0 for p, t in zip(predicted, true_s, strict=True)), tracked_errors=tuple(tracked),
    )  # fmt: skip


# -- reporting -----------------------------------------------------------------------------------------------------------------------------------------


def summary(errors: Sequence[float]) -> tuple[float, float]:
    """(median, 90th percentile) of the errors' sizes."""
    sizes = sorted(abs(error) for error in errors)
    if len(sizes) < 2:
        return (sizes[0], sizes[0]) if sizes else (0.0, 0.0)
    tenths = quantiles(sizes, n=10, method="inclusive")
    return tenths[4], tenths[8]


def apart(row: Row) -> tuple[list[float], list[float]]:
    """A row's errors in two factors, each for every pass: the error of the typical one of its like (the middle of predicted / true), and what the pass itself
    is off by beside that, which no prediction made before the first of them can know."""
    likeness = row.likeness or (0,) * len(row.errors)
    ratios: dict[int, list[float]] = {}
    for error, alike in zip(row.errors, likeness, strict=True):
        ratios.setdefault(alike, []).append(1.0 + error)
    middles = {alike: median(found) for alike, found in ratios.items()}
    typical = [middles[alike] - 1.0 for alike in likeness]
    return typical, [(1.0 + error) / middles[alike] - 1.0 for error, alike in zip(row.errors, likeness, strict=True)]


def figures(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """(median, 90th percentile) of the passes' errors: by the profile alone, in the two parts of these (`apart`), and after tracking."""
    decode = [row for row in rows if row.phase == "decode"]
    steady = [error for row in rows if row.box_change is not None and row.box_change < STEADY for error in row.errors]
    parts = [apart(row) for row in rows]
    return {
        **({f"offline, while the box was within {100 * STEADY:.0f} % of its speed at the profile": summary(steady)} if steady else {}),
        "offline": summary([error for row in rows for error in row.errors]),
        "offline, decode": summary([error for row in decode for error in row.errors]),
        "offline, prefill": summary([error for row in rows if row.phase == "prefill" for error in row.errors]),
        "offline, the typical pass of each kind": summary([error for typical, _ in parts for error in typical]),
        "spread of like passes": summary([error for _, spread in parts for error in spread]),
        f"after {TRACKED} passes": summary([error for row in decode for error in row.tracked_errors]),
    }


def report(rows: Sequence[Row]) -> str:
    lines = [f"{'machine':<10} {'model':<14} seqs prompt memory phase   most work   true ms  predicted   error  tracked"]
    for row in rows:
        case = row.case
        tracked = f"{100 * sum(row.tracked_errors) / len(row.tracked_errors):+6.1f} %" if row.tracked_errors else ""
        lines.append(
            f"{case.machine:<10} {case.model:<14} {case.num_seqs:4d} {case.input_len:6d} {case.memory_frac:6.2f} {row.phase:<7} {row.bound_by:<9} "
            f"{1e3 * row.true_s:9.2f} {1e3 * row.predicted_s:10.2f} {100 * (row.predicted_s / row.true_s - 1):+6.1f} % {tracked}"
            + ("" if row.box_change is None else f"   box {100 * row.box_change:.0f} %")
        )
    lines += [f"{name}: median {100 * median:.1f} %, 90th percentile {100 * p90:.1f} %" for name, (median, p90) in figures(rows).items()]
    return "\n".join([*lines, f"wanted: {100 * WANTED_MEDIAN:.0f} %, {100 * WANTED_P90:.0f} %"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.truth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=8, help="random machines (default 8)")
    parser.add_argument("--first", type=int, default=0, help="number of the first machine (live: -1 is the CPU alone, 0 emulated:demo)")
    parser.add_argument("--cases", type=int, default=4, help="plans per machine (default 4: one of each model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--live", action="store_true", help="this box: emulated GPUs with random links and memory (the first is emulated:demo)")
    parser.add_argument("--profile", choices=KINDS, default="full", help="what the planner starts from (default: full)")
    parser.add_argument("--model", action="append", metavar="NAME", help="live: this model only (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: figures and rows")
    options = parser.parse_args(arguments)
    if options.live:
        rows = _live(options)
    else:
        rows = _virtual(options)
    if options.json:
        sys.stdout.write(json.dumps({"figures": figures(rows), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    else:
        sys.stdout.write(report(rows) + "\n")
    return 0


def _live(options: argparse.Namespace) -> list[Row]:
    from benchmarks.truth_live import MODELS as MODELS_LIVE
    from benchmarks.truth_live import live_rows, own_cache

    with own_cache() as folder:
        numbers = range(options.first, options.first + options.machines)
        return [row for number in numbers for row in live_rows(folder, options.seed, number, kind=options.profile, models=options.model or MODELS_LIVE)]


def _virtual(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for number in range(options.first, options.first + options.machines):
        machine, profiles = random_machine(options.seed, number), dict[str, HardwareProfile]()
        for case in random_cases(machine, options.seed, options.cases):
            spec = dummy_spec(case.model)
            if case.model not in profiles:
                profiles[case.model] = profiled(machine, spec, CARD_BYTES, options.seed, options.profile)
            rows += judge(machine, case, spec, profiles[case.model], options.seed)
    return rows


if __name__ == "__main__":
    sys.exit(main())
