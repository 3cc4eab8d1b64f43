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
Accessing = tuple[Queue, Sequence[Access], Sequence[Access]]  # a task's queue, reads and writes
Order = tuple[int, int, str, str]  # the task to wait for (negative: of the previous pass, from its end), its queue's number, the kind of hazard, the buffer
NUMBER_OF: dict[Queue, int] = {queue: number for number, queue in enumerate(QUEUES)}


def derive_waits(tasks: Sequence[Accessing]) -> list[tuple[Wait, ...]]:
    """For tasks (queue, reads, writes) in serial order the fewest waits that order every conflicting pair as that order does, in steady state over passes."""
    count = len(tasks)
    return [tuple(Wait(other % count, f"{kind} {buffer}", previous=other < 0) for other, _, kind, buffer in needed) for needed in ordering(tasks)]


def ordering(tasks: Sequence[Accessing]) -> list[list[Order]]:
    """`derive_waits` as plain numbers. Solving a plan asks for this some hundred times, so records are tuples and the comparisons of regions written out."""
    history: _History = {}
    shifted = len(tasks)
    accesses = _of_several_queues(tasks)
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
        waits: list[Order] = []
        regions = accesses[index]
        for order in sorted(_conflicts(regions, history), reverse=True) if regions else ():
            other, queue = order[:2]
            if other <= clock[queue]:
                continue
            waits.append(order)
            if other < 0:
                clock[queue] = other
            else:
                clock = list(map(max, clock, clocks[other]))
        clock[number] = index
        clocks.append(clock)
        last_of[number] = clock
        for key, record in regions:
            _remember(history, key, record)
        result.append(waits)
    return result


def _of_several_queues(tasks: Sequence[Accessing]) -> list[_Accesses]:
    """Every task's accesses (writes last, so that a task that reads and writes a region leaves its write in the history), without those to buffers that one
    queue alone uses: its own order orders them. Accesses with different keys never overlap: KV of different layers is kept apart, so that histories stay
    short in deep models."""
    users: dict[tuple[str, int], int] = {}
    by_layer: dict[str, bool] = {}
    found: list[_Accesses] = []
    for index, (name, reads, writes) in enumerate(tasks):
        number = NUMBER_OF[name]
        regions: _Accesses = []
        for is_write, accesses in ((False, reads), (True, writes)):
            for buffer, lo, hi, mb, glo, ghi in accesses:
                if buffer not in by_layer:
                    by_layer[buffer] = buffer.endswith(".kv")
                key = (buffer, lo) if by_layer[buffer] else (buffer, 0)
                users[key] = users.get(key, 0) | 1 << number
                regions.append((key, (index, lo, hi, mb, glo, ghi, is_write, number)))
        found.append(regions)
    several = {key for key, queues in users.items() if queues & (queues - 1)}
    return [[region for region in regions if region[0] in several] for regions in found]


def _conflicts(accesses: _Accesses, history: _History) -> list[Order]:
    """Per other queue, the latest task that this one must come after."""
    needed: dict[int, Order] = {}
    for key, (_, lo, hi, mb, glo, ghi, writes, queue) in accesses:
        for index, other_lo, other_hi, other_mb, other_glo, other_ghi, other_writes, other in reversed(history.get(key, ())):  # the latest first
            if other == queue or not (writes or other_writes) or (other in needed and index <= needed[other][0]):
                continue
            if lo < other_hi and other_lo < hi and (mb < 0 or other_mb < 0 or (mb == other_mb and glo < other_ghi and other_glo < ghi)):
                needed[other] = (index, other, "RAW" if other_writes and not writes else "WAW" if other_writes else "WAR", key[0])
                if key[0] == "gpu.ring":  # which two queues use
                    break
    return list(needed.values())


def _remember(history: _History, key: tuple[str, int], record: _Record) -> None:
    """Add a record and drop those that it stands for: a write is ordered after all that it covers, a read after its own queue's last one of the same."""
    records = history.get(key)
    if records is None:
        history[key] = [record]
        return
    _, lo, hi, mb, glo, ghi, writes, _ = record
    if not writes:
        if records and records[-1][1:] == record[1:]:
            records.pop()
    else:
        records[:] = [old for old in records if lo > old[1] or hi < old[2] or not (mb < 0 or (mb == old[3] and glo <= old[4] and ghi >= old[5]))]
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
