"""How fast a pass could be at best: the relaxed program (docs/architecture.md) for one load, as a linear program.

Owns: `pass_bound` at profiled op times ("plan") or at the machine's peaks ("hardware"). It drops units, layers, hand-offs, fixed costs and order, and
lets each pass choose its own residency, so no plan can beat the plan bound. Knows nothing of plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from twinpilots.config import KvDtype
from twinpilots.errors import LimitError
from twinpilots.hardware.profile import ComputeProfile, HardwareProfile
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.cost import attention_kv_bytes, disk_rate, linear_s
from twinpilots.plan.driver import least_between_s
from twinpilots.plan.load import PassLoad, SeqClass
from twinpilots.plan.workload import Limits

MAX_MICRO_BATCHES = 8  # no plan cuts a pass into more
BoundKind = Literal["plan", "hardware"]
Line = Literal["cpu", "gpu", "link", "dram", "disk"]
LinearTime = Callable[[OpSpec, float, ComputeProfile], float]  # (op, tokens) -> seconds of the whole op


@dataclass(frozen=True, slots=True)
class PassBound:
    """No pass of this load takes less than ``seconds``; ``bottleneck`` is the resource that says so."""

    seconds: float
    bottleneck: Line


def pass_bound(spec: ModelSpec, profile: HardwareProfile, limits: Limits, load: PassLoad, kind: BoundKind, *, kv_dtype: KvDtype) -> PassBound:
    """The least time of one pass over all shares resident | streamed | CPU of every op type, all places of the KV (the groups of ``load`` are ignored), and,
    where ``limits`` let weights lie on the disk, all parts of them that do.

    Raises LimitError when weights and this load's KV do not fit both memories together.
    """
    bounds = []
    for machine in (profile, profile.cpu_alone) if profile.gpu is not None and profile.alone is not None else (profile,):
        try:
            bounds.append(_bound(spec, machine, limits, load, kind, kv_dtype))
        except LimitError:
            if machine is profile:
                raise
    return min(bounds, key=lambda bound: bound.seconds)


def _bound(spec: ModelSpec, profile: HardwareProfile, limits: Limits, load: PassLoad, kind: BoundKind, kv_dtype: KvDtype) -> PassBound:
    from scipy.optimize import linprog

    program = _Program(spec, profile, limits, load, kind, kv_dtype)
    answer = linprog(program.objective, A_ub=program.rows, b_ub=program.limits, A_eq=program.equal_rows, b_eq=program.equal_to, method="highs")
    if answer.status != 0:
        need, given = program.bytes_needed, limits.gpu_bytes * (profile.gpu is not None) + limits.host_bytes + limits.disk_bytes
        raise LimitError(f"weights and KV of this pass need {need} bytes, GPU and host memory offer {given}; raise a memory limit or run fewer sequences")
    prices = {name: abs(float(answer.ineqlin.marginals[i])) for i, name in enumerate(program.lines)}
    driver_s = least_between_s(profile, load.num_seqs) if kind == "plan" else 0.0
    return PassBound(float(answer.x[0]) + driver_s, max(program.lines, key=lambda name: prices[name]))


class _Program:
    """Variables: T, then (resident, streamed, CPU) seconds-free shares of each op type, then the KV's (GPU, host with CPU attention, host streamed), then,
    if anything may lie on the disk, the weights there as a part of all bytes, and the share of the KV that is streamed from there."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, limits: Limits, load: PassLoad, kind: BoundKind, kv_dtype: KvDtype) -> None:
        self.spec, self.profile, self.kind, self.kv_dtype = spec, profile, kind, kv_dtype
        head = spec.ops(64)[-1]
        counts = Counter(spec.format_classes)
        short = spec.one_layer_per_class
        self.types = [(op, counts[op.layer], load.tokens()) for op in short.ops(64) if op.layer >= 0] + [(head, 1, load.logit_rows)]
        self.classes = [c for group in load.groups(-1, 0, 3) for c in group.classes]
        self.uses_disk = limits.disk_bytes > 0
        self.width = 1 + 3 * len(self.types) + 3 + 2 * self.uses_disk
        self.objective = [1.0] + [0.0] * (self.width - 1)
        self.lines: list[Line] = []
        self.rows: list[list[float]] = []
        self.limits: list[float] = []
        self._add_lines()
        self._add_memory(limits)
        self.equal_rows = [self._row({(i, share): 1.0 for share in range(3)}) for i in range(len(self.types) + 1)]
        self.equal_to = [1.0] * len(self.equal_rows)
        if profile.gpu is None:
            self.equal_rows.append(self._row({(i, share): 1.0 for i in range(len(self.types)) for share in (0, 1)} | {(self.kv, 0): 1.0, (self.kv, 2): 1.0}))
            self.equal_to.append(0.0)

    @property
    def kv(self) -> int:
        """The place of the KV shares, after the op types."""
        return len(self.types)

    @property
    def on_disk(self) -> tuple[int, int]:
        """The place of the weights on the disk, after the KV."""
        return self.kv + 1, 0

    @property
    def kv_on_disk(self) -> tuple[int, int]:
        return self.kv + 1, 1

    @cached_property
    def all_bytes(self) -> float:
        """Of weights and KV: shares of the whole keep the program well conditioned."""
        return max(1.0, sum(count * op.weight_bytes for op, count, _ in self.types) + self._kv_memory())

    @property
    def bytes_needed(self) -> int:
        return int(sum(count * op.weight_bytes for op, count, _ in self.types) + self._kv_memory())

    def _row(self, terms: dict[tuple[int, int], float], time: float = 0.0) -> list[float]:
        row = [0.0] * self.width
        row[0] = time
        for (i, share), value in terms.items():
            row[1 + 3 * i + share] = value
        return row

    def _add_line(self, name: Line, terms: dict[tuple[int, int], float]) -> None:
        self.lines.append(name)
        self.rows.append(self._row(terms, time=-1.0))
        self.limits.append(0.0)

    def _add_lines(self) -> None:
        """One line per resource: T >= the seconds of work on it."""
        profile = self.profile
        if self.uses_disk:
            rate = disk_rate(profile)
            self._add_line("disk", {self.on_disk: self.all_bytes / rate, self.kv_on_disk: self._kv_earlier() / rate})
        on_cpu = {(i, 2): count * self._linear(op, tokens, profile.cpu) for i, (op, count, tokens) in enumerate(self.types)}
        on_cpu[self.kv, 1] = self._attention(profile.cpu)
        if profile.gpu is None or profile.link is None:
            self._add_line("cpu", on_cpu)
            self._add_dram()
            return
        link = {(i, 1): count * op.weight_bytes / profile.link.up_bytes_per_s for i, (op, count, _) in enumerate(self.types)}
        link[self.kv, 2] = self._kv_earlier() / profile.link.up_bytes_per_s
        on_gpu = {(i, share): count * self._linear(op, tokens, profile.gpu) for i, (op, count, tokens) in enumerate(self.types) for share in (0, 1)}
        on_gpu[self.kv, 0] = on_gpu[self.kv, 2] = self._attention(profile.gpu)
        for name, work, processor in (("cpu", on_cpu, profile.cpu), ("gpu", on_gpu, profile.gpu)):
            # while the link runs, the processor does 1 / copy_slowdown of its work, or a little more
            lost = 1 - 1 / processor.least_copy_slowdown if self.kind == "plan" else 0.0
            self._add_line(name, {key: work.get(key, 0.0) + lost * link.get(key, 0.0) for key in (*work, *link)})  # type: ignore[arg-type]
        self._add_line("link", link)
        self._add_dram()

    def _add_dram(self) -> None:
        """Host memory feeds the link and the CPU, and takes what the disk gives. Only at the machine's peaks: profiled op times contain what DRAM allows,
        caches included."""
        if self.kind == "hardware":
            per_s = self.profile.dram_bytes_per_s
            reads = {(i, share): count * op.weight_bytes / per_s for i, (op, count, _) in enumerate(self.types) for share in (1, 2)}
            reads[self.kv, 1], reads[self.kv, 2] = self._kv_read() / per_s, self._kv_earlier() / per_s
            if self.uses_disk:
                reads[self.on_disk], reads[self.kv_on_disk] = self.all_bytes / per_s, self._kv_earlier() / per_s  # what is read is written there first
            self._add_line("dram", reads)

    def _add_memory(self, limits: Limits) -> None:
        weights = [count * op.weight_bytes for op, count, _ in self.types]
        kv, scale = self._kv_memory(), self.all_bytes
        self.rows.append(self._row({**{(i, 0): w / scale for i, w in enumerate(weights)}, (self.kv, 0): kv / scale}))
        self.limits.append(limits.gpu_bytes / scale)
        on_host = {(i, share): w / scale for i, w in enumerate(weights) for share in (1, 2)}
        spared = {self.on_disk: -1.0, self.kv_on_disk: -kv / scale} if self.uses_disk else {}
        self.rows.append(self._row({**on_host, (self.kv, 1): kv / scale, (self.kv, 2): kv / scale, **spared}))
        self.limits.append(limits.host_bytes / scale)
        if self.uses_disk:
            self.rows += [
                self._row({key: -value for key, value in spared.items()}), self._row({self.on_disk: 1.0, **{key: -value for key, value in on_host.items()}}),
                self._row({self.kv_on_disk: 1.0, (self.kv, 2): -1.0}),
            ]  # fmt: skip
            self.limits += [limits.disk_bytes / scale, 0.0, 0.0]

    def _linear(self, op: OpSpec, tokens: float, processor: ComputeProfile) -> float:
        if self.kind == "hardware":
            return max(op.weight_bytes / processor.read_bytes_per_s, op.flops(tokens) / processor.flops_per_s)
        # a plan may cut the pass into micro-batches; where a measured curve makes that cheaper, so does the bound
        return min(m * linear_s(op, op.rows, tokens / m, processor) for m in range(1, MAX_MICRO_BATCHES + 1))

    def _attention(self, processor: ComputeProfile) -> float:
        def one(sequences: SeqClass, window: int | None) -> float:
            kv_bytes = attention_kv_bytes(self.spec, sequences, window, self.kv_dtype)
            flops = self.spec.attention_flops(1, sequences.pairs(window))
            if self.kind == "hardware":
                return max(kv_bytes / processor.read_bytes_per_s, flops / processor.flops_per_s)
            return processor.attention_s(kv_bytes, flops, kv_dtype=self.kv_dtype)

        return self._over_layers(lambda c, window: c.num_seqs * one(c, window))

    def _over_layers(self, of_layer: Callable[[SeqClass, int | None], float]) -> float:
        windows = [layer.window for layer in self.spec.layers]
        return sum(windows.count(window) * of_layer(c, window) for window in set(windows) for c in self.classes)

    def _kv_memory(self) -> float:
        return self._over_layers(lambda c, _: c.num_seqs * c.kv_len * self.spec.kv_token_bytes(self.kv_dtype))

    def _kv_read(self) -> float:
        return self._over_layers(lambda c, window: c.num_seqs * attention_kv_bytes(self.spec, c, window, self.kv_dtype))

    def _kv_earlier(self) -> float:
        return self._over_layers(lambda c, _: c.num_seqs * (c.kv_len - c.query_tokens) * self.spec.kv_token_bytes(self.kv_dtype))
