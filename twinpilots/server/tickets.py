"""One HTTP request's share of the engine: what it asked for, and the newest of what has come back.

Owns `Job`, `PassFacts` and `Ticket`. A slow reader costs no memory: outputs are cumulative, so only each request's newest is kept. A `Ticket` belongs to
the event loop's thread. Knows nothing of HTTP, and of the engine only that somebody delivers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from twinpilots.request import RequestOutput, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt for the engine. ``stream``: somebody reads along; else only the finished output is wanted. ``client``: among whom the engine shares fairly;
    ``priority``: lower goes first, among this client's."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    prompt: str | None = None
    stream: bool = False
    client: str = ""
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PassFacts:
    """What one pass did, or ``passes`` that were chained, for the loop: who was in it, who got a token in each, and the outputs that somebody waits for.
    ``ended_s``: monotonic clock."""

    ended_s: float
    scheduled: tuple[str, ...]
    sampled: tuple[str, ...]
    outputs: tuple[RequestOutput, ...]
    passes: int = 1


class Ticket:
    """The jobs of one HTTP request, from being taken on to being closed. Use it as a context manager: leaving aborts whatever has not finished."""

    def __init__(self, jobs: Sequence[Job], on_close: Callable[[Ticket], None]) -> None:
        self.jobs = tuple(jobs)
        self.unfinished = {job.request_id for job in jobs}
        self.error: Exception | None = None
        self._accepted = 0
        self._newest: dict[str, RequestOutput] = {}
        self._changed = asyncio.Event()
        self._on_close: Callable[[Ticket], None] | None = on_close

    @property
    def num_sequences(self) -> int:
        return sum(job.params.n for job in self.jobs)

    # -- the engine's side ---------------------------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """One more of the jobs is in the engine's queue."""
        self._accepted += 1
        self._changed.set()

    def deliver(self, output: RequestOutput) -> None:
        self._newest[output.request_id] = output
        if output.finished:
            self.unfinished.discard(output.request_id)
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The request ends here with an error."""
        self.error = self.error or error
        self._changed.set()

    # -- the reader's side ---------------------------------------------------------------------------------------------------------------

    async def accepted(self) -> None:
        """Returns when the engine has taken all jobs. Raises what it refused one with."""
        while self._accepted < len(self.jobs):
            await self._wait()

    async def updates(self) -> AsyncIterator[list[RequestOutput]]:
        """The outputs that changed, again and again, until every job has finished."""
        while True:
            fresh, self._newest = list(self._newest.values()), {}
            if fresh:
                yield fresh
            elif not self.unfinished:
                return
            else:
                await self._wait()

    async def results(self) -> list[RequestOutput]:
        """The finished outputs in the order of the jobs."""
        done = {output.request_id: output async for outputs in self.updates() for output in outputs if output.finished}
        return [done[job.request_id] for job in self.jobs]

    async def _wait(self) -> None:
        if self.error is None:
            await self._changed.wait()
            self._changed.clear()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Aborts what has not finished. Safe to repeat."""
        if self._on_close is not None:
            on_close, self._on_close = self._on_close, None
            on_close(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
