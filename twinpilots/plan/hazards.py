"""Derives the waits between queues from what tasks read and write, and checks independently that nothing conflicting is left unordered.

A pass runs its queues concurrently, each in order. Passes are fenced from each other by the driver, except link_in, which may run one pass ahead
with weight packets (not with KV, whose loads wait for the pass's metadata): so only ring accesses can conflict across passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from twinpilots.plan.tasks import QUEUES, Access, Queue, Task, Wait

_Record = tuple[int, Access, bool, Queue]  # task index (negative: of the previous pass), region, writes, queue


def derive_waits(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """``tasks`` (in serial order) with the fewest waits that order every conflicting pair as the serial order does, in steady state over passes."""
    history: dict[tuple[str, int], list[_Record]] = {}
    shifted = len(tasks)
    for task in tasks:  # what the previous pass leaves behind: ring accesses, counted back from the end
        for access, writes in _accesses(task):
            if access.buffer == "gpu.ring":
                _remember(history, (task.index - shifted, access, writes, task.queue))
    clocks: list[dict[Queue, int]] = []
    last_of: dict[Queue, int] = {}
    result = []
    for task in tasks:
        clock = dict(clocks[last_of[task.queue]]) if task.queue in last_of else {}
        waits = []
        for queue, (index, hazard) in sorted(_conflicts(task, history).items(), key=lambda item: -item[1][0]):
            if index <= clock.get(queue, -shifted - 1):
                continue
            waits.append(Wait(index % shifted, hazard, previous=index < 0))
            for known, value in ({queue: index} if index < 0 else clocks[index]).items():
                clock[known] = max(clock.get(known, -shifted - 1), value)
        clock[task.queue] = task.index
        clocks.append(clock)
        last_of[task.queue] = task.index
        for access, writes in _accesses(task):
            _remember(history, (task.index, access, writes, task.queue))
        result.append(replace(task, waits=tuple(waits)) if waits else task)
    return tuple(result)


def _conflicts(task: Task, history: dict[tuple[str, int], list[_Record]]) -> dict[Queue, tuple[int, str]]:
    """Per other queue, the latest task that this one must come after, and the hazard."""
    needed: dict[Queue, tuple[int, str]] = {}
    for access, writes in _accesses(task):
        for index, other, other_writes, queue in history.get(_key(access), ()):
            if queue != task.queue and (writes or other_writes) and (queue not in needed or index > needed[queue][0]) and access.overlaps(other):
                hazard = "RAW" if other_writes and not writes else "WAW" if other_writes else "WAR"
                needed[queue] = (index, f"{hazard} {access.buffer}")
    return needed


def _accesses(task: Task) -> Iterator[tuple[Access, bool]]:
    """Writes last, so that a task that reads and writes a region leaves its write in the history."""
    for access in task.reads:
        yield access, False
    for access in task.writes:
        yield access, True


def _key(access: Access) -> tuple[str, int]:
    """Accesses with different keys never overlap: KV of different layers is kept apart, so that histories stay short in deep models."""
    return access.buffer, access.lo if access.buffer.endswith(".kv") else 0


def _remember(history: dict[tuple[str, int], list[_Record]], record: _Record) -> None:
    """Add a record and drop those that it stands for: a write is ordered after all that it covers, a read after its own queue's covered reads."""
    _, access, writes, queue = record
    records = history.setdefault(_key(access), [])
    if records:
        records[:] = [old for old in records if not ((writes or (old[3] == queue and not old[2])) and access.covers(old[1]))]
    records.append(record)


def find_races(tasks: Sequence[Task]) -> list[str]:
    """Conflicting pairs that the waits leave unordered, over two consecutive passes of ``tasks``; empty when the schedule is safe.

    Independent of `derive_waits`: builds the full happens-before relation by transitive closure (bit sets) and tests every pair of accesses.
    """
    count = len(tasks)
    before = _happens_before(tasks)
    by_buffer: dict[str, list[tuple[int, Access, bool]]] = {}
    for shift in (0, count):
        for task in tasks:
            for access, writes in _accesses(task):
                by_buffer.setdefault(access.buffer, []).append((task.index + shift, access, writes))
    races = []
    for buffer, records in by_buffer.items():
        for position, (second, access, writes) in enumerate(records):
            for first, other, other_writes in records[:position]:
                if first != second and (writes or other_writes) and access.overlaps(other) and not before[second] >> first & 1:
                    one, two = tasks[first % count], tasks[second % count]
                    races.append(f"{buffer}: task {one.index} ({one.kind}) and task {two.index} ({two.kind}) are not ordered")
    return races


def _happens_before(tasks: Sequence[Task]) -> list[int]:
    """Per task of two consecutive passes, the set (as bits) of tasks that are finished when it starts."""
    count = len(tasks)
    before: list[int] = []
    last_of: dict[Queue, int] = {}
    first_pass = (1 << count) - 1
    for number in range(2 * count):
        task, shift = tasks[number % count], number // count * count
        known = 0
        previous = last_of.get(task.queue)
        if previous is not None:
            known |= before[previous] | 1 << previous
        if shift and task.kind != "load":  # the driver's fence; only weight packets run ahead of it
            known |= first_pass
        for wait in task.waits:
            target = wait.task + (0 if wait.previous and shift else shift) - (count if wait.previous and not shift else 0)
            if target >= 0:
                known |= before[target] | 1 << target
        before.append(known)
        last_of[task.queue] = number
    return before


def queue_order_is_serial(tasks: Sequence[Task]) -> bool:
    """Whether every wait points backwards in the serial order (or to the previous pass), so that no cycle of waits can exist."""
    return all(wait.previous or wait.task < task.index for task in tasks for wait in task.waits) and all(task.queue in QUEUES for task in tasks)
