"""The worker of `make gpu-bench`: one model's weights, the box's rates, and then case after case: a point under a policy.

Owns how passes are run and timed. Decode passes run at a context whose prompts were never computed (`Scheduler.skip_prompts`): the pages hold whatever they
hold, which takes the same time. ``python -m benchmarks.gpu_cases TASK`` prints one JSON line per event: ``begin`` names a case, ``case`` ends it. Knows nothing
of other models, verdicts or reports.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np

from benchmarks.gpu_points import STEPS, Point
from benchmarks.gpu_rates import Rates, bound_profile, measured_rates
from benchmarks.gpu_stock import Stock
from benchmarks.gpu_workers import Emit, card_used_bytes, outcome, serve, since
from twinpilots.benchmarks.throughput import prompts
from twinpilots.config import EngineConfig
from twinpilots.device.memory import HostArena
from twinpilots.errors import LimitError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import DummyCheckpoint
from twinpilots.plan.bounds import pass_bound
from twinpilots.plan.estimate import estimate_pass_s
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan, Policy
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits
from twinpilots.planner import Planner, limits_of, pass_load_of
from twinpilots.profiling import measure_machine, stored_profile
from twinpilots.request import SamplingParams
from twinpilots.runtime.batch import StepBatch
from twinpilots.session import Session

FIRST = ("auto", "stream")  # the policies that verdicts ask about: more passes, before all others
QUICK_S = 0.15  # passes below this are timed more often
SETUP_S = 3.0  # of an engine, before one was seen: devices, programs


@dataclass(frozen=True, kw_only=True)
class FamilyTask:
    """Points of one model; ``cases`` are (number of the point, policy) in the order in which they are wanted."""

    device: str
    points: Sequence[Mapping[str, Any]]
    cases: Sequence[tuple[int, str]]
    budget_s: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the cases of one model share."""

    device: str
    stock: Stock
    profile: HardwareProfile
    rates: Rates
    used_before_bytes: int | None  # of the card, before this process took any of it
    most_host_bytes: int


def run_family(task: FamilyTask, emit: Emit) -> None:
    """The rates first, then the cases while time lasts."""
    deadline = time.monotonic() + task.budget_s
    points = [Point(**fields) for fields in task.points]
    spec, used = points[0].spec, card_used_bytes(task.device)
    profile = stored_profile(task.device, spec) or measure_machine(task.device, spec, progress=lambda note: emit({"event": "note", "note": note}))
    rates = measured_rates(task.device, profile)
    emit({"event": "rates", "rates": rates, "profile": asdict(profile)})
    most = spec.linear_bytes * 17 // 16 + spec.embedding_bytes + max(_kv_bytes(point) for point in points)  # a sixteenth for activations and programs
    with closing(Stock(spec, emulated=profile.emulated, pin=_pin(task.device))) as stock:
        bench = Bench(device=task.device, stock=stock, profile=profile, rates=rates, used_before_bytes=used, most_host_bytes=most)
        for number, (index, policy) in enumerate(task.cases):
            began, left_s = time.monotonic(), deadline - time.monotonic()
            urgent = [case for case in task.cases[number:] if case[1] in FIRST] or task.cases[number:]
            case = {"case": f"{points[index].name} {policy}", "point": index, "policy": policy}
            emit({"event": "begin", **case})
            found: dict[str, Any] = {}
            result = outcome(partial(_into, found, bench, points[index], cast(Policy, policy), min(left_s, 2 * left_s / len(urgent))))
            emit({"event": "case", **case, **result, "figures": found or None, "seconds": time.monotonic() - began})


def _into(found: dict[str, Any], bench: Bench, point: Point, policy: Policy, limit_s: float) -> None:
    if limit_s < SETUP_S:  # finding a plan takes a second or two itself
        raise LimitError(f"not run: {max(0.0, limit_s):.0f} s are its share of the time left")
    found.update(measure_case(bench, point, policy, limit_s))


def _kv_bytes(point: Point) -> int:
    spec = point.spec
    return point.num_seqs * (point.workload.seq_len + 16) * spec.kv_bytes_per_token(spec.weight_dtype)


def _pin(device: str) -> Any:
    """Pins an arena for all engines on a CUDA device: each would take seconds for it."""
    if not device.startswith("cuda:"):
        return None
    from twinpilots.device.cuda import CudaRuntime

    def pin(arena: HostArena) -> Any:
        runtime = CudaRuntime(int(device.removeprefix("cuda:")))
        runtime.pin(arena)
        return partial(runtime.release, arena)

    return pin


# -- one case --------------------------------------------------------------------------------------------------------------------------------


def measure_case(bench: Bench, point: Point, policy: Policy, limit_s: float) -> dict[str, Any]:
    """The figures of one point under one policy. LimitError where it cannot run, or not in ``limit_s``."""
    spec, began = point.spec, time.monotonic()
    config = EngineConfig.of(
        dtype="auto", quantization=point.quantization, device=bench.device, gpu_memory=point.gpu_memory, host_memory=None, max_model_len=None,
        max_num_seqs=point.num_seqs, kv_cache_dtype="auto", policy=policy, plan=None, threads=None, seed=0, deterministic=False, unit_rows=None,
        enable_prefix_caching=False,
    )  # fmt: skip
    limits = limits_of(config, bench.profile)
    solution = solve(spec, bench.profile, point.workload, limits, policy=policy, compare=False, proportionate=True)
    pass_s = solution.prediction.prefill_s if point.kind == "prefill" else solution.prediction.step_s
    warm, timed = num_runs(policy, pass_s, limit_s - SETUP_S - (time.monotonic() - began))
    checkpoint = DummyCheckpoint(spec)
    planner = Planner(replace(config, plan=solution.plan), spec, bench.profile, checkpoint.fingerprint)  # a given plan stays as it is
    made = bench.stock.executor(spec, solution.plan, most_bytes=min(bench.most_host_bytes, limits.host_bytes))
    with closing(Session(planner.config, spec, bench.profile, solution.plan, checkpoint, None, planner, make_executor=made)) as session:
        run = run_decode if point.kind == "decode" else run_prefill
        passes, num_seqs = run(session, point, warm, timed)
        used, own = card_used_bytes(bench.device), session.executor.ledger.peak("gpu")
        stats = session.stats.as_dict(peak_gpu_bytes=own, peak_host_bytes=session.executor.ledger.peak("host"))
        finite = session.last_pass is not None and bool(np.isfinite(session.last_pass[1]).all())
    planner.close()
    footprint = own if used is None or bench.used_before_bytes is None else used - bench.used_before_bytes
    return {
        **passes.figures(bench, point, solution.plan, limits), "num_seqs": num_seqs, "gpu_memory": point.gpu_memory, "footprint_bytes": footprint,
        "peak_bytes": stats["peak_bytes"], "weights_frac": stats["weights_frac"], "tracked_tokens_per_s": stats["tokens_per_s"]["predicted"],
        "finite": finite, "load_s": session.load_s, "device_waits": getattr(session.executor.gpu, "device_waits", None),
        "plan": {"max_pass_tokens": solution.plan.max_pass_tokens, "gpu_pages": solution.plan.gpu_pages, "host_pages": solution.plan.host_pages},
    }  # fmt: skip


def num_runs(policy: str, pass_s: float, limit_s: float) -> tuple[int, int]:
    """(passes to warm up, passes to time), or rounds over all prompts, of ``pass_s`` each. LimitError where not even the fewest fit."""
    warm, most, least = 2, 8, 3
    if pass_s < QUICK_S:
        warm, most = 3, 16
    if policy not in FIRST:
        most, least = most // 2, 2
    fits = int(limit_s / pass_s) - warm
    if fits < least:
        raise LimitError(f"not run: {warm + least} passes of {pass_s:.3g} s (predicted) and the loading do not fit in {max(limit_s, 0.0):.0f} s")
    return warm, min(most, fits)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Timed passes: each one's batch, its seconds as a user feels them, and the executor's part of these. ``seconds``: of all, from the first to the last.
    ``tokens``: generated, or read from prompts."""

    tokens: int
    seconds: float
    batches: Sequence[StepBatch]
    pass_s: Sequence[float]
    executor_s: Sequence[float]
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    def figures(self, bench: Bench, point: Point, plan: Plan, limits: Limits) -> dict[str, Any]:
        """Achieved beside predicted (by the profile alone: nothing is learned from passes) and both bounds, of the very same passes."""
        spec, best = point.spec, bound_profile(bench.profile, bench.rates)
        known: dict[tuple[int, PassLoad], tuple[float, float, float]] = {}

        def priced(bucket: BucketPlan, load: PassLoad) -> tuple[float, float, float]:
            if (id(bucket), load) not in known:
                predicted_s = estimate_pass_s(spec, plan, bucket, bench.profile, load)
                plan_s = pass_bound(spec, bench.profile, limits, load, "plan", kv_dtype=plan.kv_dtype).seconds
                hardware_s = pass_bound(spec, best, limits, load, "hardware", kv_dtype=plan.kv_dtype).seconds
                known[id(bucket), load] = predicted_s, plan_s, min(plan_s, hardware_s)
            return known[id(bucket), load]

        predicted_s, plan_s, hardware_s = (sum(each) for each in zip(*(priced(b.bucket, pass_load_of(b)) for b in self.batches), strict=True))
        rate, bound = self.tokens / self.seconds, self.tokens / hardware_s
        return {
            "tokens": self.tokens, "seconds": self.seconds, "passes": len(self.pass_s), "pass_s": list(self.pass_s), "tokens_per_s": rate,
            "predicted": self.tokens / predicted_s, "plan_bound": self.tokens / plan_s, "hardware_bound": bound, "efficiency": rate / bound,
            "driver_frac": 1.0 - sum(self.executor_s) / self.seconds,
            "busy_s": since(self.before["busy_s"], self.after["busy_s"]), "bytes": since(self.before["bytes"], self.after["bytes"]),
            "launches": since(dict.fromkeys(self.after["launches"], 0) | self.before["launches"], self.after["launches"]),
        }  # fmt: skip


class _Clock:
    """Runs and times passes of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.batches: list[StepBatch] = []
        self.pass_s: list[float] = []
        self.executor_s: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self.session.step(partial=False)
        self.pass_s.append(time.perf_counter() - began)
        record, last = self.session.executor.last_record, self.session.last_pass
        assert record is not None and last is not None
        self.batches.append(last[0])
        self.executor_s.append(record.seconds)

    def sums(self) -> dict[str, Any]:
        launches = getattr(self.session.executor.gpu, "launches", {})  # a CUDA device's: what was launched one by one, what was replayed
        return {**self.session.stats.as_dict(peak_gpu_bytes=0, peak_host_bytes=0), "launches": dict(launches)}

    def passes(self, tokens: int, before: Mapping[str, Any]) -> Passes:
        return Passes(
            tokens=tokens, seconds=sum(self.pass_s), batches=self.batches, pass_s=self.pass_s, executor_s=self.executor_s, before=before, after=self.sums()
        )


def run_decode(session: Session, point: Point, warm: int, timed: int) -> tuple[Passes, int]:
    """Decode passes right after ``point.context`` tokens, of as many of the sequences as the plan's pages hold at once; and how many those are."""
    engine = session.engine
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    for number, tokens in enumerate(prompts(point.num_seqs, point.context)):
        engine.add_request(str(number), tokens, params)
    started = session.scheduler.skip_prompts()
    if not started:
        raise LimitError(f"no sequence of {point.workload.seq_len} tokens finds pages under this plan")
    for number in range(started, point.num_seqs):
        engine.abort(str(number))
    with session.driving():
        warming, clock = _Clock(session), _Clock(session)
        for _ in range(warm):
            warming.step()
        before = clock.sums()
        for _ in range(timed):
            clock.step()
    return clock.passes(timed * started, before), started


def run_prefill(session: Session, point: Point, warm: int, timed: int) -> tuple[Passes, int]:
    """All prompts read from the first token to the last, again and again; once is enough to warm up."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    tokens = prompts(point.num_seqs, point.context)

    def read_all(clock: _Clock, number: int) -> None:
        for index, prompt in enumerate(tokens):
            session.engine.add_request(f"{number}-{index}", prompt, params)
        while session.engine.has_unfinished():
            clock.step()

    with session.driving():
        clock = _Clock(session)
        read_all(_Clock(session), -1)
        before = clock.sums()
        for number in range(min(timed, warm + 1)):
            read_all(clock, number)
    return clock.passes(min(timed, warm + 1) * point.num_seqs * point.context, before), point.num_seqs


if __name__ == "__main__":
    serve(sys.argv[1:], {"family": FamilyTask}, {"family": run_family})
