"""An `LLM` as the engine thread drives it.

Owns the translation of jobs into requests and of passes into facts, and the workload that a server's plan is made for. Knows nothing of threads or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Container
from contextlib import ExitStack

from twinpilots.api import LLM
from twinpilots.plan.workload import Workload
from twinpilots.server.pacing import Pacer
from twinpilots.server.tickets import Job, PassFacts
from twinpilots.server.view import View

# What a server's first plan is made for: the lengths of a chat's longer turns (ShareGPT's 90th percentile replies), as many at once as small servers see.
EXPECTED = Workload(num_requests=32, input_len=512, output_len=256, max_num_seqs=32)


class ServedLLM:
    """Closes ``llm`` when it is closed."""

    def __init__(self, llm: LLM) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(llm)
        self._live = self._stack.enter_context(llm.open_engine())
        self.view = View(llm, self._live)
        self._pacer = Pacer()

    def add(self, job: Job) -> None:
        self._live.add(job.request_id, job.prompt_token_ids, job.params, job.prompt, client=job.client, priority=job.priority)

    def abort(self, request_id: str) -> None:
        self._live.abort(request_id)

    def has_unfinished(self) -> bool:
        return self._live.num_unfinished > 0

    def step(self, streamed: Container[str]) -> PassFacts:
        session = self._live.session
        prompts = sum(sequence.is_catching_up for sequence in session.scheduler.running)
        decoding = len(session.scheduler.running) - prompts
        session.scheduler.prompt_budget = self._pacer.budget(prompts + len(session.scheduler.waiting), decoding)
        began_s = time.perf_counter()
        outputs = self._live.step(partial=streamed)
        seconds = time.perf_counter() - began_s
        last_pass = session.last_pass
        assert last_pass is not None
        items = last_pass[0].items
        chunks = [item.num_tokens for item in items if item.is_chunk]
        passes = max(1, session.engine.last_passes)
        self._pacer.observe(seconds / passes, sum(chunks), len(items) - len(chunks))
        self.view.after_passes(last_pass[0], passes)
        return PassFacts(
            ended_s=time.monotonic(), outputs=tuple(outputs), scheduled=tuple(dict.fromkeys(item.sequence.request_id for item in items)),
            sampled=session.engine.last_sampled, passes=passes,
        )  # fmt: skip

    def hurry(self) -> None:
        self._live.hurry()

    def rest(self) -> None:
        self.view.publish()

    def close(self) -> None:
        self.view.publish()
        self._stack.close()
