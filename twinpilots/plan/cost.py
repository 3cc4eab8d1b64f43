"""The time and the traffic of one task, from a machine's profile. One small function per kind of task.

Owns: `TaskCost`, `task_cost` and the formulas behind it. All times exclude waiting. Knows nothing of queues, order or contention (see `simulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from twinpilots.config import KvDtype
from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.driver import as_used
from twinpilots.plan.load import GroupLoad, PassLoad, SeqClass
from twinpilots.plan.plan import Plan
from twinpilots.plan.tasks import NUM_GROUPS, Kind, Task

Traffic = Literal["", "weights", "kv", "activations"]
ACTIVATION_BYTES = 4  # activations are fp32 everywhere


@dataclass(frozen=True, slots=True)
class TaskCost:
    """Seconds of one task alone on its queue, its bytes from or to host memory, and its bytes over the link, of which kind."""

    seconds: float
    dram_bytes: float = 0.0
    link_bytes: float = 0.0
    traffic: Traffic = ""
    memory_frac: float = 0.0  # part of its time for which it keeps memory busy: what another reader of the same memory can slow down


class CostModel:
    """Prices tasks of one (model, plan, profile, load); equal tasks of different layers are priced once."""

    def __init__(self, spec: ModelSpec, plan: Plan, profile: HardwareProfile, load: PassLoad) -> None:
        self.spec, self.plan, self.profile, self.load = spec, plan, as_used(profile, plan), load
        self.ops: dict[tuple[int, str], OpSpec] = {(op.layer, op.name): op for op in spec.ops(plan.unit_rows)}
        self.kv_dtype = plan.kv_dtype
        self._known: dict[tuple[object, ...], TaskCost] = {}

    def cost(self, task: Task) -> TaskCost:
        key = cost_key(self.spec, task)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = COSTS[task.kind](self, task)
        return found

    def compute(self, task: Task) -> ComputeProfile:
        if task.queue == "cpu":
            return self.profile.cpu
        assert self.profile.gpu is not None, "a GPU task needs a profile with a GPU"
        return self.profile.gpu

    @property
    def link(self) -> LinkProfile:
        assert self.profile.link is not None, "a copy needs a profile with a link"
        return self.profile.link

    def tokens(self, task: Task) -> int:
        return self.load.logit_rows if task.logit_rows else self.load.tokens(task.mb, task.glo, task.ghi)

    def groups(self, task: Task) -> tuple[GroupLoad, ...]:
        return self.load.groups(task.mb, task.glo, task.ghi)


def cost_key(spec: ModelSpec, task: Task) -> tuple[object, ...]:
    """Equal for tasks of equal cost, under every profile and load of one plan."""
    return _alike(
        spec, task.layer, task.kind, task.op, task.row1 - task.row0, task.columns, task.mb, task.glo, task.ghi, task.logit_rows, task.queue, len(task.terms),
        task.norm,
    )  # fmt: skip


def cost_key_of(spec: ModelSpec, fields: Mapping[str, Any]) -> tuple[object, ...]:
    """`cost_key` of a task that is not made yet: its fields, without those that keep their defaults."""
    get = fields.get
    return _alike(
        spec, fields["layer"], fields["kind"], get("op", ""), get("row1", 0) - get("row0", 0), get("columns", 0), fields["mb"], get("glo", 0),
        get("ghi", NUM_GROUPS), get("logit_rows", False), fields["queue"], len(get("terms", ())), get("norm", ""),
    )  # fmt: skip


def _alike(spec: ModelSpec, layer: int, kind: str, *rest: object) -> tuple[object, ...]:
    # op rows are equal in all layers (ModelSpec describes uniform layers), so the layer matters to attention's window and to formats only
    return (kind, *rest, spec.layers[layer].window if kind == "attend" else None, spec.format_classes[layer] if layer >= 0 else -1)


def task_cost(task: Task, spec: ModelSpec, plan: Plan, profile: HardwareProfile, load: PassLoad) -> TaskCost:
    """The cost of one task. Pricing many: keep a `CostModel`."""
    return CostModel(spec, plan, profile, load).cost(task)


# -- formulas -----------------------------------------------------------------------------------------------------------------------------


def linear_s(op: OpSpec, rows: int, tokens: float, processor: ComputeProfile) -> float:
    """``rows`` rows of a linear for ``tokens`` tokens, of which an expert sees its active fraction; the fixed cost excluded."""
    return processor.linear_s(op.rate_key, rows * op.row_elements, tokens * op.active_frac)


def attention_s(spec: ModelSpec, sequences: SeqClass, window: int | None, kv_dtype: KvDtype, processor: ComputeProfile) -> float:
    """One layer's attention of these sequences; the fixed cost excluded."""
    kv_bytes = attention_kv_bytes(spec, sequences, window, kv_dtype)
    return sequences.num_seqs * processor.attention_s(kv_bytes, spec.attention_flops(1, sequences.pairs(window)), kv_dtype=kv_dtype)


def attention_kv_bytes(spec: ModelSpec, sequences: SeqClass, window: int | None, kv_dtype: KvDtype) -> int:
    """Bytes of K and V that one layer's attention of one of these sequences reads."""
    return spec.kv_token_bytes(kv_dtype) * sequences.kv_read(window)


def rope_append_bytes(spec: ModelSpec, tokens: int, kv_dtype: KvDtype) -> int:
    """q, k and v read and written back, k and v written to their pages."""
    width = spec.q_size + 2 * spec.kv_size
    return tokens * (2 * ACTIVATION_BYTES * width + spec.kv_token_bytes(kv_dtype))


def staged_kv_bytes(spec: ModelSpec, sequences: SeqClass, page_size: int, kv_dtype: KvDtype) -> int:
    """The whole pages of one layer that hold the earlier tokens of these sequences."""
    pages = -(-(sequences.kv_len - sequences.query_tokens) // page_size)
    return sequences.num_seqs * pages * spec.kv_page_bytes(kv_dtype, page_size)


# -- one function per kind of task ---------------------------------------------------------------------------------------------------------


def _linear(model: CostModel, task: Task) -> TaskCost:
    op, processor = model.ops[task.layer, task.op], model.compute(task)
    rows = task.row1 - task.row0
    seconds = processor.task_s + linear_s(op, rows, model.tokens(task), processor)
    curve = processor.curve(op.rate_key)
    memory_frac = min(1.0, curve(1) / curve(model.tokens(task) * op.active_frac))  # one token's time is taken for reading alone
    return TaskCost(seconds, dram_bytes=rows * op.row_bytes if task.queue == "cpu" else 0, memory_frac=memory_frac)


def _attend(model: CostModel, task: Task) -> TaskCost:
    processor, window = model.compute(task), model.spec.layers[task.layer].window
    classes = [c for group in model.groups(task) for c in group.classes]
    seconds = processor.task_s + sum(attention_s(model.spec, c, window, model.kv_dtype, processor) for c in classes)
    kv_bytes = sum(c.num_seqs * attention_kv_bytes(model.spec, c, window, model.kv_dtype) for c in classes)
    return TaskCost(seconds, dram_bytes=kv_bytes if task.queue == "cpu" else 0, memory_frac=float(all(c.query_tokens == 1 for c in classes)))


def _elementwise(model: CostModel, task: Task, num_bytes: float) -> TaskCost:
    processor = model.compute(task)
    seconds = processor.task_s + num_bytes / processor.elementwise_bytes_per_s
    return TaskCost(seconds, dram_bytes=num_bytes if task.queue == "cpu" else 0)


def _norm(model: CostModel, task: Task) -> TaskCost:
    return _elementwise(model, task, 2 * ACTIVATION_BYTES * model.tokens(task) * model.spec.hidden_size)


def _add(model: CostModel, task: Task) -> TaskCost:
    """x is read and written, each term read; a post-norm reads and writes the sum once more."""
    touched = 2 + len(task.terms) + (2 if task.norm else 0)
    return _elementwise(model, task, touched * ACTIVATION_BYTES * model.tokens(task) * model.spec.hidden_size)


def _embed(model: CostModel, task: Task) -> TaskCost:
    spec = model.spec
    per_value = spec.table_format.bytes_per_weight + (spec.weight_bytes_per_element if spec.learned_positions else 0) + ACTIVATION_BYTES
    return _elementwise(model, task, per_value * model.tokens(task) * spec.hidden_size)


def _rope_append(model: CostModel, task: Task) -> TaskCost:
    return _elementwise(model, task, rope_append_bytes(model.spec, model.tokens(task), model.kv_dtype))


def _poison(model: CostModel, task: Task) -> TaskCost:
    return _elementwise(model, task, task.columns)


def _copy(model: CostModel, task: Task) -> TaskCost:
    num_bytes = ACTIVATION_BYTES * model.tokens(task) * task.columns
    rate = model.link.down_bytes_per_s if task.kind == "send" else model.link.up_bytes_per_s
    return TaskCost(model.link.copy_s + num_bytes / rate, num_bytes, num_bytes, "activations")


def _load(model: CostModel, task: Task) -> TaskCost:
    return TaskCost(model.link.packet_s + task.columns / model.link.up_bytes_per_s, task.columns, task.columns, "weights")


def _read(model: CostModel, task: Task) -> TaskCost:
    """From the disk into the staging ring, where it is written."""
    return TaskCost(model.profile.disk_read_s + task.columns / disk_rate(model.profile), task.columns)


def _read_kv(model: CostModel, task: Task) -> TaskCost:
    """What the load that follows brings to the GPU."""
    num_bytes = _load_kv(model, task).link_bytes
    return TaskCost(model.profile.disk_read_s + num_bytes / disk_rate(model.profile), num_bytes)


def _write_kv(model: CostModel, task: Task) -> TaskCost:
    num_bytes = model.spec.kv_token_bytes(model.kv_dtype) * model.tokens(task)
    return TaskCost(model.profile.disk_read_s + num_bytes / (model.profile.disk_write_bytes_per_s or disk_rate(model.profile)), num_bytes)


def disk_rate(profile: HardwareProfile) -> float:
    """Bytes per second that the disk gives."""
    assert profile.disk_bytes_per_s is not None, "reading from the disk needs a profile with a disk"
    return profile.disk_bytes_per_s


def _load_kv(model: CostModel, task: Task) -> TaskCost:
    classes = [c for group in model.groups(task) for c in group.classes]
    num_bytes = sum(staged_kv_bytes(model.spec, c, model.plan.page_size, model.kv_dtype) for c in classes)
    seconds = model.link.packet_s + model.link.load_kv_s + _behind_linear_s(model, task) + num_bytes / model.link.up_bytes_per_s
    return TaskCost(seconds, num_bytes, num_bytes, "kv")


def _behind_linear_s(model: CostModel, task: Task) -> float:
    """What a copy of KV waits for the linear that the GPU is at, where both share a core."""
    return model.link.kv_copy_token_s * model.load.tokens(task.mb)


def _store_kv(model: CostModel, task: Task) -> TaskCost:
    num_bytes = model.spec.kv_token_bytes(model.kv_dtype) * model.tokens(task)
    seconds = model.link.packet_s + model.link.store_kv_s + _behind_linear_s(model, task) + num_bytes / model.link.down_bytes_per_s
    return TaskCost(seconds, num_bytes, num_bytes, "kv")


COSTS: dict[Kind, Callable[[CostModel, Task], TaskCost]] = {
    "embed": _embed, "norm": _norm, "linear": _linear, "linear_in": _linear, "rope_append": _rope_append, "attend": _attend, "add": _add,
    "send": _copy, "recv": _copy, "load": _load, "load_kv": _load_kv, "store_kv": _store_kv, "read": _read, "read_kv": _read_kv,
    "write_kv": _write_kv, "poison": _poison,
}  # fmt: skip
