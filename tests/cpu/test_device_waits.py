"""Streams that wait for the CPU pilot by themselves: tokens, the probe, what is let go, how far launches run ahead, and the driver's calls, without a GPU."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_steps import TokenTask, run_tokens
from tests.cpu.async_streams import FULL, SlowKernels, SlowRuntime, SlowStream, SlowWords
from tests.cpu.test_cuda_standin import MIB, FakeEvent, FakeRuntime, FakeStream
from tests.device_programs import entry, insn, load, weights
from tests.hand_plans import random_plan
from tests.planning import llama
from tests.words_case import HAND_OFFS, hand_offs
from twinpilots.device import cuda_sync, cuda_words
from twinpilots.device.base import OK
from twinpilots.device.cuda import CudaGpu
from twinpilots.device.cuda_sync import MOST_AHEAD, Board, HostView, StreamSync
from twinpilots.device.cuda_words import DriverWords, device_pointer, probe
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError
from twinpilots.kernels.abi import EVENTS_OFFSET, Op, Space, address
from twinpilots.kernels.native import ABORTED, CANCELLED
from twinpilots.plan.schedule import expand
from twinpilots.runtime.executor import GPU_QUEUES
from twinpilots.runtime.machine import Insn, Machine

FAULTS = {
    "refuses": "cuStreamWaitValue32 failed with CUDA error 801", "holds": "did not pass a word that is there", "mute": "did not see what it wrote",
    "passes": "did not wait for a word that is not there", "blind": "did not see what the CPU wrote",
}  # fmt: skip


@pytest.fixture
def host() -> Iterator[HostArena]:
    arena = HostArena(4 * MIB, shared=False, num_events=64)
    yield arena
    arena.close()


@contextmanager
def opened(host: HostArena, runtime: SlowRuntime | None = None) -> Iterator[CudaGpu]:
    gpu = CudaGpu(0, runtime or SlowRuntime())
    gpu.open(host, MIB)
    try:
        yield gpu
    finally:
        gpu.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "stream" or thread.name.startswith("cuda:0")]


def fill(place: int, **extra: Any) -> Any:
    return insn(Op.POISON, address(Space.GPU, place), 100, **extra)


# -- tokens ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama/float32/hand-0", "gemma2/float32/hand-1"])
def test_tokens_are_the_same_when_the_stream_waits_for_the_cpu(case: str) -> None:
    events = list[Any]()
    gpu = CudaGpu(0, SlowRuntime(seed=7))
    run_tokens(TokenTask(device="cuda:0", cases=(case,)), events.append, gpu)
    assert events[-1]["ok"] is True, events[-1]["detail"]
    assert gpu.device_waits == "yes" and gpu.launches["waits_on_device"] > 20 and gpu.launches["replayed"] > 0, gpu.launches


def test_where_streams_have_no_words_the_launch_thread_polls() -> None:
    events = list[Any]()
    gpu = CudaGpu(0, FakeRuntime())
    run_tokens(TokenTask(device="cuda:0", cases=("llama/float32/hand-0",)), events.append, gpu)
    assert events[-1]["ok"] is True, events[-1]["detail"]
    assert gpu.device_waits == "no: a stand-in has none" and gpu.launches["waits_by_polling"] > 0 == gpu.launches["waits_on_device"]


def test_the_stream_waits_and_the_launch_thread_goes_on(host: HostArena) -> None:
    with opened(host) as gpu:
        program = entry(host, fill(0, waits=(20,)), fill(200, record=21), fill(400, waits=(22,), record=23))
        trace = host.alloc(9 * 8, "programs")
        program["trace"] = trace
        gpu.submit("gpu", program)
        until(lambda: gpu.launches["waits_on_device"] == 2)
        time.sleep(0.1)
        assert host.events[21] == host.events[23] == 0 and not gpu.read(0, 600).any(), "all is launched, nothing is done"
        host.events[20] = 1
        until(lambda: host.events[21] == 1)
        time.sleep(0.1)
        assert host.events[23] == 0 and (gpu.read(200, 100) == 0xFF).all() and not gpu.read(400, 100).any()
        host.events[22] = 1
        gpu.wait("gpu", 10.0)
        assert host.events[23] == 1 and (gpu.read(400, 100) == 0xFF).all()
        times = host.view(trace, np.int64, (3, 3))
        assert (np.diff(times.reshape(-1)) >= 0).all() and times[0, 1] - times[0, 0] > 15e6 < times[2, 1] - times[2, 0], "a wait takes the stream's time"


def test_what_a_link_queue_will_launch_is_waited_for_on_the_host_and_then_by_its_event(host: HostArena) -> None:
    """CUDA must know of every order between streams; a word hides it."""
    assert GPU_QUEUES[-1] == "gpu", "the compute queue is submitted when all records of its card are promised"
    with opened(host) as gpu:
        src, data = weights(host, 1000)
        gpu.submit("link_in", entry(host, load(host, [(0, src, 1000)], waits=(30,), record=2)))
        gpu.submit("gpu", entry(host, fill(0, waits=(2,), record=3)))
        until(lambda: gpu.launches["waits_by_polling"] == 1)
        host.events[30] = 1
        gpu.wait("gpu", 10.0)
        assert gpu.launches["waits_on_device"] == 0 and np.array_equal(gpu.read(100, 900), data[100:])


def test_all_that_a_word_depends_on_is_launched_before_the_stream_waits_for_it() -> None:
    """The CPU pilot waits for the compute queue only, and only for what is before in the serial order, which each queue keeps."""
    spec = llama(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=130)
    waits = 0
    for seed in range(8):
        plan = random_plan(spec, seed)
        for bucket in plan.buckets:
            schedule = expand(spec, plan, bucket, ((True, True, True),) * bucket.micro_batches)
            for task in schedule.queue("cpu"):
                waits += len(task.waits)
                assert all(schedule.tasks[wait.task].queue == "gpu" and wait.task < task.index and not wait.previous for wait in task.waits)
    assert waits > 500


def test_hand_offs_keep_their_order_and_one_that_does_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that a card is tested with: on streams that keep the order, and on some whose word overtakes what it is about."""
    count, seconds = hand_offs(CudaGpu(0, SlowRuntime()), 3)
    assert count == 3 * HAND_OFFS and seconds < 0.1

    def at_once(self: SlowWords, stream: Any, offset: int, value: int) -> None:
        self.host.view(offset, "<u4", (1,))[0] = value

    write = SlowWords.write
    monkeypatch.setattr(SlowWords, "write", lambda self, stream, offset, value: (write if offset < EVENTS_OFFSET else at_once)(self, stream, offset, value))
    with pytest.raises(AssertionError, match="came after the word"):
        hand_offs(CudaGpu(0, SlowRuntime()), 1)
    monkeypatch.setattr(SlowWords, "write", write)
    wait = SlowWords.wait
    monkeypatch.setattr(SlowWords, "wait", lambda self, stream, offset, value: wait(self, stream, offset, value) if offset < EVENTS_OFFSET else None)
    with pytest.raises(AssertionError, match="came after the word"):
        hand_offs(CudaGpu(0, SlowRuntime()), 5)


# -- what never comes ------------------------------------------------------------------------------------------------------------------------


def stuck(host: HostArena, gpu: CudaGpu) -> None:
    """A compute queue whose stream waits for a word that nobody will write, and link queues that wait for it, one in its stream and one by polling."""
    gpu.submit("gpu", entry(host, fill(0, waits=(20,), record=21), fill(200, record=22)))
    until(lambda: gpu.launches["waits_on_device"] == 1)
    gpu.submit("link_out", entry(host, fill(400, waits=(21,))))
    gpu.submit("link_in", entry(host, fill(600, waits=(40,))))
    time.sleep(0.05)
    assert host.events[21] == 0


def test_closing_lets_a_waiting_stream_go(host: HostArena) -> None:
    with opened(host) as gpu:
        stuck(host, gpu)
        began = time.monotonic()
        gpu.close()
        assert time.monotonic() - began < 3.0 and not host.aborted


def test_an_abort_lets_a_waiting_stream_go(host: HostArena) -> None:
    with opened(host) as gpu:
        stuck(host, gpu)
        began = time.monotonic()
        host.set_abort()
        with pytest.raises(DeviceLostError, match="aborted"):
            gpu.wait("gpu", 10.0)
    assert time.monotonic() - began < 3.0


def test_a_cancelled_entry_lets_its_stream_go_and_the_next_one_runs(host: HostArena) -> None:
    with opened(host) as gpu:
        gpu.submit("gpu", entry(host, fill(0, waits=(20,), record=21)))
        until(lambda: gpu.launches["waits_on_device"] == 1)
        gpu.cancel("gpu", 1)
        gpu.submit("gpu", entry(host, fill(200, waits=(20,), record=21), pass_id=2))
        until(lambda: gpu.launches["waits_on_device"] == 2)
        host.events[20] = 2
        gpu.wait("gpu", 10.0)
        assert host.events[21] == 2


def test_a_word_that_does_not_come_in_time_is_an_error(host: HostArena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sync, "WAIT_TIMEOUT_S", 0.2)
    with opened(host) as gpu:
        gpu.submit("gpu", entry(host, fill(0, waits=(20,), record=21)))
        with pytest.raises(DeviceLostError, match="did not come in time"):
            gpu.wait("gpu", 10.0)


@pytest.mark.parametrize("alone", [False, True])
def test_closing_after_a_failed_launch_lets_all_streams_go(host: HostArena, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """Whether another launch thread waits for the stream that is held, or all have ended."""
    run, go_on = SlowKernels.run, threading.Event()

    def failing(self: SlowKernels, machine: Machine, insn: Insn) -> bool:
        if insn.record == 22:
            assert go_on.wait(10.0)
            raise RuntimeError("out of something")
        return run(self, machine, insn)

    monkeypatch.setattr(SlowKernels, "run", failing)
    with opened(host) as gpu:
        gpu.submit("gpu", entry(host, fill(0, waits=(20,), record=21), fill(200, record=22)))
        until(lambda: 21 in gpu._board.launched)
        if not alone:
            gpu.submit("link_out", entry(host, fill(400, waits=(21,))))
            time.sleep(0.02)
        began = time.monotonic()
        go_on.set()
        with pytest.raises(DeviceLostError, match="gpu of cuda:0 failed: RuntimeError: out of something"):
            gpu.wait("gpu", 10.0)
        if alone:
            until(lambda: not any(thread.is_alive() for thread in gpu._threads))
    assert time.monotonic() - began < 3.0


# -- how far ahead ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captures", [True, False])
def test_launches_run_only_so_far_ahead_of_a_word(host: HostArena, monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    """Whether a launch thread comes by in the middle of a long part, or after each instruction."""
    if not captures:
        monkeypatch.setattr(SlowRuntime, "graphs", lambda self: None)
    runtime = SlowRuntime()
    with opened(host, runtime) as gpu:
        began = time.monotonic()
        gpu.submit("gpu", entry(host, fill(0, waits=(20,)), *[fill(200) for _ in range(1000)], fill(400, record=21)))
        until(lambda: runtime.compute.deepest > 50)
        time.sleep(0.3)
        assert runtime.compute.deepest <= MOST_AHEAD, "a launch into a full queue of the device's is stuck"
        host.events[20] = 1
        gpu.wait("gpu", 20.0)
        assert host.events[21] == 1
        assert captures or 1e-9 * gpu.launches["host_ns"] < time.monotonic() - began - 0.25, "to be held is no part of what launching takes"


def test_closing_frees_a_launch_that_is_stuck_all_the_same(host: HostArena, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much a device's queue holds is nowhere written."""
    monkeypatch.setattr(cuda_sync, "MOST_AHEAD", 1 << 30)
    runtime = SlowRuntime()
    with opened(host, runtime) as gpu:
        gpu.submit("gpu", entry(host, fill(0, waits=(20,)), *[fill(200) for _ in range(1500)]))
        until(lambda: runtime.compute.deepest == FULL)
        began = time.monotonic()
        gpu.close()
        assert time.monotonic() - began < 5.0


def test_waits_end_as_they_should() -> None:
    host, stream, words = HostArena(MIB, shared=False, num_events=8), FakeStream(), RecordedWords()
    view, board = HostView(alias=None, words=words, reason=""), Board(host)
    sync = StreamSync(lambda timed: FakeEvent(), stream, host, view, board, waits=True)
    assert sync.wait(3, 7, lambda: CANCELLED) == OK and words.calls == [("wait", EVENTS_OFFSET + 12, 7)]
    assert sync.drain(lambda: ABORTED) == ABORTED and host.events[3] == 7, "let go"
    assert sync.drain(lambda: ABORTED) == OK, "nothing is awaited any more"
    assert sync.wait(6, 1, lambda: OK) == OK
    sync.pace(MOST_AHEAD + 1, lambda: CANCELLED)
    assert host.events[6] == 1 and sync.wait(7, 1, lambda: OK) == CANCELLED and len(words.calls) == 2, "once let go, nothing more is waited for"
    assert sync.drain(lambda: OK) == CANCELLED
    words.calls.clear()
    host.events[3] = 2**32 - 2
    assert sync.wait(3, 2**32 - 3, lambda: CANCELLED) == OK and not words.calls, "there"
    assert sync.wait(3, 2**32 + 1, lambda: CANCELLED) == OK and words.calls[-1] == ("wait", EVENTS_OFFSET + 12, 2**32 + 1)
    host.events[3] = 1
    assert sync.drain(lambda: ABORTED) == OK, "beyond the end of 32 bits"
    sync.record(4, 2**32 + 5)
    assert words.calls[-1] == ("write", EVENTS_OFFSET + 16, 2**32 + 5) and board.launched[4][0] == 2**32 + 5
    first = board.launched[4][1]
    for value in (6, 7):
        sync.record(4, value)
    assert board.launched[4][1] is first, "events are used again"
    links = StreamSync(lambda timed: FakeEvent(), stream, host, view, board)
    assert links.wait(5, 1, lambda: CANCELLED) == CANCELLED, "a link queue polls: what it has not launched can be dropped"
    host.close()


# -- the probe -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_words_that_do_not_do_as_they_should_are_not_used(fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cuda_words, "PROBE_S", 0.1)
    host, runtime = HostArena(4 * MIB, shared=False, num_events=4), SlowRuntime(fault=fault)
    with caplog.at_level(logging.WARNING, "twinpilots.device.cuda"), opened(host, runtime) as gpu:
        assert gpu.device_waits.startswith("no: ") and FAULTS[fault] in gpu.device_waits
        assert len(caplog.records) == 1 and "polls instead" in caplog.text
        assert not host.events.any(), "no event was touched"
        assert runtime.words is not None
        runtime.words.given_up = True
    host.close()


def test_good_words_pass_quickly_and_leave_nothing_behind(host: HostArena) -> None:
    stream, words = SlowStream(3), SlowWords(host)
    began = time.monotonic()
    assert probe(words, stream, host) is None and time.monotonic() - began < 0.2
    stream.close()
    assert not host.bytes[EVENTS_OFFSET - 256 : EVENTS_OFFSET + 256].any()


# -- the driver's calls ----------------------------------------------------------------------------------------------------------------------

FAKE_DRIVER = r"""
#include <stdint.h>
uint64_t seen[5]; int status = 0;
static int note(uint64_t which, void* stream, uint64_t address, uint32_t value, unsigned flags) {
  seen[0] = which; seen[1] = (uint64_t)stream; seen[2] = address; seen[3] = value; seen[4] = flags; return status;
}
int cuMemHostGetDevicePointer_v2(uint64_t* pointer, void* host, unsigned flags) { *pointer = (uint64_t)host + 0x7000000000ull + flags; return status; }
int cuStreamWaitValue32(void* s, uint64_t a, uint32_t v, unsigned f) { return note(1, s, a, v, f); }
int cuStreamWriteValue32(void* s, uint64_t a, uint32_t v, unsigned f) { return note(2, s, a, v, f); }
#ifdef NEW
int cuStreamWaitValue32_v2(void* s, uint64_t a, uint32_t v, unsigned f) { return note(11, s, a, v, f); }
int cuStreamWriteValue32_v2(void* s, uint64_t a, uint32_t v, unsigned f) { return note(12, s, a, v, f); }
#endif
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize("kind", ["NEW", "OLD"])
def test_the_driver_is_called_with_whole_addresses_and_its_refusals_are_errors(kind: str, tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", f"-D{kind}", "-o", tmp_path / "driver.so", tmp_path / "driver.c"], check=True, timeout=60)
    driver = ctypes.CDLL(str(tmp_path / "driver.so"))
    seen, status = (ctypes.c_uint64 * 5).in_dll(driver, "seen"), ctypes.c_int.in_dll(driver, "status")
    base = device_pointer(driver, 0x7F12_3456_7000)
    assert base == 0x7F12_3456_7000 + 0x70_0000_0000, "all 64 bits"
    words, first = DriverWords(driver, base), 10 * (kind == "NEW")

    class Stream:
        cuda_stream = 0x5555_AAAA_0010

    words.wait(Stream(), EVENTS_OFFSET + 8, 2**32 + 3)
    assert list(seen) == [first + 1, 0x5555_AAAA_0010, base + EVENTS_OFFSET + 8, 3, 0], "greater or equal, cyclic"
    words.write(Stream(), EVENTS_OFFSET + 4, -1)
    assert list(seen) == [first + 2, 0x5555_AAAA_0010, base + EVENTS_OFFSET + 4, 2**32 - 1, 0], "with the fence"
    status.value = 801
    with pytest.raises(RuntimeError, match="cuStreamWaitValue32 failed with CUDA error 801"):
        words.wait(Stream(), 0, 0)
    with pytest.raises(RuntimeError, match="cuStreamWriteValue32 failed with CUDA error 801"):
        words.write(Stream(), 0, 0)
    assert device_pointer(driver, 64) is None


def test_a_driver_without_the_calls_is_said_so() -> None:
    with pytest.raises(AttributeError):
        DriverWords(ctypes.CDLL(None), 0)
    assert device_pointer(None, 64) is None and device_pointer(ctypes.CDLL(None), 64) is None


class RecordedWords:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def wait(self, stream: Any, offset: int, value: int) -> None:
        self.calls.append(("wait", offset, value))

    def write(self, stream: Any, offset: int, value: int) -> None:
        self.calls.append(("write", offset, value))


def until(happened: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(1e-3)
