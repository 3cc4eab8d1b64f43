"""The planner beside a run: predicts every pass, learns from what it took, and says when the plan should change.

Owns `OnlinePlanner`, which joins the simulator (predictions), the tracker (rates) and `Adaptation` (decisions) for one model on one machine, and the memory
of what was simulated. The session drives it on a real machine, `benchmarks.adaptation` on the virtual clock. Knows nothing of devices, requests or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from twinpilots.adaptation import Adaptation, Ask, Change, PassSeen, Runner
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.expected import DOWN, UP, ExpectedTime, PassWork, WorkKind
from twinpilots.plan.glance import glance
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.priced import Layout
from twinpilots.plan.rebalance import Option, Sequences, can_move, option_of, options
from twinpilots.plan.tasks import Schedule
from twinpilots.predictions import Predictions
from twinpilots.runtime.stats import BusySeconds
from twinpilots.stats.correction import WorkTime
from twinpilots.stats.tracker import Snapshot, Tracker

EAGER_PASSES = 16  # the first ones: all are looked at
LOOK_PASSES = 2  # while nothing is unusual, every second pass tells enough: looking takes the driver's time
LOOK_ALONE = 8  # the same where no GPU is used, so there is no work to move: only predictions gain by it
RENEW_LOOKS = 8  # how often the rates that predictions go by are looked after, in passes looked at; a jump is followed at once
RENEW_DRIFT = 0.04  # of a pass's time: less is left to what passes of the plan have taught, because simulating anew is not free
DRIVER_DECAY = 0.2  # weight of the newest pass in the mean of the driver's time
DRIVER_MOST = 4.0  # times its usual time that one pass's may count as: a pause of the process is not the driver's work
MOST_REMEMBERED = 512  # passes
DRIVER_LEAST_S = 0.5e-3  # taken for usual where the profile says less
LINK_QUEUES = {UP: "link_in", DOWN: "link_out"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PassPrediction:
    """One pass before it ran: its seconds, the driver's included, and how long each resource works, counted as a pass reports it. ``plain_s``: without
    what passes of this plan have taken beyond their predictions so far."""

    seconds: float
    plain_s: float
    busy_s: BusySeconds


@dataclass(frozen=True, kw_only=True)
class PassDone:
    """One pass after it ran: what it was, its task list, seconds of work by kind, whole seconds as the user feels them, and the driver's part of them: from
    the end of the last pass's work to the begin of this one's."""

    plan: Plan
    bucket: BucketPlan
    load: PassLoad
    schedule: Schedule
    work_s: Mapping[WorkKind, float]
    seconds: float
    driver_s: float
    remaining: int  # passes of this kind that are still to come, about
    chained: int = 1  # passes that ran in one call, this one among them


class OnlinePlanner:
    """``adapts``: whether the plan may change, with ``alarms`` also without a search; predictions and the tracker work either way. ``at_once``: whether a pass
    unlike those before it is simulated when it comes, or priced by what `prepare` has simulated. ``witness`` is shown every pass."""

    def __init__(
        self, spec: ModelSpec, profile: HardwareProfile, runner: Runner, *, adapts: bool, alarms: bool = True, at_once: bool = True,
        witness: Callable[[PassDone], None] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.profile, self.adapts, self._runner = spec, profile, adapts, runner  # the profile as history corrects it
        self.tracker, self.witness = Tracker(profile), witness
        self.adaptation = Adaptation(self.tracker, Resolver(spec), runner, price=self._price if alarms else None, glances=True)
        self._renewed_at: Snapshot = {}
        self._num_jumps = 0
        self.predictions = Predictions(spec, profile, at_once=at_once)
        self._work: dict[int, tuple[Schedule, PassWork]] = {}
        self._expected: dict[tuple[int, PassLoad], tuple[ExpectedTime, ...]] = {}
        self._driver_s = 0.0  # what the driver takes for a pass lately, beyond what the profile says

    def at(self, profile: HardwareProfile) -> OnlinePlanner:
        """A planner at other rates that has learned nothing; it goes on with this one's task lists, and this one does no more."""
        other = OnlinePlanner(self.spec, profile, self._runner, adapts=self.adapts, at_once=self.predictions.at_once)
        other.predictions, other._work = self.predictions, self._work
        other.predictions.renew(profile)
        return other

    def predict(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassPrediction:
        """What the simulator says of this pass, and what passes of this plan have taught."""
        timing = self.predictions.timing(plan, bucket, load)
        plain_s = timing.seconds + max(self._driver_s, -timing.driver_s)
        return PassPrediction(seconds=plain_s * self.adaptation.expected_factor(bucket), plain_s=plain_s, busy_s=BusySeconds(**timing.resource_s))

    def after_pass(self, done: PassDone, prediction: PassPrediction) -> Change | None:
        """Learn from a pass; the plan to go on with, or None to stay."""
        if self.witness is not None:
            self.witness(done)
        every = LOOK_PASSES if done.plan.uses_gpu else LOOK_ALONE
        is_disturbed = self.adaptation.is_disturbed(done.seconds, prediction.seconds)
        if is_disturbed:
            self.tracker.pass_over()
        elif self.tracker.num_passes < EAGER_PASSES or not self.tracker.is_settled or (self.tracker.num_passes + 1) % every == 0:
            self.tracker.observe(self.records(done), done.seconds)
        else:
            self.tracker.pass_over()
        if not is_disturbed:
            self._follow_driver(done)
        jumps, self._num_jumps = self._num_jumps, self.tracker.num_jumps
        if jumps != self._num_jumps or (self.tracker.num_passes % (RENEW_LOOKS * every) == 0 and self.tracker.drift(self._renewed_at)[0] > RENEW_DRIFT):
            self._renew()
        if not self.adapts or not can_move(done.plan):
            return None
        return self.adaptation.after_pass(
            PassSeen(
                plan=done.plan, bucket=done.bucket, load=done.load, predicted_s=prediction.plain_s, measured_s=done.seconds, remaining=done.remaining,
                driver_s=self._driver_s,
            )
        )  # fmt: skip

    def _price(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> float:
        """Of sequences dealt the way of another bucket."""
        return self.predictions.timing(plan, bucket, Sequences.of(load).load(bucket)).seconds + self._driver_s

    def _follow_driver(self, done: PassDone) -> None:
        usual_s = self.predictions.timing(done.plan, done.bucket, done.load).driver_s
        beyond_s = min(done.driver_s, DRIVER_MOST * max(usual_s, DRIVER_LEAST_S)) - usual_s
        self._driver_s += DRIVER_DECAY * (beyond_s - self._driver_s)

    def switched(self, plan: Plan, seconds: float) -> None:
        """Another plan is in force; to change to it took so long. What was remembered of the old one's buckets can go."""
        self.adaptation.switch_s = seconds
        self.predictions.forget_all_but(plan)
        self._work.clear()
        self._expected.clear()

    def recalled(self) -> None:
        """The tracker was given an earlier run's history: predict by it."""
        self._renew()

    # -- predictions -------------------------------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, buckets: Sequence[BucketPlan], budget_s: float) -> None:
        """Before passes of ``plan`` follow each other: simulate what will come most of these buckets."""
        self.predictions.prepare(plan, buckets, budget_s)

    def _renew(self) -> None:
        self._renewed_at = self.tracker.snapshot()
        self.profile = self.tracker.profile()
        self.predictions.renew(self.profile)

    # -- records -----------------------------------------------------------------------------------------------------------------------------

    def records(self, done: PassDone) -> Iterable[WorkTime]:
        """Every kind of work against the offline profile. What the simulator adds for contention is expected, too, so that it is not learned twice."""
        for expected in self._expected_of(done):
            kind = expected.kind
            seconds = done.work_s.get(kind, 0.0)
            expected_s = expected.seconds * self.slowed(done, kind)
            yield WorkTime(resource=kind.resource, key=kind.key, size=expected.scale, expected_s=expected_s, seconds=seconds)

    def slowed(self, done: PassDone, kind: WorkKind) -> float:
        """How much longer the simulator expects this kind of work to take than alone on the machine."""
        timing, queue = self.predictions.timing(done.plan, done.bucket, done.load), LINK_QUEUES.get(kind.key, kind.resource)
        alone_s = timing.alone_s.get(queue, 0.0)
        return timing.busy_s[queue] / alone_s if alone_s > 0 else 1.0

    def work_of(self, done: PassDone) -> PassWork:
        """What the pass's task list consists of."""
        found = self._work.get(id(done.schedule))
        if found is None or found[0] is not done.schedule:
            found = self._work[id(done.schedule)] = done.schedule, PassWork(done.schedule, self.spec, done.plan)
        return found[1]

    def _expected_of(self, done: PassDone) -> tuple[ExpectedTime, ...]:
        key = (id(done.schedule), done.load)
        if key not in self._expected:
            if len(self._expected) >= MOST_REMEMBERED:
                self._expected.clear()
            self._expected[key] = self.work_of(done).expected(self.tracker.offline, done.load)
        return self._expected[key]


class Resolver:
    """Answers asks of one model, beside the passes, in this process or another: a copy of it that another process gets is one and the same from ask to ask, so
    that it remembers there what the last search has left behind."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._layout: Layout | None = None

    def __call__(self, ask: Ask) -> tuple[Option, ...]:
        """The bucket's options at the ask's rates."""
        if self._layout is None or not self._layout.serves(ask.plan):
            self._layout = Layout(self.spec, ask.plan)
        if ask.thorough:
            found = list(options(self.spec, ask.profile, ask.plan, ask.bucket, ask.load, surprise=ask.surprise, layout=self._layout))
            found += [option_of(self.spec, ask.profile, ask.plan, bucket, ask.load) for bucket in ask.kept]
        else:
            found = list(glance(self.spec, ask.profile, ask.plan, ask.bucket, ask.load, self._layout))
        return tuple(Option(bucket=each.bucket, seconds=each.seconds + ask.driver_s, pilots=each.pilots) for each in found)

    def __reduce__(self) -> tuple[Callable[..., Resolver], tuple[ModelSpec, int]]:
        return _there, (self.spec, id(self))


@lru_cache(maxsize=1)
def _there(spec: ModelSpec, _name: int) -> Resolver:
    """Of another process's `Resolver` the copy that is here."""
    return Resolver(spec)
