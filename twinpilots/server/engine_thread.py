"""The thread that owns the model: it takes commands between passes and runs passes while there is work.

Owns the thread, the command queue, what happens when a pass fails, and the count of what has been accepted (back-pressure). The event loop's thread
submits and closes tickets, and gets facts and outputs through `call_soon_threadsafe`; nothing else is shared. Knows nothing of HTTP or of plans.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, Protocol

from twinpilots.errors import DeviceLostError, TwinPilotsError
from twinpilots.server.tickets import Job, PassFacts, Ticket

logger = logging.getLogger(__name__)
State = Literal["loading", "ready", "draining", "stopped"]
MOST_FAILURES = 3  # passes that fail one after another before the engine is given up


class Served(Protocol):
    """The engine as its thread sees it."""

    def add(self, job: Job) -> None:
        """Queue a job. Raises ValueError or UserError for one that cannot run."""
        ...

    def abort(self, request_id: str) -> None: ...

    def has_unfinished(self) -> bool: ...

    def step(self, streamed: Container[str]) -> PassFacts:
        """One pass, or a short chain of passes. Growing outputs are wanted of ``streamed`` requests, finished ones of all."""
        ...

    def hurry(self) -> None:
        """From any thread: let a step that runs return after the pass it is in."""
        ...

    def rest(self) -> None:
        """There is nothing left to do for now."""
        ...

    def close(self) -> None: ...


class EngineStoppedError(TwinPilotsError):
    """The engine is not (or no longer) there: still loading, shutting down, or lost."""


class QueueFullError(TwinPilotsError):
    """As many sequences as may be are accepted already."""


class RequestFailedError(TwinPilotsError):
    """The engine failed while it worked on this request; others may be fine."""


class EngineThread:
    """``open_served`` loads the model, in the thread. ``max_accepted`` sequences are in flight at most. In the loop, ``on_ready`` runs when
    it is loaded, ``on_pass`` after every pass, ``on_stop`` once, when the thread has ended, with the error that ended it (None: it was asked to)."""

    def __init__(
        self, open_served: Callable[[], Served], *, max_accepted: Callable[[], int], on_ready: Callable[[], None],
        on_pass: Callable[[PassFacts], None], on_stop: Callable[[BaseException | None], None],
    ) -> None:  # fmt: skip
        self._open_served, self._max_accepted = open_served, max_accepted
        self._on_ready, self._on_pass, self._on_stop = on_ready, on_pass, on_stop
        self.state: State = "loading"
        self._commands: queue.SimpleQueue[Callable[[Served], None] | None] = queue.SimpleQueue()
        self._in_flight: set[str] = set()  # the engine thread's own, as is the next
        self._streamed: set[str] = set()
        self._tickets: dict[str, Ticket] = {}  # the loop's own, by request id
        self._stop_wanted = False
        self._served: Served | None = None  # to be hurried, by whoever has a command
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="twinpilots-engine", daemon=True)

    # -- the loop's side -----------------------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    @property
    def num_accepted(self) -> int:
        """Sequences taken on and not finished."""
        return sum(ticket.num_sequences for ticket in set(self._tickets.values()))

    def check_room(self, num_sequences: int) -> None:
        """Raises EngineStoppedError and QueueFullError. On an empty engine there is room for any number."""
        if self.state != "ready":
            raise EngineStoppedError(f"the server is {self.state}; try again later")
        accepted, most = self.num_accepted, self._max_accepted()
        if accepted and accepted + num_sequences > most:
            raise QueueFullError(f"the queue is full: {accepted} sequences are accepted, {most} at most; try again later")

    def submit(self, jobs: Sequence[Job], on_close: Callable[[Ticket], None]) -> Ticket:
        """Hand jobs to the engine, after `check_room`; what the engine refuses shows in `Ticket.accepted`. ``on_close`` hears when the ticket is closed."""

        def closed(ticket: Ticket) -> None:
            self._closed(ticket)
            on_close(ticket)

        ticket = Ticket(jobs, closed)
        for job in jobs:
            self._tickets[job.request_id] = ticket
            self._commands.put(partial(self._add, job=job))
        self._hurry()
        return ticket

    def drain(self) -> None:
        """Take nothing new; what runs may finish."""
        if self.state in ("loading", "ready"):
            self.state = "draining"

    def stop(self) -> None:
        """End the thread after the pass it is in; unfinished requests fail."""
        self.drain()
        self._stop_wanted = True
        self._commands.put(None)
        self._hurry()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within the time."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _closed(self, ticket: Ticket) -> None:
        for job in ticket.jobs:
            self._tickets.pop(job.request_id, None)
        unfinished = tuple(ticket.unfinished)
        if unfinished:
            self._commands.put(partial(self._abort, request_ids=unfinished))
            self._hurry()

    def _hurry(self) -> None:
        """After a command was put: who steps hears of it after the pass that runs."""
        if self._served is not None:
            self._served.hurry()

    def _deliver(self, facts: PassFacts) -> None:
        self._on_pass(facts)
        for output in facts.outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None:
                ticket.deliver(output)

    def _accept(self, request_id: str) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            ticket.accept()

    def _fail(self, request_ids: Sequence[str], error: Exception) -> None:
        for request_id in request_ids:
            ticket = self._tickets.get(request_id)
            if ticket is not None:
                ticket.fail(error)

    def _ended(self, error: BaseException | None) -> None:
        self.state = "stopped"
        self._fail(tuple(self._tickets), EngineStoppedError("the server is shutting down" if error is None else f"the engine has stopped: {error}"))
        self._on_stop(error)

    # -- the engine's side ---------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            served = self._served = self._open_served()
            try:
                self._call(self._opened)
                self._serve(served)
            finally:
                served.close()
        except BaseException as caught:  # noqa: BLE001  whatever it is, the loop must hear of it
            error = caught
        self._call(self._ended, error)

    def _opened(self) -> None:
        if self.state == "loading":
            self.state = "ready"
            self._on_ready()

    def _serve(self, served: Served) -> None:
        failures = 0
        while not self._stop_wanted:
            self._take_commands(served, wait=True)
            while served.has_unfinished() and not self._stop_wanted:
                failures = 0 if self._step(served) else failures + 1
                if failures >= MOST_FAILURES:
                    raise DeviceLostError(f"{failures} passes failed one after another; start the server anew")
                self._take_commands(served, wait=False)
            served.rest()

    def _take_commands(self, served: Served, *, wait: bool) -> None:
        for command in self._waiting_commands(wait):
            if command is not None:
                command(served)

    def _waiting_commands(self, wait: bool) -> Iterator[Callable[[Served], None] | None]:
        try:
            if wait:
                yield self._commands.get()
            while True:
                yield self._commands.get_nowait()
        except queue.Empty:
            return

    def _add(self, served: Served, job: Job) -> None:
        try:
            served.add(job)
        except Exception as error:  # noqa: BLE001  what is wrong with one request must not end the others
            self._call(self._fail, (job.request_id,), error)
            return
        self._in_flight.add(job.request_id)
        if job.stream:
            self._streamed.add(job.request_id)
        self._call(self._accept, job.request_id)

    def _abort(self, served: Served, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            served.abort(request_id)
        self._forget(request_ids)

    def _forget(self, request_ids: Sequence[str]) -> None:
        self._in_flight.difference_update(request_ids)
        self._streamed.difference_update(request_ids)

    def _step(self, served: Served) -> bool:
        """One pass; False when it failed: then the requests in flight fail with it and the engine goes on, unless a device is lost."""
        try:
            facts = served.step(self._streamed)
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001
            logger.error("a pass failed: %s\n%s", error, traceback.format_exc())
            lost = tuple(self._in_flight)
            self._abort(served, lost)
            self._call(self._fail, lost, RequestFailedError("the engine failed while it worked on this request"))
            return False
        self._forget([output.request_id for output in facts.outputs if output.finished])
        self._call(self._deliver, facts)
        return True

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)
