"""The two pilots of a hidden machine, driven by the profiler as real ones are: instruction lists in, times of a virtual clock out.

Owns `HiddenDevices` and how long an instruction takes on a `HiddenMachine`. The profiler's own experiments run on it unchanged (`measured`); what the planner
gets to know of the machine is what they find.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.hidden_machine import CPU, GPU, LINK_IN, LINK_OUT, HiddenMachine, Job, Weather, play
from twinpilots.device.memory import HostArena
from twinpilots.hardware.measure import measure, measure_scaled
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.kernels.abi import DTYPE_CODES, INSN, Epilogue, Meta, Op
from twinpilots.model.spec import BYTES_PER_WEIGHT, ModelSpec
from twinpilots.model.weight_format import FORMATS

QUEUE_NUMBERS = {"cpu": CPU, "gpu": GPU, "link_in": LINK_IN, "link_out": LINK_OUT}
NAMES = {code: name for name, code in DTYPE_CODES.items()}
KV_ELEMENT_BYTES = {**BYTES_PER_WEIGHT, "int8": 1}  # the scales beside int8 are too few to matter here
HIDDEN_CORES = 4
ProfileKind = Literal["full", "quick", "scaled"]  # scaled: the nearest preset at a few measured rates
KINDS: tuple[ProfileKind, ...] = ("full", "quick", "scaled")
Peak = tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """What an instruction needs to know of the metadata."""

    tokens: int
    sequences: tuple[tuple[int, int], ...]  # (query tokens, KV tokens after the pass)


class HiddenDevices:
    """Both pilots' queues. ``gpu`` is a `GpuDevice` in so far as a bench asks; the pilot is this object."""

    threads = HIDDEN_CORES
    nodes: tuple[int, ...] = ()

    def __init__(self, machine: HiddenMachine, gpu_memory_bytes: int, seed: int) -> None:
        self.machine = machine
        self.gpu = _Gpu(self, machine.name, gpu_memory_bytes)
        self.host: HostArena | None = None
        self.submitted: dict[int, Any] = {}
        self._now_s = 0.0
        self._rng = random.Random(f"bench {machine.name} {seed}")
        self._weather = Weather(machine, self._rng)

    def clock(self) -> float:
        return self._now_s

    def run(self, entry: Any, host: HostArena) -> None:
        """The CPU's entry, and what was submitted to the other queues before."""
        self.host = host
        self.submitted[CPU] = entry
        self.finish()

    def finish(self) -> None:
        """Runs all that was submitted, together."""
        assert self.host is not None
        jobs: list[Job] = []
        lists: dict[int, list[int]] = {}
        recorded: dict[int, int] = {}
        weather = self._weather.next()
        instructions = {queue: self._view(entry["insns"], INSN, (int(entry["count"]),)) for queue, entry in self.submitted.items()}
        for queue, rows in instructions.items():
            batch = self._batch(self.submitted[queue]["meta"])
            known: dict[bytes, tuple[float, float]] = {}
            lists[queue] = []
            for row in rows:
                key = row["op"].tobytes() + row["a"][:12].tobytes()
                if key not in known:
                    known[key] = instruction_cost(self.machine, queue, row, batch)
                seconds, host_bytes = known[key]
                if row["record"] >= 0:
                    recorded[int(row["record"])] = len(jobs)
                lists[queue].append(len(jobs))
                jobs.append(Job(queue, seconds * weather[queue], host_bytes))
        for queue, rows in instructions.items():
            for row, number in zip(rows, lists[queue], strict=True):
                jobs[number].waits = [recorded[int(event)] for event in row["wait_event"][: int(row["num_waits"])]]
        play(self.machine, jobs, 1, self._rng)
        for queue, entry in self.submitted.items():
            self._write_trace(entry, [jobs[number] for number in lists[queue]])
        self._now_s += self.machine.step_s + max((job.end_s for job in jobs), default=0.0)
        self.submitted = {}

    def peaks(self, of: Literal["cpu", "gpu", "all cores"]) -> Peak:
        if of == "all cores":
            return self.machine.dram, self.machine.cpu.flops
        processor = self.machine.cpu if of == "cpu" else self.machine.gpu
        return processor.read, processor.flops

    def _write_trace(self, entry: Any, jobs: list[Job]) -> None:
        trace = self._view(entry["trace"], np.dtype(np.int64), (len(jobs), 3))
        free_s = 0.0
        for i, job in enumerate(jobs):
            trace[i] = [round((self._now_s + seconds) * 1e9) for seconds in (free_s, job.start_s, job.end_s)]
            free_s = job.end_s

    def _batch(self, address: int) -> Batch:
        words = self._view(address, np.dtype(np.int32), (1 << 16,))
        count = int(words[Meta.NUM_SEQS])
        queries, lengths = (words[words[at] : words[at] + count].tolist() for at in (Meta.OFF_SEQ_LEN, Meta.OFF_SEQ_KV))
        return Batch(int(words[Meta.NUM_TOKENS]), tuple(zip(queries, lengths, strict=True)))

    def _view(self, address: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        assert self.host is not None
        return self.host.view(int(address) & ((1 << 56) - 1), dtype, shape)


class _Gpu:
    """The GPU's side of `HiddenDevices`: holds nothing, computes nothing."""

    emulated, overhead_bytes = False, 0

    def __init__(self, devices: HiddenDevices, name: str, memory_bytes: int) -> None:
        self._devices, self.name, self.memory_bytes = devices, f"hidden:{name}", memory_bytes

    def open(self, host: HostArena, num_bytes: int) -> None:
        assert num_bytes <= self.memory_bytes
        self._devices.host = host

    def submit(self, queue: str, entry: Any) -> None:
        self._devices.submitted[QUEUE_NUMBERS[queue]] = entry

    def wait(self, queue: str, timeout_s: float) -> None:  # noqa: ARG002 the protocol's
        if QUEUE_NUMBERS[queue] in self._devices.submitted:
            self._devices.finish()

    def cancel(self, queue: str, pass_id: int) -> None:  # noqa: ARG002 nothing is ever under way
        self._devices.submitted.pop(QUEUE_NUMBERS[queue], None)

    def write(self, offset: int, data: np.ndarray) -> None:
        assert offset + data.nbytes <= self.memory_bytes

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        assert offset + num_bytes <= self.memory_bytes
        return np.zeros(num_bytes, np.uint8)

    def close(self) -> None:
        self._devices.submitted = {}


# -- instructions ------------------------------------------------------------------------------------------------------------------------------------


def _linear(machine: HiddenMachine, queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    """LINEAR: rows are outputs (gate and up side by side count as one row); LINEAR_IN: rows are inputs."""
    return _weights(machine, queue, a[6], a[7] * (2 if a[9] == Epilogue.ACT_MUL else 1), a[5], batch)


def _linear_in(machine: HiddenMachine, queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    return _weights(machine, queue, a[6], a[7], a[5], batch)


def _weights(machine: HiddenMachine, queue: int, rows: int, row_elements: int, dtype: int, batch: Batch) -> tuple[float, float]:
    weight_bytes = rows * row_elements * FORMATS[NAMES[dtype]].bytes_per_weight
    seconds = machine.processors[queue].linear_s(weight_bytes, rows * row_elements, rows, batch.tokens)
    return seconds, host_bytes_of(machine, queue, weight_bytes)


def _attend(machine: HiddenMachine, queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    heads, kv_heads, head_dim, element = a[4], a[5], a[6], KV_ELEMENT_BYTES[NAMES[a[10]]]
    found = []
    for query, length in batch.sequences:
        pairs = query * (length - query) + query * (query + 1) / 2
        found.append((length, 2.0 * kv_heads * head_dim * element * length, 4.0 * heads * head_dim * pairs))
    return machine.processors[queue].attention_s(found), host_bytes_of(machine, queue, sum(kv_bytes for _, kv_bytes, _ in found))


def _norm(machine: HiddenMachine, queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    return machine.processors[queue].small_s(8.0 * batch.tokens * a[6]), 0.0


def _copy(machine: HiddenMachine, _queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    return machine.copy_time_s(4.0 * batch.tokens * a[4], down=bool(a[5])), 0.0


def _load(machine: HiddenMachine, _queue: int, a: list[int], _batch: Batch) -> tuple[float, float]:
    return machine.packet_time_s(a[2]), float(a[2])


def _load_kv(machine: HiddenMachine, _queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    pages = sum(-(-(length - query) // a[3]) for query, length in batch.sequences)
    return machine.packet_time_s(pages * a[2], pages=pages), float(pages * a[2])


def _store_kv(machine: HiddenMachine, _queue: int, a: list[int], batch: Batch) -> tuple[float, float]:
    num_bytes = batch.tokens * a[2] / a[3]
    return machine.packet_time_s(num_bytes, down=True, pages=len(batch.sequences)), num_bytes


def host_bytes_of(machine: HiddenMachine, queue: int, num_bytes: float) -> float:
    return num_bytes if queue == CPU or (queue == GPU and machine.shared) else 0.0


COSTS: dict[int, Callable[[HiddenMachine, int, list[int], Batch], tuple[float, float]]] = {
    Op.LINEAR: _linear, Op.LINEAR_IN: _linear_in, Op.ATTEND: _attend, Op.NORM: _norm, Op.COPY: _copy, Op.LOAD: _load, Op.LOAD_KV: _load_kv,
    Op.STORE_KV: _store_kv,
}  # fmt: skip


def instruction_cost(machine: HiddenMachine, queue: int, row: np.void, batch: Batch) -> tuple[float, float]:
    """(seconds alone, bytes of host memory touched)."""
    return COSTS[int(row["op"])](machine, queue, row["a"].tolist(), batch)


def measured(machine: HiddenMachine, spec: ModelSpec, gpu_memory_bytes: int, seed: int, kind: ProfileKind = "full") -> HardwareProfile:
    """What the offline profiler says of the machine."""
    devices = HiddenDevices(machine, gpu_memory_bytes, seed)
    if kind == "scaled":
        return measure_scaled(devices, devices.gpu, spec, peaks=devices.peaks, clock=devices.clock)
    return measure(devices, devices.gpu, spec, quick=kind == "quick", peaks=devices.peaks, clock=devices.clock)
