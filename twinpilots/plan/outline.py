"""What the simulator needs to know of a task list, whatever the rates: order, waits, and one task of every cost.

Owns `Outline` and the two ways to one: of a schedule, and straight from a plan, for a price alone, without the tasks. Knows nothing of seconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import cost_key, cost_key_of
from twinpilots.plan.hazards import NUMBER_OF, ordering
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expanded
from twinpilots.plan.tasks import QUEUES, Packet, PassShape, Schedule, Task

Waits = Sequence[tuple[int, int]]  # (the task to wait for, negative: of the previous pass, counted back from its end; the number of its queue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """By task: its queue's number, its layer, its waits and the number of its cost. ``examples``: a task of every cost; ``order``: by queue, its tasks."""

    queues: Sequence[int]
    layers: Sequence[int]
    waits: Sequence[Waits]
    costs: Sequence[int]
    examples: Sequence[Task]
    order: Sequence[Sequence[int]]
    packets: tuple[Packet, ...]
    shape: PassShape
    reads: tuple[Packet, ...] = ()

    @property
    def num_tasks(self) -> int:
        return len(self.queues)


def outline_of(schedule: Schedule, spec: ModelSpec) -> Outline:
    tasks, count = schedule.tasks, len(schedule.tasks)
    costs, firsts = _numbered(cost_key(spec, task) for task in tasks)
    queues = [NUMBER_OF[task.queue] for task in tasks]
    waits = [tuple((wait.task - count if wait.previous else wait.task, queues[wait.task]) for wait in task.waits) for task in tasks]
    return Outline(
        queues=queues, layers=[task.layer for task in tasks], waits=waits, costs=costs, examples=[tasks[index] for index in firsts],
        order=_in_order(queues), packets=schedule.packets, shape=schedule.shape, reads=schedule.reads,
    )  # fmt: skip


def outline(spec: ModelSpec, plan: Plan, bucket: BucketPlan, shape: PassShape) -> Outline:
    """As of the schedule that `expand` makes, in half the time."""
    made = expanded(spec, plan, bucket, shape)
    costs, firsts = _numbered(cost_key_of(spec, fields) for fields in made.tasks)
    queues = [NUMBER_OF[fields["queue"]] for fields in made.tasks]
    return Outline(
        queues=queues, layers=[fields["layer"] for fields in made.tasks],
        waits=[tuple([each[:2] for each in needed]) for needed in ordering(made.accesses)],
        costs=costs, examples=[Task(index=index, **made.tasks[index]) for index in firsts], order=_in_order(queues), packets=made.packets, shape=shape,
        reads=made.reads.packets,
    )  # fmt: skip


def _numbered(keys: Iterable[Hashable]) -> tuple[list[int], list[int]]:
    """The number of every key, in the order of their first places; and these places."""
    numbers: dict[Hashable, int] = {}
    found: list[int] = []
    firsts: list[int] = []
    for place, key in enumerate(keys):
        number = numbers.setdefault(key, len(firsts))
        if number == len(firsts):
            firsts.append(place)
        found.append(number)
    return found, firsts


def _in_order(queues: Sequence[int]) -> list[list[int]]:
    return [[index for index, queue in enumerate(queues) if queue == number] for number in range(len(QUEUES))]
