"""When the running plan should change, and to what: decided pass by pass from what the passes took.

Owns `Adaptation`: the state of every bucket in use, when a re-solve is worth asking for, the judgement of its answer (gain against switching cost,
hysteresis, what plans like it took when they were measured), and the record of every change. Deterministic: no clock, no thread; whoever solves is
injected. Knows nothing of devices, requests or how options are found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.outcomes import KEPT_PLANS, OUTCOME_FADE, RECENT, SETTLE_PASSES, BucketState, Outcomes, describe, load_change, signature_of, words_of
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.rebalance import Option, alone, in_the_manner_of, pilots_of, shares_of, with_bucket
from twinpilots.stats.tracker import Tracker

CHECK_PASSES = 2  # of a bucket, between two looks at whether to ask
MOST_UNSETTLED = 5  # passes that an ask waits while rates seem to be jumping: the first to jump are not the whole picture
MOST_PATIENCE = 64  # passes between two asks that change nothing, at most
UNDONE_PATIENCE = 16  # after a change that was undone: what its like would take is known now
DRIFT = 0.04  # of a pass's time: rates that changed less need no new plan
BIG_DRIFT = 0.12  # is asked about at once, whatever came of the last asks
LOAD_CHANGE = 1.25  # factor on tokens or context
SURPRISE = 0.06  # measured / predicted of a pass beyond what the plan was made with, in log ratio
BIG_SURPRISE = 0.3  # is asked about even when the run has not paid for it yet
MIN_GAIN = 0.02  # of a pass's time: what a change must bring
ALIKE = 0.4  # nearness below which two plans have too little in common for that,
FAR_GAIN = 0.05  # and the gain that a change between them must bring
JUDGED_PASSES = 8  # after which a change's outcome is written down
CLEAR_PASSES, CLEAR_LOSS = 4, 1.1  # or sooner, when it is so clear a loss
SOLVING_FRAC = 0.01  # of the run's time that may go to solving anew, beside the devices but on the same machine
GLANCE_S = 0.05  # taken for what a glance takes, before there was one
MOST_CREDIT_S = 1.0  # what may be saved up, and, where rates have changed much, be owed
DISTURBED, DISTURBED_S = 1.6, 0.02  # times as long, or so much longer, a pass may take because of a search beside it: one of few sequences takes 10 ms alone
ALARM, ALARM_PASSES, ALARM_GAIN = 0.6, 3, 0.8  # log of measured / predicted that is one, in so many passes, where another plan takes at most this part of them
HISTORY_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class PassSeen:
    """One pass as the session saw it. ``predicted_s``: by the simulator at the tracker's rates, without what outcomes taught. ``remaining``: passes of
    this kind that are still to come, about."""

    plan: Plan
    bucket: BucketPlan
    load: PassLoad
    predicted_s: float
    measured_s: float
    remaining: int
    driver_s: float = 0.0  # of both: what a pass takes beside the devices' work


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a re-solve needs: pure data, good for another process. ``kept``: buckets that were in force before and are to be priced, too.
    ``surprise``: measured / predicted of the bucket in force. ``thorough``: a search; else a glance, for which ``kept`` does not matter."""

    profile: HardwareProfile
    plan: Plan
    bucket: BucketPlan
    load: PassLoad
    kept: tuple[BucketPlan, ...]
    driver_s: float
    reason: str
    surprise: float = 1.0
    thorough: bool = True


Price = Callable[[Plan, BucketPlan, PassLoad], float]  # seconds of a pass, about, at once
Solver = Callable[[Ask], tuple[Option, ...]]  # the bucket as it is first; picklable, for a runner may be another process


class Runner(Protocol):
    """Solves one thing at a time, on the spot or elsewhere. ``last_s``: what the last solve took. ``disturbs``: whether passes beside a solve are slower."""

    last_s: float
    disturbs: bool

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None: ...

    def collect(self) -> tuple[Option, ...] | None:
        """The answer, once; None while there is none."""
        ...


class Inline:
    """Solves on the spot and free of charge: for the virtual clock."""

    last_s = 0.0
    disturbs = False

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        self._answer: tuple[Option, ...] | None = solve()

    def collect(self) -> tuple[Option, ...] | None:
        answer, self._answer = self._answer, None
        return answer


@dataclass(kw_only=True)
class ChangeRecord:
    """One change of plan. ``pass_number`` counts all passes. Seconds are of one pass of the bucket (measured: the median of a few), or, of a change that
    loaded the model anew (``scope`` "workload"), of all the work that it was made for."""

    pass_number: int
    reason: str
    what: str
    predicted_before_s: float | None
    predicted_after_s: float
    measured_before_s: float | None
    measured_after_s: float | None = None
    scope: Literal["pass", "workload"] = "pass"

    def as_dict(self) -> dict[str, Any]:
        return {
            "pass": self.pass_number, "scope": self.scope, "reason": self.reason, "change": self.what,
            "predicted_s": {"before": self.predicted_before_s, "after": self.predicted_after_s},
            "measured_s": {"before": self.measured_before_s, "after": self.measured_after_s},
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """A plan to switch to from the next pass on, and why."""

    plan: Plan
    reason: str


class Adaptation:
    """Fed with every pass; answers with a change when there is one. ``runner`` takes a solve and gives its answer, at once or some passes later. ``glances``:
    the solver can answer at a glance, which is asked for first, and followed by a search when the run has paid for that."""

    def __init__(self, tracker: Tracker, solve: Solver, runner: Runner, *, price: Price | None = None, switch_s: float = 0.0, glances: bool = False) -> None:
        self.tracker, self._solve, self._runner, self._price, self._glances = tracker, solve, runner, price, glances
        self.switch_s = switch_s  # what a change costs once
        self.history: deque[ChangeRecord] = deque(maxlen=HISTORY_LENGTH)
        self.outcomes = Outcomes()
        self.num_passes = self.num_asks = self._num_jumps = self._unsettled = 0
        self._optimism = 0.0  # log of measured / predicted of the last changes
        self._credit_s = 0.0  # what the run has paid for solving so far, less what that took
        self._glance_s = min(GLANCE_S, runner.last_s)  # what the last one took
        self._search_s: float | None = None
        self._buckets: dict[int, BucketState] = {}
        self._asked: Ask | None = None
        self._judging: tuple[ChangeRecord, BucketState] | None = None

    def after_pass(self, seen: PassSeen) -> Change | None:
        """Take in a pass; the plan to go on with, or None to stay."""
        self.num_passes += 1
        self._optimism *= OUTCOME_FADE
        self._credit_s = min(MOST_CREDIT_S, self._credit_s + SOLVING_FRAC * seen.measured_s)
        state = self._state(seen)
        if not self.is_disturbed(seen.measured_s, seen.predicted_s * math.exp(state.log_outcome)):
            state.add(seen.measured_s, seen.predicted_s)
        self._watch_rates()
        if not self._unsettled and state.num_ratios >= 2:
            self.outcomes.put(state.signature, state.log_outcome, state.passes, self.num_passes)
        at_once = self._judge(seen) or self._alarm(state, seen)
        if at_once is not None:
            return at_once
        if self._asked is None:
            reason = self._why_ask(state, seen)
            if reason is not None:
                self._ask(state, seen, reason, thorough=not self._glances)
            elif self._owes_search(state, seen):
                self._ask(state, seen, state.asked_why, thorough=True)
            else:
                return None
        answer = self._runner.collect()
        if answer is None:
            return None
        last_s = self._runner.last_s
        self._credit_s -= last_s
        self._search_s, self._glance_s = (last_s, self._glance_s) if self._asked is not None and self._asked.thorough else (self._search_s, last_s)
        return self._decide(answer, seen)

    def is_disturbed(self, measured_s: float, expected_s: float) -> bool:
        """Whether a search beside a pass has slowed it down: what it took then says nothing of the plan, nor of the rates. A search does not slow down by
        more than `DISTURBED` or `DISTURBED_S`."""
        return self._asked is not None and self._runner.disturbs and measured_s < max(DISTURBED * expected_s, expected_s + DISTURBED_S)

    def expected_factor(self, bucket: BucketPlan) -> float:
        """Measured / predicted to expect of the next pass, predicted at the tracker's rates."""
        state = self._buckets.get(id(bucket))
        log_factor = state.log_outcome if state is not None and state.num_ratios >= RECENT else self.outcomes.log_factor(signature_of(bucket), self.num_passes)
        return math.exp(log_factor)

    def note_reload(self, reason: str, what: str, predicted_before_s: float | None, predicted_after_s: float) -> None:
        """Another plan was loaded for another workload."""
        self._judging = None
        self.history.append(
            ChangeRecord(
                pass_number=self.num_passes, reason=reason, what=what, predicted_before_s=predicted_before_s, predicted_after_s=predicted_after_s,
                measured_before_s=None, scope="workload",
            )
        )  # fmt: skip

    def _state(self, seen: PassSeen) -> BucketState:
        key = id(seen.bucket)
        if key not in self._buckets:
            alive = {id(bucket) for bucket in seen.plan.buckets}
            self._buckets = {number: state for number, state in self._buckets.items() if number in alive}
            self._buckets[key] = BucketState(bucket=seen.bucket)
        return self._buckets[key]

    def _watch_rates(self) -> None:
        """When a rate has jumped, passes before were predicted at rates that no longer hold: what they took says nothing about the next ones."""
        if self.tracker.num_jumps != self._num_jumps:
            self._num_jumps = self.tracker.num_jumps
            self.outcomes.doubt()
            for state in self._buckets.values():
                state.forget_ratios()
        self._unsettled = 0 if self.tracker.is_settled else self._unsettled + 1

    # -- asking ------------------------------------------------------------------------------------------------------------------------------

    def _why_ask(self, state: BucketState, seen: PassSeen) -> str | None:
        """The reason to have this bucket solved again, or None."""
        waited = state.passes - state.asked_at
        if state.passes % CHECK_PASSES:
            return None
        if waited < SETTLE_PASSES or seen.remaining < SETTLE_PASSES or 0 < self._unsettled < MOST_UNSETTLED:
            return None
        paid = self._credit_s >= min(self._glance_s if self._glances else self._cost_s, MOST_CREDIT_S)
        if state.made_for is None:
            return "first use" if paid else None
        drift, words = self.tracker.drift(state.made_at)
        on_credit = self._credit_s > -MOST_CREDIT_S
        if drift > BIG_DRIFT and on_credit:
            return words
        surprise = abs(state.log_outcome - state.made_outcome) if waited >= state.patience and state.num_ratios >= RECENT else 0.0
        if not paid and not (surprise > BIG_SURPRISE and on_credit):
            return None
        if drift > DRIFT and waited >= state.patience:
            return words
        if load_change(state.made_for, seen.load) > LOAD_CHANGE:
            return f"{words_of(seen.load)} instead of {words_of(state.made_for)}"
        if surprise > max(SURPRISE, 2 * state.noise_log):
            return f"passes take {math.exp(state.log_outcome):.2f} of what was predicted"
        return None

    def _owes_search(self, state: BucketState, seen: PassSeen) -> bool:
        """A glance is followed by a search as soon as the run has paid for it; where passes are slower beside one, when it is known what the glance brought."""
        waited = state.passes - state.asked_at
        if self._judging is not None and self._runner.disturbs:
            return False
        if not state.asked_why or waited < SETTLE_PASSES or seen.remaining < SETTLE_PASSES or 0 < self._unsettled < MOST_UNSETTLED:
            return False
        return self._credit_s >= min(self._cost_s, MOST_CREDIT_S)

    @property
    def _cost_s(self) -> float:
        """Of a search."""
        return self._runner.last_s if self._search_s is None else self._search_s

    def _ask(self, state: BucketState, seen: PassSeen, reason: str, *, thorough: bool) -> None:
        ask = Ask(
            profile=self.tracker.profile(), plan=seen.plan, bucket=seen.bucket, load=seen.load, kept=tuple(state.left), driver_s=seen.driver_s, reason=reason,
            surprise=math.exp(state.log_outcome), thorough=thorough,
        )  # fmt: skip
        self._asked = ask
        state.asked_why = "" if thorough else reason
        self.num_asks += 1
        state.asked_at, state.made_for, state.made_at, state.made_outcome = state.passes, seen.load, self.tracker.snapshot(), state.log_outcome
        self._runner.submit(partial(self._solve, ask))

    # -- deciding ----------------------------------------------------------------------------------------------------------------------------

    def _decide(self, answer: Sequence[Option], seen: PassSeen) -> Change | None:
        ask, self._asked = self._asked, None
        assert ask is not None
        if not answer or seen.bucket is not ask.bucket or seen.plan is not ask.plan:
            return None  # the load went on to another bucket meanwhile: this one is asked about again when it comes back
        state = self._buckets[id(ask.bucket)]
        now, *others = answer
        # What the plan in force takes is measured; predictions of the others are corrected by how that compares with its own.
        measured_s = state.measured_s if state.num_ratios >= 2 else None
        outcome = state.log_outcome if measured_s is None else math.log(measured_s / now.seconds)
        now_s = now.seconds * math.exp(outcome)
        best, best_s = None, math.inf
        for option in others:
            seconds = option.seconds * math.exp(self._log_outcome(option, state, outcome))
            if seconds < best_s:
                best, best_s = option, seconds
        least_gain = MIN_GAIN
        if best is not None and signature_of(best.bucket).nearness(state.signature) < ALIKE:
            # What this plan has taught says little of the other: this one's noise counts against the change, and how much the last ones promised too much.
            least_gain = max(FAR_GAIN, 3 * state.noise_log, -math.expm1(-self._optimism))
        gain_s = now_s - best_s
        if best is None or gain_s < least_gain * now_s or gain_s * seen.remaining < self.switch_s:
            if ask.thorough:
                state.patience = min(MOST_PATIENCE, 2 * state.patience)
            return None
        return self._change(ask, state, seen, best, now_s, best_s)

    def _log_outcome(self, option: Option, state: BucketState, outcome: float) -> float:
        """What to expect of an option beyond its prediction: what its like took, of which the plan in force is the nearest witness."""
        own = signature_of(option.bucket)
        near = own.nearness(state.signature)
        # Whatever slows one pilot down slows two that wait for each other down as well; the other way round it may have been the waiting.
        joins = own.pilots == "both" and state.signature.pilots != "both"
        return near * outcome + (1.0 - near) * self.outcomes.log_factor(own, self.num_passes, max(0.0, outcome) if joins else 0.0)

    def _change(self, ask: Ask, state: BucketState, seen: PassSeen, option: Option, now_s: float, then_s: float) -> Change:
        record = ChangeRecord(
            pass_number=self.num_passes, reason=ask.reason, what=f"{describe(ask.bucket)} -> {describe(option.bucket)}", predicted_before_s=now_s,
            predicted_after_s=then_s, measured_before_s=state.measured_s,
        )  # fmt: skip
        left = deque([each for each in state.left if each != option.bucket], maxlen=KEPT_PLANS)
        left.append(ask.bucket)
        fresh = BucketState(
            bucket=option.bucket, made_for=ask.load, since=seen.load, made_at=state.made_at, asked_at=0, left=left,
            # What the search knew of, not what has come out since: passes that turn out slower than that are a reason to search again.
            made_outcome=self._log_outcome(option, state, state.made_outcome), asked_why=state.asked_why,
            patience=min(MOST_PATIENCE, 2 * state.patience) if option.bucket in state.left else SETTLE_PASSES,
        )  # fmt: skip
        del self._buckets[id(ask.bucket)]
        self._buckets[id(option.bucket)] = fresh
        self.history.append(record)
        self._judging = record, fresh
        reason = f"{ask.reason}: predicted {then_s * 1e3:.3g} ms a pass instead of {now_s * 1e3:.3g} ms"
        return Change(plan=self._carry(with_bucket(ask.plan, ask.bucket, option.bucket), fresh), reason=reason)

    def _alarm(self, state: BucketState, seen: PassSeen) -> Change | None:
        """Two pilots that take far longer than all rates say wait for each other: one alone is tried before a search has ended, and undone when that was
        wrong."""
        if self._price is None or self._judging is not None or state.has_alarmed or state.num_ratios < ALARM_PASSES or pilots_of(seen.bucket) != "both":
            return None
        measured_s = state.measured_s
        if measured_s is None or state.log_outcome - state.made_outcome < ALARM or seen.remaining < SETTLE_PASSES:
            return None
        state.has_alarmed = True
        candidates = [alone(seen.bucket, "cpu"), alone(seen.bucket, "stream")]
        seconds = [self._price(seen.plan, each, seen.load) for each in candidates]
        then_s, found = min(seconds), candidates[seconds.index(min(seconds))]
        if then_s > ALARM_GAIN * measured_s:
            return None
        ask = Ask(
            profile=self.tracker.offline, plan=seen.plan, bucket=seen.bucket, load=seen.load, kept=(), driver_s=seen.driver_s,
            reason=f"passes take {math.exp(state.log_outcome):.2f} of what was predicted",
        )  # fmt: skip
        state.made_at = self.tracker.snapshot()
        return self._change(ask, state, seen, Option(bucket=found, seconds=then_s, pilots=pilots_of(found)), measured_s, then_s)

    def _carry(self, plan: Plan, state: BucketState) -> Plan:
        """Of fewer tokens the CPU computes no smaller part, of more no larger one, for it reads less and computes more: a batch that drains need not find out
        anew, bucket by bucket, what it has just learned. Only buckets that have not run; each is solved itself when it does."""
        like = state.bucket
        for bucket in plan.buckets:
            lacks = (shares_of(bucket)[0] - shares_of(like)[0]) * (like.max_tokens - bucket.max_tokens) < 0
            if bucket.phase == like.phase and lacks and id(bucket) not in self._buckets:
                moved = in_the_manner_of(bucket, like)
                self._buckets[id(moved)] = BucketState(bucket=moved, left=deque([bucket], maxlen=KEPT_PLANS))
                state.carried = (*state.carried, (bucket, moved))
                plan = with_bucket(plan, bucket, moved)
        return plan

    def _judge(self, seen: PassSeen) -> Change | None:
        """Write down what the last change brought, once that is known; the way back if that was a loss."""
        if self._judging is None:
            return None
        record, state = self._judging
        before_s, after_s = record.measured_before_s, state.measured_s
        is_clear = state.passes >= CLEAR_PASSES and before_s is not None and after_s is not None and after_s > CLEAR_LOSS * before_s
        if state.passes < JUDGED_PASSES and not is_clear:
            return None
        self._judging = None
        record.measured_after_s = after_s
        if after_s is not None:
            self._optimism = max(0.0, math.log(after_s / record.predicted_after_s), self._optimism / 2)
        if before_s is None or after_s is None or after_s <= (1.0 + MIN_GAIN) * before_s or seen.bucket is not state.bucket:
            return None
        if state.since is None or load_change(state.since, seen.load) > LOAD_CHANGE:
            return None  # another load, other times
        back = state.left[-1]
        self.history.append(
            ChangeRecord(
                pass_number=self.num_passes, reason="the last change was a loss", what=f"{describe(state.bucket)} -> {describe(back)}",
                predicted_before_s=after_s, predicted_after_s=before_s, measured_before_s=after_s,
            )
        )  # fmt: skip
        plan = with_bucket(seen.plan, state.bucket, back)
        for before, after in state.carried:
            if id(after) in self._buckets and not self._buckets[id(after)].passes:
                del self._buckets[id(after)]
                plan = with_bucket(plan, after, before)
        del self._buckets[id(state.bucket)]
        self._buckets[id(back)] = BucketState(
            bucket=back, made_for=seen.load, made_at=state.made_at, asked_at=0, patience=UNDONE_PATIENCE, left=deque([state.bucket], maxlen=KEPT_PLANS)
        )
        reason = f"the last change was a loss: {after_s * 1e3:.3g} ms a pass instead of {before_s * 1e3:.3g} ms"
        return Change(plan=plan, reason=reason)
