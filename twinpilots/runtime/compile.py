"""Lowers a schedule's tasks to instruction arrays: the last step before an interpreter runs them.

Owns the mapping from task to instruction and the numbering of event slots. Knows nothing of time, batches or devices beyond their layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twinpilots.kernels.abi import (
    ACT_CODES,
    DTYPE_CODES,
    EVENT_FIRST_PACKET,
    EVENT_START,
    INSN,
    MAX_WAITS,
    NORM_CODES,
    NULL,
    NUM_ARGS,
    NUM_FLOATS,
    Epilogue,
    Op,
    Space,
)  # fmt: skip
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import QUEUES, Queue, Schedule, Task
from twinpilots.runtime.layout import Layout, page_bytes

RUN_QUEUES: tuple[Queue, ...] = tuple(queue for queue in QUEUES if not queue.startswith("disk"))  # `check_runnable` lets no plan pass that uses it
_OPS: dict[str, Op] = {
    "embed": Op.EMBED, "norm": Op.NORM, "linear": Op.LINEAR, "linear_in": Op.LINEAR_IN, "rope_append": Op.ROPE_APPEND, "attend": Op.ATTEND, "add": Op.ADD,
    "send": Op.COPY, "recv": Op.COPY, "load": Op.LOAD, "load_kv": Op.LOAD_KV, "store_kv": Op.STORE_KV, "poison": Op.POISON,
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One pass, lowered. ``queues[q]`` are q's instructions; a LOAD's first argument is an index into ``segments`` until `Executor` places the table."""

    schedule: Schedule
    bucket: BucketPlan
    queues: dict[Queue, np.ndarray]  # INSN arrays
    segments: np.ndarray  # int64 [num_segments][3]: dst, src, bytes
    num_events: int
    stream: bytes  # equal for programs whose link_in queues do the same


class Compiler:
    """Lowers schedules of one plan layout."""

    def __init__(self, spec: ModelSpec, plan: Plan, host: Layout, gpu: Layout | None) -> None:
        self.spec, self.plan, self.host, self.gpu = spec, plan, host, gpu
        self.ops: dict[tuple[int, str], OpSpec] = {(op.layer, op.name): op for op in spec.ops(plan.unit_rows)}

    def compile(self, schedule: Schedule, bucket: BucketPlan) -> Program:
        """The program of one pass. Raises AssertionError when a task needs something that the layout lacks (a bug, never the user's input)."""
        slots = self._event_slots(schedule)
        segments = [
            (self.gpu.ring + packet.ring_lo + segment.offset, self.host.weight(self.ops[segment.layer, segment.op], segment.row0), segment.num_bytes)
            for packet in schedule.packets
            for segment in packet.segments
            if self.gpu
        ]
        first_segment = np.cumsum([0] + [len(packet.segments) for packet in schedule.packets])
        queues: dict[Queue, np.ndarray] = {}
        for queue in RUN_QUEUES:
            rows = [self._lower(task, schedule, slots, first_segment) for task in schedule.queue(queue)]
            queues[queue] = np.array(rows, INSN) if rows else np.zeros(0, INSN)
        table = np.array(segments, np.int64).reshape(-1, 3)
        return Program(schedule, bucket, queues, table, 1 + max(slots.values(), default=EVENT_START), queues["link_in"].tobytes() + table.tobytes())

    def _event_slots(self, schedule: Schedule) -> dict[int, int]:
        """The event slot of each task that records. Ring events keep their slots in every program with the same packets: link_in runs ahead of the pass."""
        slots: dict[int, int] = {}
        num_packets = len(schedule.packets)
        segment_of: dict[tuple[int, str, int], int] = {}
        last_segment = []
        for packet in schedule.packets:
            for segment in packet.segments:
                segment_of[segment.layer, segment.op, segment.row0] = len(segment_of)
            last_segment.append(len(segment_of) - 1)
        last_use: dict[int, int] = {}
        for task in schedule.tasks:
            if task.kind == "load":
                slots[task.index] = EVENT_FIRST_PACKET + task.packet
            elif task.kind == "poison":
                last_use[last_segment[task.packet]] = task.index
            elif task.source == "ring":
                last_use[segment_of[task.layer, task.op, task.row0]] = task.index
        for segment_number, index in last_use.items():
            slots[index] = EVENT_FIRST_PACKET + num_packets + segment_number
        free = EVENT_FIRST_PACKET + num_packets + len(segment_of)
        for target in sorted({wait.task for task in schedule.tasks for wait in task.waits}):
            if target not in slots:
                slots[target] = free
                free += 1
        return slots

    def _lower(self, task: Task, schedule: Schedule, slots: dict[int, int], first_segment: np.ndarray) -> tuple[object, ...]:
        """One INSN record as a tuple."""
        waits = [(slots[wait.task], -1 if wait.previous else 0) for wait in task.waits]
        if task.kind == "load_kv":
            waits.append((EVENT_START, 0))  # the pass's metadata must be in place: unlike weights, KV is not loaded ahead of its pass
        assert len(waits) <= MAX_WAITS
        args: tuple[int, ...]
        floats: tuple[float, ...]
        if task.kind == "load":
            packet = schedule.packets[task.packet]
            moved = sum(segment.num_bytes for segment in packet.segments)  # without the padding between them
            args, floats = (int(first_segment[task.packet]), len(packet.segments), moved), ()
        else:
            args, floats = _LOWER[task.kind](self, task)
        padding = (0,) * (MAX_WAITS - len(waits))
        return (
            _OPS[task.kind], task.layer, int(task.logit_rows), max(task.mb, 0), task.glo, task.ghi, len(waits), slots.get(task.index, -1),
            tuple(event for event, _ in waits) + padding, tuple(offset for _, offset in waits) + padding,
            args + (NULL,) * (NUM_ARGS - len(args)), floats + (0.0,) * (NUM_FLOATS - len(floats)),
        )  # fmt: skip

    # -- addresses -----------------------------------------------------------------------------------------------------------------------

    def _layout(self, buffer: str) -> Layout:
        layout = self.gpu if buffer.startswith("gpu.") else self.host
        assert layout is not None
        return layout

    def _buffer(self, buffer: str, column: int = 0) -> tuple[int, int]:
        base, stride = self._layout(buffer).buffers[buffer.partition(".")[2]]
        return base + 4 * column, stride

    def _device_layout(self, task: Task) -> Layout:
        layout = self.host if task.queue == "cpu" else self.gpu
        assert layout is not None
        return layout

    def _small(self, task: Task, name: str) -> int:
        return self._device_layout(task).small.get(name, NULL)

    def _norm(self, task: Task, name: str) -> tuple[int, int]:
        name = name if name == "final_norm" else f"{task.layer}.{name}"
        return self._small(task, name), self._small(task, f"{name}.bias")

    def _kv(self, task: Task) -> int:
        if task.slot >= 0 and task.kind in ("rope_append", "attend"):
            assert self.gpu is not None
            return self.gpu.staging[task.slot]
        kv = self._device_layout(task).kv
        assert kv is not None
        return kv.layer(task.layer)


def _lower_embed(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    spec = c.spec
    dst, stride = c._buffer(task.dst)
    table = c.host.weight(c.ops[-1, "lm_head"], 0) if spec.tied else c.host.small["embed"]
    positions = c.host.small.get("positions", NULL)
    unit = c.ops[-1, "lm_head"].unit_rows
    panels = spec.tied or spec.table_format.is_quantized
    return (
        dst, stride, table, int(panels), DTYPE_CODES[spec.table_format.name], spec.hidden_size, unit, spec.vocab_size, positions,
        spec.learned_position_offset, DTYPE_CODES[spec.weight_dtype],
    ), (spec.embed_scale,)  # fmt: skip


def _lower_norm(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return (*c._buffer(task.dst), *c._buffer(task.src), *c._norm(task, task.norm), c.spec.hidden_size, NORM_CODES[c.spec.norm]), (c.spec.norm_eps,)


def _lower_linear(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    spec, op = c.spec, c.ops[task.layer, task.op]
    epilogue, bias, bias2 = Epilogue.NONE, f"{task.layer}.{task.op}.bias", ""
    if task.op == "gate_up_proj":
        epilogue, bias, bias2 = Epilogue.ACT_MUL, f"{task.layer}.gate_proj.bias", f"{task.layer}.up_proj.bias"
    elif task.op == "fc1":
        epilogue = Epilogue.ACT
    elif task.op == "lm_head" and spec.logit_softcap:
        epilogue = Epilogue.SOFTCAP

    def bias_address(name: str) -> int:
        base = c._small(task, name)
        return base if base == NULL else base + 4 * task.row0

    args = (
        *c._buffer(task.dst, task.dst_col), *c._buffer(task.src, task.src_col), _weight(c, task), DTYPE_CODES[op.format.name], task.row1 - task.row0,
        op.width, op.unit_rows, epilogue, ACT_CODES[spec.activation], bias_address(bias), bias_address(bias2), _rounding(op, task),
    )  # fmt: skip
    return args, (spec.logit_softcap or 0.0,)


def _lower_linear_in(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    op = c.ops[task.layer, task.op]
    return (
        *c._buffer(task.dst, task.dst_col), *c._buffer(task.src, task.src_col), _weight(c, task), DTYPE_CODES[op.format.name], task.row1 - task.row0,
        c.spec.hidden_size, int(task.accumulate), _rounding(op, task),
    ), ()  # fmt: skip


def _rounding(op: OpSpec, task: Task) -> int:
    """1: activations are rounded to 8 bits, which is faster on the CPU and on nothing else."""
    return int(op.fast and task.queue == "cpu")


def _weight(c: Compiler, task: Task) -> int:
    if task.source == "ring":
        assert c.gpu is not None
        return c.gpu.ring + task.ring_lo
    return c._device_layout(task).weight(c.ops[task.layer, task.op], task.row0)


def _lower_rope_append(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    spec = c.spec
    rope = spec.layers[task.layer].rope
    cos, sin = (NULL, NULL) if rope is None else (c._small(task, f"rope{rope}.cos"), c._small(task, f"rope{rope}.sin"))
    rotary_dim = 0 if rope is None else spec.ropes[rope].rotary_dim
    gains = (c._small(task, f"{task.layer}.q_norm"), c._small(task, f"{task.layer}.k_norm")) if spec.qk_norm else (NULL, NULL)
    args = (
        *c._buffer(task.src), *gains, cos, sin, rotary_dim, spec.num_heads, spec.num_kv_heads, spec.head_dim, c._kv(task), page_bytes(spec, c.plan),
        c.plan.page_size, DTYPE_CODES[c.plan.kv_dtype],
    )  # fmt: skip
    return args, (spec.norm_eps,)


def _lower_attend(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    spec = c.spec
    space = "host" if task.queue == "cpu" else "gpu"
    args = (
        *c._buffer(task.dst), *c._buffer(f"{space}.qkv"), spec.num_heads, spec.num_kv_heads, spec.head_dim, c._kv(task), page_bytes(spec, c.plan),
        c.plan.page_size, DTYPE_CODES[c.plan.kv_dtype], spec.layers[task.layer].window or 0,
    )  # fmt: skip
    return args, (spec.softmax_scale, spec.attention_softcap or 0.0)


def _lower_add(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    terms = [c._buffer(term) for term in task.terms] + [(NULL, 0)] * (2 - len(task.terms))
    gain = c._norm(task, task.norm) if task.norm else (NULL, NULL)
    bias = c._small(task, f"{task.layer}.{task.bias}.bias") if task.bias else NULL
    return (*c._buffer(task.dst), *terms[0], *terms[1], bias, *gain, NORM_CODES[c.spec.norm], c.spec.hidden_size), (c.spec.norm_eps,)


def _lower_copy(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return (*c._buffer(task.dst, task.dst_col), *c._buffer(task.src, task.src_col), task.columns, int(task.kind == "send")), ()


def _lower_kv_copy(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    spec = c.spec
    assert c.gpu is not None and c.host.kv is not None
    home = c.host.kv.layer(task.layer)
    return (c.gpu.staging[task.slot], home, page_bytes(spec, c.plan), c.plan.page_size, spec.num_kv_heads, spec.head_dim, DTYPE_CODES[c.plan.kv_dtype]), ()


def _lower_poison(c: Compiler, task: Task) -> tuple[tuple[int, ...], tuple[float, ...]]:
    assert c.gpu is not None and c.gpu.space == Space.GPU
    return (c.gpu.ring + task.ring_lo, task.columns), ()


_LOWER: dict[str, Callable[[Compiler, Task], tuple[tuple[int, ...], tuple[float, ...]]]] = {
    "embed": _lower_embed, "norm": _lower_norm, "linear": _lower_linear, "linear_in": _lower_linear_in, "rope_append": _lower_rope_append,
    "attend": _lower_attend, "add": _lower_add, "send": _lower_copy, "recv": _lower_copy, "load_kv": _lower_kv_copy, "store_kv": _lower_kv_copy,
    "poison": _lower_poison,
}  # fmt: skip
