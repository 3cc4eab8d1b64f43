"""The CUDA device on a stand-in: the same threads, queues, waits and copies, on a torch arena in host memory. What only a GPU can show is in tests/gpu."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cpu.native_twin import Batch, Seq
from tests.device_programs import entry, insn, load, weights
from twinpilots.device.cpu import CpuPilot
from twinpilots.device.cuda import CudaGpu
from twinpilots.device.cuda_sync import Board, HostView, StreamSync
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError, DeviceUnavailableError, LimitError
from twinpilots.kernels import native
from twinpilots.kernels.abi import Op, Space, address
from twinpilots.kernels.native import CANCELLED

MIB = 2**20


class FakeEvent:
    def __init__(self) -> None:
        self.time_s: float | None = None

    def record(self, stream: Any) -> None:
        self.time_s = time.monotonic()

    def synchronize(self) -> None:
        assert self.time_s is not None

    def elapsed_time(self, later: Any) -> float:
        assert self.time_s is not None and later.time_s is not None
        return 1e3 * (later.time_s - self.time_s)


class FakeStream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: FakeEvent) -> None:
        assert event.time_s is not None, "a CUDA stream would not wait for an event that nobody recorded"
        self.waited.append(event)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class FakeRuntime:
    """Streams that run at once, a device that is host memory. ``mapped``: whether the host arena can be seen from the device."""

    def __init__(self, mapped: bool = True) -> None:
        self.mapped, self.pinned = mapped, 0

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def pin(self, host: HostArena) -> HostView:
        self.pinned += 1
        return HostView(alias=torch.from_numpy(host.bytes) if self.mapped else None, words=None, reason="a stand-in has none")

    def release(self, host: HostArena) -> None:
        self.pinned -= 1

    def stream(self) -> FakeStream:
        return FakeStream()

    def event(self, *, timed: bool) -> FakeEvent:
        return FakeEvent()

    def kernels(self) -> None:
        return None

    def graphs(self) -> None:
        return None

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


@contextmanager
def opened(mapped: bool = True) -> Iterator[tuple[HostArena, CudaGpu]]:
    host, runtime = HostArena(8 * MIB, shared=False, num_events=64), FakeRuntime(mapped)
    gpu = CudaGpu(0, runtime)
    try:
        gpu.open(host, 2 * MIB)
        yield host, gpu
    finally:
        gpu.close()
        assert runtime.pinned == 0
        host.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_queues_load_compute_copy_and_record(mapped: bool) -> None:
    with opened(mapped) as (host, gpu):
        src, data = weights(host, 10_000)
        batch = Batch([Seq(2), Seq(3)])
        meta = host.alloc(batch.words.nbytes, "programs")
        host.view(meta, np.int32, batch.words.shape)[:] = batch.words
        buffer = host.alloc(5 * 8 * 4, "workspace")
        values = host.view(buffer, np.float32, (5, 8))
        values[:] = np.arange(40).reshape(5, 8)
        poison = insn(Op.POISON, address(Space.GPU, 0), 100, waits=(2,))
        up = insn(Op.COPY, address(Space.GPU, 16384), 8, buffer, 8, 3, 0, waits=(4,))
        down = insn(Op.COPY, buffer, 8, address(Space.GPU, 16384 + 4), 8, 2, 1, record=3)
        for one in (poison, up, down):
            one["ghi"] = 3
        work = entry(host, poison, up, down)
        work["meta"] = meta
        gpu.submit("gpu", work)
        gpu.submit("link_in", entry(host, load(host, [(0, src, 10_000)], record=2)))
        time.sleep(0.02)
        assert host.events[3] == 0, "the CPU pilot has not recorded event 4"
        host.events[4] = 1
        gpu.wait("gpu", 10.0)
        got = gpu.read(0, 10_000)
        assert (got[:100] == 0xFF).all() and np.array_equal(got[100:], data[100:])
        wanted = np.arange(40, dtype=np.float32).reshape(5, 8)
        wanted[:, :2] = wanted[:, 1:3]  # columns 1 and 2 came back as 0 and 1
        assert np.array_equal(values, wanted) and host.events[3] == 1


def test_written_memory_reads_back() -> None:
    with opened() as (_, gpu):
        data = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
        data.flags.writeable = False  # a memory-mapped checkpoint
        gpu.write(64, data)
        assert np.array_equal(gpu.read(64, 4000).view(np.float32), data)
        with pytest.raises(ValueError, match="leave the GPU arena"):
            gpu.read(2 * MIB, 1)


def test_a_record_that_is_launched_but_not_done_is_waited_for_on_the_stream() -> None:
    host, stream, launched = HostArena(MIB, shared=False, num_events=8), FakeStream(), FakeEvent()
    launched.record(None)
    board = Board(host)
    board.launched[5] = (7, launched)
    sync = StreamSync(FakeRuntime().event, stream, host, HostView(alias=None, words=None, reason=""), board)
    assert sync.wait(5, 7, lambda: 0) == 0 and stream.waited == [launched]
    assert sync.wait(5, 8, lambda: CANCELLED) == CANCELLED, "pass 8's record is not launched yet"
    host.events[5] = 8
    assert sync.wait(5, 8, lambda: CANCELLED) == 0 and len(stream.waited) == 1, "done: nothing to wait for"
    host.close()


def test_trace_times_are_the_streams() -> None:
    with opened() as (host, gpu):
        program = entry(host, insn(Op.POISON, address(Space.GPU, 0), 8, waits=(9,)))
        trace = host.alloc(24, "programs")
        program["trace"] = trace
        before = time.monotonic_ns()
        gpu.submit("gpu", program)
        threading.Timer(0.03, lambda: host.events.__setitem__(9, 1)).start()
        gpu.wait("gpu", 5.0)
        waiting, working, end = host.view(trace, np.int64, 3).tolist()
        assert before <= waiting < working <= end <= time.monotonic_ns() and working - waiting > 20e6


@pytest.mark.skipif(native.load() is None, reason="only the native pilot sleeps")
def test_the_native_pilot_does_not_oversleep_what_a_device_writes_without_waking_it() -> None:
    with opened() as (host, _):
        pilot, best = CpuPilot(threads=1), 1.0
        for number in range(1, 6):
            threading.Timer(0.03, lambda value=number: host.events.__setitem__(7, value)).start()
            began = time.monotonic()
            pilot.run(entry(host, insn(Op.POISON, host.alloc(64, "workspace"), 64, waits=(7,)), pass_id=number), host)
            best = min(best, time.monotonic() - began)
        pilot.close()
        assert best < 0.045, "a sleep of 50 ms per hand-off"


def test_cancel_drops_what_waits() -> None:
    with opened() as (host, gpu):
        gpu.submit("link_in", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(20,), record=21), pass_id=1))
        gpu.cancel("link_in", 1)
        gpu.submit("link_in", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, record=21), pass_id=2))
        gpu.wait("link_in", 5.0)
        assert host.events[21] == 2


def test_a_failing_launch_is_a_lost_device_with_the_reason() -> None:
    with opened() as (host, gpu):
        src, _ = weights(host, 64)
        gpu.submit("link_in", entry(host, load(host, [(2 * MIB - 8, src, 64)])))
        with pytest.raises(DeviceLostError, match="link_in of cuda:0 failed"):
            gpu.wait("link_in", 5.0)
        assert host.aborted


def test_closing_ends_what_still_waits_and_may_be_repeated() -> None:
    before = threading.active_count()
    with opened() as (host, gpu):
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(20,))))
    gpu.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="not open"):
        gpu.wait("gpu", 1.0)


def test_more_memory_than_there_is_is_refused() -> None:
    host = HostArena(MIB, shared=False, num_events=4)
    with pytest.raises(LimitError, match="lower --gpu-memory"):
        CudaGpu(0, FakeRuntime()).open(host, 2**40)
    host.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_missing_gpu_is_said_so() -> None:
    with pytest.raises(DeviceUnavailableError, match=r"cuda:0 is not here.*emulated:demo"):
        CudaGpu(0)
