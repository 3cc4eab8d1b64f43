"""Fills a layout with a model's weights: packs every linear into the host format, resident rows to the GPU, the rest where the CPU and the link read it.

Owns the way from a checkpoint's tensors to addresses. Streams one op at a time, so that the peak is one op's tensors beyond the arenas.
Knows nothing of file formats (model.checkpoint) or of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from twinpilots.device.memory import HostArena
from twinpilots.kernels import format as weight_format
from twinpilots.kernels import quant_format
from twinpilots.kernels.abi import NULL
from twinpilots.model.spec import ModelSpec, OpSpec, RopeSpec
from twinpilots.plan.plan import Plan
from twinpilots.runtime.layout import Layout, small_tensors

OFFSET_MASK = (1 << 56) - 1


class TensorSource(Protocol):
    """What a checkpoint gives: a tensor by id, linears as float32 or raw 16-bit words in the model's dtype, norms and biases as float32."""

    def array(self, tensor_id: str) -> np.ndarray: ...

    def blocks(self, tensor_id: str) -> np.ndarray:
        """Row blocks (`kernels.quant_format`) of a weight that the model keeps quantised."""
        ...


class HostMemory(Protocol):
    def view(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray: ...


GpuWrite = Callable[[int, np.ndarray], None]  # (offset, contiguous bytes)
Loader = Callable[
    [ModelSpec, Plan, TensorSource, Layout, HostArena, Layout | None, GpuWrite | None, Callable[[int], None] | None], None
]  # `load_weights`, or what takes its place  # fmt: skip


def load_weights(
    spec: ModelSpec, plan: Plan, source: TensorSource, host: Layout, memory: HostMemory, gpu: Layout | None, gpu_write: GpuWrite | None,
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Copies every weight to where the layouts keep it. ``progress`` is told the bytes done, op by op."""
    for op in spec.ops(plan.unit_rows):
        _load_op(op, source, host, memory, gpu, gpu_write)
        if progress:
            progress(op.weight_bytes)
    if "embed" in host.small:
        _load_table(spec, plan, source, _host_view(memory, host.small["embed"], spec.table_bytes))
    if "positions" in host.small:
        _host_view(memory, host.small["positions"], spec.position_bytes)[:] = source.array("positions").reshape(-1).view(np.uint8)
    load_small(spec, plan, source, host, memory, gpu, gpu_write)


def load_small(
    spec: ModelSpec, plan: Plan, source: TensorSource, host: Layout, memory: HostMemory, gpu: Layout | None, gpu_write: GpuWrite | None
) -> None:  # fmt: skip
    """Copies norms, biases and rotary tables to every device that keeps them."""
    for name, values in _small_values(spec, plan, source):
        for layout in (host, gpu):
            if layout is None or layout.small.get(name, NULL) == NULL:
                continue
            raw = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
            if layout is host:
                _host_view(memory, layout.small[name], raw.nbytes)[:] = raw
            else:
                assert gpu_write is not None
                gpu_write(layout.small[name] & OFFSET_MASK, raw)


def _load_table(spec: ModelSpec, plan: Plan, source: TensorSource, out: np.ndarray) -> None:
    """The untied embedding table: row by row, or in panels like lm_head's where it is quantised."""
    if spec.table_format.is_quantized:
        quant_format.pack_out(source.blocks("embed"), spec.table_format, spec.ops(plan.unit_rows)[-1].unit_rows, out=out)
    else:
        out[:] = source.array("embed").reshape(-1).view(np.uint8)


def _host_view(memory: HostMemory, addr: int, num_bytes: int) -> np.ndarray:
    return memory.view(addr & OFFSET_MASK, np.dtype(np.uint8), (num_bytes,))


def _load_op(op: OpSpec, source: TensorSource, host: Layout, memory: HostMemory, gpu: Layout | None, gpu_write: GpuWrite | None) -> None:
    key = (op.layer, op.name)
    parts: list[np.ndarray] | None = None
    for layout in (host, gpu):
        if layout is None or key not in layout.weights:
            continue
        parts = parts or _op_tensors(op, source)
        row0, row1 = layout.rows[key]
        if layout is host:
            _pack(op, parts, row0, row1, _host_view(memory, layout.weights[key], (row1 - row0) * op.row_bytes))
        else:
            assert gpu_write is not None
            packed = np.empty((row1 - row0) * op.row_bytes, np.uint8)
            _pack(op, parts, row0, row1, packed)
            gpu_write(layout.weights[key] & OFFSET_MASK, packed)


def _op_tensors(op: OpSpec, source: TensorSource) -> list[np.ndarray]:
    prefix = "" if op.layer < 0 else f"{op.layer}."
    names = ("gate_proj", "up_proj") if op.name == "gate_up_proj" else (op.name,)
    read = source.blocks if op.format.is_quantized else source.array
    return [read(f"{prefix}{name}") for name in names]


def _pack(op: OpSpec, parts: list[np.ndarray], row0: int, row1: int, out: np.ndarray) -> None:
    """Rows [row0, row1) of the op in the format of docs/execution.md, into ``out`` (bytes)."""
    if op.format.is_quantized:
        _pack_blocks(op, parts, row0, row1, out)
        return
    typed = out.view(parts[0].dtype)
    if op.split_dim == "in":
        weight_format.pack_in(parts[0], out=typed, row0=row0, row1=row1)
    elif op.name == "gate_up_proj":
        weight_format.pack_gate_up(parts[0], parts[1], op.unit_rows, out=typed, row0=row0, row1=row1)
    else:
        weight_format.pack_out(parts[0], op.unit_rows, out=typed, row0=row0, row1=row1)


def _pack_blocks(op: OpSpec, parts: list[np.ndarray], row0: int, row1: int, out: np.ndarray) -> None:
    if op.split_dim == "in":
        quant_format.pack_in(parts[0], op.format, out=out, row0=row0, row1=row1)
    elif op.name == "gate_up_proj":
        quant_format.pack_gate_up(parts[0], parts[1], op.format, op.unit_rows, out=out, row0=row0, row1=row1)
    else:
        quant_format.pack_out(parts[0], op.format, op.unit_rows, out=out, row0=row0, row1=row1)


def _small_values(spec: ModelSpec, plan: Plan, source: TensorSource) -> Iterator[tuple[str, np.ndarray]]:
    for name in small_tensors(spec):
        values = source.array(name).astype(np.float32)
        yield name, values + np.float32(spec.norm_offset) if name.endswith("norm") else values
    for number, rope in enumerate(spec.ropes):
        cos, sin = rope_tables(rope, plan.max_model_len)
        yield f"rope{number}.cos", cos
        yield f"rope{number}.sin", sin


def rope_tables(rope: RopeSpec, max_model_len: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each [rows, rotary_dim / 2] fp32: one row per position; longrope appends the rows of its long factors."""
    frequencies = [rope.inv_freq] + ([rope.long_inv_freq] if rope.long_inv_freq else [])
    positions = np.arange(max_model_len, dtype=np.float32)
    angles = np.concatenate([positions[:, None] * np.asarray(inv_freq, np.float32)[None, :] for inv_freq in frequencies])
    return np.cos(angles) * np.float32(rope.scale), np.sin(angles) * np.float32(rope.scale)
