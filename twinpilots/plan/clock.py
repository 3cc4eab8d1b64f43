"""The simulator's event loop: when each task of a few passes, run back to back on the virtual clock, starts and ends.

Owns `Clock`. Waits, hand-off latency, the driver's fence between passes, link_in and the disk running ahead of it, and the slowdown of a processor while the
link moves data, the disk fills host memory, or the other processor reads. Knows tasks by their seconds only: prices are `cost.py`'s, and what is reported
of a pass is `simulate.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.plan.outline import Outline
from twinpilots.plan.tasks import AHEAD, QUEUES

SLOWED = CPU, GPU, LINK_IN, LINK_OUT = (0, 1, 2, 3)
DISK, DISK_OUT = (4, 5)
COPYING, READING = 1, 2  # what is under way beside the processors, as flags: copies over the link, the disk's reads or writes


class Clock:
    """The event loop. Task i of pass p is number ``p * count + i``; a queue is blocked (next event at infinity), about to start, or running."""

    def __init__(
        self, tasks: Outline, seconds: Sequence[float], memory_frac: Sequence[float], profile: HardwareProfile, driver_s: float, reported: int
    ) -> None:  # fmt: skip
        """``seconds`` by task, ``memory_frac`` by the number of its cost."""
        self.count = tasks.num_tasks
        self.reported = reported  # pass 0 fills the pipeline; the pass after this one is only prefetched
        self.num_passes = reported + 2
        self.seconds = seconds
        self.overhead_s = driver_s  # between two passes
        self.copy_slowdown = [(side.copy_slowdown, side.least_copy_slowdown) if side else (1.0, 1.0) for side in (profile.cpu, profile.gpu)]
        reads = (profile.cpu.read_bytes_per_s, profile.gpu.read_bytes_per_s if profile.gpu else 0.0)
        self.peer_slowdown = (profile.cpu.peer_slowdown, profile.gpu.peer_slowdown if profile.gpu else 1.0)
        self.link_slowdown = profile.link.peer_slowdown if profile.link else 1.0
        self.fracs = sorted(set(memory_frac))
        numbered = {frac: number for number, frac in enumerate(self.fracs)}
        numbers = [numbered[frac] for frac in memory_frac]
        self.frac_of = [numbers[cost] for cost in tasks.costs]  # tasks alike share what is computed for them
        self.memory_share = (reads[CPU] / sum(reads), reads[GPU] / sum(reads))  # of the traffic when both read all the time
        self.order = tasks.order[: 1 + max(LINK_OUT, *(number for number, queue in enumerate(tasks.order) if queue))]
        ahead = [task.kind in AHEAD for task in tasks.examples]
        self.fenced = [not ahead[cost] for cost in tasks.costs]
        latency = [[_handoff_s(profile, queue, other) for other in range(len(QUEUES))] for queue in range(len(QUEUES))]
        self.waits = [[(target, latency[queue][other]) for target, other in waits] for queue, waits in zip(tasks.queues, tasks.waits, strict=True)]
        self.disk_share = _disk_share(profile) if len(self.order) > DISK else 0.0
        self.slowed: tuple[int, ...] = () if self._undisturbed else (CPU, GPU) if self.link_slowdown == 1.0 else SLOWED
        self.factors: dict[tuple[int, int, int], list[float]] = {}
        total = self.num_passes * self.count
        self.start, self.end = [inf] * total, [inf] * total
        self.pass_end = [inf] * self.num_passes
        self.left = [sum(self.fenced)] * self.num_passes
        self.link_busy_s = 0.0

    @property
    def _undisturbed(self) -> bool:
        """Whether nobody slows anybody down."""
        return self.copy_slowdown == [(1.0, 1.0)] * 2 and self.peer_slowdown == (1.0, 1.0) and self.link_slowdown == 1.0

    def run(self) -> None:
        """Until the reported pass is over. Every pass ends with its last task outside the weight loads, all of which are consumed by then."""
        order, end, start, count, frac_of = self.order, self.end, self.start, self.count, self.frac_of
        lengths = [len(queue) for queue in order]
        place, passed = [0] * len(order), [self.num_passes if not length else 0 for length in lengths]  # of each queue's current task, and of its pass
        current = [queue[0] if queue else -1 for queue in order]
        queues = tuple(range(len(order)))
        event = [inf] * len(order)  # when the current task starts or ends; infinity: blocked or done
        running = [False] * len(order)
        factors = [1.0] * len(order)  # how much slower than alone each queue's current task runs now
        slow, disks = 0, 0  # link queues at work, and the disk's
        now, finished = 0.0, True
        while True:
            for q in queues if finished else ():
                if event[q] == inf and passed[q] < self.num_passes:
                    event[q] = self._ready(current[q], passed[q], now)
            then = min(event)
            q = event.index(then)
            assert then < inf, "the waits of the task list form a cycle"
            if slow and self.pass_end[self.reported - 1] <= now:
                self.link_busy_s += then - now
            now, number, task, finished = then, passed[q], current[q], running[q]
            if finished:
                running[q], event[q] = False, inf
                end[number * count + task] = now
                place[q] += 1
                if place[q] == lengths[q]:
                    place[q], passed[q] = 0, number + 1
                current[q] = order[q][place[q]]
                if q >= DISK:
                    disks -= 1
                else:
                    slow -= q >= LINK_IN
                if self._ends_pass(task, number, now) and number == self.reported:
                    return
            else:
                running[q] = True
                start[number * count + task] = now
                if q >= DISK:
                    disks += 1
                else:
                    slow += q >= LINK_IN
                event[q] = now + self.seconds[task]
                factors[q] = 1.0
            if self.slowed:
                moving = (slow > 0) + (READING if disks else 0)
                beside = frac_of[current[CPU]] if running[CPU] else -1, frac_of[current[GPU]] if running[GPU] else -1, moving
                found = self.factors.get(beside) or self._factors(*beside)
                for side in self.slowed:
                    if running[side] and found[side] != factors[side]:
                        event[side] = now + (event[side] - now) * found[side] / factors[side]
                        factors[side] = found[side]

    def _factors(self, on_cpu: int, on_gpu: int, moving: int) -> list[float]:
        """How much slower than alone what runs on each queue is beside the compute queues' present tasks (by what part of them reads; -1: none) and what else
        moves data (flags)."""
        found = self.factors[on_cpu, on_gpu, moving] = [self._computed_factor(side, (on_cpu, on_gpu), moving) for side in SLOWED]
        return found

    def _computed_factor(self, side: int, numbers: Sequence[int], moving: int) -> float:
        """The processors' slow-down was measured with both reading all the time; with less traffic it is less, and it stretches only the part of a task's
        time that goes to reading. What the disk brings is written to host memory like what the link takes is read: of the CPU's slow-down by copies at the
        link's rate it causes the part that its rate is of the link's.
        """
        fracs = [self.fracs[number] if number >= 0 else 0.0 for number in numbers]
        if side >= LINK_IN:
            return 1.0 + (self.link_slowdown - 1.0) * fracs[CPU]
        reading, computing = self.copy_slowdown[side] if moving & COPYING else (1.0, 1.0)
        if moving & READING and side == CPU:
            reading, computing = (now + self.disk_share * (slowdown - 1.0) for now, slowdown in zip((reading, computing), self.copy_slowdown[CPU], strict=True))
        factor = reading if reading == computing else max(computing, fracs[side] * reading)
        if numbers[GPU - side] < 0:
            return factor
        traffic = self.memory_share[CPU] * fracs[CPU] + self.memory_share[GPU] * fracs[GPU]
        return factor * max(1.0, fracs[side] * self.peer_slowdown[side] * traffic)

    def _ready(self, task: int, number: int, now: float) -> float:
        """When the waits of this task of pass ``number`` are over; infinity while one of them is still open."""
        ready, end = now, self.end
        if number and self.fenced[task]:
            ready = max(ready, self.pass_end[number - 1] + self.overhead_s)
        base = number * self.count
        for target, latency_s in self.waits[task]:
            if base + target >= 0:
                over_s = end[base + target] + latency_s
                if over_s > ready:
                    ready = over_s
        return ready

    def _ends_pass(self, task: int, number: int, now: float) -> bool:
        """Note that a task is done; whether it was the last of its pass."""
        self.left[number] -= self.fenced[task]
        if self.left[number] or not self.fenced[task]:
            return False
        self.pass_end[number] = now
        return True


def _disk_share(profile: HardwareProfile) -> float:
    return min(1.0, profile.disk_bytes_per_s / profile.link.up_bytes_per_s) if profile.link and profile.disk_bytes_per_s else 0.0


def _handoff_s(profile: HardwareProfile, queue: int, other: int) -> float:
    """From a record on one queue to the waiting task's start on another."""
    if profile.link is None or queue == other:
        return 0.0
    return profile.link.handoff_s if queue + other == CPU + GPU else profile.link.queue_handoff_s
