"""A lower bound on the simulated time of every way to split the ops in one phase: for all combinations at once, as arrays.

Owns `phase_bound` and `Pass`. A pass's tasks are played in their order on the two compute queues, with the simulator's own costs. What can only make a pass
longer is left out: slower work beside copies, hazards other than a value that is not there yet, packets. Where nothing is streamed that is the simulation
itself. With a link to ask (`played_link.py`) the same tasks tell about how long the pass takes, instead of how long at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.hardware.profile import ComputeProfile
from twinpilots.model.spec import OpSpec
from twinpilots.plan.cost import ACTIVATION_BYTES, attention_s, linear_s, rope_append_bytes, staged_kv_bytes
from twinpilots.plan.grid import HEAD_LAYER, Bools, Floats, Grid
from twinpilots.plan.load import PassLoad, SeqClass
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.played_link import PlayedLink
from twinpilots.plan.pricing import phase_loads
from twinpilots.plan.problem import Problem
from twinpilots.plan.schedule import DEVICES, OTHER
from twinpilots.plan.tasks import GPU_KV, HOST_KV, STREAMED_KV, Device

QKV = ("q_proj", "k_proj", "v_proj")
_Ends = Mapping[tuple[Device, str], Floats]  # by device and op
_Before = Callable[[int], Mapping[Device, Floats]]  # micro-batch -> when each device may begin
_After = Callable[[int, _Ends], Mapping[Device, Floats]]  # micro-batch, when its linears are done -> when each device can go on


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one phase in one wave, by combination: no less than ``bound``; ``likely`` is a first guess, for the order in which to look at them."""

    bound: Floats
    likely: Floats


def phase_bound(problem: Problem, plan: Plan, phase: Phase, grid: Grid) -> Seconds:
    """``plan`` tells the phase's loads and buffers; its own splits do not matter."""
    bound, likely = np.zeros(grid.shape), np.zeros(grid.shape)
    for _, load, count in phase_loads(problem.workload, plan, phase):
        made = Pass(problem, plan, grid, load)
        least = np.maximum(made.run(), made.link_bound_s)
        bound += count * least
        likely += count * made.slowed(least)
    return Seconds(bound=bound.ravel(), likely=likely.ravel())


class Pass:
    """One pass on the clock of two queues. Times are from the begin of the pass, by combination. Without ``played`` no task takes longer than it must."""

    def __init__(self, problem: Problem, plan: Plan, grid: Grid, load: PassLoad, played: PlayedLink | None = None) -> None:
        self.played = played
        self.problem, self.plan, self.grid, self.rows, self.load = problem, plan, grid, grid.rows, load
        self.mbs = list(range(len(load.micro_batches)))
        self.spec, self.profile = self.problem.spec, self.problem.profile
        assert self.profile.gpu is not None and self.profile.link is not None
        self.processor: dict[Device, ComputeProfile] = {"cpu": self.profile.cpu, "gpu": self.profile.gpu}
        self.link, self.kv_dtype = self.profile.link, self.plan.kv_dtype
        self.zero: Floats = np.zeros((1,) * len(grid.shape))
        self.free: dict[Device, Floats] = dict.fromkeys(DEVICES, self.zero + self.profile.step_s(self.load.num_seqs))
        self.stored, self.streamed_bytes = self.zero, self.zero  # when the last new KV is back in host memory; weights so far
        self.kv_s = 0.0
        self.busy_s: dict[Device, Floats] = dict.fromkeys(DEVICES, self.zero)
        self.beside: dict[Device, Floats] = dict.fromkeys(DEVICES, self.zero)
        self.level: dict[int, int] = {}  # by axis, the layer whose ops its dimension tells apart
        self.ready: dict[tuple[Device, int], Floats] = {}
        self.x: dict[tuple[Device, int], Floats] = {}
        self.valid: dict[tuple[Device, int], Bools] = {}

    @property
    def link_bound_s(self) -> Floats:
        """What the link moves in a pass beside a ring full of packets, which may have come before it began."""
        return np.maximum(0.0, self.streamed_bytes - self.plan.ring_bytes) / self.link.up_bytes_per_s + self.kv_s

    def slowed(self, seconds: Floats) -> Floats:
        """The pass beside its copies: as long as the link works at least, and the devices slower for as long."""
        link_s = self.streamed_bytes / self.link.up_bytes_per_s + self.kv_s
        slowdown = min(processor.copy_slowdown for processor in self.processor.values())
        longest = np.maximum(seconds, link_s)
        return longest + (slowdown - 1.0) * np.minimum(seconds, link_s * seconds / longest)

    def run(self) -> Floats:
        for mb in self.mbs:
            tokens = self.load.tokens(mb)
            table = self.spec.table_format.bytes_per_weight + (self.spec.weight_bytes_per_element if self.spec.learned_positions else 0)
            embedded = self._task("cpu", self._elementwise("cpu", tokens * self.spec.hidden_size * (table + ACTIVATION_BYTES)), [])
            self.x |= {("cpu", mb): embedded, ("gpu", mb): self.zero}
            self.valid |= {("cpu", mb): self.zero == 0, ("gpu", mb): self.zero != 0}
        first, second = ("gate_up_proj", "down_proj") if self.spec.gated_mlp else ("fc1", "fc2")
        for layer in range(self.spec.num_layers):
            self._attention(layer, first)
            self._mlp(layer, first, second)
        self._head()
        return np.maximum(np.maximum(self.free["cpu"], self.free["gpu"]), self.stored)

    def _enter(self, layer: int, *names: str) -> None:
        """From here on the arrays tell apart what the axes of these ops do in this layer."""
        for axis in {self.grid.axis_of[name] for name in names}:
            parent = self.grid.parents.get((axis, layer))
            if parent is None or self.level.get(axis, 0) == layer:
                continue
            self.level[axis] = layer

            def spread(array: NDArray[Any], axis: int = axis, parent: NDArray[np.intp] = parent) -> NDArray[Any]:
                return array if array.shape[axis] == 1 else np.take(array, parent, axis)

            self.free = {device: spread(array) for device, array in self.free.items()}
            self.x, self.ready = ({key: spread(array) for key, array in each.items()} for each in (self.x, self.ready))
            self.valid = {key: spread(array) for key, array in self.valid.items()}
            self.stored, self.streamed_bytes = spread(self.stored), spread(self.streamed_bytes)

    # -- tasks -------------------------------------------------------------------------------------------------------------------------------

    def _task(self, device: Device, seconds: float | Floats, after: Sequence[tuple[Device, Floats]], where: Bools | None = None) -> Floats:
        """A task of one queue after others; only ``where`` it exists. Its end."""
        start = self.free[device]
        for source, end in after:
            start = np.maximum(start, end if source == device else end + self.link.handoff_s)
        if self.played is not None:
            seconds = self.played.slowed(device, start, seconds)
            self.busy_s[device] = self.busy_s[device] + (seconds if where is None else np.where(where, seconds, 0.0))
        end = start + seconds
        self.free[device] = end if where is None else np.where(where, end, self.free[device])
        return end

    def _elementwise(self, device: Device, num_bytes: float) -> float:
        return self.processor[device].task_s + num_bytes / self.processor[device].elementwise_bytes_per_s

    def _copy(self, source: Device, tokens: int, columns: float | Floats, ready: Floats, where: Bools) -> Floats:
        """An activation copy, a task of the GPU's queue. Its end, as the other device sees it."""
        rate = self.link.down_bytes_per_s if source == "gpu" else self.link.up_bytes_per_s
        end = self._task("gpu", self.link.copy_s + ACTIVATION_BYTES * tokens * columns / rate, [(source, ready)], where)
        return end if source == "cpu" else end + self.link.handoff_s

    def _op(self, layer: int, name: str) -> OpSpec:
        return self.problem.templates[self.spec.format_classes[layer] if layer >= 0 else 0][name]

    def _linear(self, device: Device, layer: int, name: str, tokens: int, ready: Floats) -> Floats:
        """A device's rows of one op: one task for each source of its rows. The last of the streamed rows cannot be there before the link has moved all."""
        op, rows, processor = self._op(layer, name), self.rows[layer, name], self.processor[device]
        row_s: Floats | float = linear_s(op, 1, tokens, processor)
        if self.played is not None:
            row_s = row_s * self.played.peer_drag(device, {each: self._reading(each, op, tokens) for each in DEVICES}, self.beside[device])
        if device == "cpu":
            return self._task(device, processor.task_s + rows.cpu * row_s, [(device, ready)], rows.cpu > 0)
        kept = self._task(device, processor.task_s + rows.resident * row_s, [(device, ready)], rows.resident > 0)
        streamed = self._streamed(layer, name, processor.task_s + rows.streamed * row_s, ready)
        self.free[device] = np.where(rows.streamed > 0, streamed, self.free[device])
        return np.where(rows.streamed > 0, streamed, np.where(rows.resident > 0, kept, ready))

    def _streamed(self, layer: int, name: str, seconds: Floats, ready: Floats) -> Floats:
        """When the streamed rows are done: at least a task after the link has moved all up to here; or when the link is played, after it has."""
        op, rows = self._op(layer, name), self.rows[layer, name]
        if self.played is not None:
            arrived = self.played.fetched((layer, name), op, rows.streamed)
            end = self._task("gpu", seconds, [("gpu", ready), ("gpu", arrived)], rows.streamed > 0)
            self.played.used((layer, name), end)
            return end
        end = self._task("gpu", seconds, [("gpu", ready)], rows.streamed > 0)
        moved = self.streamed_bytes + rows.streamed * op.row_bytes
        return np.maximum(end, np.maximum(0.0, moved - self.plan.ring_bytes) / self.link.up_bytes_per_s + self.processor["gpu"].task_s)

    def _reading(self, device: Device, op: OpSpec, tokens: int) -> float:
        """The part of a linear's time that goes to reading."""
        curve = self.processor[device].curve(op.rate_key)
        return min(1.0, curve(1) / curve(tokens * op.active_frac))

    def _linears(self, layer: int, names: Sequence[str], before: _Before, after: _After) -> None:
        """One phase of linears. Where the ring may be too small for the phase the order is another one: then the earlier of both, in every respect."""
        if self.played is not None:
            self._linears_played(self.played, layer, names, before, after)
            return
        saved = self.free.copy(), self.x.copy(), self.valid.copy()
        one = self._in_order(layer, names, before, after, by_batch=True)
        streamed = sum((self.rows[layer, name].streamed * self._op(layer, name).row_bytes for name in names), self.zero)
        if len(self.mbs) > 1 and np.any(streamed > 0):
            free, (self.free, self.x, self.valid) = self.free, saved
            other = self._in_order(layer, names, before, after, by_batch=False)
            pick = streamed > 0
            self.free = {device: np.where(pick, np.minimum(free[device], self.free[device]), free[device]) for device in DEVICES}
            one = {key: np.where(pick, np.minimum(value, other[key]), value) for key, value in one.items()}
        self.ready = one
        self.streamed_bytes = self.streamed_bytes + streamed

    def _linears_played(self, played: PlayedLink, layer: int, names: Sequence[str], before: _Before, after: _After) -> None:
        """One phase of linears in the order that the ring's size decides."""
        self.beside = self._beside(layer, names)
        began = self._state(), played.saved()
        self.ready = self._in_order(layer, names, before, after, by_batch=True)
        crowded = played.crowded([(layer, name) for name in names])
        if len(self.mbs) > 1 and np.any(crowded):
            by_batch = self._state(), played.saved()
            self._set_state(began[0])
            played.restore(began[1])
            self.ready = self._in_order(layer, names, before, after, by_batch=False)
            self._set_state(
                [{key: np.where(crowded, mine[key], array) for key, array in old.items()} for old, mine in zip(by_batch[0], self._state(), strict=True)]
            )
            played.keep(crowded, by_batch[1])

    def _beside(self, layer: int, names: Sequence[str]) -> dict[Device, Floats]:
        """The part of its time in these linears in which a device has the other beside it."""
        tokens = self.load.tokens(0) if layer >= 0 else self.load.logit_rows
        work_s = {
            d: sum((self.rows[layer, name].of(d) * linear_s(self._op(layer, name), 1, tokens, self.processor[d]) for name in names), self.zero) for d in DEVICES
        }
        return {device: np.minimum(1.0, work_s[OTHER[device]] / np.maximum(work_s[device], 1e-12)) for device in DEVICES}

    def _state(self) -> list[dict[Any, NDArray[Any]]]:
        return [dict(each) for each in (self.free, self.busy_s, self.x, self.valid, self.ready)]

    def _set_state(self, state: list[dict[Any, NDArray[Any]]]) -> None:
        self.free, self.busy_s, self.x, self.valid, self.ready = (dict(each) for each in state)

    def _in_order(self, layer: int, names: Sequence[str], before: _Before, after: _After, *, by_batch: bool) -> dict[tuple[Device, int], Floats]:
        """What ``after`` says of every micro-batch when they take turns (``by_batch``), or when all of them take every piece in turn."""
        ready: dict[tuple[Device, int], Floats] = {}
        ends: dict[tuple[Device, str, int], Floats] = {}
        if by_batch:
            for mb in self.mbs:
                begun = before(mb)
                ends |= {(d, name, mb): self._linear(d, layer, name, self.load.tokens(mb), begun[d]) for d in DEVICES for name in names}
                ready |= {(d, mb): end for d, end in after(mb, {(d, name): ends[d, name, mb] for d in DEVICES for name in names}).items()}
            return ready
        normed = {mb: before(mb) for mb in self.mbs}
        for device in DEVICES:
            for name in names:
                ends |= {(device, name, mb): self._linear(device, layer, name, self.load.tokens(mb), normed[mb][device]) for mb in self.mbs}
        for mb in self.mbs:
            ready |= {(d, mb): end for d, end in after(mb, {(d, name): ends[d, name, mb] for d in DEVICES for name in names}).items()}
        return ready

    def _computes(self, layer: int, names: Sequence[str]) -> dict[Device, Bools]:
        return {device: reduce(np.logical_or, (self.rows[layer, name].of(device) > 0 for name in names)) for device in DEVICES}

    def _attended(self, mb: int, device: Device) -> list[int]:
        groups = (HOST_KV,) if device == "cpu" else (GPU_KV, STREAMED_KV)
        return [group for group in groups if self.load.tokens(mb, group, group + 1)]

    def _attended_tokens(self, mb: int, device: Device) -> int:
        return sum(self.load.tokens(mb, group, group + 1) for group in self._attended(mb, device))

    # -- blocks ------------------------------------------------------------------------------------------------------------------------------

    def _normed(self, mb: int, needed: Mapping[Device, Bools]) -> dict[Device, Floats]:
        """The residual brought to the devices that need it, and normed there."""
        tokens, hidden, ends = self.load.tokens(mb), self.spec.hidden_size, {}
        for device in DEVICES:
            self._bring(device, mb, needed[device] & ~self.valid[device, mb])
            ends[device] = self._task(device, self._elementwise(device, 2 * ACTIVATION_BYTES * tokens * hidden), [(device, self.x[device, mb])], needed[device])
        return ends

    def _bring(self, device: Device, mb: int, where: Bools) -> None:
        """The residual to a device that lacks it."""
        arrived = self._copy(OTHER[device], self.load.tokens(mb), self.spec.hidden_size, self.x[OTHER[device], mb], where)
        self.x[device, mb] = np.where(where, arrived, self.x[device, mb])
        self.valid[device, mb] = self.valid[device, mb] | where

    def _attention(self, layer: int, first: str) -> None:
        self._enter(layer, *QKV)
        needed = self._computes(layer, QKV)
        self._linears(layer, QKV, lambda mb: self._normed(mb, needed), lambda mb, ends: self._exchanged_qkv(layer, mb, ends))
        self._enter(layer, "o_proj")
        attended = {mb: self._attend(layer, mb, {device: self.ready[device, mb] for device in DEVICES}) for mb in self.mbs}
        self._linears(layer, ("o_proj",), lambda mb: attended[mb], lambda _mb, ends: {d: ends[d, "o_proj"] for d in DEVICES})
        self._enter(layer, first)
        for mb in self.mbs:
            self._join(mb, {d: self.ready[d, mb] for d in DEVICES}, self._computes(layer, ("o_proj",)), self._computes(layer, (first,)))

    def _exchanged_qkv(self, layer: int, mb: int, ends: _Ends) -> dict[Device, Floats]:
        """When each device has the q, k and v of the sequences that it attends."""
        ready = {d: reduce(np.maximum, (np.where(self.rows[layer, name].of(d) > 0, ends[d, name], 0.0) for name in QKV)) for d in DEVICES}
        for source in DEVICES:
            if self._attended_tokens(mb, OTHER[source]):
                ready[OTHER[source]] = np.maximum(ready[OTHER[source]], self._sent_qkv(layer, mb, source, ends))
        return ready

    def _sent_qkv(self, layer: int, mb: int, source: Device, ends: _Ends) -> Floats:
        """When the other device has this one's rows of q, k and v; columns that touch go in one copy."""
        tokens, waiting, arrived, ready, full = self._attended_tokens(mb, OTHER[source]), self.zero, self.zero, self.zero, self.zero != 0
        for name in (*QKV, ""):
            whole = self.problem.ops[name].rows if name else 0
            rows = self.rows[layer, name].of(source) if name else self.zero
            touches = (waiting > 0) & (rows > 0) & (full if source == "gpu" else rows == whole)
            leaves = (waiting > 0) & ~touches
            arrived = np.where(leaves, np.maximum(arrived, self._copy(source, tokens, waiting, ready, leaves)), arrived)
            end = ends[source, name] if name else self.zero
            waiting, ready, full = np.where(touches, waiting + rows, rows), np.where(touches, np.maximum(ready, end), end), rows == whole
        return arrived

    def _attend(self, layer: int, mb: int, ready: Mapping[Device, Floats]) -> dict[Device, Floats]:
        """When each device has all attention outputs that its rows of o_proj need."""
        ends: dict[Device, Floats] = {}
        for device, group in [(d, g) for d, g in (("gpu", GPU_KV), ("gpu", STREAMED_KV), ("cpu", HOST_KV)) if self.load.tokens(mb, g, g + 1)]:
            ends[device] = self._attend_group(layer, mb, device, group, ready[device])  # type: ignore[index, arg-type]
        seen = {device: ends.get(device, self.zero) for device in DEVICES}
        for source in DEVICES:
            columns = self.rows[layer, "o_proj"].of(OTHER[source])
            if source in ends:
                arrived = self._copy(source, self._attended_tokens(mb, source), columns, ends[source], columns > 0)
                seen[OTHER[source]] = np.maximum(seen[OTHER[source]], np.where(columns > 0, arrived, 0.0))
        return seen

    def _attend_group(self, layer: int, mb: int, device: Device, group: int, ready: Floats) -> Floats:
        tokens, processor, window = self.load.tokens(mb, group, group + 1), self.processor[device], self.spec.layers[layer].window
        classes = [c for each in self.load.groups(mb, group, group + 1) for c in each.classes]
        after = [(device, ready), *([(device, self._staged_kv(classes, layer, mb))] if group == STREAMED_KV else [])]
        self._task(device, self._elementwise(device, rope_append_bytes(self.spec, tokens, self.kv_dtype)), after)
        seconds: Floats | float = sum(attention_s(self.spec, c, window, self.kv_dtype, processor) for c in classes)
        if self.played is not None and all(c.query_tokens == 1 for c in classes):
            seconds = seconds * self.played.peer_drag(device, dict.fromkeys(DEVICES, 1.0), float(bool(self._attended(mb, OTHER[device]))))
        end = self._task(device, processor.task_s + seconds, [])
        if group == STREAMED_KV:
            back_s = self.link.packet_s + self.spec.kv_token_bytes(self.kv_dtype) * tokens / self.link.down_bytes_per_s
            self.stored = np.maximum(self.stored, end) + back_s
            if self.played is not None:
                self.played.used_kv(self._slot(layer, mb), self.stored)
        return end

    def _staged_kv(self, classes: Sequence[SeqClass], layer: int, mb: int) -> Floats:
        """When the KV of these sequences has come."""
        moved = sum(staged_kv_bytes(self.spec, c, self.plan.page_size, self.kv_dtype) for c in classes)
        self.kv_s += self.link.packet_s + moved / self.link.up_bytes_per_s
        if self.played is not None:
            return self.played.fetched_kv(self._slot(layer, mb), moved)
        return self.profile.step_s(self.load.num_seqs) + self.kv_s + self.zero

    def _slot(self, layer: int, mb: int) -> int:
        return (layer * len(self.mbs) + mb) % 2

    def _join(self, mb: int, parts: Mapping[Device, Floats], gives: Mapping[Device, Bools], needed_next: Mapping[Device, Bools]) -> None:
        """Partial sums change sides and are added to the residuals that live on: those needed next, or else one of those that are valid."""
        tokens, hidden, valid = self.load.tokens(mb), self.spec.hidden_size, {device: self.valid[device, mb] for device in DEVICES}
        keeps = {device: needed_next[device] & valid[device] for device in DEVICES}
        none = ~(keeps["gpu"] | keeps["cpu"])
        on_gpu = np.where(gives["gpu"] & valid["gpu"], True, np.where(gives["cpu"] & valid["cpu"], False, valid["gpu"]))
        keeps = {"gpu": keeps["gpu"] | none & on_gpu, "cpu": keeps["cpu"] | none & ~on_gpu}
        ready = {device: np.where(gives[device], parts[device], 0.0) for device in DEVICES}
        for source in DEVICES:
            crosses = gives[source] & keeps[OTHER[source]]
            arrived = self._copy(source, tokens, hidden, parts[source], crosses)
            ready[OTHER[source]] = np.maximum(ready[OTHER[source]], np.where(crosses, arrived, 0.0))
        touched = (2 + gives["gpu"].astype(float) + gives["cpu"]) * ACTIVATION_BYTES * tokens * hidden  # x is read and written, each term read
        for device in DEVICES:
            add_s = self.processor[device].task_s + touched / self.processor[device].elementwise_bytes_per_s
            self.x[device, mb] = self._task(device, add_s, [(device, ready[device])], keeps[device])
            self.valid[device, mb] = keeps[device]

    def _mlp(self, layer: int, first: str, second: str) -> None:
        self._enter(layer, second)
        needed = self._computes(layer, (first,))
        self._linears(layer, (first,), lambda mb: self._normed(mb, needed), lambda mb, ends: self._exchanged_act(layer, mb, first, second, ends))
        halves = self.ready
        self._linears(layer, (second,), lambda mb: {d: halves[d, mb] for d in DEVICES}, lambda _mb, ends: {d: ends[d, second] for d in DEVICES})
        needed_next: dict[Device, Bools] = dict.fromkeys(DEVICES, self.zero != 0)
        if layer + 1 < self.spec.num_layers:
            self._enter(layer + 1, *QKV)
            needed_next = self._computes(layer + 1, QKV)
        for mb in self.mbs:
            self._join(mb, {d: self.ready[d, mb] for d in DEVICES}, self._computes(layer, (second,)), needed_next)

    def _exchanged_act(self, layer: int, mb: int, first: str, second: str, ends: _Ends) -> dict[Device, Floats]:
        """When each device has the activations that its rows of the second half need."""
        surplus = self.rows[layer, first].of("gpu") - self.rows[layer, second].of("gpu")
        ready = {d: np.where(self.rows[layer, first].of(d) > 0, ends[d, first], 0.0) for d in DEVICES}
        for source, columns in ((DEVICES[0], surplus), (DEVICES[1], -surplus)):
            arrived = self._copy(source, self.load.tokens(mb), columns, ends[source, first], columns > 0)
            ready[OTHER[source]] = np.maximum(ready[OTHER[source]], np.where(columns > 0, arrived, 0.0))
        return ready

    def _head(self) -> None:
        """The norm where the residuals of all micro-batches are, and the few rows to the other device."""
        heads, logits, hidden = self._computes(HEAD_LAYER, ("lm_head",)), self.load.logit_rows, self.spec.hidden_size
        together = {d: reduce(np.logical_and, [self.valid[d, mb] for mb in self.mbs]) for d in DEVICES}
        apart = ~(together["gpu"] | together["cpu"])
        for device in DEVICES:  # micro-batches ended on different devices: bring them together where most of the head is
            home = apart & (heads["gpu"] if device == "gpu" else ~heads["gpu"])
            for mb in self.mbs if np.any(home) else ():
                self._bring(device, mb, home & ~self.valid[device, mb])
            together[device] = together[device] | home
        both = {device: heads[device] & together[device] for device in DEVICES}
        elsewhere = ~(both["gpu"] | both["cpu"])
        normed, ends = {device: both[device] | elsewhere & together[device] for device in DEVICES}, {}
        for device in DEVICES:
            after = [(device, np.where(self.valid[device, mb], self.x[device, mb], 0.0)) for mb in self.mbs]
            ends[device] = self._task(device, self._elementwise(device, 2 * ACTIVATION_BYTES * logits * hidden), after, normed[device])
        for device in DEVICES:
            crosses = heads[device] & ~normed[device]
            ends[device] = np.where(crosses, self._copy(OTHER[device], logits, hidden, ends[OTHER[device]], crosses), ends[device])
        if self.played is not None:
            self.beside = self._beside(HEAD_LAYER, ("lm_head",))
        done = {device: self._linear(device, HEAD_LAYER, "lm_head", logits, ends[device]) for device in DEVICES}
        self._copy("gpu", logits, self.rows[HEAD_LAYER, "lm_head"].of("gpu"), done["gpu"], heads["gpu"])
