"""What is counted and timed per request, by vLLM's names where they exist, and the page that Prometheus scrapes.

Owns `Telemetry`. It lives in the event loop's thread: passes tell it who was scheduled and who got a token, tickets when they came and how they ended.
Engine-wide figures come from the `View`. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from twinpilots.request import RequestOutput
from twinpilots.server.prometheus import Histogram, Page
from twinpilots.server.tickets import Job, PassFacts
from twinpilots.server.view import Snapshot

# vLLM's buckets, so that its dashboards' quantiles mean the same here.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Time from a request's arrival to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Time from one token of a sequence to its next.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("A request's mean time per token after the first.", _TOKEN_S),
    "e2e_request_latency_seconds": ("Time from a request's arrival to its end.", _REQUEST_S),
    "request_queue_time_seconds": ("Time from a request's arrival to its first pass.", _REQUEST_S),
    "request_inference_time_seconds": ("Time from a request's first pass to its end.", _REQUEST_S),
    "request_prefill_time_seconds": ("Time from a request's first pass to its first token.", _REQUEST_S),
    "request_decode_time_seconds": ("Time from a request's first token to its end.", _REQUEST_S),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", _TOKENS),
    "request_params_n": ("The n of a request.", _COUNTS),
    "request_params_max_tokens": ("The max_tokens of a request.", _TOKENS),
    "iteration_tokens_total": ("Sequences that got a token in a pass.", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)),
}
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "not_ready", "unauthorized", "invalid")
RETRY_AFTER_MOST_S = 60


@dataclass(slots=True)
class _Times:
    job: Job
    arrived_s: float
    scheduled_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None


class Telemetry:
    """Counters and histograms of one server."""

    def __init__(self, model_name: str) -> None:
        self._labels = {"model_name": model_name}
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in HISTOGRAMS.items()}
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected = dict.fromkeys(REJECTIONS, 0)
        self._live: dict[str, _Times] = {}

    # -- what happens --------------------------------------------------------------------------------------------------------------------

    def arrived(self, job: Job) -> None:
        self._live[job.request_id] = _Times(job, time.monotonic())

    def on_pass(self, facts: PassFacts) -> None:
        now_s, observe = facts.ended_s, self.histograms
        observe["iteration_tokens_total"].observe(len(facts.sampled), facts.passes)
        for request_id in facts.scheduled:
            times = self._live.get(request_id)
            if times is not None and times.scheduled_s is None:
                times.scheduled_s = now_s
                observe["request_queue_time_seconds"].observe(now_s - times.arrived_s)
        for request_id in dict.fromkeys(facts.sampled):
            times = self._live.get(request_id)
            if times is None:
                continue
            if times.first_s is None or times.last_s is None:
                times.first_s = now_s
                observe["time_to_first_token_seconds"].observe(now_s - times.arrived_s)
            else:
                observe["inter_token_latency_seconds"].observe((now_s - times.last_s) / facts.passes, facts.passes)
            times.last_s = now_s
        for output in facts.outputs:
            if output.finished:
                self._finished(output, now_s)

    def _finished(self, output: RequestOutput, now_s: float) -> None:
        times = self._live.pop(output.request_id, None)
        if times is None:
            return
        for one in output.outputs:
            self.finished[one.finish_reason or "error"] += 1
        observe = self.histograms
        tokens = sum(len(one.token_ids) for one in output.outputs)
        observe["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        observe["request_generation_tokens"].observe(tokens)
        observe["request_params_n"].observe(times.job.params.n)
        if times.job.params.max_tokens is not None:
            observe["request_params_max_tokens"].observe(times.job.params.max_tokens)
        observe["e2e_request_latency_seconds"].observe(now_s - times.arrived_s)
        if times.scheduled_s is not None and times.first_s is not None:
            observe["request_inference_time_seconds"].observe(now_s - times.scheduled_s)
            observe["request_prefill_time_seconds"].observe(times.first_s - times.scheduled_s)
            observe["request_decode_time_seconds"].observe(now_s - times.first_s)
            longest = max(len(one.token_ids) for one in output.outputs)
            if longest > 1:
                observe["request_time_per_output_token_seconds"].observe((now_s - times.first_s) / (longest - 1))

    def ended(self, request_id: str, *, failed: bool) -> None:
        """A request whose reader left or whose engine failed; nothing to do for one that has finished."""
        times = self._live.pop(request_id, None)
        if times is not None:
            self.finished["error" if failed else "abort"] += times.job.params.n

    def retry_after_s(self, num_ahead: int, num_at_once: int) -> int:
        """When somebody who is refused now may find room: the mean request time by how many are ahead."""
        mean_s = self.histograms["e2e_request_latency_seconds"].mean or 1.0
        return max(1, min(RETRY_AFTER_MOST_S, math.ceil(mean_s * num_ahead / max(1, num_at_once) / 2)))

    # -- the page --------------------------------------------------------------------------------------------------------------------------

    def render(self, snapshot: Snapshot | None) -> str:
        """The scrape. ``snapshot`` is None while the model loads."""
        page = Page(self._labels)
        prefix = "twinpilots:"
        page.values("counter", f"{prefix}request_success_total", "Sequences that ended, by reason.",
                    [({"finished_reason": reason}, count) for reason, count in self.finished.items()])  # fmt: skip
        page.values("counter", f"{prefix}requests_rejected_total", "Requests refused before any work, by reason.",
                    [({"reason": reason}, count) for reason, count in self.rejected.items()])  # fmt: skip
        for name, (text, _) in HISTOGRAMS.items():
            page.histogram(f"{prefix}{name}", text, self.histograms[name])
        if snapshot is not None:
            snapshot.add_to(page, prefix)
        return page.render()
