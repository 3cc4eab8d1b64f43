"""A bench on the real devices: runs hand-made instruction lists through the same queues as the executor and reads the devices' own times.

Owns one host arena and one device arena for the time of a measurement. Knows nothing of what is measured or of plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from twinpilots.device.base import GpuDevice
from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import ENTRY, EVENTS_OFFSET, INSN, MAX_WAITS, NULL, NUM_ARGS, NUM_FLOATS, Meta, Op, Space, address
from twinpilots.plan.tasks import GPU_KV, RunQueue

TIMEOUT_S = 60.0
PROGRAM_BYTES = 4 << 20
NUM_EVENTS = 8192


def instruction(
    op: Op, args: Sequence[int], floats: Sequence[float] = (), *, waits: Sequence[int] = (), record: int = -1, groups: tuple[int, int] = (0, 3)
) -> tuple[object, ...]:
    """One INSN record as a tuple, over the token rows of micro-batch 0."""
    padding = (0,) * (MAX_WAITS - len(waits))
    return (
        int(op), 0, 0, 0, *groups, len(waits), record, tuple(waits) + padding, (0,) * MAX_WAITS,
        tuple(args) + (NULL,) * (NUM_ARGS - len(args)), tuple(floats) + (0.0,) * (NUM_FLOATS - len(floats)),
    )  # fmt: skip


class Pilot(Protocol):
    """What a bench asks of the CPU's side: `CpuPilot` is one."""

    threads: int

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA nodes on which what it reads should lie."""
        ...

    def run(self, entry: Any, host: HostArena) -> None:
        """Runs one entry of instructions to its end."""
        ...


class Rig:
    """Host arena, device arena and the way to run instructions on a queue. Close it, or use it as a context manager.

    ``clock``: what the devices' time is counted by (s); virtual devices bring their own.
    """

    def __init__(
        self, pilot: Pilot, gpu: GpuDevice | None, *, host_bytes: int, gpu_bytes: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:  # fmt: skip
        self.pilot, self.gpu, self.clock = pilot, gpu, clock
        num_bytes = EVENTS_OFFSET + 4 * NUM_EVENTS + host_bytes + PROGRAM_BYTES + (1 << 20)
        self.host = HostArena(num_bytes, shared=gpu is not None and gpu.emulated, num_events=NUM_EVENTS, nodes=pilot.nodes)
        self._meta = self.host.view(self.host.alloc(1 << 18, "programs"), np.dtype(np.int32), (1 << 16,))
        self._programs = self.host.alloc(PROGRAM_BYTES, "programs")
        self._pass_id = 0
        self._gpu_pos, self._gpu_bytes = 0, gpu_bytes
        if gpu:
            gpu.open(self.host, gpu_bytes)

    def alloc_host(self, num_bytes: int) -> int:
        return address(Space.HOST, self.host.alloc(num_bytes, "workspace"))

    def alloc_gpu(self, num_bytes: int) -> int:
        start = -(-self._gpu_pos // 64) * 64
        self._gpu_pos = start + num_bytes
        assert self._gpu_pos <= self._gpu_bytes, "the rig's device arena is too small"
        return address(Space.GPU, start)

    def fill(self, addr: int, num_bytes: int, value: int) -> None:
        """Sets every byte (weights must hold ordinary numbers: denormals and NaN are slower than the truth)."""
        offset = addr & ((1 << 56) - 1)
        if addr >> 56 == Space.GPU:
            assert self.gpu is not None
            self.gpu.write(offset, np.full(num_bytes, value, np.uint8))
        else:
            self.host.view(offset, np.dtype(np.uint8), (num_bytes,))[:] = value

    def read_host(self, num_bytes: int) -> None:
        """Reads so much of the host arena once: nothing else stays in the caches."""
        self.host.view(0, np.dtype(np.uint64), (min(num_bytes, self.host.num_bytes) // 8,)).max()

    def set_tokens(self, tokens: int) -> None:
        """All token rows in micro-batch 0, group 0; every row at position 0 of slot = its number."""
        self.set_sequences([(tokens, tokens)], page_size=1 << 30)

    def set_sequences(self, sequences: Sequence[tuple[int, int]], page_size: int, group: int = GPU_KV) -> None:
        """Sequences of (query tokens, KV tokens after the pass), each on pages of its own, numbered from 0; all of one ``group``."""
        meta = self._meta
        meta[:] = 0
        tokens = sum(query for query, _ in sequences)
        count = len(sequences)
        pages = [-(-kv // page_size) for _, kv in sequences]
        meta[Meta.NUM_TOKENS], meta[Meta.NUM_SEQS], meta[Meta.NUM_MICRO_BATCHES] = tokens, count, 1
        sizes = {
            Meta.OFF_TOKEN: tokens, Meta.OFF_POSITION: tokens, Meta.OFF_ROPE_ROW: tokens, Meta.OFF_SLOT: tokens, Meta.OFF_LOGIT_ROW: 1, Meta.OFF_SEQ_ROW: count,
            Meta.OFF_SEQ_LEN: count, Meta.OFF_SEQ_KV: count, Meta.OFF_SEQ_PAGES: count, Meta.OFF_SEQ_HOME: count, Meta.OFF_PAGE: sum(pages),
        }  # fmt: skip
        position = int(Meta.HEADER)
        for word, size in sizes.items():
            meta[word] = position
            position += size
        meta[Meta.NUM_WORDS] = position
        meta[Meta.ROWS : Meta.ROWS + 4] = [tokens if edge > group else 0 for edge in range(4)]
        meta[Meta.SEQS : Meta.SEQS + 4] = [count if edge > group else 0 for edge in range(4)]
        starts = np.cumsum([0] + [query for query, _ in sequences])[:-1]
        first_pages = np.cumsum([0, *pages])[:-1]
        for word, values in (
            (Meta.OFF_SEQ_ROW, starts), (Meta.OFF_SEQ_LEN, [q for q, _ in sequences]), (Meta.OFF_SEQ_KV, [kv for _, kv in sequences]),
            (Meta.OFF_SEQ_PAGES, first_pages), (Meta.OFF_SEQ_HOME, first_pages), (Meta.OFF_PAGE, np.arange(sum(pages))), (Meta.OFF_SLOT, np.arange(tokens)),
        ):  # fmt: skip
            meta[meta[word] : meta[word] + len(values)] = values

    def run(self, programs: dict[RunQueue, list[tuple[object, ...]]]) -> dict[RunQueue, np.ndarray]:
        """Runs the instructions of all queues at once, to the end. Returns per queue int64 [count][3]: wait began, work began, work ended (ns)."""
        self._pass_id += 1
        position = self._programs
        entries, traces = {}, {}
        for queue, rows in programs.items():
            insns = np.array(rows, INSN)
            self.host.view(position, INSN, insns.shape)[:] = insns
            trace = -(-(position + insns.nbytes) // 64) * 64
            traces[queue] = self.host.view(trace, np.dtype(np.int64), (len(insns), 3))
            entry = np.zeros((), ENTRY)
            entry["insns"], entry["trace"] = address(Space.HOST, position), address(Space.HOST, trace)
            entry["meta"] = address(Space.HOST, self._meta.ctypes.data - self.host.base)
            entry["count"], entry["pass_id"], entry["first_pass"] = len(insns), self._pass_id, self._pass_id
            entries[queue] = entry
            position = -(-(trace + 24 * len(insns)) // 64) * 64
        assert position <= self._programs + PROGRAM_BYTES
        for queue, entry in sorted(entries.items(), key=lambda item: item[0] == "gpu"):  # the compute queue last
            if queue != "cpu":
                assert self.gpu is not None
                self.gpu.submit(queue, entry)
        if "cpu" in entries:
            self.pilot.run(entries["cpu"], self.host)
        for queue in entries:
            if queue != "cpu":
                assert self.gpu is not None
                self.gpu.wait(queue, TIMEOUT_S)
        return {queue: trace.copy() for queue, trace in traces.items()}

    def close(self) -> None:
        if self.gpu:
            self.gpu.close()
        self.host.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def work_s(trace: np.ndarray) -> np.ndarray:
    """Seconds of work per instruction, waits excluded."""
    return np.asarray((trace[:, 2] - trace[:, 1]) * 1e-9)
