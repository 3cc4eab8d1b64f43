"""One model's random weights in host memory, for one engine after another: filled once at memory speed, pinned once.

Owns the host arena that `Executor`s of different plans share, and what is in it: one block of random values over and over, so that every layout finds weights
and KV there that are finite wherever it looks. Norms and rotary tables are each layout's own. Knows nothing of plans, points or time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.cpu import choose_cores
from twinpilots.device.memory import EVENT_BYTES, HostArena
from twinpilots.device.topology import memory_nodes
from twinpilots.kernels.abi import EVENTS_OFFSET
from twinpilots.model.dummy import BLOCK
from twinpilots.model.spec import ModelSpec
from twinpilots.model.tensors import RawTensor, convert
from twinpilots.plan.memory import gpu_layout_bytes, host_layout_bytes
from twinpilots.plan.plan import Plan
from twinpilots.runtime.executor import NUM_EVENTS, Executor
from twinpilots.runtime.layout import Layout
from twinpilots.runtime.weights import OFFSET_MASK, GpuWrite, TensorSource, load_small

PIECE_BYTES = 256 << 20  # that one thread fills at a time
PACKET_BYTES = 64 << 20  # written to the GPU at a time
RESERVED_BYTES = EVENTS_OFFSET + EVENT_BYTES * NUM_EVENTS
Bytes = NDArray[np.uint8]


def random_block(spec: ModelSpec, seed: int = 0) -> Bytes:
    """Values of the spec's weight type, about as large as keeps activations in size. Of quantised weights every byte may be a scale's: they are such
    that any two make a small fp16 number, positive or negative."""
    rng = np.random.default_rng(seed)
    if any(op.format.is_quantized for op in spec.ops(64)):
        return (rng.choice(np.array([0x20, 0xA0], np.uint8), 2 * BLOCK) | rng.integers(0, 16, 2 * BLOCK, np.uint8)).astype(np.uint8)
    values = rng.standard_normal(BLOCK, dtype=np.float32) * np.float32(spec.hidden_size**-0.5)
    return np.ascontiguousarray(convert(RawTensor(data=values, dtype="fp32"), spec.weight_dtype, "random").data).view(np.uint8)


def fill(target: Bytes, block: Bytes, threads: int) -> None:
    """The block over and over, by several threads: copying leaves Python's lock alone, and so does the kernel that brings the pages."""

    def fill_piece(start: int) -> None:
        piece = target[start : start + PIECE_BYTES // len(block) * len(block)]
        for at in range(0, len(piece), len(block)):
            part = piece[at : at + len(block)]
            np.copyto(part, block[: len(part)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill_piece, range(0, len(target), PIECE_BYTES // len(block) * len(block))))


class Stock:
    """The weights of ``spec``, shared with the device's process where ``emulated``. ``pin``: pins an arena for all engines, and gives what undoes that.
    Close it."""

    def __init__(self, spec: ModelSpec, *, emulated: bool, pin: Callable[[HostArena], Callable[[], None]] | None = None) -> None:
        self._block, self._emulated, self._pin = random_block(spec), emulated, pin
        self._cores = choose_cores(gpu=True, emulated=emulated).pilot
        self._arena: HostArena | None = None
        self._unpin: Callable[[], None] = lambda: None
        self._dirty: list[tuple[int, int]] = []  # ranges that the last engine has left other bytes in

    def executor(self, spec: ModelSpec, plan: Plan, *, most_bytes: int = 0) -> Callable[..., Executor]:
        """What makes `Executor`s of this plan over the stock. ``most_bytes``: what later plans will ask for, if more."""
        needed = host_layout_bytes(spec, plan)
        if self._arena is None or self._arena.num_bytes < needed:
            self._provide(max(needed, most_bytes))
        return partial(Executor, arena=self._arena, load=self._load)

    def _provide(self, num_bytes: int) -> None:
        self.close()
        self._arena = HostArena(num_bytes, shared=self._emulated, num_events=NUM_EVENTS, nodes=memory_nodes(self._cores))
        fill(self._arena.bytes[RESERVED_BYTES:], self._block, len(self._cores))
        if self._pin is not None:
            self._unpin = self._pin(self._arena)

    def _load(
        self, spec: ModelSpec, plan: Plan, source: TensorSource, host: Layout, memory: HostArena, gpu: Layout | None, gpu_write: GpuWrite | None, progress: Any
    ) -> None:  # fmt: skip
        """`runtime.weights.load_weights`, with the linears and the tables there already: in the place of any layout, and of its KV."""
        for first, last in self._dirty:
            fill(memory.bytes[first:last], self._block, len(self._cores))
        self._dirty = _others(spec, plan, host)
        if gpu_write is not None:
            size = min(PACKET_BYTES, memory.num_bytes - RESERVED_BYTES)
            num_bytes = gpu_layout_bytes(spec, plan)
            for at in range(0, num_bytes, size):
                gpu_write(at, memory.bytes[RESERVED_BYTES : RESERVED_BYTES + min(size, num_bytes - at)])
        load_small(spec, plan, source, host, memory, gpu, gpu_write)
        if progress:
            progress(spec.linear_bytes)

    def close(self) -> None:
        self._unpin()
        self._unpin, self._dirty = (lambda: None), []
        if self._arena is not None:
            self._arena.close()
            self._arena = None


def _others(spec: ModelSpec, plan: Plan, host: Layout) -> list[tuple[int, int]]:
    """The ranges of the arena that hold neither weights nor KV: an engine leaves activations, norms and programs there."""
    ops = [op for op in spec.ops(plan.unit_rows) if (op.layer, op.name) in host.weights]
    ends = [(host.weight(op, host.rows[op.layer, op.name][1])) & OFFSET_MASK for op in ops]
    ends += [(host.small[name] & OFFSET_MASK) + size for name, size in (("embed", spec.table_bytes), ("positions", spec.position_bytes)) if name in host.small]
    weights_end, last = max(ends, default=RESERVED_BYTES), host_layout_bytes(spec, plan)
    if host.kv is None:
        return [(weights_end, last)]
    kv_first = host.kv.base & OFFSET_MASK
    return [(weights_end, kv_first), (kv_first + host.kv.layer_bytes * len(host.kv.layers), last)]
