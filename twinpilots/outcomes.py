"""What buckets' plans took when they ran, lent to plans that are alike; and what makes plans and loads alike.

Owns `BucketState`, `Outcomes`, `Signature` and the words for a bucket and for a load. Pure. Knows nothing of when plans change (`adaptation`).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import NamedTuple

from twinpilots.plan.draft import Attention
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Phase
from twinpilots.plan.rebalance import Pilots, pilots_of, shares_of
from twinpilots.plan.tasks import NUM_GROUPS
from twinpilots.stats.tracker import Snapshot

SETTLE_PASSES = 4  # after a change, before the next: the tracker must have seen the new plan
RECENT = 5  # passes whose median measured / predicted is a plan's outcome: two pauses of the process do not show
KEPT_PLANS = 3  # buckets that were left and may come back
REACH = 0.3  # how far the outcome of one plan speaks for others: difference of the rows' shares at which its weight falls by e
OUTCOME_FADE = 0.997  # weight of an outcome after one more pass
OUTCOME_AFTER_DRIFT = 0.2  # and after the rates have changed: it was another machine then
OUTCOME_PRIOR = 1.0  # how much no outcome at all counts, in passes
MOST_OUTCOME = 8.0  # passes that one plan's outcome counts at most


@dataclass(kw_only=True)
class BucketState:
    """What is known of one bucket of the plan in force."""

    bucket: BucketPlan
    passes: int = 0
    made_for: PassLoad | None = None
    since: PassLoad | None = None  # the load when it came into force
    made_at: Snapshot = field(default_factory=dict)  # the tracker's rates that it was solved with
    made_outcome: float = 0.0  # the log outcome it was solved with
    asked_at: int = 0  # by its own passes
    asked_why: str = ""  # by a glance that no search has followed yet
    patience: int = SETTLE_PASSES
    has_alarmed: bool = False
    carried: tuple[tuple[BucketPlan, BucketPlan], ...] = ()  # other buckets that were changed with it: (before, after)
    left: deque[BucketPlan] = field(default_factory=lambda: deque(maxlen=KEPT_PLANS))
    _log_ratios: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _measured_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @cached_property
    def signature(self) -> Signature:
        return signature_of(self.bucket)

    def add(self, measured_s: float, predicted_s: float) -> None:
        self._log_ratios.append(math.log(measured_s / predicted_s))
        self._measured_s.append(measured_s)
        self.passes += 1

    @property
    def log_outcome(self) -> float:
        """log(measured / predicted), lately."""
        return median(self._log_ratios) if self._log_ratios else self.made_outcome

    @property
    def num_ratios(self) -> int:
        return len(self._log_ratios)

    def forget_ratios(self) -> None:
        self._log_ratios.clear()
        self._measured_s.clear()

    @property
    def noise_log(self) -> float:
        """How far the outcome may be off: the passes' mean distance from it over the root of their number."""
        ratios = self._log_ratios
        return sum(abs(each - self.log_outcome) for each in ratios) / len(ratios) ** 1.5 if ratios else 0.0

    @property
    def measured_s(self) -> float | None:
        """Of a pass, lately."""
        return median(self._measured_s) if self._measured_s else None


class Outcomes:
    """What plans took when they ran, against what was predicted at the tracker's rates: lent to plans that are alike."""

    def __init__(self) -> None:
        self._found: dict[Signature, tuple[float, float, int]] = {}  # -> (log outcome, passes that count, pass number)

    def put(self, own: Signature, log_outcome: float, passes: int, at: int) -> None:
        self._found[own] = (log_outcome, min(float(passes), MOST_OUTCOME), at)

    def log_factor(self, own: Signature, at: int, unknown: float = 0.0) -> float:
        """log(measured / predicted) to expect of such a plan; ``unknown`` for one that nothing is known about."""
        weight, total = OUTCOME_PRIOR, OUTCOME_PRIOR * unknown
        for signature, (log_outcome, passes, then) in self._found.items():
            near = own.nearness(signature) * passes * OUTCOME_FADE ** (at - then)
            weight += near
            total += near * log_outcome
        return total / weight

    def doubt(self) -> None:
        """The machine has changed: what was found out so far counts less."""
        self._found = {signature: (log_outcome, OUTCOME_AFTER_DRIFT * passes, at) for signature, (log_outcome, passes, at) in self._found.items()}


def load_change(then: PassLoad, now: PassLoad) -> float:
    """The largest factor by which tokens or context differ; host KV that comes or goes counts as doubling."""
    found = 1.0
    for before, after in zip(_load_sizes(then), _load_sizes(now), strict=True):
        found = max(found, max(before, after) / max(1.0, min(before, after)))
    return found


def _load_sizes(load: PassLoad) -> tuple[float, float]:
    """(tokens, mean context)."""
    groups = load.groups(-1, 0, NUM_GROUPS)
    return float(load.tokens()), sum(group.kv_tokens for group in groups) / max(1, load.num_seqs)


def words_of(load: PassLoad) -> str:
    tokens, context = _load_sizes(load)
    return f"{tokens:.0f} tokens at a context of {context:.0f}"


def _host_side(bucket: BucketPlan) -> Attention:
    return bucket.host_attention if bucket.phase == "decode" else bucket.host_prefill_attention


def describe(bucket: BucketPlan) -> str:
    on_cpu, streamed = shares_of(bucket)
    shares = f"{100 * streamed:.0f} % streamed, {100 * on_cpu:.0f} % CPU"
    return f"{shares}, {bucket.micro_batches} micro-batches, host KV attended by the {_host_side(bucket).upper()}"


class Signature(NamedTuple):
    """What makes plans of a bucket alike."""

    pilots: Pilots
    phase: Phase
    micro_batches: int
    host_side: Attention
    on_cpu: float
    streamed: float
    max_tokens: int

    def nearness(self, other: Signature) -> float:
        """How much of another plan's outcome holds for this one: nothing when other pilots compute, or in another phase."""
        if (self.pilots, self.phase) != (other.pilots, other.phase):
            return 0.0
        distance = abs(self.on_cpu - other.on_cpu) + abs(self.streamed - other.streamed) + 0.1 * abs(math.log2(self.max_tokens / other.max_tokens))
        distance += 0.2 * (self.micro_batches != other.micro_batches) + 0.2 * (self.host_side != other.host_side)
        return math.exp(-distance / REACH)


def signature_of(bucket: BucketPlan) -> Signature:
    on_cpu, streamed = shares_of(bucket)
    return Signature(pilots_of(bucket), bucket.phase, bucket.micro_batches, _host_side(bucket), round(on_cpu, 3), round(streamed, 3), bucket.max_tokens)
