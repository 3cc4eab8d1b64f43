"""Machines of which the planner is told nothing: random ones, with habits that its cost model does not know.

Owns `HiddenMachine` (how long any piece of work takes there) and `play` (queues, waits, and who gets how much of the memory). What the cost model knows
nothing of: products that pay for whole tiles of tokens and pass smoothly from reading to computing, slices of few rows, packets that need a size to get up
to speed, pages, waking up after a pause, noise of every task, weather, and one memory whose bandwidth is dealt out moment by moment. Knows nothing of
profiles or plans.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

CPU, GPU, LINK_IN, LINK_OUT = range(4)
Scale = Literal["near", "beyond"]
TINY_S = 1e-12


@dataclass(frozen=True, kw_only=True)
class HiddenProcessor:
    """One processor. Rates per second; ``tile``: tokens that products take at a time, ``tile_cost``: how much of an unfilled tile is paid for."""

    read: float
    flops: float
    tile: int
    tile_cost: float
    blend: float  # of reading and computing: 1 adds them, infinity takes the larger
    narrow_rows: float  # a slice of so many rows takes twice the time per row
    attention_read: float
    attention_flops: float
    attention_tokens: float  # of context until a sequence's pages are read at half that rate
    seq_s: float
    elementwise: float
    fixed_s: float  # of an instruction
    gap_s: float  # between two
    wake_s: float  # after a pause
    noise: float  # of a task, in log

    def blended(self, read_s: float, compute_s: float) -> float:
        longer, shorter = max(read_s, compute_s), min(read_s, compute_s)
        return longer * (1.0 + (shorter / longer) ** self.blend) ** (1.0 / self.blend) if longer > 0 else 0.0

    def linear_s(self, weight_bytes: float, elements: float, rows: int, tokens: int) -> float:
        filled = -(-tokens // self.tile) * self.tile
        paid = tokens + self.tile_cost * (filled - tokens)
        seconds = self.blended(weight_bytes / self.read, 2.0 * elements * paid / self.flops)
        return self.fixed_s + seconds * (1.0 + self.narrow_rows / max(rows, 1))

    def attention_s(self, sequences: Sequence[tuple[int, float, float]]) -> float:
        """Of (context, KV bytes, FLOPs) of each sequence."""
        total = self.fixed_s
        for context, kv_bytes, flops in sequences:
            rate = self.attention_read * context / (context + self.attention_tokens)
            total += self.seq_s + self.blended(kv_bytes / rate, flops / self.attention_flops)
        return total

    def small_s(self, num_bytes: float) -> float:
        return self.fixed_s + num_bytes / self.elementwise


@dataclass(frozen=True, kw_only=True)
class HiddenMachine:
    """``dram``: bytes/s for all that touch host memory; ``shared``: the GPU computes from that memory, too. ``crowding``: how much another's traffic slows
    reading even before the bandwidth is used up."""

    name: str
    cpu: HiddenProcessor
    gpu: HiddenProcessor
    up: float
    down: float
    packet_s: float
    packet_half: float  # bytes at which a packet moves at half the rate
    page_s: float  # of one page of KV over the link
    copy_s: float
    handoff_s: float
    queue_handoff_s: float
    link_noise: float
    dram: float
    crowding: float
    shared: bool
    step_s: float  # from a pass's last work to the next one's first, even if the driver does nothing
    driver_s: float  # scheduling, sampling and accounting of a pass beside it,
    driver_seq_s: float  # and of each of its sequences
    weather: float  # how far a queue's speed wanders from pass to pass, in log
    idle_s: float = 200e-6  # a pause from here on is one to wake up from

    @property
    def processors(self) -> tuple[HiddenProcessor, HiddenProcessor]:
        return self.cpu, self.gpu

    def between_s(self, num_seqs: int) -> float:
        """From a pass's last work to the first of the next one, which has so many sequences."""
        return self.step_s + self.driver_s + num_seqs * self.driver_seq_s

    def packet_time_s(self, num_bytes: float, *, down: bool = False, pages: int = 0) -> float:
        rate = self.down if down else self.up
        return self.packet_s + pages * self.page_s + (num_bytes + self.packet_half) / rate

    def copy_time_s(self, num_bytes: float, *, down: bool) -> float:
        return self.copy_s + num_bytes / (self.down if down else self.up)

    def noise_of(self, queue: int) -> float:
        return self.processors[queue].noise if queue in (CPU, GPU) else self.link_noise

    def alone(self, queue: int) -> float:
        """Host bytes per second of a queue that does nothing but read or write."""
        return (self.cpu.read, self.gpu.read, self.up, self.down)[queue]


def random_machine(seed: int, number: int) -> HiddenMachine:
    """Every other one is within a factor of 4 of a small box with one core for each pilot, the others are cards and servers."""
    rng = random.Random(f"machine {seed} {number}")
    near = number % 2 == 0
    scale: Scale = "near" if near else "beyond"

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    cpu_read = between(7e9, 100e9) if near else between(30e9, 300e9)
    gpu_read = between(7e9, 100e9) if near else between(250e9, 3000e9)
    cpu_flops = between(25e9, 400e9) if near else between(0.5e12, 8e12)
    gpu_flops = between(25e9, 400e9) if near else between(15e12, 600e12)
    link = between(0.7e9, min(10e9, 0.5 * cpu_read)) if near else between(5e9, 55e9)
    dram = cpu_read * rng.uniform(1.02, 1.7) if near else max(cpu_read * rng.uniform(1.02, 1.5), 1.1 * link)
    shared = near and rng.random() < 0.4
    gpu_read = min(gpu_read, 0.95 * dram) if shared else gpu_read
    return HiddenMachine(
        name=f"{scale}-{number}", cpu=_processor(rng, cpu_read, cpu_flops, "near", rng.choice((4, 6, 8))),
        gpu=_processor(rng, gpu_read, gpu_flops, scale, 6 if near else rng.choice((16, 32, 64))),
        up=link, down=link * rng.uniform(0.7, 1.1), packet_s=between(2e-6, 20e-6), packet_half=between(4e3, 60e3), page_s=between(50e-9, 500e-9),
        copy_s=between(2e-6, 12e-6), handoff_s=between(2e-6, 25e-6), queue_handoff_s=between(2e-6, 25e-6), link_noise=0.02, dram=dram,
        crowding=rng.uniform(0.0, 0.25), shared=shared, step_s=between(40e-6, 400e-6),
        weather=rng.uniform(0.0, 0.03), driver_s=between(200e-6, 2e-3), driver_seq_s=between(5e-6, 50e-6),
    )  # fmt: skip


class Weather:
    """How much longer than usual everything on a queue takes just now: neighbours, clocks, heat. It changes slowly."""

    def __init__(self, machine: HiddenMachine, rng: random.Random) -> None:
        self._deviation, self._rng = machine.weather, rng
        self._logs = [rng.gauss(0.0, machine.weather) for _ in range(4)]

    def next(self) -> tuple[float, ...]:
        """A factor per queue, one pass later."""
        self._logs = [0.8 * log + 0.6 * self._rng.gauss(0.0, self._deviation) for log in self._logs]
        return tuple(math.exp(log) for log in self._logs)


def _processor(rng: random.Random, read: float, flops: float, scale: Scale, tile: int) -> HiddenProcessor:
    share = rng.uniform
    return HiddenProcessor(
        read=read, flops=flops, tile=tile, tile_cost=share(0.0, 0.3) if scale == "near" else share(0.2, 0.9), blend=share(2.0, 6.0),
        narrow_rows=share(0.0, 6.0 if scale == "near" else 40.0),
        attention_read=read * share(0.4, 0.9), attention_flops=flops * share(0.3, 0.8), attention_tokens=share(2.0, 30.0), seq_s=share(0.1e-6, 1.5e-6),
        elementwise=read * share(0.3, 0.8), fixed_s=share(0.3e-6, 4e-6), gap_s=share(0.2e-6, 2e-6), wake_s=share(0.0, 8e-6), noise=share(0.02, 0.06),
    )  # fmt: skip


# -- the queues ------------------------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Job:
    """One task of a queue: seconds alone on the machine, host bytes touched, jobs it waits for, and the pass whose end it waits for (-1: none)."""

    queue: int
    seconds: float
    host_bytes: float = 0.0
    waits: Sequence[int] = ()
    fence: int = -1
    of_pass: int = 0
    driver_s: float = 0.0  # after that pass, before this job
    counts: bool = True  # whether the pass lasts until it is done
    ready_s: float = math.inf
    start_s: float = 0.0
    end_s: float = math.inf


@dataclass
class _Queue:
    jobs: list[int] = field(default_factory=list)
    at: int = 0
    free_s: float = 0.0
    running: bool = False
    left_s: float = 0.0
    speed: float = 1.0


def play(machine: HiddenMachine, jobs: Sequence[Job], num_passes: int, rng: random.Random, until: int | None = None) -> list[float]:
    """Runs the jobs (in each queue in their order) and notes their times in them; when each pass ended. ``until``: the pass whose end is the end."""
    queues = [_Queue() for _ in range(4)]
    left = [0] * num_passes
    for number, job in enumerate(jobs):
        queues[job.queue].jobs.append(number)
        left[job.of_pass] += job.counts
    ends = [math.inf] * num_passes
    now = 0.0
    while True:
        first, then = _next_event(machine, jobs, queues, ends, now, rng)
        if first is None:
            return ends
        for queue in queues:
            if queue.running:
                queue.left_s -= (then - now) * queue.speed
        now = then
        job = jobs[first.jobs[first.at]]
        if first.running:
            first.running, job.end_s, first.free_s = False, now, now
            first.at += 1
            left[job.of_pass] -= job.counts
            if job.counts and not left[job.of_pass]:
                ends[job.of_pass] = now
                if job.of_pass == until:
                    return ends
        else:
            _start(machine, first, job, now, rng)
        _deal(machine, jobs, queues)


def _start(machine: HiddenMachine, queue: _Queue, job: Job, now: float, rng: random.Random) -> None:
    pause_s = now - queue.free_s
    queue.running, job.start_s = True, now
    queue.left_s = job.seconds * math.exp(rng.gauss(0.0, machine.noise_of(job.queue)))
    if job.queue in (CPU, GPU) and pause_s > machine.idle_s:
        queue.left_s += machine.processors[job.queue].wake_s


def _next_event(
    machine: HiddenMachine, jobs: Sequence[Job], queues: Sequence[_Queue], ends: Sequence[float], now: float, rng: random.Random
) -> tuple[_Queue | None, float]:  # fmt: skip
    first, then = None, math.inf
    for queue in queues:
        if queue.running:
            at_s = now + max(queue.left_s, 0.0) / queue.speed
        elif queue.at < len(queue.jobs):
            at_s = max(now, _ready_s(machine, jobs, jobs[queue.jobs[queue.at]], queue, ends, rng))
        else:
            continue
        if at_s < then:
            first, then = queue, at_s
    assert first is not None or all(queue.at == len(queue.jobs) for queue in queues), "the jobs wait for each other in a circle"
    return first, then


def _ready_s(machine: HiddenMachine, jobs: Sequence[Job], job: Job, queue: _Queue, ends: Sequence[float], rng: random.Random) -> float:
    """When a job may start; infinity while a wait is open. Noted in it, with the luck of its hand-offs: asked again, it says the same."""
    if job.ready_s < math.inf:
        return job.ready_s
    ready_s = queue.free_s + (machine.processors[job.queue].gap_s if job.queue in (CPU, GPU) else 0.0)
    for number in job.waits:
        other = jobs[number]
        if other.end_s == math.inf:
            return math.inf
        ready_s = max(ready_s, other.end_s + _handoff_s(machine, job.queue, other.queue) * (0.7 + 0.3 * rng.expovariate(1.0)))
    if job.fence >= 0:
        if ends[job.fence] == math.inf:
            return math.inf
        ready_s = max(ready_s, ends[job.fence] + machine.step_s + job.driver_s)
    job.ready_s = ready_s
    return ready_s


def _handoff_s(machine: HiddenMachine, queue: int, other: int) -> float:
    if queue == other:
        return 0.0
    return machine.handoff_s if queue + other == CPU + GPU else machine.queue_handoff_s


def _deal(machine: HiddenMachine, jobs: Sequence[Job], queues: Sequence[_Queue]) -> None:
    """How fast each running job goes now: host memory's bandwidth goes to all in equal parts, none gets more than it asks for."""
    asked = {}
    for number, queue in enumerate(queues):
        queue.speed = 1.0
        if queue.running:
            job = jobs[queue.jobs[queue.at]]
            if job.host_bytes > 0:
                asked[number] = job.host_bytes / max(job.seconds, TINY_S)
    if len(asked) < 2:
        return
    left, given, waiting = machine.dram, dict[int, float](), sorted(asked, key=lambda number: asked[number])
    for count, number in zip(range(len(waiting), 0, -1), waiting, strict=True):
        given[number] = min(asked[number], left / count)
        left -= given[number]
    total = sum(given.values())
    for number, rate in given.items():
        crowd = machine.crowding * min(1.0, asked[number] / machine.alone(number)) * (total - rate) / machine.dram
        queues[number].speed = rate / asked[number] / (1.0 + crowd)
