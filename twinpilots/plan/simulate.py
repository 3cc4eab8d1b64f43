"""Prices one pass: an exact event simulation of the four queues that run a task list, and its fast estimate for deep models.

Owns: `simulate`, `PassTiming`, `PassEstimator`. Waits, hand-off latency, the driver's fence between passes, link_in running one pass ahead, and the
slowdown of a processor while the link moves data are modelled; rates come from `cost`. Knows nothing of how a plan is found or run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import CostModel, TaskCost, attention_s, linear_s, staged_kv_bytes
from twinpilots.plan.load import PassLoad
from twinpilots.plan.memory import layer_templates
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expand
from twinpilots.plan.tasks import HOST_KV, NUM_GROUPS, QUEUES, STREAMED_KV, PassShape, Queue, Schedule, Task

EXACT_LAYERS = 6  # a model of at most this many layers is simulated whole
SHORT_LAYERS = 3
CPU, GPU, LINK_IN, LINK_OUT = range(4)
COMPUTE: tuple[Queue, ...] = ("cpu", "gpu")
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
    ``bytes``: link_weights, link_kv, link_activations.
    """

    seconds: float
    fill_s: float
    busy_s: dict[str, float]
    bytes: dict[str, float]
    alone_s: dict[str, float] = field(default_factory=dict)
    timeline: tuple[TimelineEntry, ...] = ()

    def scaled(self, factors: Mapping[str, float]) -> PassTiming:
        """The timing of a pass with so much more work for "cpu", "gpu" and "link": it lasts longer as the busiest of them then and before."""
        each = {name: factors.get(name, factors["link"]) for name in self.busy_s}
        longest = max(self.busy_s[queue] * each[queue] for queue in QUEUES) / max(self.busy_s[queue] for queue in QUEUES)
        return replace(
            self, seconds=self.seconds * longest, fill_s=self.fill_s * longest,
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
    schedule: Schedule, spec: ModelSpec, plan: Plan, profile: HardwareProfile, load: PassLoad, *, keep_timeline: bool = False
) -> PassTiming:  # fmt: skip
    """Run ``schedule`` a few passes back to back on the virtual clock and report one in steady state."""
    if load.shape != schedule.shape:
        raise ValueError(f"load has shape {load.shape}, the schedule was made for {schedule.shape}")
    model = CostModel(spec, plan, profile, load)
    costs = [model.cost(task) for task in schedule.tasks]
    driver_s = profile.step_s(load.num_seqs)
    clock = _Clock(schedule.tasks, [cost.seconds for cost in costs], [cost.memory_frac for cost in costs], profile, driver_s, _settled_pass(schedule, plan))
    clock.run()
    begin_s, end_s = clock.pass_end[clock.reported - 1 : clock.reported + 1]
    base = clock.reported * len(schedule.tasks)
    busy_s: dict[str, float] = dict.fromkeys((*QUEUES, "link", *APART.values()), 0.0)
    for task in schedule.tasks:
        seconds = clock.end[base + task.index] - clock.start[base + task.index]
        busy_s[task.queue] += seconds
        if task.kind in APART:
            busy_s[APART[task.kind]] += seconds
    busy_s["link"] = clock.link_busy_s
    alone_s: dict[str, float] = dict.fromkeys(QUEUES, 0.0)
    for task in schedule.tasks:
        alone_s[task.queue] += costs[task.index].seconds
    timeline = tuple(
        TimelineEntry(task.queue, task.index, clock.start[base + task.index] - begin_s, clock.end[base + task.index] - begin_s)
        for task in (schedule.tasks if keep_timeline else ())
    )
    fill_s = clock.pass_end[0] + driver_s
    return PassTiming(seconds=end_s - begin_s, fill_s=fill_s, busy_s=busy_s, bytes=_link_bytes(costs), alone_s=alone_s, timeline=timeline)


def _settled_pass(schedule: Schedule, plan: Plan) -> int:
    """The first pass in steady state: the second; the third when the ring is so large that link_in needs a pass to get as far ahead as it can."""
    return 1 if sum(packet.num_bytes for packet in schedule.packets) > plan.ring_bytes else 2


def _link_bytes(costs: Sequence[TaskCost]) -> dict[str, float]:
    moved = {"weights": 0.0, "kv": 0.0, "activations": 0.0}
    for cost in costs:
        if cost.traffic:
            moved[cost.traffic] += cost.link_bytes
    return {f"link_{name}": num_bytes for name, num_bytes in moved.items()}


class _Clock:
    """The event loop. Task i of pass p is number ``p * count + i``; a queue is blocked (next event at infinity), about to start, or running."""

    def __init__(
        self, tasks: Sequence[Task], seconds: Sequence[float], memory_frac: Sequence[float], profile: HardwareProfile, driver_s: float,
        reported: int,
    ) -> None:  # fmt: skip
        self.count = len(tasks)
        self.reported = reported  # pass 0 fills the pipeline; the pass after this one is only prefetched
        self.num_passes = reported + 2
        self.seconds = seconds
        self.overhead_s = driver_s
        numbers = {name: number for number, name in enumerate(QUEUES)}
        self.copy_slowdown = [(side.copy_slowdown, side.least_copy_slowdown) if side else (1.0, 1.0) for side in (profile.cpu, profile.gpu)]
        reads = (profile.cpu.read_bytes_per_s, profile.gpu.read_bytes_per_s if profile.gpu else 0.0)
        self.peer_slowdown = (profile.cpu.peer_slowdown, profile.gpu.peer_slowdown if profile.gpu else 1.0)
        self.link_slowdown = profile.link.peer_slowdown if profile.link else 1.0
        self.memory_frac = memory_frac
        self.memory_share = (reads[CPU] / sum(reads), reads[GPU] / sum(reads))  # of the traffic when both read all the time
        self.order: list[list[int]] = [[], [], [], []]
        self.fenced = [task.kind != "load" for task in tasks]
        queue_of = [numbers[task.queue] for task in tasks]
        for task in tasks:
            self.order[queue_of[task.index]].append(task.index)
        self.waits = [
            [(w.task - self.count if w.previous else w.task, _handoff_s(profile, queue_of[task.index], queue_of[w.task])) for w in task.waits] for task in tasks
        ]
        total = self.num_passes * self.count
        self.start, self.end = [inf] * total, [inf] * total
        self.pass_end = [inf] * self.num_passes
        self.left = [sum(self.fenced)] * self.num_passes
        self.link_busy_s = 0.0

    def run(self) -> None:
        """Until the reported pass is over. Every pass ends with its last task outside the weight loads, all of which are consumed by then."""
        order, end, start, count = self.order, self.end, self.start, self.count
        lengths = [len(queue) for queue in order]
        at = [0, 0, 0, 0]  # the place of each queue's current task, counted over all passes
        event = [inf] * 4  # when the current task starts or ends; infinity: blocked or done
        running = [False] * 4
        factors = [1.0] * 4  # how much slower than alone each queue's current task runs now
        slow = 0  # link queues at work
        slowed = (CPU, GPU) if self.link_slowdown == 1.0 else (CPU, GPU, LINK_IN, LINK_OUT)
        now = 0.0
        check = [CPU, GPU, LINK_IN, LINK_OUT]
        while True:
            for q in check:
                if event[q] == inf and at[q] < self.num_passes * lengths[q]:
                    event[q] = self._ready(order[q][at[q] % lengths[q]], at[q] // lengths[q], now)
            q = event.index(min(event))
            then = event[q]
            assert then < inf, "the waits of the task list form a cycle"
            if slow and self.pass_end[self.reported - 1] <= now:
                self.link_busy_s += then - now
            now = then
            number, index = divmod(at[q], lengths[q])
            task = order[q][index]
            if running[q]:
                running[q], event[q] = False, inf
                end[number * count + task] = now
                at[q] += 1
                slow -= q >= LINK_IN
                if self._ends_pass(task, number, now) and number == self.reported:
                    return
                check = [CPU, GPU, LINK_IN, LINK_OUT]
            else:
                running[q] = True
                start[number * count + task] = now
                slow += q >= LINK_IN
                event[q] = now + self.seconds[task]
                factors[q] = 1.0
                check = []
            tasks = [order[side][at[side] % lengths[side]] if running[side] else -1 for side in (CPU, GPU)]
            for side in slowed:
                if running[side]:
                    factor = self._factor(side, tasks, bool(slow))
                    if factor != factors[side]:
                        event[side] = now + (event[side] - now) * factor / factors[side]
                        factors[side] = factor

    def _factor(self, side: int, tasks: Sequence[int], link_at_work: bool) -> float:
        """How much slower than alone what runs on a queue is beside the compute queues' present ``tasks`` (-1: none) and the link.

        The processors' slow-down was measured with both reading all the time; with less traffic it is less, and it stretches only the part of a task's
        time that goes to reading.
        """
        fracs = [self.memory_frac[task] if task >= 0 else 0.0 for task in tasks]
        if side >= LINK_IN:
            return 1.0 + (self.link_slowdown - 1.0) * fracs[CPU]
        reading, computing = self.copy_slowdown[side] if link_at_work else (1.0, 1.0)
        factor = reading if reading == computing else max(computing, fracs[side] * reading)
        if tasks[GPU - side] < 0:
            return factor
        traffic = self.memory_share[CPU] * fracs[CPU] + self.memory_share[GPU] * fracs[GPU]
        return factor * max(1.0, fracs[side] * self.peer_slowdown[side] * traffic)

    def _ready(self, task: int, number: int, now: float) -> float:
        """When the waits of this task of pass ``number`` are over; infinity while one of them is still open."""
        ready = now
        if number and self.fenced[task]:
            ready = max(ready, self.pass_end[number - 1] + self.overhead_s)
        base = number * self.count
        for target, latency_s in self.waits[task]:
            if base + target >= 0:
                ready = max(ready, self.end[base + target] + latency_s)
        return ready

    def _ends_pass(self, task: int, number: int, now: float) -> bool:
        """Note that a task is done; whether it was the last of its pass."""
        self.left[number] -= self.fenced[task]
        if self.left[number] or not self.fenced[task]:
            return False
        self.pass_end[number] = now
        return True


def _handoff_s(profile: HardwareProfile, queue: int, other: int) -> float:
    """From a record on one queue to the waiting task's start on another."""
    if profile.link is None or queue == other:
        return 0.0
    return profile.link.handoff_s if queue + other == CPU + GPU else profile.link.queue_handoff_s


# -- deep models ---------------------------------------------------------------------------------------------------------------------------


class PassEstimator:
    """Prices passes of one bucket and shape from two shortened copies of the model, extrapolated along its layers; exact up to EXACT_LAYERS layers.

    Build it once for many loads of one shape: the schedules are kept, only the costs change. Smaller ``samples`` are quicker and less exact.
    """

    def __init__(
        self, spec: ModelSpec, plan: Plan, bucket: BucketPlan, profile: HardwareProfile, shape: PassShape,
        samples: tuple[int, int] = (EXACT_LAYERS, SHORT_LAYERS),
    ) -> None:  # fmt: skip
        self.spec, self.plan, self.bucket, self.profile = spec, plan, bucket, profile
        sizes = (spec.num_layers,) if spec.num_layers <= samples[0] else samples
        self.kinds = [_layer_kind(spec, plan, bucket, layer) for layer in range(spec.num_layers)]
        self.samples = [sample_layers(self.kinds, size) for size in sizes]
        self.models = [_shorten(spec, plan, bucket, layers) for layers in self.samples]
        self.schedules = [expand(short, short_plan, short_bucket, shape) for short, short_plan, short_bucket in self.models]

    def timing(self, load: PassLoad) -> PassTiming:
        """The pass's timing, without a timeline."""
        deep = len(self.samples) > 1
        timings = [
            simulate(schedule, short, short_plan, self.profile, load, keep_timeline=deep)
            for schedule, (short, short_plan, _) in zip(self.schedules, self.models, strict=True)
        ]  # fmt: skip
        return self._extrapolate(timings[0], timings[1], load) if deep else timings[0]

    def _extrapolate(self, longer: PassTiming, shorter: PassTiming, load: PassLoad) -> PassTiming:
        """Times and bytes grow along the layers' work, queue by queue; a pass lasts as long as its busiest queue at least."""
        work = self._work_by_kind(longer, load)
        sets = (range(self.spec.num_layers), *self.samples)
        lines = [_Line(*(sum(work[self.kinds[layer]][axis] for layer in layers) for layers in sets)) for axis in range(len(QUEUES) + 1)]
        by_queue: dict[str, _Line] = {**dict(zip(QUEUES, lines, strict=False)), "link": lines[LINK_IN]}
        by_count = _Line(*(len(layers) for layers in sets))
        by_queue |= dict.fromkeys(APART.values(), by_count)
        busy_s = {name: by_queue[name].at(longer.busy_s[name], shorter.busy_s[name], by_count) for name in longer.busy_s}
        num_bytes = {name: by_count.at(longer.bytes[name], shorter.bytes[name], by_count) for name in longer.bytes}
        num_bytes["link_weights"] = by_queue["link_in"].at(longer.bytes["link_weights"], shorter.bytes["link_weights"], by_count)
        # In a sample the link may be busy with the head's packets for longer than its few layers take: their time then does not show in the pass's.
        # Their slowing by the link shows too much.
        alone_s: dict[str, float] = {name: by_queue[name].at(longer.alone_s[name], shorter.alone_s[name], by_count) for name in QUEUES}
        layers_s = lines[-1].at(self._layers_s(longer, 0), self._layers_s(shorter, 1), by_count)
        layers_s -= max(busy_s[name] - alone_s[name] for name in COMPUTE) * max(0.0, 1.0 - busy_s["link"] / layers_s)
        head_s, head_loads_s = self._head_s(longer), self._head_loads_s()
        queued_s = self._least_s(work, self.profile.step_s(load.num_seqs), head_s, head_loads_s)
        least_s = max(*busy_s.values(), layers_s + max(head_s, head_loads_s - self._ring_s), queued_s)
        return PassTiming(
            seconds=max(least_s, lines[-1].at(longer.seconds, shorter.seconds, by_count)),
            fill_s=max(least_s, lines[-1].at(longer.fill_s, shorter.fill_s, by_count)),
            busy_s=busy_s,
            bytes=num_bytes,
            alone_s=alone_s,
        )

    def _layers_s(self, timing: PassTiming, sample: int) -> float:
        """When the last layer's work ends."""
        tasks = self.schedules[sample].tasks
        return max(entry.end_s for entry in timing.timeline if tasks[entry.task].layer >= 0 and entry.queue != "link_in")

    def _head_s(self, timing: PassTiming) -> float:
        """The head's work after the layers."""
        tasks, layers_s = self.schedules[0].tasks, self._layers_s(timing, 0)
        work_s: dict[Queue, float] = dict.fromkeys(COMPUTE, 0.0)
        for entry in timing.timeline:
            if tasks[entry.task].layer < 0 and entry.start_s >= layers_s and entry.queue in work_s:
                work_s[entry.queue] += entry.end_s - entry.start_s
        return max(work_s.values())

    def _head_loads_s(self) -> float:
        """On the link."""
        num_bytes = sum(segment.num_bytes for packet in self.schedules[0].packets for segment in packet.segments if segment.layer < 0)
        return num_bytes / self.profile.link.up_bytes_per_s if self.profile.link else 0.0

    @property
    def _ring_s(self) -> float:
        """How far the link can be ahead of who computes."""
        return self.plan.ring_bytes / self.profile.link.up_bytes_per_s if self.profile.link else 0.0

    def _least_s(self, work: Mapping[Hashable, Sequence[float]], driver_s: float, head_s: float, head_loads_s: float) -> float:
        """A pass at least: layers of which nothing is streamed leave the link a ringful to load ahead and no more, so what lies behind them is late.
        Where most of it is does not show in samples, in which the ring holds a larger part."""
        before_s, least_s = driver_s, 0.0
        loads_s = [work[kind][LINK_IN] for kind in self.kinds]
        left_s = sum(loads_s)
        for kind, own_s in zip(self.kinds, loads_s, strict=True):
            least_s = max(least_s, before_s - self._ring_s + max(left_s + head_s, left_s + head_loads_s))
            before_s += work[kind][-1] if own_s == 0.0 else max(work[kind][CPU], work[kind][GPU])
            left_s -= own_s
        return least_s

    def _work_by_kind(self, timing: PassTiming, load: PassLoad) -> dict[Hashable, list[float]]:
        """Per kind of layer the seconds on each queue, and what a layer adds to the pass: seen in the longer sample, computed for kinds not in it."""
        layers, schedule = self.samples[0], self.schedules[0]
        busy, ends = [[0.0] * len(QUEUES) for _ in layers], [0.0] * len(layers)
        for entry in timing.timeline:
            layer = schedule.tasks[entry.task].layer
            if layer >= 0:
                busy[layer][QUEUES.index(entry.queue)] += entry.end_s - entry.start_s
                if entry.queue != "link_in":
                    ends[layer] = max(ends[layer], entry.end_s)
        seen: dict[Hashable, list[list[float]]] = {}
        for i, layer in enumerate(layers):
            seen.setdefault(self.kinds[layer], []).append([*busy[i], ends[i] - (ends[i - 1] if i else self.profile.step_s(load.num_seqs))])
        work = {kind: [sum(values) / len(found) for values in zip(*found, strict=True)] for kind, found in seen.items()}
        for layer, kind in enumerate(self.kinds):
            if kind not in work:
                static = _layer_work(self.spec, self.plan, self.bucket, self.profile, load, layer)
                work[kind] = [*static, max(static)]
        return work


def estimate_pass(spec: ModelSpec, plan: Plan, bucket: BucketPlan, profile: HardwareProfile, load: PassLoad) -> PassTiming:
    """A pass's timing at the price of a few layers."""
    return PassEstimator(spec, plan, bucket, profile, load.shape).timing(load)


def estimate_pass_s(spec: ModelSpec, plan: Plan, bucket: BucketPlan, profile: HardwareProfile, load: PassLoad) -> float:
    """Seconds of a pass at the price of a few layers."""
    return estimate_pass(spec, plan, bucket, profile, load).seconds


def sample_layers(kinds: Sequence[Hashable], size: int) -> tuple[int, ...]:
    """``size`` layers in which the kinds of layers appear in their proportions (largest remainders), each kind spread evenly over its layers."""
    members: dict[Hashable, list[int]] = {}
    for layer, kind in enumerate(kinds):
        members.setdefault(kind, []).append(layer)
    groups = list(members.values())
    quotas = [len(group) * size / len(kinds) for group in groups]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(groups)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: size - sum(counts)]:
        counts[i] += 1
    return tuple(sorted(group[(2 * i + 1) * len(group) // (2 * count)] for group, count in zip(groups, counts, strict=True) for i in range(count)))


@dataclass(frozen=True, slots=True)
class _Line:
    """A quantity's static size in the whole model and in its two samples: the axis along which measurements of the samples are extrapolated."""

    whole: float
    longer: float
    shorter: float

    def at(self, longer: float, shorter: float, count: _Line) -> float:
        """The line through (self.longer, longer) and (self.shorter, shorter) at self.whole; along the number of layers where the samples hardly differ."""
        expected = self.whole * (count.longer - count.shorter) / count.whole
        axis = self if self.longer - self.shorter > 0.3 * expected > 0 else count
        return longer + (longer - shorter) / (axis.longer - axis.shorter) * (axis.whole - axis.longer)


def _layer_kind(spec: ModelSpec, plan: Plan, bucket: BucketPlan, layer: int) -> Hashable:
    """Layers of one kind are alike to every cost."""
    return tuple(bucket.splits[layer].items()), spec.layers[layer].window, layer in plan.host_kv_layers, spec.format_classes[layer]


def _shorten(spec: ModelSpec, plan: Plan, bucket: BucketPlan, layers: Sequence[int]) -> tuple[ModelSpec, Plan, BucketPlan]:
    """The model, plan and bucket of these layers and the head alone."""
    if len(layers) == spec.num_layers:
        return spec, plan, bucket
    short_bucket = replace(bucket, splits=(*(bucket.splits[layer] for layer in layers), bucket.splits[-1]))
    host_kv_layers = tuple(i for i, layer in enumerate(layers) if layer in plan.host_kv_layers)
    short_plan = replace(plan, buckets=(short_bucket,), host_kv_layers=host_kv_layers)
    return replace(spec, layers=tuple(spec.layers[layer] for layer in layers)), short_plan, short_bucket


class LayerWork:
    """The static seconds of work of a bucket's passes by resource ("cpu", "gpu", "link"), every task alone on the machine, small ones left out: in proportion
    to a pass's work, and known without a task list."""

    def __init__(self, spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> None:
        self._spec, self._plan, self._bucket = spec, plan, bucket
        layers = range(spec.num_layers)
        counts = Counter(_layer_kind(spec, plan, bucket, layer) for layer in layers)
        first = {_layer_kind(spec, plan, bucket, layer): layer for layer in reversed(layers)}
        self._layers = [(first[kind], count) for kind, count in counts.items()]

    def seconds(self, profile: HardwareProfile, load: PassLoad) -> dict[str, float]:
        spec, plan, found = self._spec, self._plan, [0.0] * len(QUEUES)
        for layer, count in self._layers:
            for queue, seconds in enumerate(_layer_work(spec, plan, self._bucket, profile, load, layer)):
                found[queue] += count * seconds
        head, split = spec.ops(plan.unit_rows)[-1], self._bucket.splits[-1]["lm_head"]
        found[CPU] += linear_s(head, split.cpu, load.logit_rows, profile.cpu) if split.cpu else 0.0
        found[GPU] += linear_s(head, split.gpu, load.logit_rows, profile.gpu) if split.gpu and profile.gpu else 0.0
        found[LINK_IN] += split.streamed * head.row_bytes / profile.link.up_bytes_per_s if profile.link else 0.0
        return {"cpu": found[CPU], "gpu": found[GPU], "link": found[LINK_IN]}


def _layer_work(spec: ModelSpec, plan: Plan, bucket: BucketPlan, profile: HardwareProfile, load: PassLoad, layer: int) -> list[float]:
    """The static seconds of each queue in one layer: linears, attention and weight or KV loads; small tasks are left out."""
    ops = layer_templates(spec, plan.unit_rows)[spec.format_classes[layer]]
    tokens = [load.tokens(mb) for mb in range(len(load.micro_batches))]
    work = [0.0, 0.0, 0.0, 0.0]
    for name, split in bucket.splits[layer].items():
        op = ops[name]
        for count in tokens:
            if split.cpu:
                work[CPU] += profile.cpu.task_s + linear_s(op, split.cpu, count, profile.cpu)
            if split.gpu and profile.gpu:
                work[GPU] += profile.gpu.task_s + linear_s(op, split.gpu, count, profile.gpu)
        if profile.link:
            work[LINK_IN] += split.streamed * op.row_bytes / profile.link.up_bytes_per_s
    for group in range(NUM_GROUPS):
        queue = CPU if group == HOST_KV or layer in plan.host_kv_layers else GPU
        processor = profile.cpu if queue == CPU else profile.gpu
        classes = [c for load_of in load.groups(-1, group, group + 1) for c in load_of.classes]
        if processor:
            work[queue] += sum(attention_s(spec, c, spec.layers[layer].window, plan.kv_dtype, processor) for c in classes)
        if profile.link and group == STREAMED_KV:
            moved = sum(staged_kv_bytes(spec, c, plan.page_size, plan.kv_dtype) for c in classes)
            work[LINK_IN] += moved / profile.link.up_bytes_per_s
    return work
