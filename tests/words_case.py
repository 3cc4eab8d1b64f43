"""Hand-offs between CPU and GPU over and over: does each side, once it sees the other's word, see all of the other's data? For tests/gpu, gpu-check and the
stand-in. Needs no pytest."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from tests.cpu.native_twin import Batch, Seq
from tests.device_programs import entry, insn
from twinpilots.device.cuda import CudaGpu, CudaRuntime
from twinpilots.device.cuda_sync import HostView
from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import Op, Space, address

ROWS, COLUMNS = 64, 256  # 64 KiB: a hand-off of 16 sequences of a small model
HAND_OFFS = 40  # there and back, in one program: all launched ahead
PATIENCE_S = 10.0
MIB = 2**20


class Polling(CudaRuntime):
    """The same device, whose launch threads poll for the CPU."""

    def pin(self, host: HostArena) -> HostView:
        return HostView(alias=super().pin(host).alias, words=None, reason="not wanted here")


def hand_offs(gpu: CudaGpu, passes: int) -> tuple[int, float]:
    """(hand-offs there and back, median seconds of one). AssertionError when data comes after its word, on either side."""
    host = HostArena((1 + HAND_OFFS) * MIB, shared=False, num_events=2 * HAND_OFFS + 4)
    gpu.open(host, MIB)
    took = []
    try:
        up, down, program = _program(host)
        for number in range(1, passes + 1):
            program["pass_id"] = number
            gpu.submit("gpu", program)
            for index in range(HAND_OFFS):
                value = float(number * HAND_OFFS + index)
                up[:] = value
                began = time.perf_counter()
                host.events[2 + 2 * index] = number  # after the data: a store is not seen before those that it follows
                _await(host, 3 + 2 * index, number)
                took.append(time.perf_counter() - began)
                wrong = int((down[index] != value).sum())
                assert wrong == 0, f"pass {number}, hand-off {index}: {wrong} of {ROWS * COLUMNS} numbers came after the word that said they were there"
            gpu.wait("gpu", PATIENCE_S)
    finally:
        gpu.close()
        host.close()
    return passes * HAND_OFFS, median(took)


def _program(host: HostArena) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from one host buffer to the GPU and back to another, each time a further one, in the order of events 2, 3, 4, ..."""
    batch = Batch([Seq(1) for _ in range(ROWS)])
    meta = host.alloc(batch.words.nbytes, "programs")
    host.view(meta, np.int32, batch.words.shape)[:] = batch.words
    size = 4 * ROWS * COLUMNS
    source = host.alloc(size, "workspace")
    targets = [host.alloc(size, "workspace") for _ in range(HAND_OFFS)]
    insns = []
    for index, target in enumerate(targets):
        there = insn(Op.COPY, address(Space.GPU, 0), COLUMNS, source, COLUMNS, COLUMNS, 0, waits=(2 + 2 * index,))
        back = insn(Op.COPY, target, COLUMNS, address(Space.GPU, 0), COLUMNS, COLUMNS, 1, record=3 + 2 * index)
        insns += [there, back]
    for one in insns:
        one["ghi"] = 3
    program = entry(host, *insns)
    program["meta"] = meta
    up, first = host.view(source, np.float32, (ROWS, COLUMNS)), targets[0]
    assert targets == list(range(first, first + HAND_OFFS * size, size))
    return up, host.view(first, np.float32, (HAND_OFFS, ROWS, COLUMNS)), program


def _await(host: HostArena, event: int, value: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while host.events[event] != value:
        assert time.monotonic() < deadline and not host.aborted, f"event {event} did not come"
        time.sleep(0)  # the launch threads need Python's lock
