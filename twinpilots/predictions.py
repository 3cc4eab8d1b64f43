"""What passes should take, at once: a few of every bucket are simulated ahead, and those that come are priced by the nearest of these.

To simulate a pass takes as long as a pass of a small model, so nothing is simulated while passes follow each other. Owns the simulated passes and how one
stands for others. Knows nothing of what passes took (`online`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.driver import between_s
from twinpilots.plan.estimate import LayerWork, PassEstimator
from twinpilots.plan.load import PassLoad, decode_load, prefill_load
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.simulate import PassTiming
from twinpilots.plan.tasks import PassShape

MOST_REMEMBERED = 512  # passes
NEARBY = math.log(1.15)  # of every resource's work: as good as the pass itself
CONTEXTS = (0.25, 0.75)  # of the longest sequence: where passes are simulated ahead
PROMPT_TOKENS = 128  # of a prompt, about
QUEUES_OF = {"cpu": ("cpu",), "gpu": ("gpu",), "link": ("link_in", "link")}  # where a timing keeps a resource's work


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """A pass that was simulated: its work alone (seconds by resource), and its timing."""

    work: Mapping[str, float]
    timing: PassTiming

    def distance(self, work: Mapping[str, float]) -> float:
        """The largest factor between the two passes' work, as a logarithm."""
        return max(abs(math.log((seconds + 1e-9) / (self.work[name] + 1e-9))) for name, seconds in work.items())

    def stand_in(self, work: Mapping[str, float], driver_s: Callable[[float], float]) -> PassTiming:
        """The timing of a pass with that work; ``driver_s``: of a pass whose work takes so long."""
        factors = {name: seconds / self.work[name] if self.work[name] else 1.0 for name, seconds in work.items()}
        alone = self.timing.scaled(factors)
        new = {name: seconds for name, seconds in work.items() if seconds and not self.work[name]}  # what this pass does not use cannot be scaled
        added = {queue: seconds for name, seconds in new.items() for queue in QUEUES_OF[name]}
        least_s = max(new.values(), default=0.0)
        made = replace(
            alone, seconds=max(alone.seconds, least_s), fill_s=max(alone.fill_s, least_s), busy_s=alone.busy_s | added,
            alone_s=alone.alone_s | {queue: seconds for queue, seconds in added.items() if queue in alone.alone_s},
        )  # fmt: skip
        return made.with_driver(driver_s(made.seconds))


class Predictions:
    """Timings of one model's passes at the rates of ``profile``, which may be replaced at any time. ``at_once`` False: only `prepare` simulates, as long as
    there is anything that can stand in."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, *, at_once: bool) -> None:
        self.spec, self.profile, self.at_once = spec, profile, at_once
        self.num_simulated = 0
        self._known: dict[int, tuple[BucketPlan, list[_Known]]] = {}  # a bucket is kept alive: its id is the key
        self._timings: dict[tuple[int, PassLoad], PassTiming] = {}
        self._estimators: dict[tuple[int, PassShape], PassEstimator] = {}
        self._works: dict[int, LayerWork] = {}

    def timing(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassTiming:
        key = (id(bucket), load)
        if key not in self._timings:
            if len(self._timings) >= MOST_REMEMBERED:
                self._timings.clear()
            self._timings[key] = self._nearest(plan, bucket, load)
        return self._timings[key]

    def _nearest(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> PassTiming:
        work = self._work(plan, bucket, load)
        known = self._of(bucket)
        best = min(known, key=lambda each: each.distance(work), default=None)
        if best is None and not self.at_once:
            relatives = [each for other, found in self._known.values() if other.phase == bucket.phase for each in found]
            best = min(relatives, key=lambda each: each.distance(work), default=None)
        if best is None or (self.at_once and best.distance(work) > NEARBY):
            best = self._simulate(plan, bucket, load, work)
        return best.stand_in(work, partial(between_s, self.profile, plan, load))

    def _simulate(self, plan: Plan, bucket: BucketPlan, load: PassLoad, work: Mapping[str, float]) -> _Known:
        self.num_simulated += 1
        key = (id(bucket), load.shape)
        known = self._of(bucket)  # keeps the bucket alive
        if key not in self._estimators:
            self._estimators[key] = PassEstimator(self.spec, plan, bucket, self.profile, load.shape)
        estimator = self._estimators[key]
        estimator.profile = self.profile
        known.append(_Known(work=work, timing=estimator.timing(load)))
        return known[-1]

    def _of(self, bucket: BucketPlan) -> list[_Known]:
        if id(bucket) not in self._known or self._known[id(bucket)][0] is not bucket:
            self._known[id(bucket)] = bucket, []
        return self._known[id(bucket)][1]

    def _work(self, plan: Plan, bucket: BucketPlan, load: PassLoad) -> Mapping[str, float]:
        if id(bucket) not in self._works:
            self._of(bucket)
            self._works[id(bucket)] = LayerWork(self.spec, plan, bucket)
        return self._works[id(bucket)].seconds(self.profile, load)

    # -- ahead ---------------------------------------------------------------------------------------------------------------------------------

    def prepare(self, plan: Plan, buckets: Sequence[BucketPlan], budget_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Simulates typical passes of those of the plan's buckets that have none yet, the largest bucket first, until the time is up, but one in any case."""
        until_s = clock() + budget_s
        for bucket in sorted(buckets, key=lambda bucket: (bucket.phase != "decode", -bucket.max_tokens)):
            if not self._of(bucket):
                for load in typical_loads(plan, bucket):
                    self._simulate(plan, bucket, load, self._work(plan, bucket, load))
                    if clock() > until_s:
                        return

    def simulate_at_once(self, at_once: bool) -> None:
        """From now on as the argument of the same name says; what was remembered was priced the other way."""
        self.at_once = at_once
        self._timings.clear()

    def renew(self, profile: HardwareProfile) -> None:
        """Other rates from now on. What was simulated still stands for what has so much more or less work by them."""
        self.profile = profile
        self._timings.clear()
        if self.at_once:
            for _, known in self._known.values():
                known.clear()

    def forget_all_but(self, plan: Plan) -> None:
        """Another plan is in force: passes of buckets that it has not do not come again."""
        kept = {id(bucket) for bucket in plan.buckets}
        self._timings.clear()
        self._known = {key: found for key, found in self._known.items() if key in kept}
        self._works = {key: found for key, found in self._works.items() if key in kept}
        self._estimators = {key: found for key, found in self._estimators.items() if key[0] in kept}


def typical_loads(plan: Plan, bucket: BucketPlan) -> Iterator[PassLoad]:
    """Passes of a bucket as they come most: full, KV on the GPU first; a decoding one also of few sequences."""
    capacity = plan.gpu_pages * plan.page_size
    if bucket.phase == "prefill":
        chunk = min(bucket.max_tokens, PROMPT_TOKENS, plan.max_model_len)
        count = max(1, min(bucket.max_tokens // chunk, plan.max_num_seqs))
        on_gpu = min(count, capacity // chunk)
        yield prefill_load(on_gpu, count - on_gpu, chunk, 0, bucket)
        return
    for share, part in zip(CONTEXTS, (1.0, 0.6), strict=True):
        count, context = max(1, round(part * bucket.max_tokens)), max(1, round(share * plan.max_model_len))
        on_gpu = min(count, capacity // (context + 1))
        yield decode_load(on_gpu, count - on_gpu, context, bucket)
