"""KV on its way between the tiers: the little program that copies it, beside the program of an ordinary pass.

Owns the instructions, their piece of the host arena and what they took. Knows nothing of why a sequence moves.

The copies are LOAD instructions at the head of the queue link_out, whichever way they go: link_in may already be working for the next pass, and would not
come to them before that pass. They run while the pass computes. No wait orders them against it, because none is needed: a sequence that moves is in no
pass until its copy is over, so nobody else touches its old pages' tokens (shared pages are only read) or its new pages (nobody has them yet); passes are
fenced from each other by the driver, who waits for link_out. `accesses` declares that, and `tests/unit/test_migration.py` holds passes against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import ENTRY, INSN, NULL, Op, Space, address
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.memory import KV_MOVES_PER_PASS, kv_move_pages
from twinpilots.plan.packets import align
from twinpilots.plan.plan import Plan
from twinpilots.plan.tasks import Access
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.kv_cache import KvMove
from twinpilots.runtime.layout import Layout, page_bytes


class KvMoves:
    """Writes a pass's copies into ``host``, before it runs: `kv_move_pages` pages of KV_MOVES_PER_PASS sequences at most, into the `kv_move_bytes` bytes at
    offset ``start``."""

    def __init__(self, spec: ModelSpec, plan: Plan, host: HostArena, start: int, host_layout: Layout, gpu_layout: Layout) -> None:
        assert host_layout.kv is not None and gpu_layout.kv is not None
        self._layers = [(gpu_layout.kv.layer(layer), host_layout.kv.layer(layer)) for layer in range(spec.num_layers)]
        self._page_bytes = page_bytes(spec, plan)
        most = spec.num_layers * kv_move_pages(plan)
        self._segments_at, self._insns_at = start, start + align(24 * most)
        self._trace_at = self._insns_at + KV_MOVES_PER_PASS * INSN.itemsize
        self._segments = host.view(self._segments_at, np.int64, (most, 3))
        self._insns = host.view(self._insns_at, INSN, (KV_MOVES_PER_PASS,))
        self._trace = host.view(self._trace_at, np.int64, (KV_MOVES_PER_PASS, 3))
        self._count = 0

    def write(self, moves: Sequence[KvMove]) -> np.ndarray:
        """The instructions (a view); link bytes are in their third argument. One that has nothing to copy is left out."""
        used = self._count = 0
        for move in moves:
            if move.source:
                rows = self._segments_of(move)
                self._segments[used : used + len(rows)] = rows
                insn = self._insns[self._count]
                insn["op"], insn["layer"], insn["ghi"], insn["record"] = Op.LOAD, 0, 3, -1
                for name in ("row_kind", "mb", "glo", "num_waits"):
                    insn[name] = 0
                insn["a"] = NULL
                insn["a"][:3] = address(Space.HOST, self._segments_at + 24 * used), len(rows), int(rows[:, 2].sum())
                used += len(rows)
                self._count += 1
        self._trace[:] = 0
        return self._insns[: self._count]

    def _segments_of(self, move: KvMove) -> np.ndarray:
        """[layers x pages][3]: destination, source, bytes."""
        source, target = (self._page_bytes * np.array(pages, np.int64) for pages in (move.source, move.target))
        rows = np.empty((len(self._layers), len(source), 3), np.int64)
        for layer, (gpu, host) in enumerate(self._layers):
            to, fro = (gpu, host) if move.to == "gpu" else (host, gpu)
            rows[layer, :, 0], rows[layer, :, 1] = to + target, fro + source
        rows[:, :, 2] = self._page_bytes
        return rows.reshape(-1, 3)

    def entry(self, pass_id: int, meta: int) -> np.ndarray:
        """What a queue is given."""
        entry = np.zeros((), ENTRY)
        entry["insns"], entry["meta"], entry["trace"] = address(Space.HOST, self._insns_at), meta, address(Space.HOST, self._trace_at)
        entry["count"], entry["pass_id"], entry["first_pass"] = self._count, pass_id, pass_id
        return entry

    @property
    def num_bytes(self) -> int:
        """What the last written moves copy."""
        return int(self._insns["a"][: self._count, 2].sum())

    @property
    def seconds(self) -> float:
        """How long the copies took."""
        return float((self._trace[: self._count, 2] - self._trace[: self._count, 1]).sum()) * 1e-9

    def release(self) -> None:
        """Views that are still held would keep the arena's file open."""
        self._segments, self._insns, self._trace = np.empty((0, 3), np.int64), np.empty(0, INSN), np.empty((0, 3), np.int64)
        self._count = 0


def accesses(batch: StepBatch) -> Iterator[tuple[KvMove, Access, Access]]:
    """What every move reads and writes: KV pages (columns are page numbers here, not layers) of the tier that it leaves and of the one that it goes to."""
    for move in batch.moves:
        there, here = ("gpu.kv", "host.kv") if move.to == "gpu" else ("host.kv", "gpu.kv")
        for source, target in zip(move.source, move.target, strict=True):
            yield move, Access(here, source, source + 1), Access(there, target, target + 1)
