"""Whole passes on a hidden machine: the executor's task list, timed by what each task takes there.

Owns `run_passes`. Knows nothing of profiles: the planner's cost model and this page share the task list and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.hidden_devices import QUEUE_NUMBERS, host_bytes_of
from benchmarks.hidden_machine import HiddenMachine, Job, Weather, play
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.cost import cost_key
from twinpilots.plan.expected import WorkKind, seconds_by_kind
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import Plan
from twinpilots.plan.tasks import Schedule, Task

WARM_UP, PREFETCHED = 1, 1  # passes before the first and after the last reported one: its packets are loaded meanwhile
Cost = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class HiddenPass:
    """From the end of the pass before to its own, the driver's part included; and each kind of work's seconds, waits excluded."""

    seconds: float
    work_s: dict[WorkKind, float]


def run_passes(machine: HiddenMachine, spec: ModelSpec, plan: Plan, schedule: Schedule, loads: Sequence[PassLoad], seed: int) -> list[HiddenPass]:
    """One pass after the other, each with its own load (all of the schedule's shape)."""
    rng = random.Random(f"run {machine.name} {seed}")
    count = len(schedule.tasks)
    each = [*loads[:1] * WARM_UP, *loads, *loads[-1:] * PREFETCHED]
    pricer, weather, jobs = _Pricer(machine, spec, plan), Weather(machine, rng), list[Job]()
    for number, load in enumerate(each):
        costs, factors = pricer.costs(schedule, load), weather.next()
        for task, (seconds, host_bytes) in zip(schedule.tasks, costs, strict=True):
            queue = QUEUE_NUMBERS[task.queue]
            waits = [(number - wait.previous) * count + wait.task for wait in task.waits if number or not wait.previous]
            fenced = task.kind != "load"
            driver_s = machine.between_s(load.num_seqs) - machine.step_s
            jobs.append(Job(queue, seconds * factors[queue], host_bytes, waits, number - 1 if fenced else -1, number, driver_s, fenced))
    last = WARM_UP + len(loads) - 1
    ends = play(machine, jobs, len(each), rng, until=last)
    return [
        HiddenPass(
            seconds=ends[number] - ends[number - 1],
            work_s=seconds_by_kind(schedule, spec, plan, {task: (job := jobs[number * count + task]).end_s - job.start_s for task in range(count)}),
        )
        for number in range(WARM_UP, last + 1)
    ]  # fmt: skip


class _Pricer:
    """What tasks take alone; equal ones of a load are priced once."""

    def __init__(self, machine: HiddenMachine, spec: ModelSpec, plan: Plan) -> None:
        self.machine, self.spec, self.plan = machine, spec, plan
        self.ops: dict[tuple[int, str], OpSpec] = {(op.layer, op.name): op for op in spec.ops(plan.unit_rows)}
        self.token_bytes = spec.kv_token_bytes(plan.kv_dtype)
        self.keys: dict[int, tuple[object, ...]] = {}

    def costs(self, schedule: Schedule, load: PassLoad) -> list[Cost]:
        known: dict[tuple[object, ...], Cost] = {}
        found = []
        for task in schedule.tasks:
            key = self.keys.get(id(task)) or self.keys.setdefault(id(task), (*cost_key(self.spec, task), task.columns))
            if key not in known:
                known[key] = COSTS[task.kind](self, task, load)
            found.append(known[key])
        return found

    def tokens(self, task: Task, load: PassLoad) -> int:
        return load.logit_rows if task.logit_rows else load.tokens(task.mb, task.glo, task.ghi)

    def small(self, task: Task, num_bytes: float) -> Cost:
        queue = QUEUE_NUMBERS[task.queue]
        return self.machine.processors[queue].small_s(num_bytes), 0.0

    def values(self, task: Task, load: PassLoad) -> float:
        return 4.0 * self.tokens(task, load) * self.spec.hidden_size

    def linear(self, task: Task, load: PassLoad) -> Cost:
        op, rows, queue = self.ops[task.layer, task.op], task.row1 - task.row0, QUEUE_NUMBERS[task.queue]
        seconds = self.machine.processors[queue].linear_s(rows * op.row_bytes, rows * op.row_elements, rows, self.tokens(task, load))
        return seconds, host_bytes_of(self.machine, queue, rows * op.row_bytes)

    def attend(self, task: Task, load: PassLoad) -> Cost:
        spec, window, queue, found = self.spec, self.spec.layers[task.layer].window, QUEUE_NUMBERS[task.queue], []
        for group in load.groups(task.mb, task.glo, task.ghi):
            for c in group.classes:
                read = c.kv_read(window)
                found += [(read, float(self.token_bytes * read), spec.attention_flops(1, c.pairs(window)))] * c.num_seqs
        return self.machine.processors[queue].attention_s(found), host_bytes_of(self.machine, queue, sum(kv_bytes for _, kv_bytes, _ in found))

    def norm(self, task: Task, load: PassLoad) -> Cost:
        return self.small(task, 2 * self.values(task, load))

    def add(self, task: Task, load: PassLoad) -> Cost:
        return self.small(task, (2 + len(task.terms) + (2 if task.norm else 0)) * self.values(task, load))

    def embed(self, task: Task, load: PassLoad) -> Cost:
        return self.small(task, 1.5 * self.values(task, load))

    def rope_append(self, task: Task, load: PassLoad) -> Cost:
        width = self.spec.q_size + 2 * self.spec.kv_size
        return self.small(task, self.tokens(task, load) * (8.0 * width + self.token_bytes))

    def poison(self, task: Task, load: PassLoad) -> Cost:  # noqa: ARG002 as the others
        return self.small(task, task.columns)

    def copy(self, task: Task, load: PassLoad) -> Cost:
        return self.machine.copy_time_s(4.0 * self.tokens(task, load) * task.columns, down=task.kind == "send"), 0.0

    def load(self, task: Task, load: PassLoad) -> Cost:  # noqa: ARG002 as the others
        return self.machine.packet_time_s(task.columns), float(task.columns)

    def load_kv(self, task: Task, load: PassLoad) -> Cost:
        classes = [c for group in load.groups(task.mb, task.glo, task.ghi) for c in group.classes]
        pages = sum(c.num_seqs * -(-(c.kv_len - c.query_tokens) // self.plan.page_size) for c in classes)
        num_bytes = self.token_bytes * pages * self.plan.page_size
        return self.machine.packet_time_s(num_bytes, pages=pages), num_bytes

    def store_kv(self, task: Task, load: PassLoad) -> Cost:
        num_bytes = self.token_bytes * self.tokens(task, load)
        num_seqs = sum(group.num_seqs for group in load.groups(task.mb, task.glo, task.ghi))
        return self.machine.packet_time_s(num_bytes, down=True, pages=num_seqs), num_bytes


COSTS: dict[str, Callable[[_Pricer, Task, PassLoad], Cost]] = {
    "linear": _Pricer.linear, "linear_in": _Pricer.linear, "attend": _Pricer.attend, "norm": _Pricer.norm, "add": _Pricer.add, "embed": _Pricer.embed,
    "rope_append": _Pricer.rope_append, "poison": _Pricer.poison, "send": _Pricer.copy, "recv": _Pricer.copy, "load": _Pricer.load,
    "load_kv": _Pricer.load_kv, "store_kv": _Pricer.store_kv,
}  # fmt: skip
