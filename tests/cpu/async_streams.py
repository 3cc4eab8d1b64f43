"""CUDA streams that do take their time: the compute queue's work runs on a thread of its own, as late as its waits and a random number allow.

Words of the host arena are waited for and written on that thread. The link queues' streams work in the launch threads themselves, since torch's copies on host
memory are done when they return; there a wait for another stream's event blocks.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.cpu.test_cuda_standin import FakeRuntime
from tests.cpu.test_graphs import RecordingGraphs
from twinpilots.device.cuda_sync import HostView
from twinpilots.device.memory import HostArena
from twinpilots.runtime.interpreter import has_reached
from twinpilots.runtime.machine import Insn, Machine
from twinpilots.runtime.torch_ops import OPS

FULL = 1000  # pieces of work that a stream holds; who brings another is stuck until one is done
HANGS_S = 20.0  # no test keeps a stream waiting as long: whoever does has forgotten it


class SlowStream:
    """In order, on a thread of its own, each piece of work a random moment late."""

    def __init__(self, seed: int) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._random = random.Random(seed)
        self._undone, self._changed = 0, threading.Condition()
        self.deepest = 0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self.thread.start()

    def put(self, work: Callable[[], None]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._undone < FULL, HANGS_S), "a launch was stuck in a full queue"
            self._undone += 1
            self.deepest = max(self.deepest, self._undone)
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._random.random() < 0.1:
                time.sleep(self._random.random() * 1e-3)
            try:
                with torch.inference_mode():
                    work()
            except BaseException as error:  # noqa: BLE001  whoever synchronises gets it
                self.error = self.error or error
            with self._changed:
                self._undone -= 1
                self._changed.notify_all()

    def wait_event(self, event: SlowEvent) -> None:
        done = event.done
        assert done is not None, "a CUDA stream would not wait for an event that nobody recorded"
        self.put(lambda: _come(done))

    def query(self) -> bool:
        return self._undone == 0

    def is_dry(self, within_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._undone == 0, within_s)

    def synchronize(self) -> None:
        assert self.is_dry(HANGS_S), "a stream was left waiting"
        if self.error is not None:
            raise RuntimeError(f"in a stream: {self.error}")

    def close(self) -> None:
        self._work.put(None)
        self.thread.join(HANGS_S)
        assert not self.thread.is_alive(), "a stream was left waiting"


class PromptStream:
    """Works in the thread that gives it work."""

    def put(self, work: Callable[[], None]) -> None:
        work()

    def wait_event(self, event: SlowEvent) -> None:
        assert event.done is not None, "a CUDA stream would not wait for an event that nobody recorded"
        _come(event.done)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class SlowEvent:
    """Recorded when its stream comes to it; a later record is another moment, and who waits for the earlier one keeps to that."""

    def __init__(self) -> None:
        self.done: threading.Event | None = None
        self.time_s = 0.0

    def record(self, stream: Any) -> None:
        done = self.done = threading.Event()

        def happen() -> None:
            self.time_s = time.monotonic()
            done.set()

        stream.put(happen)

    def synchronize(self) -> None:
        assert self.done is not None
        _come(self.done)

    def elapsed_time(self, later: SlowEvent) -> float:
        assert self.done is not None and self.done.is_set() and later.done is not None and later.done.is_set()
        return 1e3 * (later.time_s - self.time_s)


def _come(done: threading.Event) -> None:
    assert done.wait(HANGS_S), "an event never came"


class SlowWords:
    """Words waited for by streams. ``fault``: "refuses", "holds" (what is there is waited for all the same), "passes" (nothing is waited for), "blind"
    (what the CPU writes later is not seen), "mute" (writes are lost)."""

    def __init__(self, host: HostArena, fault: str = "") -> None:
        self.host, self.fault = host, fault
        self.given_up = False  # set when a test is over: broken words let go

    def wait(self, stream: Any, offset: int, value: int) -> None:
        word = self.host.view(offset, "<u4", (1,))
        if self.fault == "refuses":
            raise RuntimeError("cuStreamWaitValue32 failed with CUDA error 801")
        there = has_reached(int(word[0]), value)

        def come() -> None:
            deadline = time.monotonic() + HANGS_S
            while not (has_reached(int(word[0]), value) and self.fault != "holds" and (there or self.fault != "blind")) and self.fault != "passes":
                if self.given_up:
                    return
                assert time.monotonic() < deadline, "a word never came"
                time.sleep(20e-6)

        stream.put(come)

    def write(self, stream: Any, offset: int, value: int) -> None:
        word = self.host.view(offset, "<u4", (1,))
        if self.fault != "mute":
            stream.put(lambda: word.__setitem__(0, value % 2**32))


class SlowKernels:
    """Every instruction of the compute queue as a kernel of the device's own, run by the stream when it comes to it."""

    def __init__(self, runtime: SlowRuntime) -> None:
        self._runtime = runtime

    def run(self, machine: Machine, insn: Insn) -> bool:
        stream = self._runtime.compute

        def launch() -> None:
            stream.put(lambda: OPS[insn.op](machine, insn))

        if self._runtime.recorder.recording is None:
            launch()
        else:
            self._runtime.recorder.recording.append(launch)
        return True


class SlowRuntime(FakeRuntime):
    """The stand-in with such streams. ``fault``: of its words, as `SlowWords`."""

    def __init__(self, seed: int = 1, fault: str = "") -> None:
        super().__init__()
        self._seed, self._fault = seed, fault
        self.recorder = RecordingGraphs()
        self.streams: list[SlowStream] = []
        self.words: SlowWords | None = None

    @property
    def compute(self) -> SlowStream:
        return self.streams[-1]

    def pin(self, host: HostArena) -> HostView:
        view = super().pin(host)
        self.words = SlowWords(host, self._fault)
        return HostView(alias=view.alias, words=self.words, reason="")

    def release(self, host: HostArena) -> None:
        """Waits for all streams, as the real one does."""
        super().release(host)
        assert self._fault or all(stream.is_dry(2.0) for stream in self.streams), "a stream was left waiting"
        if self.words is not None:
            self.words.given_up = True
        while self.streams:
            self.streams.pop().close()

    def stream(self) -> Any:
        if threading.current_thread().name.endswith((" link_in", " link_out")):
            return PromptStream()
        self.streams.append(SlowStream(self._seed + len(self.streams)))
        return self.streams[-1]

    def event(self, *, timed: bool) -> Any:
        return SlowEvent()

    def kernels(self) -> Any:
        return None if self._fault else SlowKernels(self)  # without words records are torch's operations, and so must be what they follow

    def graphs(self) -> Any:
        return self.recorder

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()
