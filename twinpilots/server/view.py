"""What both pilots do, for the page and for Prometheus: published by the engine's thread, read by the loop's.

Owns `Snapshot` (one frozen picture) and `View` (which takes it from the `LLM`, twice a second while passes run and whenever work ends). The two threads share
nothing but the reference to the newest snapshot. Knows nothing of HTTP or requests.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinpilots.api import LLM
from twinpilots.live import LiveEngine
from twinpilots.plan.difference import difference
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.layout import page_bytes
from twinpilots.server.prometheus import Page

SAMPLE_S = 0.5  # one sample of the timeline
KEPT_SAMPLES = 600
KEPT_CHANGES = 50
RESOURCES = ("cpu", "gpu", "link", "dram")
Shares = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One piece of the timeline, ``seconds`` long, ending at ``time_s`` (since 1970). ``busy``: fractions of it. ``prompt`` and ``generated`` count tokens;
    ``measured_s`` and ``predicted_s`` are those of its passes."""

    time_s: float
    seconds: float
    busy: Mapping[str, float]
    prompt: int
    generated: int
    measured_s: float
    predicted_s: float
    running: int
    waiting: int

    def as_dict(self) -> dict[str, Any]:
        rounded = {name: round(share, 4) for name, share in self.busy.items()}
        return {
            "t": round(self.time_s, 3), "seconds": round(self.seconds, 3), **rounded, "prompt_tokens": self.prompt, "generated_tokens": self.generated,
            "measured_s": round(self.measured_s, 4), "predicted_s": round(self.predicted_s, 4), "running": self.running, "waiting": self.waiting,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One picture of the engine. ``stats`` is `LLM.stats()`, ``totals`` what it leaves out; ``kv`` is (pages used, pages) by tier; ``shares`` the plan in force
    by phase and operation; ``now`` the last pass."""

    taken_s: float  # monotonic
    stats: Mapping[str, Any]
    totals: Mapping[str, float]
    running: int
    waiting: int
    preemptions: int
    kv_moves: Mapping[str, int]
    kv: Mapping[str, tuple[int, int]]
    plan: Mapping[str, str]
    limits: Mapping[str, int]
    shares: Mapping[str, Shares]
    now: Mapping[str, Any] | None
    samples: tuple[Sample, ...]
    changes: tuple[Mapping[str, Any], ...]

    @property
    def busy(self) -> Mapping[str, float]:
        """By resource, over the last sample; nothing is busy when no pass has run since."""
        fresh = self.samples and time.monotonic() - self.taken_s < 2 * SAMPLE_S + self.samples[-1].seconds and self.running
        return self.samples[-1].busy if fresh else dict.fromkeys(RESOURCES, 0.0)

    def document(self, since_s: float) -> dict[str, Any]:
        """What the page polls: everything but samples that it has already."""
        return {
            "stats": self.stats, "totals": self.totals, "running": self.running, "waiting": self.waiting, "preemptions": self.preemptions,
            "kv_moves": self.kv_moves, "plan": self.plan,
            "kv": {tier: {"used": used, "pages": pages} for tier, (used, pages) in self.kv.items()}, "limits": self.limits, "shares": self.shares,
            "now": self.now, "busy": self.busy, "changes": self.changes, "samples": [sample.as_dict() for sample in self.samples if sample.time_s > since_s],
        }  # fmt: skip

    def add_to(self, page: Page, prefix: str) -> None:
        """The engine's part of a scrape."""
        stats, totals = self.stats, self.totals
        counter, gauge = "counter", "gauge"
        page.value(gauge, f"{prefix}num_requests_running", "Sequences that passes work on.", self.running)
        page.value(gauge, f"{prefix}num_requests_waiting", "Sequences that wait for a place.", self.waiting)
        used, pages = (sum(part[i] for part in self.kv.values()) for i in (0, 1))
        page.value(gauge, f"{prefix}kv_cache_usage_perc", "KV pages in use, both tiers; 1 means all.", used / pages if pages else 0.0)
        tiers = [({"tier": tier}, part[0] / part[1] if part[1] else None) for tier, part in self.kv.items()]
        page.values(gauge, f"{prefix}kv_cache_tier_usage_perc", "KV pages in use by tier; 1 means all.", tiers)
        page.value(counter, f"{prefix}num_preemptions_total", "Sequences that lost their pages and were computed anew.", self.preemptions)
        _labelled(page, counter, f"{prefix}kv_moves_total", "Sequences whose KV was moved between the tiers, by where it went.", "to", self.kv_moves)
        found = stats["prefix_cache"]
        page.value(counter, f"{prefix}prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", found["queried_tokens"])
        page.value(counter, f"{prefix}prefix_cache_hits_total", "Prompt tokens found there.", found["hit_tokens"])
        page.value(counter, f"{prefix}prompt_tokens_total", "Prompt tokens computed.", stats["tokens"]["prompt"])
        page.value(counter, f"{prefix}generation_tokens_total", "Tokens generated.", stats["tokens"]["generated"])
        page.value(counter, f"{prefix}passes_total", "Passes run.", totals["passes"])
        page.value(counter, f"{prefix}pass_seconds_total", "Time in passes, scheduling and sampling included.", stats["seconds"])
        _labelled(page, counter, f"{prefix}link_bytes_total", "Bytes over the link between host and GPU memory.", "kind",
                  {kind.removeprefix("link_"): value for kind, value in stats["bytes"].items()})  # fmt: skip
        _labelled(page, counter, f"{prefix}busy_seconds_total", "Time that each resource worked, waits excluded.", "resource", stats["busy_s"])
        _labelled(page, gauge, f"{prefix}busy_ratio", "Share of the last half second that each resource worked; dram is estimated from bytes.", "resource",
                  self.busy)  # fmt: skip
        page.value(counter, f"{prefix}weight_wait_seconds_total", "Time that GPU operations waited for streamed weights.", totals["weight_wait_s"])
        _labelled(page, counter, f"{prefix}compared_pass_seconds_total", "Seconds of the passes that have a prediction.", "kind",
                  {"measured": totals["measured_s"], "predicted": totals["predicted_s"]})  # fmt: skip
        _labelled(page, gauge, f"{prefix}tokens_per_second", "Generated tokens per second of passes since the start, and the plan's limits.", "kind",
                  stats["tokens_per_s"])  # fmt: skip
        _labelled(page, gauge, f"{prefix}weights_ratio", "Weights by where passes took them from.", "place", stats["weights_frac"])
        _labelled(page, gauge, f"{prefix}peak_bytes", "The most memory held, by tier.", "tier", stats["peak_bytes"])
        page.values(gauge, f"{prefix}plan_info", "The plan in force.", [(self.plan, 1)])
        page.value(counter, f"{prefix}plan_changes_total", "Plans that took another's place.", stats["plan_changes"])


def _labelled(page: Page, kind: str, name: str, text: str, label: str, values: Mapping[str, float | None]) -> None:
    page.values(kind, name, text, [({label: key}, value) for key, value in values.items()])


class View:
    """Takes snapshots of ``llm``, which is driven as ``live``. All but `newest` is the engine thread's."""

    def __init__(self, llm: LLM, live: LiveEngine) -> None:
        self._llm, self._live = llm, live
        self._plan: Plan | None = None
        self._plan_text: Mapping[str, str] = {}
        self._shares: dict[str, Shares] = {}
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._changes: deque[Mapping[str, Any]] = deque(maxlen=KEPT_CHANGES)
        self._num_reasons = 0
        self._now: dict[str, Any] | None = None
        self._host_kv_bytes = 0.0
        self._bucket: BucketPlan | None = None
        self._last_s = time.monotonic()
        self._last_totals = self._totals()
        self.newest = self._snapshot()

    def after_passes(self, batch: StepBatch, passes: int) -> None:
        """Counts the pass, or the chain of so many; publishes when it is time."""
        self._bucket = batch.bucket
        tokens = sum(item.num_tokens for item in batch.items)
        self._now = {"phase": batch.bucket.phase, "tokens": tokens, "sequences": len(batch.items), "micro_batches": len(batch.micro_batches)}
        on_host = sum(item.end for item in batch.items if item.sequence.tier == "host")
        self._host_kv_bytes += passes * on_host * self._kv_bytes_per_token
        if time.monotonic() - self._last_s >= SAMPLE_S:
            self.publish()

    def publish(self) -> None:
        """A new sample and a new snapshot."""
        now_s, totals = time.monotonic(), self._totals()
        seconds = now_s - self._last_s
        if totals["passes"] > self._last_totals["passes"] and seconds > 0:
            self._samples.append(self._sample(seconds, totals))
        self._last_s, self._last_totals, self._host_kv_bytes = now_s, totals, 0.0
        self.newest = self._snapshot()

    # -- the pieces ----------------------------------------------------------------------------------------------------------------------

    def _totals(self) -> dict[str, float]:
        return self._live.session.stats.totals()

    @property
    def _kv_bytes_per_token(self) -> float:
        plan, spec = self._llm.plan, self._llm.spec
        return page_bytes(spec, plan) * spec.num_layers / plan.page_size

    def _sample(self, seconds: float, totals: Mapping[str, float]) -> Sample:
        done = {name: totals[name] - self._last_totals[name] for name in totals}
        dram_bytes = done["cpu_weight_bytes"] + done["link_bytes"] + self._host_kv_bytes
        busy = {name: min(1.0, done[f"{name}_busy_s"] / seconds) for name in ("cpu", "gpu", "link")}
        busy["dram"] = min(1.0, dram_bytes / (self._live.session.profile.dram_bytes_per_s * seconds))
        return Sample(
            time_s=time.time(), seconds=seconds, busy=busy, prompt=int(done["prompt_tokens"]), generated=int(done["generated_tokens"]),
            measured_s=done["measured_s"], predicted_s=done["predicted_s"], running=self._live.num_running, waiting=self._live.num_waiting,
        )  # fmt: skip

    def _snapshot(self) -> Snapshot:
        stats = self._llm.stats()
        self._note_plan(stats["plan_history"])
        live, counts = self._live, self._live.stats()
        limits = {"max_model_len": live.plan.max_model_len, "max_num_seqs": live.plan.max_num_seqs, "max_pass_tokens": live.plan.max_pass_tokens}
        kv = {tier: (pages["total"] - pages["free"], pages["total"]) for tier, pages in counts["pages"].items()}
        return Snapshot(
            taken_s=time.monotonic(), stats=stats, totals=self._totals(), running=live.num_running, waiting=live.num_waiting,
            preemptions=counts["preemptions"], kv_moves=counts["kv_moves"],
            kv=kv, plan=self._plan_text, limits=limits, shares=dict(self._shares), now=self._now,
            samples=tuple(self._samples), changes=tuple(self._changes),
        )  # fmt: skip

    def _note_plan(self, history: Sequence[Mapping[str, Any]]) -> None:
        plan = self._llm.plan
        if plan is not self._plan:
            if self._plan is not None:
                reason = history[-1]["reason"] if len(history) > self._num_reasons else None
                self._changes.append({"t": round(time.time(), 3), "text": difference(self._plan, plan), "reason": reason})
            self._num_reasons = len(history)
            self._plan, self._shares = plan, {}
            self._plan_text = {
                "id": hashlib.sha256(plan.to_json().encode()).hexdigest()[:12], "model": plan.model, "policy": plan.policy,
                "uses_gpu": str(plan.uses_gpu).lower(), "uses_cpu": str(plan.uses_cpu).lower(), "kv_dtype": plan.kv_dtype,
            }  # fmt: skip
            for phase in ("prefill", "decode"):
                of_phase = [bucket for bucket in plan.buckets if bucket.phase == phase]
                if of_phase:
                    self._shares[phase] = self._shares_of(of_phase[-1])
        if self._bucket is not None and any(self._bucket is bucket for bucket in plan.buckets):
            self._shares[self._bucket.phase] = self._shares_of(self._bucket)

    def _shares_of(self, bucket: BucketPlan) -> Shares:
        """By operation, the fractions of its bytes over all layers that are resident, streamed and the CPU's."""
        sums: Shares = {}
        for op in self._llm.spec.ops(self._llm.plan.unit_rows):
            split, found = bucket.splits[op.layer][op.name], sums.setdefault(op.name, {"resident": 0.0, "streamed": 0.0, "cpu": 0.0})
            for place in found:
                found[place] += getattr(split, place) * op.row_bytes
        return {name: {place: round(part / sum(found.values()), 4) for place, part in found.items()} for name, found in sums.items()}
