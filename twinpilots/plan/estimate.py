"""The simulator's fast estimate for deep models: two shortened copies are simulated and extrapolated along the layers' work.

Owns `PassEstimator` and `sample_layers`. Up to EXACT_LAYERS layers it is the simulation itself. Knows nothing of how a plan is found or run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.clock import CPU, DISK, GPU, LINK_IN
from twinpilots.plan.cost import attention_s, disk_rate, linear_s, staged_kv_bytes
from twinpilots.plan.driver import as_used, between_s
from twinpilots.plan.load import PassLoad
from twinpilots.plan.memory import layer_templates
from twinpilots.plan.outline import outline
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.simulate import APART, PassTiming, simulate
from twinpilots.plan.tasks import HOST_KV, NUM_GROUPS, QUEUES, STREAMED_KV, PassShape, Queue

EXACT_LAYERS = 6  # a model of at most this many layers is simulated whole
SHORT_LAYERS = 3
COMPUTE: tuple[Queue, ...] = ("cpu", "gpu")


class PassEstimator:
    """Prices passes of one bucket and shape from two shortened copies of the model, extrapolated along its layers; exact up to EXACT_LAYERS layers.

    Build it once for many loads of one shape: the task lists' outlines are kept, only the costs change. Smaller ``samples`` are quicker and less exact.
    """

    def __init__(
        self, spec: ModelSpec, plan: Plan, bucket: BucketPlan, profile: HardwareProfile, shape: PassShape,
        samples: tuple[int, int] = (EXACT_LAYERS, SHORT_LAYERS),
    ) -> None:  # fmt: skip
        self.spec, self.plan, self.bucket, self.profile = spec, plan, bucket, profile
        sizes = (spec.num_layers,) if spec.num_layers <= samples[0] else samples
        self.kinds = _layer_kinds(spec, plan, bucket)
        self.samples = [sample_layers(self.kinds, size) for size in sizes]
        self.models = [_shorten(spec, plan, bucket, layers) for layers in self.samples]
        self.outlines = [outline(short, short_plan, short_bucket, shape) for short, short_plan, short_bucket in self.models]

    def timing(self, load: PassLoad) -> PassTiming:
        """The pass's timing, without a timeline."""
        if len(self.samples) == 1:
            return simulate(self.outlines[0], self.spec, self.plan, self.profile, load)
        # The driver waits for all queues, so where there is one queue its time is added at the end, when it is known how long the whole pass takes.
        driver_s = self.profile.step_s(load.num_seqs) if self.plan.uses_gpu else 0.0
        longer, shorter = (
            simulate(tasks, short, short_plan, self.profile, load, keep_timeline=True, driver_s=driver_s)
            for tasks, (short, short_plan, _) in zip(self.outlines, self.models, strict=True)
        )
        found = self._extrapolate(longer, shorter, load)
        return found if self.plan.uses_gpu else found.with_driver(between_s(self.profile, self.plan, load, found.seconds))

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
        queued_s = self._least_s(work, longer.driver_s, head_s, head_loads_s)
        least_s = max(*busy_s.values(), layers_s + max(head_s, head_loads_s - self._ring_s), queued_s)
        return PassTiming(
            seconds=max(least_s, lines[-1].at(longer.seconds, shorter.seconds, by_count)),
            fill_s=max(least_s, lines[-1].at(longer.fill_s, shorter.fill_s, by_count)),
            busy_s=busy_s,
            bytes=num_bytes,
            alone_s=alone_s,
            driver_s=longer.driver_s,
        )

    def _layers_s(self, timing: PassTiming, sample: int) -> float:
        """When the last layer's work ends."""
        layers = self.outlines[sample].layers
        return max(entry.end_s for entry in timing.timeline if layers[entry.task] >= 0 and entry.queue not in ("link_in", "disk"))

    def _head_s(self, timing: PassTiming) -> float:
        """The head's work after the layers."""
        layers, layers_s = self.outlines[0].layers, self._layers_s(timing, 0)
        work_s: dict[Queue, float] = dict.fromkeys(COMPUTE, 0.0)
        for entry in timing.timeline:
            if layers[entry.task] < 0 and entry.start_s >= layers_s and entry.queue in work_s:
                work_s[entry.queue] += entry.end_s - entry.start_s
        return max(work_s.values())

    def _head_loads_s(self) -> float:
        """On the link."""
        num_bytes = sum(segment.num_bytes for packet in self.outlines[0].packets for segment in packet.segments if segment.layer < 0)
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
        layers, layer_of = self.samples[0], self.outlines[0].layers
        busy, ends = [[0.0] * len(QUEUES) for _ in layers], [0.0] * len(layers)
        for entry in timing.timeline:
            layer = layer_of[entry.task]
            if layer >= 0:
                busy[layer][QUEUES.index(entry.queue)] += entry.end_s - entry.start_s
                if entry.queue not in ("link_in", "disk"):
                    ends[layer] = max(ends[layer], entry.end_s)
        seen: dict[Hashable, list[list[float]]] = {}
        for i, layer in enumerate(layers):
            seen.setdefault(self.kinds[layer], []).append([*busy[i], ends[i] - (ends[i - 1] if i else timing.driver_s)])
        work = {kind: [sum(values) / len(found) for values in zip(*found, strict=True)] for kind, found in seen.items()}
        for layer, kind in enumerate(self.kinds):
            if kind not in work:
                static = _layer_work(self.spec, self.plan, self.bucket, as_used(self.profile, self.plan), load, layer)
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


def _layer_kinds(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> list[int]:
    """The kind of every layer, as a number: layers of one kind are alike to every cost."""
    alike: dict[Hashable, int] = {}
    splits: dict[int, int] = {}  # most layers share one mapping
    for layer in bucket.splits[:-1]:
        if id(layer) not in splits:
            splits[id(layer)] = alike.setdefault(tuple(layer.items()), len(alike))
    kinds: dict[Hashable, int] = {}
    return [
        kinds.setdefault((splits[id(bucket.splits[i])], layer.window, i in plan.host_kv_layers, spec.format_classes[i], _on_disk(plan, i)), len(kinds))
        for i, layer in enumerate(spec.layers)
    ]


def _on_disk(plan: Plan, layer: int) -> Hashable:
    return tuple(plan.disk_rows[layer].values()) if plan.disk_rows else None


def _shorten(spec: ModelSpec, plan: Plan, bucket: BucketPlan, layers: tuple[int, ...]) -> tuple[ModelSpec, Plan, BucketPlan]:
    """The model, plan and bucket of these layers and the head alone."""
    if len(layers) == spec.num_layers:
        return spec, plan, bucket
    short_bucket = replace(bucket, splits=(*(bucket.splits[layer] for layer in layers), bucket.splits[-1]))
    host_kv_layers = tuple(i for i, layer in enumerate(layers) if layer in plan.host_kv_layers)
    short_plan = replace(plan, buckets=(short_bucket,), host_kv_layers=host_kv_layers)
    if plan.disk_rows:
        short_plan = replace(short_plan, disk_rows=(*(plan.disk_rows[layer] for layer in layers), plan.disk_rows[-1]))
    return spec.of_layers(layers), short_plan, short_bucket


class LayerWork:
    """The static seconds of work of a bucket's passes by resource ("cpu", "gpu", "link"), every task alone on the machine, small ones left out: in proportion
    to a pass's work, and known without a task list."""

    def __init__(self, spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> None:
        self._spec, self._plan, self._bucket = spec, plan, bucket
        kinds = _layer_kinds(spec, plan, bucket)
        self._layers = [(kinds.index(kind), count) for kind, count in Counter(kinds).items()]

    def seconds(self, profile: HardwareProfile, load: PassLoad) -> dict[str, float]:
        spec, plan, found = self._spec, self._plan, [0.0] * len(QUEUES)
        profile = as_used(profile, plan)
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
    work = [0.0] * len(QUEUES)
    for name, split in bucket.splits[layer].items():
        op = ops[name]
        for count in tokens:
            if split.cpu:
                work[CPU] += profile.cpu.task_s + linear_s(op, split.cpu, count, profile.cpu)
            if split.gpu and profile.gpu:
                work[GPU] += profile.gpu.task_s + linear_s(op, split.gpu, count, profile.gpu)
        if profile.link:
            work[LINK_IN] += split.streamed * op.row_bytes / profile.link.up_bytes_per_s
        if plan.disk_rows:
            work[DISK] += plan.on_disk(layer, name) * op.row_bytes / disk_rate(profile)
    for group in range(NUM_GROUPS):
        queue = CPU if group == HOST_KV or layer in plan.host_kv_layers else GPU
        processor = profile.cpu if queue == CPU else profile.gpu
        classes = [c for load_of in load.groups(-1, group, group + 1) for c in load_of.classes]
        if processor:
            work[queue] += sum(attention_s(spec, c, spec.layers[layer].window, plan.kv_dtype, processor) for c in classes)
        if profile.link and group == STREAMED_KV:
            moved = sum(staged_kv_bytes(spec, c, plan.page_size, plan.kv_dtype) for c in classes)
            work[LINK_IN] += moved / profile.link.up_bytes_per_s
            work[DISK] += moved / disk_rate(profile) if plan.kv_on_disk else 0.0
    return work
