"""The offline profile, corrected by real passes: a short model of the same widths, run by the engine itself.

What no single instruction shows is measured here: the driver's time between two passes (scheduling, metadata, sampling, accounting, all of it in no cache
after a pass), and what work takes among its neighbours instead of in a row of its like. Owns the short model, its plan, the passes, and what they say of a
profile (`corrected`). Knows nothing of names of devices or of where profiles are kept.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from twinpilots.config import EngineConfig
from twinpilots.device.memory import HostArena
from twinpilots.errors import LimitError
from twinpilots.fixed_costs import with_pieces, with_small_tasks
from twinpilots.hardware.profile import AloneProfile, ComputeProfile, Curve, HardwareProfile
from twinpilots.model.dummy import DummyCheckpoint
from twinpilots.model.spec import ModelSpec
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.draft import Draft, PlanOptions, fill_resident, nothing_resident
from twinpilots.plan.expected import ATTENTION, COPIES, SMALL
from twinpilots.plan.memory import plan_memory
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.policies import build_policy, hetegen_alpha
from twinpilots.plan.problem import Problem, best_fit, no_cpu, sized
from twinpilots.plan.rebalance import Option
from twinpilots.plan.workload import Limits, Workload
from twinpilots.planner import Planner
from twinpilots.request import SamplingParams
from twinpilots.runtime.executor import Executor
from twinpilots.runtime.layout import Layout
from twinpilots.runtime.weights import OFFSET_MASK, GpuWrite, TensorSource, load_small
from twinpilots.session import Session
from twinpilots.stats.correction import Medians, WorkTime
from twinpilots.stats.correction import corrected as corrected_by

SHORT_BYTES, TABLE_BYTES = 80 << 20, 32 << 20  # of weights: more than caches hold, and quickly made; of them lm_head, which has as many rows as that allows
CARD_BYTES = 1 << 30  # of a GPU's memory, at most
RESIDENT = 0.4  # of the weights: some are streamed, some are the CPU's
RUN_PASSES = 16  # that one step may run, at most
ON_GPU = 8  # one sequence in so many keeps its KV on the GPU
MIN_ROWS = 64
WEIGHT_BYTE = 0x2C  # every format reads it as ordinary small numbers: denormals and NaN are slower than the truth


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Which passes are rehearsed: ever more sequences that decode at once, with such prompts, for about so long. Of a stage ``warm_passes`` wake everything
    up; ``least_passes`` to ``most_passes`` follow."""

    num_seqs: tuple[int, ...] = (1, 4, 16, 64)
    prompt_lens: tuple[int, ...] = (32, 32, 32, 32)
    budget_s: float = 5.0
    warm_passes: int = 3
    least_passes: int = 6
    most_passes: int = 16
    least_stages: int = 2  # whatever the time
    opening_s: float = 0.2  # what starting and ending takes beside

    @property
    def prompt_len(self) -> int:
        """The longest."""
        return max(self.prompt_lens)

    @property
    def workload(self) -> Workload:
        output_len = (self.warm_passes + self.most_passes + RUN_PASSES + self.least_passes) * len(self.num_seqs)
        return Workload(num_requests=self.num_seqs[-1], input_len=self.prompt_len, output_len=output_len, max_num_seqs=self.num_seqs[-1])


FULL = Stages()
BESIDE = Stages(prompt_lens=(4, 4, 4, 4), budget_s=2.5)  # of the CPU alone, where passes beside a GPU were rehearsed: they show the driver, and decoding
# The prompts are most of a quick one's time: many short ones make a pass as full as a few long ones.
QUICK = Stages(num_seqs=(1, 16), prompt_lens=(32, 8), budget_s=1.0, warm_passes=2, least_passes=4, most_passes=8)
QUICK_ALONE = Stages(num_seqs=(1, 4, 16), prompt_lens=(32, 32, 8), budget_s=1.5)  # where nobody disturbs for long: the middle of many passes is steadier
QUICK_BESIDE = Stages(num_seqs=(1, 16), prompt_lens=(4, 4), budget_s=0.4, warm_passes=2, least_passes=3, most_passes=8, least_stages=1)


class _Nobody:
    """A runner that solves nothing: the plan stays."""

    last_s = 0.0
    disturbs = False

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None: ...

    def collect(self) -> None:
        return None


# -- what passes say of a profile ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DriverTime:
    """Seconds from a pass's last work to the next one's first: ``step_s`` and ``seq_s`` for each sequence."""

    step_s: float
    seq_s: float


def driver_time(seconds: Mapping[int, Sequence[float]]) -> DriverTime | None:
    """The line through the medians by number of sequences, never falling and never below zero; None without any."""
    points = [(num_seqs, median(found)) for num_seqs, found in sorted(seconds.items()) if found]
    if not points:
        return None
    mean_x, mean_y = (sum(each) / len(points) for each in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    seq_s = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread) if spread else 0.0
    seq_s = min(seq_s, mean_y / mean_x)
    return DriverTime(step_s=max(0.0, mean_y - seq_s * mean_x), seq_s=seq_s)  # rounding may leave a little less than nothing


def alone_driver(passes: Iterable[PassDone]) -> AloneProfile | None:
    """From passes of the CPU alone, some one by one and some chained; None without any of the first."""
    single, chained = dict[int, list[float]](), dict[int, list[float]]()
    decoding = [done for done in passes if done.bucket.phase == "decode"]
    for done in decoding:
        if done.chained == 1:
            single.setdefault(done.load.num_seqs, []).append(done.driver_s)
    whole = driver_time(single)
    if whole is None:
        return None
    for done in decoding:
        if done.chained > 1:  # all passes of a call share what is around it
            whole_s = whole.step_s + done.load.num_seqs * whole.seq_s
            chained.setdefault(done.load.num_seqs, []).append(max(0.0, (done.chained * done.driver_s - whole_s) / (done.chained - 1)))
    inside = driver_time(chained) or whole
    inside = DriverTime(step_s=min(inside.step_s, whole.step_s), seq_s=min(inside.seq_s, whole.seq_s))
    return AloneProfile(call_s=whole.step_s - inside.step_s, call_seq_s=whole.seq_s - inside.seq_s, pass_s=inside.step_s, pass_seq_s=inside.seq_s)


def corrected(spec: ModelSpec, profile: HardwareProfile, passes: Sequence[PassDone]) -> HardwareProfile:
    """``profile`` with every rate as these passes of ``spec`` saw it, and the driver's time."""
    decoding: dict[int, list[float]] = {}
    for done in passes:
        if done.bucket.phase == "decode" and done.plan.uses_gpu:
            decoding.setdefault(done.load.num_seqs, []).append(done.driver_s)
    driver = driver_time(decoding)
    if driver is not None:
        profile = replace(profile, step_overhead_s=driver.step_s, step_seq_s=driver.seq_s)
    by_cpu = [done for done in passes if not done.plan.uses_gpu]
    shown = [done for done in passes if done.plan.uses_gpu] or by_cpu
    offline = OnlinePlanner(spec, profile, _Nobody(), adapts=False)
    offline = offline.at(with_small_tasks(offline, shown))
    profile = offline.profile
    seen = Medians(record for record in _records(offline, shown) if record.key not in (ATTENTION, SMALL, COPIES))
    found, alone = corrected_by(profile, seen), alone_driver(by_cpu)
    if alone is not None and shown is not by_cpu:
        alone = replace(alone, linear=_ratios(profile.cpu, seen, Medians(_records(offline, by_cpu))))
    return with_pieces(offline, shown, replace(found, alone=alone))


def _ratios(processor: ComputeProfile, beside: Medians, alone: Medians) -> dict[str, Curve]:
    """What linears take alone in relation to beside a GPU."""
    found = {key: alone.sizes("cpu", key) for key in processor.linear}
    return {
        key: Curve(x=tuple(sizes), y=tuple(alone.factor("cpu", key, size) / beside.factor("cpu", key, size) for size in sizes))
        for key, sizes in found.items() if sizes
    }  # fmt: skip


def _records(offline: OnlinePlanner, passes: Iterable[PassDone]) -> Iterable[WorkTime]:
    for done in passes:
        yield from offline.records(done)


# -- the short model -----------------------------------------------------------------------------------------------------------------------------


def short_model(spec: ModelSpec) -> ModelSpec:
    """The first layers of ``spec`` and part of its vocabulary: its widths and formats, but weights of `SHORT_BYTES` or of one layer."""
    row_bytes = spec.ops(MIN_ROWS)[-1].row_bytes
    rows = max(MIN_ROWS, min(spec.vocab_size, TABLE_BYTES // row_bytes // MIN_ROWS * MIN_ROWS))
    layer_bytes = sum(op.weight_bytes for op in spec.ops(MIN_ROWS) if op.layer == 0)
    count = max(1, min(spec.num_layers, (SHORT_BYTES - rows * row_bytes) // layer_bytes))
    return replace(spec, name="rehearsal", layers=spec.layers[:count], vocab_size=rows)


def short_plan(spec: ModelSpec, profile: HardwareProfile, stages: Stages = FULL) -> Plan | None:
    """A plan in which all devices do all that they can: weights resident, streamed and the CPU's, KV on both sides. None without a GPU, or where memory is
    too small."""
    limits = Limits(gpu_bytes=min(CARD_BYTES, profile.gpu_memory_bytes), host_bytes=profile.host_memory_bytes // 2)
    if profile.gpu is None or spec.max_model_len < stages.workload.seq_len:
        return None
    problem = Problem.of(spec, profile, stages.workload, limits, PlanOptions())
    micro_batches: Mapping[Phase, int] = {"prefill": 1, "decode": 1}
    return best_fit(
        problem, Draft(policy="auto", num_seqs=1, gpu_seqs=1, pass_tokens=1, micro_batches=micro_batches, uses_cpu=True, share_of_rest=True), _place
    )


def alone_plan(spec: ModelSpec, profile: HardwareProfile, stages: Stages = FULL) -> Plan | None:
    """The CPU does everything. None where memory is too small."""
    if spec.max_model_len < stages.workload.seq_len:
        return None
    try:
        return build_policy("cpu", spec, profile, stages.workload, Limits(gpu_bytes=0, host_bytes=profile.host_memory_bytes // 2))
    except LimitError:
        return None


def _place(problem: Problem, draft: Draft, count: int) -> Plan | None:
    draft = sized(draft, count, -(-count // ON_GPU))
    empty = problem.plan(draft, nothing_resident(problem.spec, problem.ops), no_cpu)
    room = problem.limits.gpu_bytes - plan_memory(problem.spec, empty).gpu.total
    wanted = sum(problem.total_bytes(name) for name in problem.ops) * RESIDENT
    if room < 0:
        return None
    resident = fill_resident(problem.spec, problem.templates, int(min(room, wanted)), leftover=False)
    plan = problem.plan(draft, resident, lambda _, tokens: dict.fromkeys(problem.ops, hetegen_alpha(problem, tokens)))
    return plan if problem.fits(plan) else None


# -- the passes ----------------------------------------------------------------------------------------------------------------------------------


def rehearse(
    device: str, threads: int | None, spec: ModelSpec, profile: HardwareProfile, *, quick: bool, until_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> HardwareProfile:  # fmt: skip
    """``profile`` corrected by passes of a short model on ``device``; as it is where memory is too small for one. ``until_s``: when, by the clock, no more
    passes are begun than it takes."""
    short = short_model(spec)
    beside, stages = (QUICK_BESIDE, QUICK_ALONE if profile.gpu is None else QUICK) if quick else (BESIDE, FULL)
    checkpoint = DummyCheckpoint(short)
    passes: list[PassDone] = []
    plan = short_plan(short, profile, stages)
    if plan is not None:
        passes += _rehearsed(device, threads, profile, plan, stages, checkpoint, clock, until_s - beside.budget_s - beside.opening_s)
        stages = beside
    plan = alone_plan(short, profile, stages)
    if plan is not None:
        passes += _rehearsed("cpu", profile.cpu_cores, profile, plan, stages, checkpoint, clock, until_s)
    return corrected(short, profile, passes) if passes else profile


def _rehearsed(
    device: str, threads: int | None, profile: HardwareProfile, plan: Plan, stages: Stages, checkpoint: DummyCheckpoint, clock: Callable[[], float],
    until_s: float,
) -> list[PassDone]:  # fmt: skip
    spec, seen = checkpoint.spec, list[PassDone]()
    config = EngineConfig.of(
        dtype="auto", quantization=None, device=device, gpu_memory=None, host_memory=None, max_model_len=None, max_num_seqs=None, kv_cache_dtype="auto",
        policy="auto", plan=plan, threads=threads, seed=0, deterministic=False, unit_rows=None, enable_prefix_caching=False,
    )  # fmt: skip
    planner = Planner(config, spec, profile, checkpoint.fingerprint)
    planner.online = OnlinePlanner(spec, profile, _Nobody(), adapts=True, alarms=False, at_once=False, witness=seen.append)
    make = functools.partial(Executor, load=_fill)
    session = Session(config, spec, profile, plan, checkpoint, None, planner, make_executor=make, prepares=False)
    try:
        return _passes(session, stages, seen, clock, until_s)
    finally:
        session.close()


def _fill(
    spec: ModelSpec, plan: Plan, source: TensorSource, host: Layout, memory: HostArena, gpu: Layout | None, gpu_write: GpuWrite | None,
    progress: Callable[[int], None] | None,  # noqa: ARG001 a `Loader`
) -> None:  # fmt: skip
    """Weights that take as long to compute with as any others, in a tenth of the time that packing random ones takes."""
    for op in spec.ops(plan.unit_rows):
        for layout in (host, gpu):
            if layout is None or (op.layer, op.name) not in layout.weights:
                continue
            offset, (first, last) = layout.weights[op.layer, op.name] & OFFSET_MASK, layout.rows[op.layer, op.name]
            if layout is host:
                memory.view(offset, np.uint8, (last - first) * op.row_bytes)[:] = WEIGHT_BYTE
            elif gpu_write is not None:
                gpu_write(offset, np.full((last - first) * op.row_bytes, WEIGHT_BYTE, np.uint8))
    for name, num_bytes in (("embed", spec.table_bytes), ("positions", spec.position_bytes)):
        if name in host.small:
            memory.view(host.small[name] & OFFSET_MASK, np.uint8, num_bytes)[:] = WEIGHT_BYTE
    load_small(spec, plan, source, host, memory, gpu, gpu_write)


def _passes(session: Session, stages: Stages, seen: list[PassDone], clock: Callable[[], float], until_s: float) -> list[PassDone]:
    """Ever more sequences that decode: each stage begins with the new ones' prompts, and has its share of the time that is left. The passes of
    a first request, in which all memory is touched and all code is run for the first time, do not count."""
    found, running = list[PassDone](), 0
    counts = [count for count in stages.num_seqs if count <= session.plan.max_num_seqs]
    params = SamplingParams(temperature=0.0, max_tokens=session.plan.max_model_len - stages.prompt_len, ignore_eos=True)

    def add(name: str, seed: int, length: int) -> None:
        prompt = [(7 * seed + 13 * place) % session.engine.vocab_size for place in range(length)]
        session.engine.add_request(name, prompt, params)

    with session.driving():
        add("first", len(counts), stages.prompt_len)
        for _ in range(stages.warm_passes + 1):
            session.step(partial=False)
            session.account()
        session.engine.abort("first")
        until_s = min(until_s, clock() + stages.budget_s)
        for number, (count, length) in enumerate(zip(counts, stages.prompt_lens, strict=False)):
            if number >= stages.least_stages and clock() > until_s:
                break
            stage_until_s = clock() + (until_s - clock()) / (len(counts) - number)
            for request in range(running, count):
                add(str(request), request, length)
            prompt_tokens, running = (count - running) * length, count
            found += _stage(session, stages, seen, count, prompt_tokens, stage_until_s, clock)
        for request in range(running):
            session.engine.abort(str(request))
    return found


def _stage(
    session: Session, stages: Stages, seen: list[PassDone], num_seqs: int, prompt_tokens: int, until_s: float, clock: Callable[[], float]
) -> list[PassDone]:  # fmt: skip
    """Passes until the time is up, the prompts' among them; of the others, those in which everything wakes up are left out."""
    session.account()
    seen.clear()
    before = session.num_tokens[0]
    while session.num_tokens[0] < before + prompt_tokens:  # then all of them decode
        session.step(partial=False)
    first, warm = session.num_tokens[1], stages.warm_passes
    while (passes := (session.num_tokens[1] - first) // num_seqs) < warm + stages.least_passes or (passes < warm + stages.most_passes and clock() < until_s):
        session.step(partial=False)
    chainer, session.engine.chainer = session.engine.chainer, None
    for _ in range(stages.least_passes if session.engine.last_passes > 1 else 0):  # passes that were chained until here, one by one
        session.step(partial=False)
    session.engine.chainer = chainer
    session.account()
    prompts = [done for done in seen if done.bucket.phase == "prefill"]
    return [*prompts, *[done for done in seen if done.bucket.phase == "decode"][warm:]]
