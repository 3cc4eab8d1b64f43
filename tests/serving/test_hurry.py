"""Promise: a new request, an abort and a shutdown wait for the pass that runs, not for all that are chained to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from twinpilots.request import SamplingParams
from twinpilots.server.engine_thread import EngineThread
from twinpilots.server.tickets import Job, PassFacts, Ticket


class Chaining:
    """A served engine whose steps end when somebody is in a hurry, and are given up after a while."""

    def __init__(self) -> None:
        self.hurried, self.stepping, self.returned = threading.Event(), threading.Event(), threading.Event()
        self.requests: set[str] = set()

    def add(self, job: Job) -> None:
        self.requests.add(job.request_id)

    def abort(self, request_id: str) -> None:
        self.requests.discard(request_id)

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def step(self, streamed: object) -> PassFacts:
        self.stepping.set()
        if self.hurried.wait(20):
            self.returned.set()
        self.hurried.clear()
        return PassFacts(ended_s=0.0, scheduled=(), sampled=(), outputs=())

    def hurry(self) -> None:
        self.hurried.set()

    def rest(self) -> None: ...

    def close(self) -> None: ...


WORDS: dict[str, Callable[[EngineThread, Ticket], object]] = {
    "request": lambda thread, ticket: thread.submit([job("b")], closed), "abort": lambda thread, ticket: ticket.close(),
    "shutdown": lambda thread, ticket: thread.stop(),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS)
def test_a_word_from_the_loop_ends_the_chain(word: Callable[[EngineThread, Ticket], object]) -> None:
    asyncio.run(_run(word))


def job(name: str) -> Job:
    return Job(request_id=name, prompt_token_ids=[1], params=SamplingParams())


def closed(ticket: Ticket) -> None: ...


async def _run(word: Callable[[EngineThread, Ticket], object]) -> None:
    served, ready = Chaining(), asyncio.Event()
    thread = EngineThread(
        lambda: served, max_accepted=lambda: 9, on_ready=ready.set, on_pass=lambda facts: None, on_stop=lambda error: None
    )  # fmt: skip
    thread.start(asyncio.get_running_loop())
    await ready.wait()
    ticket = thread.submit([job("a")], closed)
    await ticket.accepted()
    await asyncio.to_thread(served.stepping.wait, 20)
    await asyncio.sleep(0.05)
    served.returned.clear()  # the first request's own word may have ended a step
    word(thread, ticket)
    assert await asyncio.to_thread(served.returned.wait, 5)
    thread.stop()
    assert await asyncio.to_thread(thread.join, 20)
