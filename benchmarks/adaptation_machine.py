"""A machine on the virtual clock whose true rates nobody is told: the simulator runs the exact task list at them, and says what each kind of work took.

Owns `VirtualMachine`, the changes that befall it, and the oracle that knows its rates. What a planner gets from it is what a real pass reports.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from twinpilots.hardware.profile import ComputeProfile, HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.draft import Attention
from twinpilots.plan.expected import WorkKind, seconds_by_kind
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.rebalance import Sequences, options
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.tasks import PassShape, Schedule

NOISE = 0.03  # standard deviation of what a kind of work takes, in log; of a whole pass half of it
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # CPU's part of the rows that are not resident, on the oracle's grid
FINER = (-0.1, -0.05, 0.05, 0.1)
Change = Callable[[HardwareProfile], HardwareProfile]


@dataclass(frozen=True, kw_only=True)
class VirtualPass:
    """``true_s``: without noise."""

    seconds: float
    true_s: float
    work_s: dict[WorkKind, float]
    schedule: Schedule


class VirtualMachine:
    """Runs passes of one model at the rates ``truth``, which the caller may replace between passes."""

    def __init__(self, spec: ModelSpec, truth: HardwareProfile, seed: int, noise: float = NOISE) -> None:
        self.spec, self.truth, self.noise = spec, truth, noise
        self._rng = random.Random(seed)
        self._schedules: dict[tuple[int, PassShape], tuple[BucketPlan, Schedule]] = {}

    def run(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> VirtualPass:
        schedule = self._schedule(plan, bucket, load.shape)
        timing = simulate(schedule, self.spec, plan, self.truth, load, keep_timeline=True)
        work = seconds_by_kind(schedule, self.spec, plan, {entry.task: entry.end_s - entry.start_s for entry in timing.timeline})
        return VirtualPass(
            seconds=timing.seconds * self._jitter(self.noise / 2), true_s=timing.seconds, schedule=schedule,
            work_s={kind: value * self._jitter(self.noise) for kind, value in work.items()},
        )  # fmt: skip

    def seconds(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> float:
        """A pass without noise."""
        return simulate(self._schedule(plan, bucket, load.shape), self.spec, plan, self.truth, load).seconds

    def _schedule(self, plan: Plan, bucket: BucketPlan, shape: PassShape) -> Schedule:
        key = id(bucket), shape
        if key not in self._schedules or self._schedules[key][0] is not bucket:
            self._schedules[key] = bucket, expand(self.spec, plan, bucket, shape)
        return self._schedules[key][1]

    def _jitter(self, deviation: float) -> float:
        return self._rng.lognormvariate(0.0, deviation) if deviation else 1.0


def oracle_seconds(machine: VirtualMachine, plan: Plan, load: PassLoad) -> float:
    """The best pass that any plan over this memory could have at the true rates: a grid over the CPU's share (attention's linears and the others apart),
    micro-batches and the side of attention, and what the planner itself finds when it is told the rates; all run whole, without noise."""
    sequences = Sequences.of(load)
    bucket = plan.bucket_for("decode", sequences.tokens)
    oracle = VirtualMachine(machine.spec, machine.truth, 0, 0.0)  # its schedules go when it does

    def seconds(each: BucketPlan) -> float:
        return oracle.seconds(plan, each, sequences.load(each))

    told = min(seconds(option.bucket) for option in options(machine.spec, machine.truth, plan, bucket, load))
    best_s, mlp, rest, base = min(
        ((seconds(split_cpu(plan, each, mlp, rest)), mlp, rest, each) for each, mlp, rest in _grid(plan, bucket, sequences)), key=lambda found: found[:3]
    )
    finer = (seconds(split_cpu(plan, base, min(1.0, max(0.0, mlp + step)), min(1.0, max(0.0, rest + step * (rest == mlp))))) for step in FINER)
    return min(told, best_s, *finer)


def _grid(plan: Plan, bucket: BucketPlan, sequences: Sequences) -> Iterator[tuple[BucketPlan, float, float]]:
    """(bucket with its micro-batches and side of attention, the CPU's share of the MLP, of the rest)."""
    fits = sequences.pages(plan.page_size) <= plan.kv_staging_pages
    sides: tuple[Attention, ...] = ("cpu", "gpu") if sequences.host and fits else ("cpu",)
    for batches in (1, 2) if sequences.num_seqs > 1 else (1,):
        for side in sides:
            base = replace(bucket, micro_batches=batches, host_attention=side)
            for mlp in SHARES:
                yield from ((base, mlp, rest) for rest in {0.0, mlp, 1.0})


def split_cpu(plan: Plan, bucket: BucketPlan, mlp: float, rest: float) -> BucketPlan:
    """The CPU computes these parts of what is not resident, in whole units."""

    def moved(name: str, split: Split) -> Split:
        share = mlp if name in ("gate_up_proj", "down_proj", "fc1", "fc2") else rest
        left = split.rows - split.resident
        streamed = left - min(left, round(share * left / plan.unit_rows) * plan.unit_rows)
        if share == 0.0:
            streamed = left
        elif streamed and (split.resident + streamed) % plan.unit_rows:
            streamed = max(0, (split.resident + streamed) // plan.unit_rows * plan.unit_rows - split.resident)
        return Split(resident=split.resident, streamed=streamed, cpu=left - streamed)

    made = {id(layer): {name: moved(name, split) for name, split in layer.items()} for layer in bucket.splits}
    return replace(bucket, splits=tuple(made[id(layer)] for layer in bucket.splits))


# -- what can happen -------------------------------------------------------------------------------------------------------------------------


def slower(processor: ComputeProfile, factor: float) -> ComputeProfile:
    return replace(
        processor, linear={key: replace(curve, y=tuple(factor * y for y in curve.y)) for key, curve in processor.linear.items()},
        attention_bytes_per_s=processor.attention_bytes_per_s / factor, attention_flops_per_s=processor.attention_flops_per_s / factor,
        elementwise_bytes_per_s=processor.elementwise_bytes_per_s / factor,
    )  # fmt: skip


def busy_cpu(factor: float) -> Change:
    """Another process takes part of the CPU."""
    return lambda profile: replace(profile, cpu=slower(profile.cpu, factor))


def slow_link(factor: float) -> Change:
    def change(profile: HardwareProfile) -> HardwareProfile:
        assert profile.link is not None
        link = profile.link
        return replace(profile, link=replace(link, up_bytes_per_s=link.up_bytes_per_s / factor, down_bytes_per_s=link.down_bytes_per_s / factor))

    return change


def misjudged(profile: HardwareProfile, seed: int, spread: float = 0.1) -> HardwareProfile:
    """What an offline profile may have measured: every rate off by up to ``spread``."""
    rng = random.Random(seed)

    def off() -> float:
        return 1.0 + rng.uniform(-spread, spread)

    assert profile.gpu is not None and profile.link is not None
    changed = slow_link(off())(replace(profile, cpu=slower(profile.cpu, off()), gpu=slower(profile.gpu, off())))
    return replace(changed, name=profile.name)
