"""Prices one pass: an exact event simulation of the queues that run a task list.

Owns: `simulate` and `PassTiming`. The event loop is `clock.py`'s; rates come from `cost.py`; deep models have a fast estimate in `estimate.py`. Knows nothing
of how a plan is found or run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.clock import Clock
from twinpilots.plan.cost import COSTS, CostModel, TaskCost
from twinpilots.plan.driver import as_used, between_s
from twinpilots.plan.load import PassLoad
from twinpilots.plan.outline import Outline, outline_of
from twinpilots.plan.plan import Plan
from twinpilots.plan.tasks import QUEUES, Queue, Schedule

APART: dict[str, str] = {"send": "copies", "recv": "copies", "embed": "embed"}  # kinds whose time on a compute queue is also counted apart


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One task of the reported pass; seconds since the previous pass ended (a prefetched packet starts before 0)."""

    queue: Queue
    task: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTiming:
    """A pass in steady state. ``seconds`` is the time from one pass's end to the next, the driver's overhead included; ``fill_s`` is a first pass from cold.

    ``busy_s``: seconds that each queue works per pass, and ``link``: that any copy between memories of the two link queues is under way; of the compute
    queues' seconds, ``copies`` are activation copies and ``embed`` is the gather of embeddings. ``alone_s``: what the queues' tasks would take
    without each other's traffic.
    ``bytes``: link_weights, link_kv, link_activations. ``driver_s``: the driver's part of ``seconds``.
    """

    seconds: float
    fill_s: float
    busy_s: dict[str, float]
    bytes: dict[str, float]
    alone_s: dict[str, float] = field(default_factory=dict)
    driver_s: float = 0.0
    timeline: tuple[TimelineEntry, ...] = ()

    @property
    def work_seconds(self) -> float:
        """Without the driver's part."""
        return self.seconds - self.driver_s

    def with_driver(self, driver_s: float) -> PassTiming:
        """The same pass with another time between two passes."""
        more_s = driver_s - self.driver_s
        return replace(self, seconds=self.seconds + more_s, fill_s=self.fill_s + more_s, driver_s=driver_s)

    def scaled(self, factors: Mapping[str, float]) -> PassTiming:
        """The timing of a pass with so much more work for "cpu", "gpu" and "link", the driver's part left out: it lasts longer as the busiest of them then
        and before."""
        each = {name: factors.get(name, factors["link"]) for name in self.busy_s}
        longest = max(self.busy_s[queue] * each[queue] for queue in QUEUES) / max(self.busy_s[queue] for queue in QUEUES)
        return replace(
            self, seconds=self.work_seconds * longest, fill_s=(self.fill_s - self.driver_s) * longest, driver_s=0.0,
            busy_s={name: seconds * each[name] for name, seconds in self.busy_s.items()},
            alone_s={name: seconds * each[name] for name, seconds in self.alone_s.items()},
        )  # fmt: skip

    @property
    def resource_s(self) -> dict[str, float]:
        """Seconds of work as a pass reports them (`LLM.stats`): activation copies are the link's, the gather of embeddings is nobody's."""
        busy = self.busy_s
        link_s = busy["link_in"] + busy["link_out"] + busy["copies"]
        return {"cpu": max(0.0, busy["cpu"] - busy["embed"]), "gpu": max(0.0, busy["gpu"] - busy["copies"]), "link": link_s}


def simulate(
    schedule: Schedule | Outline, spec: ModelSpec, plan: Plan, profile: HardwareProfile, load: PassLoad, *, keep_timeline: bool = False,
    driver_s: float | None = None,
) -> PassTiming:  # fmt: skip
    """Run ``schedule`` a few passes back to back on the virtual clock and report one in steady state. ``driver_s``: between two
    passes, if not the profile's."""
    if load.shape != schedule.shape:
        raise ValueError(f"load has shape {load.shape}, the schedule was made for {schedule.shape}")
    profile, tasks = as_used(profile, plan), schedule if isinstance(schedule, Outline) else outline_of(schedule, spec)
    model = CostModel(spec, plan, profile, load)
    costs = [COSTS[task.kind](model, task) for task in tasks.examples]
    alone = [costs[number].seconds for number in tasks.costs]
    if driver_s is None:
        driver_s = between_s(profile, plan, load, sum(alone))  # exact where it matters: the CPU alone does one task after another
    clock = Clock(tasks, alone, [cost.memory_frac for cost in costs], profile, driver_s, _settled_pass(tasks, plan))
    clock.run()
    begin_s, end_s = clock.pass_end[clock.reported - 1 : clock.reported + 1]
    base, count = clock.reported * tasks.num_tasks, tasks.num_tasks
    start, end = clock.start[base : base + count], clock.end[base : base + count]
    busy_s: dict[str, float] = dict.fromkeys((*QUEUES, "link", *APART.values()), 0.0)
    apart = [APART.get(task.kind) for task in tasks.examples]
    for index, (number, queue) in enumerate(zip(tasks.costs, tasks.queues, strict=True)):
        seconds = end[index] - start[index]
        busy_s[QUEUES[queue]] += seconds
        name = apart[number]
        if name is not None:
            busy_s[name] += seconds
    busy_s["link"] = clock.link_busy_s
    alone_s: dict[str, float] = {name: sum(map(alone.__getitem__, order)) for name, order in zip(QUEUES, tasks.order, strict=True)}
    timeline = tuple(
        TimelineEntry(QUEUES[tasks.queues[index]], index, start[index] - begin_s, end[index] - begin_s) for index in (range(count) if keep_timeline else ())
    )
    fill_s = clock.pass_end[0] + driver_s
    return PassTiming(
        seconds=end_s - begin_s, fill_s=fill_s, busy_s=busy_s, bytes=_link_bytes(costs, tasks.costs), alone_s=alone_s, driver_s=driver_s, timeline=timeline
    )  # fmt: skip


def _settled_pass(tasks: Outline, plan: Plan) -> int:
    """The first pass in steady state: the second; the third when a ring is so large that link_in or the disk needs a pass to get as far ahead as it can."""
    if tasks.reads and sum(read.num_bytes for read in tasks.reads) <= plan.staging_bytes:
        return 2
    return 1 if sum(packet.num_bytes for packet in tasks.packets) > plan.ring_bytes else 2


def _link_bytes(costs: Sequence[TaskCost], numbers: Sequence[int]) -> dict[str, float]:
    moved = {"weights": 0.0, "kv": 0.0, "activations": 0.0}
    for number, count in Counter(numbers).items():
        if costs[number].traffic:
            moved[costs[number].traffic] += count * costs[number].link_bytes
    return {f"link_{name}": num_bytes for name, num_bytes in moved.items()}
