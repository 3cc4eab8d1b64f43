"""The device seam: what the executor may ask of a GPU, whether it is real, emulated or a stand-in.

Owns the protocols and the driver's end of a queue's mailbox (`Mailbox`). Knows nothing of instructions, plans or a particular device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError
from twinpilots.kernels.abi import CONTROL, MAILBOX, MAILBOX_ENTRIES
from twinpilots.kernels.native import ABORTED, BAD_INSTRUCTION, TIMED_OUT, Native

QueueName = Literal["gpu", "link_in", "link_out"]
QUEUE_NAMES: tuple[QueueName, ...] = ("gpu", "link_in", "link_out")

OK = 0  # an interpreter's answer for one entry (tp_run, runtime/interpreter.py); negative: the entry failed
REASONS = {
    ABORTED: "the engine was aborted",
    TIMED_OUT: "an event that an instruction waits for did not come in time",
    BAD_INSTRUCTION: "a program holds an instruction that this interpreter does not know",
}
ENTRY_QUIT = 1  # ENTRY.flags: the queue loop ends after this entry
POLL_S = 0.1  # how long a wait sleeps before it looks whether the device still lives


class GpuMemory(Protocol):
    """The slow path to a GPU's memory: loading and tests. Neither may run while a queue works on the same bytes."""

    def write(self, offset: int, data: NDArray[Any]) -> None:
        """Copy ``data`` (contiguous, any type) to ``offset`` in GPU memory."""
        ...

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """A copy of ``num_bytes`` bytes at ``offset``."""
        ...


class GpuDevice(GpuMemory, Protocol):
    """One GPU. ``name`` and ``emulated`` are shown to users; ``memory_bytes`` is the most that `open` may ask for, ``overhead_bytes`` what the process takes
    on the card beside that (a promise about its whole footprint is about both)."""

    name: str
    emulated: bool
    memory_bytes: int
    overhead_bytes: int

    def open(self, host: HostArena, num_bytes: int) -> None:
        """Allocate the one arena of ``num_bytes`` of GPU memory and start the three queues on ``host``. LimitError when it does not fit."""
        ...

    def submit(self, queue: QueueName, entry: np.void | NDArray[Any]) -> None:
        """Append one ENTRY record to ``queue`` (copied; at most MAILBOX_ENTRIES unfinished ones). Of entries that run together the compute queue's comes
        last: a device may have to know by then which events its own queues will record."""
        ...

    def cancel(self, queue: QueueName, pass_id: int) -> None:
        """Drop ``queue``'s entries whose pass id is at most ``pass_id``; returns once the queue is idle."""
        ...

    def wait(self, queue: QueueName, timeout_s: float) -> None:
        """Until ``queue`` is idle. DeviceLostError, with the reason, when the device died, aborted, failed an entry or took longer."""
        ...

    def close(self) -> None:
        """Stop the queues and free the memory. Safe to repeat."""
        ...


class Mailbox:
    """The driver's end of one queue: submit, cancel, wait. Through the native module where it is there (futexes), else by polling."""

    def __init__(self, host: HostArena, queue: QueueName, native: Native | None) -> None:
        assert CONTROL.fields is not None and MAILBOX.fields is not None
        self._host, self._queue, self._native = host, queue, native
        self.offset = int(CONTROL.fields[queue][1])
        words: dict[str, NDArray[Any]] = {}
        for name in ("head", "tail", "cancel_pass", "status"):
            dtype, place = MAILBOX.fields[name][:2]
            words[name] = host.view(self.offset + int(place), dtype, (1,))
        self._head, self._tail, self._cancel, self._status = words["head"], words["tail"], words["cancel_pass"], words["status"]
        dtype, place = MAILBOX.fields["entries"][:2]
        self._entries = host.view(self.offset + int(place), dtype.base, (MAILBOX_ENTRIES,))

    @property
    def idle(self) -> bool:
        return bool(self._head[0] == self._tail[0])

    def submit(self, entry: np.void | NDArray[Any]) -> None:
        """RuntimeError when MAILBOX_ENTRIES are unfinished: the driver must wait first."""
        if (int(self._tail[0]) - int(self._head[0])) % 2**32 >= MAILBOX_ENTRIES:
            raise RuntimeError(f"queue {self._queue} holds {MAILBOX_ENTRIES} unfinished entries; wait for it before submitting more")
        if self._native is not None:
            self._native.submit(self._host.base, self.offset, entry)
            return
        tail = int(self._tail[0])
        self._entries[tail % MAILBOX_ENTRIES] = entry
        self._tail[0] = (tail + 1) % 2**32  # after the entry: the queue reads it once the tail says so

    def request_cancel(self, pass_id: int) -> None:
        self._cancel[0] = pass_id

    def wait_idle(self, timeout_s: float, lost: Callable[[], str | None]) -> None:
        """Until idle; ``lost`` is asked every POLL_S seconds and gives the reason once the device is gone. DeviceLostError as `GpuDevice.wait`."""
        deadline = time.monotonic() + timeout_s
        while not self._wait_some(min(POLL_S, timeout_s)):
            reason = lost()
            if reason is None and self._host.aborted:
                reason = self._failure() or REASONS[ABORTED]
            if reason is None and time.monotonic() > deadline:
                reason = f"it did not finish within {timeout_s:g} s"
            if reason is not None:
                self._host.set_abort()
                raise DeviceLostError(f"queue {self._queue} is lost: {reason}; the engine cannot go on, start a new one")
        failure = self._failure()
        if failure is not None:
            self._host.set_abort()
            raise DeviceLostError(f"queue {self._queue} is lost: {failure}; the engine cannot go on, start a new one")

    def _failure(self) -> str | None:
        status = int(self._status[0])
        return REASONS.get(status, f"an entry failed with status {status}") if status < 0 else None

    def _wait_some(self, timeout_s: float) -> bool:
        if self._native is not None:
            self._native.wait_idle(self._host.base, self.offset, timeout_s)
            return self.idle
        deadline = time.monotonic() + timeout_s
        while not self.idle:
            if self._host.aborted or time.monotonic() > deadline:
                return False
            time.sleep(50e-6)
        return True
