"""What the work of a pass should take, kind by kind: the simulator's own costs of its tasks, summed the way that measured times are summed.

Owns `WorkKind` (which tasks are counted together) and `PassWork` (a task list's expected seconds for any load). Executor, simulator and tracker meet here.
Knows nothing of waits or order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import CostModel, cost_key
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import Plan
from twinpilots.plan.tasks import Queue, Schedule, Task

Resource = Literal["cpu", "gpu", "link"]
ATTENTION, SMALL, COPIES, UP, DOWN = "attention", "small", "copies", "up", "down"


class WorkKind(NamedTuple):
    """Tasks counted together: what a rate of the profile speaks of. ``key``: a linear's rate key, "attention", "small" (norms, adds, rotary), "copies"
    (activations), "up" or "down" (weights and KV over the link). ``head``: linears over the rows whose logits are wanted."""

    resource: Resource
    key: str
    head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTime:
    """Seconds of one kind in a pass by a profile, each task alone on the machine; ``scale``: where on the kind's curve that is (tokens, or context)."""

    kind: WorkKind
    scale: float
    seconds: float


def work_kind(task: Task, rate_keys: Mapping[tuple[int, str], str]) -> WorkKind | None:
    """The kind that a task is counted under; None for work that the planner does not place (embeddings, poison) and that no engine
    does yet (reads from the disk)."""
    if task.kind in ("send", "recv"):
        return WorkKind("link", COPIES)
    if task.queue in ("link_in", "link_out"):
        return WorkKind("link", UP if task.queue == "link_in" else DOWN)
    resource: Resource = "cpu" if task.queue == "cpu" else "gpu"
    if task.kind in ("linear", "linear_in"):
        return WorkKind(resource, rate_keys[task.layer, task.op], task.logit_rows)
    if task.kind in ("embed", "poison", "read", "read_kv", "write_kv"):
        return None
    return WorkKind(resource, ATTENTION if task.kind == "attend" else SMALL)


def rate_keys_of(spec: ModelSpec, unit_rows: int) -> dict[tuple[int, str], str]:
    return {(op.layer, op.name): op.rate_key for op in spec.ops(unit_rows)}


class PassWork:
    """A task list with equal tasks counted instead of kept, so that a new load is priced in some tens of costs."""

    def __init__(self, schedule: Schedule, spec: ModelSpec, plan: Plan) -> None:
        self.spec, self.plan = spec, plan
        keys = rate_keys_of(spec, plan.unit_rows)
        counted: dict[tuple[WorkKind, tuple[object, ...]], tuple[Task, int]] = {}
        for task in schedule.tasks:
            kind = work_kind(task, keys)
            if kind is not None:
                alike = kind, cost_key(spec, task)
                first, count = counted.get(alike, (task, 0))
                counted[alike] = first, count + 1
        self.counted: dict[WorkKind, list[tuple[Task, int]]] = {}
        for (kind, _), found in counted.items():
            self.counted.setdefault(kind, []).append(found)

    def expected(self, profile: HardwareProfile, load: PassLoad) -> tuple[ExpectedTime, ...]:
        """Every kind's seconds; kinds without tokens in this load (an instruction without rows does nothing) are left out."""
        model = CostModel(self.spec, self.plan, profile, load)
        found = []
        for kind, tasks in self.counted.items():
            at_work = [(task, count) for task, count in tasks if kind.key in (UP, DOWN) or model.tokens(task)]
            seconds = sum(count * model.cost(task).seconds for task, count in at_work)
            if seconds > 0:
                found.append(ExpectedTime(kind=kind, scale=_scale(kind, model, (task for task, _ in at_work)), seconds=seconds))
        return tuple(found)


def _scale(kind: WorkKind, model: CostModel, tasks: Iterable[Task]) -> float:
    """Tokens of a linear (the mean over micro-batches), context of attention; 1 for kinds with one rate."""
    if kind.key == ATTENTION:
        classes = [c for task in tasks for group in model.groups(task) for c in group.classes]
        return sum(c.num_seqs * c.kv_len for c in classes) / max(1, sum(c.num_seqs for c in classes))
    if kind.resource == "link" or kind.key == SMALL:
        return 1.0
    counts = {(task.mb, task.logit_rows): model.tokens(task) for task in tasks}
    return sum(counts.values()) / len(counts)


def seconds_by_kind(schedule: Schedule, spec: ModelSpec, plan: Plan, durations_s: Mapping[int, float]) -> dict[WorkKind, float]:
    """Task durations (by task index) summed by kind."""
    keys, total = rate_keys_of(spec, plan.unit_rows), dict[WorkKind, float]()
    for task in schedule.tasks:
        kind = work_kind(task, keys)
        if kind is not None and task.index in durations_s:
            total[kind] = total.get(kind, 0.0) + durations_s[task.index]
    return total


def kinds_on(queue: Queue, schedule: Schedule, rate_keys: Mapping[tuple[int, str], str]) -> list[WorkKind | None]:
    """The kind of every task of a queue, in its order."""
    return [work_kind(task, rate_keys) for task in schedule.queue(queue)]
