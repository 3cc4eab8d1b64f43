"""Derives the waits between queues from what tasks read and write, and checks independently that nothing conflicting is left unordered.

A pass runs its queues concurrently, each in order. Passes are fenced from each other by the driver, except link_in and the disk, which may run one pass
ahead with weights (not with KV, whose loads wait for the pass's metadata): so only accesses to the two rings can conflict across passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from twinpilots.plan.tasks import AHEAD, QUEUES, RINGS, Access, Queue, Task, Wait

# Task number (negative: of the previous pass), region (lo, hi, mb, glo, ghi), writes, queue
_Record = tuple[int, int, int, int, int, int, bool, int]
_Accesses = list[tuple[tuple[str, int], _Record]]
_History = dict[tuple[str, int], list[_Record]]
NUMBER_OF: dict[Queue, int] = {queue: number for number, queue in enumerate(QUEUES)}


def derive_waits(tasks: Sequence[tuple[Queue, Sequence[Access], Sequence[Access]]]) -> list[tuple[Wait, ...]]:
    """For tasks (queue, reads, writes) in serial order the fewest waits that order every conflicting pair as that order does, in steady state over passes.

    Solving a plan calls this some hundred times, so the records are plain tuples and the comparisons of regions are written out.
    """
    history: _History = {}
    shifted = len(tasks)
    accesses = _of_several_queues([_accesses(index, *task) for index, task in enumerate(tasks)])
    for index, regions in enumerate(accesses):  # what the previous pass leaves behind: ring accesses, counted back from the end
        for key, record in regions:
            if key[0] in RINGS:
                _remember(history, key, (index - shifted, *record[1:]))
    clocks: list[list[int]] = []  # by task, the latest task of each queue that is over when it is
    num_queues = max((NUMBER_OF[name] for name, _, _ in tasks), default=0) + 1  # few plans use the disk, whose queues are the last
    last_of: list[list[int]] = [[-shifted - 1] * num_queues for _ in range(num_queues)]
    result = []
    for index, (name, _, _) in enumerate(tasks):
        number = NUMBER_OF[name]
        clock = last_of[number].copy()
        waits = []
        for other, queue, hazard in sorted(_conflicts(accesses[index], history), reverse=True):
            if other <= clock[queue]:
                continue
            waits.append(Wait(other % shifted, hazard, previous=other < 0))
            if other < 0:
                clock[queue] = other
            else:
                clock = [max(one, two) for one, two in zip(clock, clocks[other], strict=True)]
        clock[number] = index
        clocks.append(clock)
        last_of[number] = clock
        for key, record in accesses[index]:
            _remember(history, key, record)
        result.append(tuple(waits))
    return result


def _of_several_queues(accesses: list[_Accesses]) -> list[_Accesses]:
    """Without those to buffers that one queue alone uses: its own order orders them."""
    users: dict[tuple[str, int], int] = {}
    for regions in accesses:
        for key, record in regions:
            users[key] = users.get(key, 0) | 1 << record[7]
    several = {key for key, queues in users.items() if queues & (queues - 1)}
    return [[region for region in regions if region[0] in several] for regions in accesses]


def _conflicts(accesses: Sequence[tuple[tuple[str, int], _Record]], history: _History) -> list[tuple[int, int, str]]:
    """Per other queue, (the latest task that this one must come after, the queue, the hazard)."""
    needed: dict[int, tuple[int, int, str]] = {}
    for key, (_, lo, hi, mb, glo, ghi, writes, queue) in accesses:
        for index, other_lo, other_hi, other_mb, other_glo, other_ghi, other_writes, other in history.get(key, ()):
            if other == queue or not (writes or other_writes) or (other in needed and index <= needed[other][0]):
                continue
            if lo < other_hi and other_lo < hi and (mb < 0 or other_mb < 0 or (mb == other_mb and glo < other_ghi and other_glo < ghi)):
                hazard = "RAW" if other_writes and not writes else "WAW" if other_writes else "WAR"
                needed[other] = (index, other, f"{hazard} {key[0]}")
    return list(needed.values())


def _accesses(index: int, queue: Queue, reads: Sequence[Access], writes: Sequence[Access]) -> _Accesses:
    """Writes last, so that a task that reads and writes a region leaves its write in the history."""
    number = NUMBER_OF[queue]
    found = [(_key(a), (index, a.lo, a.hi, a.mb, a.glo, a.ghi, False, number)) for a in reads]
    return found + [(_key(a), (index, a.lo, a.hi, a.mb, a.glo, a.ghi, True, number)) for a in writes]


def _key(access: Access) -> tuple[str, int]:
    """Accesses with different keys never overlap: KV of different layers is kept apart, so that histories stay short in deep models."""
    return access.buffer, access.lo if access.buffer.endswith(".kv") else 0


def _remember(history: _History, key: tuple[str, int], record: _Record) -> None:
    """Add a record and drop those that it stands for: a write is ordered after all that it covers, a read after its own queue's covered reads."""
    records = history.get(key)
    if records is None:
        history[key] = [record]
        return
    _, lo, hi, mb, glo, ghi, writes, queue = record
    records[:] = [
        old for old in records
        if lo > old[1] or hi < old[2] or not (mb < 0 or (mb == old[3] and glo <= old[4] and ghi >= old[5])) or not (writes or (old[7] == queue and not old[6]))
    ]  # fmt: skip
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
            for writes, accesses in ((False, task.reads), (True, task.writes)):
                for access in accesses:
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
        if shift and task.kind not in AHEAD:  # the driver's fence; only weights run ahead of it
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
