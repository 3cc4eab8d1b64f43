"""The planner beside a run: predicts every pass, learns from what it took, and says when the plan should change.

Owns `OnlinePlanner`, which joins the simulator (predictions), the tracker (rates) and `Adaptation` (decisions) for one model on one machine, and the memory
of what was simulated. The session drives it on a real machine, `benchmarks.adaptation` on the virtual clock. Knows nothing of devices, requests or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from twinpilots.adaptation import Adaptation, Ask, Change, PassSeen, Runner
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.expected import DOWN, UP, ExpectedTime, PassWork, WorkKind
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.rebalance import Option, option_of, options
from twinpilots.plan.simulate import PassEstimator, PassTiming
from twinpilots.plan.tasks import PassShape, Schedule
from twinpilots.runtime.stats import BusySeconds
from twinpilots.stats.tracker import Snapshot, Tracker, WorkTime

EAGER_PASSES = 16  # the first ones: all are looked at
LOOK_PASSES = 2  # while nothing is unusual, every second pass tells enough: looking takes the driver's time
LOOK_ALONE = 8  # the same where there is no GPU, so no work to move: only predictions gain by it
RENEW_LOOKS = 8  # how often the rates that predictions go by are looked after, in passes looked at; a jump is followed at once
RENEW_DRIFT = 0.04  # of a pass's time: less is left to what passes of the plan have taught, because simulating anew is not free
DRIVER_DECAY = 0.2  # weight of the newest pass in the mean of the driver's time
DRIVER_MOST_S = 0.02  # a pause of the process is not the driver's work
MOST_REMEMBERED = 512  # passes
LINK_QUEUES = {UP: "link_in", DOWN: "link_out"}
NEARBY = 1.15  # factor on every resource's work within which a pass is priced by another's simulation


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPrediction:
    """One pass before it ran: its seconds, the driver's included, and how long each resource works, counted as a pass reports it. ``plain_s``: without
    what passes of this plan have taken beyond their predictions so far."""

    seconds: float
    plain_s: float
    busy_s: BusySeconds


@dataclass(frozen=True, kw_only=True)
class PassDone:
    """One pass after it ran: what it was, its task list, seconds of work by kind, whole seconds as the user feels them, and the driver's part of them."""

    plan: Plan
    bucket: BucketPlan
    load: PassLoad
    schedule: Schedule
    work_s: Mapping[WorkKind, float]
    seconds: float
    driver_s: float
    remaining: int  # passes of this kind that are still to come, about


class OnlinePlanner:
    """``adapts``: whether the plan may change; predictions and the tracker work either way."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, runner: Runner, *, adapts: bool) -> None:
        self.spec, self.profile, self.adapts = spec, profile, adapts  # the profile as history corrects it
        self.tracker = Tracker(profile)
        self.adaptation = Adaptation(self.tracker, partial(resolve, spec), runner)
        self._renewed_at: Snapshot = {}
        self._num_jumps = 0
        self._estimators: dict[tuple[int, PassShape], tuple[BucketPlan, PassEstimator]] = {}
        self._timings: dict[tuple[int, PassLoad], PassTiming] = {}
        self._simulated: dict[tuple[int, PassShape], list[tuple[Mapping[str, float], PassTiming]]] = {}  # with each one's work by resource
        self._work: dict[int, tuple[Schedule, PassWork]] = {}
        self._expected: dict[tuple[int, PassLoad], tuple[ExpectedTime, ...]] = {}
        self._driver_s = 0.0  # scheduling and sampling of a pass, as measured lately

    def predict(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassPrediction:
        """What the simulator says of this pass, and what passes of this plan have taught."""
        timing = self._timing(plan, bucket, load)
        plain_s = timing.seconds + self._driver_s
        return PassPrediction(seconds=plain_s * self.adaptation.expected_factor(bucket), plain_s=plain_s, busy_s=BusySeconds(**timing.resource_s))

    def after_pass(self, done: PassDone, prediction: PassPrediction) -> Change | None:
        """Learn from a pass; the plan to go on with, or None to stay."""
        every = LOOK_ALONE if self.profile.gpu is None else LOOK_PASSES
        if self.tracker.num_passes < EAGER_PASSES or not self.tracker.is_settled or (self.tracker.num_passes + 1) % every == 0:
            self.tracker.observe(self._records(done), done.seconds)
        else:
            self.tracker.pass_over()
        self._driver_s += DRIVER_DECAY * (min(done.driver_s, DRIVER_MOST_S) - self._driver_s)
        jumps, self._num_jumps = self._num_jumps, self.tracker.num_jumps
        if jumps != self._num_jumps or (self.tracker.num_passes % (RENEW_LOOKS * every) == 0 and self.tracker.drift(self._renewed_at)[0] > RENEW_DRIFT):
            self._renew()
        if not self.adapts:
            return None
        return self.adaptation.after_pass(
            PassSeen(
                plan=done.plan, bucket=done.bucket, load=done.load, predicted_s=prediction.plain_s, measured_s=done.seconds, remaining=done.remaining,
                driver_s=self._driver_s,
            )
        )  # fmt: skip

    def switched(self, seconds: float) -> None:
        """Another plan is in force; to change to it took so long. What was remembered of the old one's buckets can go."""
        self.adaptation.switch_s = seconds
        self._estimators.clear()
        self._timings.clear()
        self._simulated.clear()
        self._work.clear()
        self._expected.clear()

    def recalled(self) -> None:
        """The tracker was given an earlier run's history: predict by it."""
        self._renew()

    # -- predictions -------------------------------------------------------------------------------------------------------------------------

    def _timing(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassTiming:
        key = (id(bucket), load)
        if key not in self._timings:
            if len(self._timings) >= MOST_REMEMBERED:
                self._timings.clear()
            self._timings[key] = self._nearby(plan, bucket, load)
        return self._timings[key]

    def _nearby(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassTiming:
        """A load with nearly the work of one that was simulated takes its time in proportion: a new load comes with every other pass, and to simulate
        one takes as long as a pass of a small model."""
        estimator = self._estimator(plan, bucket, load.shape)
        work = estimator.work(load)
        simulated = self._simulated.setdefault((id(bucket), load.shape), [])
        for known, timing in simulated:
            if all(known[name] / NEARBY <= seconds <= known[name] * NEARBY for name, seconds in work.items()):
                return timing.scaled({name: seconds / known[name] if known[name] else 1.0 for name, seconds in work.items()})
        simulated.append((work, estimator.timing(load)))
        return simulated[-1][1]

    def _estimator(self, plan: Plan, bucket: BucketPlan, shape: PassShape) -> PassEstimator:
        key = (id(bucket), shape)
        if key not in self._estimators or self._estimators[key][0] is not bucket:
            self._estimators[key] = (bucket, PassEstimator(self.spec, plan, bucket, self.profile, shape))  # keeps the bucket alive: its id is the key
        return self._estimators[key][1]

    def _renew(self) -> None:
        self._renewed_at = self.tracker.snapshot()
        self.profile = self.tracker.profile()
        for _, estimator in self._estimators.values():
            estimator.profile = self.profile  # its schedules stay good
        self._timings.clear()
        self._simulated.clear()

    # -- records -----------------------------------------------------------------------------------------------------------------------------

    def _records(self, done: PassDone) -> Iterable[WorkTime]:
        """Every kind of work against the offline profile. What the simulator adds for contention is expected, too, so that it is not learned twice."""
        timing = self._timing(done.plan, done.bucket, done.load)
        slowed = {queue: timing.busy_s[queue] / alone_s if alone_s > 0 else 1.0 for queue, alone_s in timing.alone_s.items()}
        for expected in self._expected_of(done):
            kind = expected.kind
            seconds = done.work_s.get(kind, 0.0)
            expected_s = expected.seconds * slowed.get(LINK_QUEUES.get(kind.key, kind.resource), 1.0)
            yield WorkTime(resource=kind.resource, key=kind.key, size=expected.scale, expected_s=expected_s, seconds=seconds)

    def _expected_of(self, done: PassDone) -> tuple[ExpectedTime, ...]:
        key = (id(done.schedule), done.load)
        if key not in self._expected:
            if len(self._expected) >= MOST_REMEMBERED:
                self._expected.clear()
            if id(done.schedule) not in self._work or self._work[id(done.schedule)][0] is not done.schedule:
                self._work[id(done.schedule)] = done.schedule, PassWork(done.schedule, self.spec, done.plan)
            self._expected[key] = self._work[id(done.schedule)][1].expected(self.tracker.offline, done.load)
        return self._expected[key]


def resolve(spec: ModelSpec, ask: Ask) -> tuple[Option, ...]:
    """The bucket's options at the ask's rates: runs beside the passes, in another process."""
    found = list(options(spec, ask.profile, ask.plan, ask.bucket, ask.load, surprise=ask.surprise))
    found += [option_of(spec, ask.profile, ask.plan, bucket, ask.load) for bucket in ask.kept]
    return tuple(Option(bucket=each.bucket, seconds=each.seconds + ask.driver_s, pilots=each.pilots) for each in found)
