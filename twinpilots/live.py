"""`LiveEngine`: an engine that requests enter and leave while its passes run, for those who drive it themselves: a batch file, a server.

Owns who drives the passes and what is still in flight. Knows nothing of files, HTTP or text. One thread at a time may use it, and one `LiveEngine` at a time
an `LLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from typing import Any

from twinpilots.plan.plan import Plan
from twinpilots.plan.workload import Workload
from twinpilots.request import RequestOutput, SamplingParams
from twinpilots.session import Session


class LiveEngine:
    """``session`` gives the session in force; ``replan(workload, longest)`` may put another one in its place."""

    def __init__(self, session: Callable[[], Session], replan: Callable[[Workload, int], None]) -> None:
        self._session = session
        self._replan = replan
        self._driving = ExitStack()
        self._driven: Session | None = None
        self._live: set[str] = set()

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._session().plan

    @property
    def session(self) -> Session:
        """The session in force, to look at."""
        return self._session()

    @property
    def num_unfinished(self) -> int:
        """Requests in flight."""
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV pages."""
        return len(self._session().scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages, new or preempted."""
        return len(self._session().scheduler.waiting)

    def stats(self) -> dict[str, Any]:
        """Counters of the scheduler: preemptions, sequences whose KV changed tiers by where it went, and KV pages, by tier (total and free)."""
        session = self._session()
        pools = session.engine.kv.pools
        pages = {tier: {"total": pool.num_pages, "free": pool.num_free} for tier, pool in pools.items()}
        moves = {tier: session.scheduler.num_moves[tier] for tier in pools}
        return {"preemptions": session.scheduler.num_preemptions, "kv_moves": moves, "pages": pages}

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens computed so far, since the LLM was made."""
        return self._session().num_tokens[0]

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, since the LLM was made."""
        return self._session().num_tokens[1]

    def fits(self, num_prompt_tokens: int, max_tokens: int | None) -> bool:
        """Whether the plan in force can hold such a sequence to its end; without ``max_tokens``, the prompt and one more token."""
        scheduler = self._session().scheduler
        capacity = max(scheduler.capacity_tokens("gpu"), scheduler.capacity_tokens("host"))
        needed = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
        return needed <= self.plan.max_model_len and needed - 1 <= capacity  # the last token is never computed

    def add(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, prompt: str | None = None, *, client: str = "", priority: int = 0
    ) -> None:
        """Queue a request. Clients share the engine fairly; among one client's requests, a lower priority goes first. Raises ValueError for bad input and
        LimitError for one that the plan in force can never run, both before any work."""
        self._session().engine.add_request(request_id, prompt_token_ids, params, prompt, client=client, priority=priority)
        self._live.add(request_id)

    def step(self, *, partial: bool | Container[str] = True) -> list[RequestOutput]:
        """One pass, or a chain of passes: the outputs of every request that got a token; without ``partial``, of those that it finished, and of the requests
        that it names. Nothing to do: []."""
        session = self._session()
        if session is not self._driven:
            self._driving.close()
            self._driving.enter_context(session.driving())
            self._driven = session
        outputs = session.step(partial=partial)
        self._live.difference_update(output.request_id for output in outputs if output.finished)
        return outputs

    def hurry(self) -> None:
        """From any thread: passes that are chained return to whoever drives after the one that runs."""
        driven = self._driven
        if driven is not None:
            driven.hurry()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, at any point; its output so far, or None when it is not (or no longer) here."""
        self._live.discard(request_id)
        return self._session().engine.abort(request_id)

    def fit(self, workload: Workload, longest: int) -> None:
        """Make the plan hold sequences of ``longest`` tokens, and change it when another would do ``workload`` sooner, its loading included. Only when
        nothing is in flight. LimitError when no plan can hold such a sequence."""
        if self._live:
            raise RuntimeError(f"{len(self._live)} requests are in flight; finish or abort them before another plan is fitted")
        self._stop_driving()
        self._replan(workload, longest)

    def close(self) -> None:
        """Abort what is in flight."""
        for request_id in tuple(self._live):
            self.abort(request_id)
        self._stop_driving()

    def _stop_driving(self) -> None:
        self._driving.close()
        self._driven = None
