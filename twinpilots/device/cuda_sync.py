"""How a CUDA queue waits for events, records them and tells times: the interpreter's `Sync` on a stream.

Owns `StreamSync` (one queue) and `Board` (what the queues of one GPU know of each other's events). Knows nothing of instructions, memory or threads.

- Wait: if the event's host word is there, nothing is left to wait for. Else, if another queue of this GPU has launched the record, the stream waits for that
  queue's CUDA event. Else, if another queue of this GPU will launch it, the launch thread polls until it has. What remains are the CPU pilot's events: there
  the compute queue's stream waits for the word itself, and its launch thread goes on; the link queues, and where streams cannot wait for words, poll.
- Why no such wait can lock up, whatever order CUDA gives to streams: the CPU pilot waits for the compute queue alone, and only for what comes before in its
  order; what that needs of the link queues was launched when it was. So all that a word depends on was launched before the wait for it.
- Launches go at most MOST_AHEAD ahead of a word that is not there: the device's own queue holds about a thousand, and who launches into a full one is stuck.
- A word that will never come (cancelled, aborted, or late by WAIT_TIMEOUT_S) is written by the queue itself, so that its stream runs dry: what then runs works
  on whatever the buffers hold, for an engine that is lost or an entry that was dropped.
- Record: a CUDA event for the other streams, and the host word in stream order: by the driver, with a fence before it; else by a kernel through the mapped
  host arena; else by a 4-byte copy. None of them wakes a sleeping thread: the host arena is marked as polled.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinpilots.device.base import OK
from twinpilots.device.cuda_words import StreamWords
from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import EVENTS_OFFSET
from twinpilots.kernels.native import TIMED_OUT
from twinpilots.runtime.interpreter import POLL_S, WAIT_TIMEOUT_S, has_reached

MOST_AHEAD = 512  # launches, behind a word that is not there
Stopped = Callable[[], int]


class Event(Protocol):
    """torch.cuda.Event."""

    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, later: Any) -> float: ...


@dataclass(frozen=True, kw_only=True)
class HostView:
    """The host arena as the device sees it. ``alias``: as a device tensor, None where it is not pinned or cannot be mapped. ``words``: how streams wait for its
    words, None where they cannot, and then ``reason`` says why."""

    alias: Tensor | None
    words: StreamWords | None
    reason: str


class Board:
    """What the queues of one GPU know of each other's events. ``launched``: event -> (value, CUDA event of the launched record)."""

    def __init__(self, host: HostArena) -> None:
        self._words = host.events
        self._promised = np.zeros(host.num_events, np.int64)
        self._awaited: deque[tuple[int, int, int]] = deque()  # event, value, launches before; by the compute queue's stream, in its order
        self.launched: dict[int, tuple[int, Event]] = {}

    def has(self, event: int, value: int) -> bool:
        return has_reached(int(self._words[event]), value)

    def promise(self, records: NDArray[np.int32], value: int) -> None:
        """These events (negative: none) will be recorded by queues of this GPU. Called before anybody waits for them."""
        self._promised[records[records >= 0]] = value

    def is_promised(self, event: int, value: int) -> bool:
        return has_reached(int(self._promised[event]), value)

    def await_word(self, event: int, value: int, launches: int) -> None:
        self._awaited.append((event, value, launches))

    def ahead(self, launches: int) -> int:
        """How many of ``launches`` came after the first word that is awaited and not there; -1 when there is none."""
        while self._awaited and self.has(*self._awaited[0][:2]):
            self._awaited.popleft()
        return launches - self._awaited[0][2] if self._awaited else -1

    def let_go(self) -> None:
        """Write all words that the stream still waits for. From any thread; who waits for later ones must be stopped by other means."""
        for event, value, _ in tuple(self._awaited):
            if not self.has(event, value):
                self._words[event] = value % 2**32


class StreamSync:
    """Events of one queue (interpreter.Sync). ``new_event`` makes CUDA events. ``waits``: this is the compute queue, whose stream waits for words itself where
    the view has them. ``counts``: waits for words that were not there, "waits_on_device" and "waits_by_polling"."""

    def __init__(
        self, new_event: Callable[..., Event], stream: Any, host: HostArena, view: HostView, board: Board, *, waits: bool = False,
        counts: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self._new_event, self._stream, self._board, self._words = new_event, stream, board, view.words
        self._waits, self._counts = waits and view.words is not None, Counter[str]() if counts is None else counts
        start = host.events.ctypes.data - host.base
        self._targets = (torch.from_numpy(host.bytes) if view.alias is None else view.alias)[start : start + host.events.nbytes].view(torch.int32)
        self._launches = 0
        self._status = OK  # why words were let go
        self._recorded: dict[int, tuple[Event | None, Event]] = {}  # of each event the last two, used by turns: nobody waits for the one before the last
        self._marks: list[tuple[NDArray[np.int64], int, Event]] = []
        self._base: tuple[Event, int] | None = None
        self._spare: list[Event] = []  # timed events, used again: three per instruction are too many to make anew each time
        new_event(timed=False).record(stream)  # the device's context is this thread's from now on: the driver's own calls do not see to that

    def wait(self, event: int, value: int, stopped: Stopped) -> int:
        if self._status != OK:
            return self._status
        deadline, polled = time.monotonic() + WAIT_TIMEOUT_S, False
        while not self._board.has(event, value):
            launched = self._board.launched.get(event)
            if launched is not None and has_reached(launched[0], value):
                self._stream.wait_event(launched[1])
                return OK
            if self._waits and not self._board.is_promised(event, value):
                self._wait_on_device(event, value)
                return OK
            status = stopped()
            if status != OK:
                return status
            if time.monotonic() > deadline:
                return TIMED_OUT
            self._counts["waits_by_polling"] += not polled
            polled = True
            time.sleep(POLL_S)
        return OK

    def _wait_on_device(self, event: int, value: int) -> None:
        assert self._words is not None
        self._board.await_word(event, value, self._launches)  # before the stream is held: whoever lets go must know
        self._words.wait(self._stream, EVENTS_OFFSET + 4 * event, value)
        self._counts["waits_on_device"] += 1

    def pace(self, launches: int, stopped: Stopped) -> None:
        self._launches += launches
        if self._waits:
            self._catch_up(MOST_AHEAD, stopped)

    def _catch_up(self, most: int, stopped: Stopped) -> None:
        """Until at most ``most`` launches are ahead of a word that is not there, or words were let go."""
        if self._board.ahead(self._launches) <= most:
            return
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while self._status == OK and self._board.ahead(self._launches) > most:
            self._status = stopped()
            if self._status == OK and time.monotonic() > deadline:
                self._status = TIMED_OUT
            time.sleep(POLL_S)
        if self._status != OK:
            self._board.let_go()

    def record(self, event: int, value: int) -> None:
        if self._words is not None:
            self._words.write(self._stream, EVENTS_OFFSET + 4 * event, value)
        else:
            self._write(event, int(np.uint32(value % 2**32).view(np.int32)))
        before, last = self._recorded.get(event, (None, None))
        done = self._new_event(timed=False) if before is None else before
        done.record(self._stream)
        self._recorded[event] = last, done
        self._board.launched[event] = (value, done)

    def _write(self, event: int, word: int) -> None:
        target = self._targets[event : event + 1]
        if target.is_cuda:
            target.fill_(word)
        else:
            device = torch.device(getattr(self._stream, "device", "cpu"))
            target.copy_(torch.full((1,), word, dtype=torch.int32).to(device, non_blocking=True), non_blocking=True)

    def mark(self, times: NDArray[np.int64], which: int) -> None:
        if self._base is None:  # the first of an entry: the stream is idle, so host and stream can be set against each other
            start = self._timed_event()
            start.synchronize()
            self._base = (start, time.monotonic_ns())
        self._marks.append((times, which, self._timed_event()))

    def _timed_event(self) -> Event:
        event = self._spare.pop() if self._spare else self._new_event(timed=True)
        event.record(self._stream)
        return event

    def drain(self, stopped: Stopped) -> int:
        if self._waits:
            self._catch_up(-1, stopped)  # by looking at words: who waits for a stream that is held sees no abort
        self._stream.synchronize()
        if self._base is not None:
            start, start_ns = self._base
            for times, which, event in self._marks:
                times[which] = start_ns + round(start.elapsed_time(event) * 1e6)
            self._spare += [start, *(event for _, _, event in self._marks)]
        self._marks.clear()
        self._base = None
        status, self._status = self._status, OK
        return status
