"""What re-solves of one memory layout keep from one to the next: task lists, which stay good when rates change, and what their passes took.

Owns `Kept` and `Layout`: what was priced, and how the linear program's answers had to be bettered. With or without it a price is the same. Knows nothing of who
asks or when.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.estimate import LayerWork, PassEstimator
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Phase, Plan, Split
from twinpilots.plan.pricing import coarse_packet_bytes
from twinpilots.plan.simulate import PassTiming

LITTLE = 0.02  # of an op's rows
MOST_KEPT = 96  # buckets of a layout: some hundred tasks each


@dataclass(kw_only=True)
class Kept:
    """A bucket that was priced: its task lists by (sampled layers), its work, and the last timing with the work that it was for."""

    bucket: BucketPlan
    layer_work: LayerWork
    estimators: dict[Hashable, PassEstimator]
    timing: PassTiming | None = None
    work: Mapping[str, float] | None = None

    def about_s(self, profile: HardwareProfile, load: PassLoad) -> float:
        """What such a pass takes at these rates, by what one took at others: as much longer as its busiest resource works longer."""
        assert self.timing is not None and self.work is not None, "only buckets that were priced are asked about"
        work = self.layer_work.seconds(profile, load)
        factors = {name: seconds / self.work[name] if self.work[name] > 0 else 1.0 for name, seconds in work.items()}
        return self.timing.scaled(factors).seconds + self.timing.driver_s


class Layout:
    """Prices buckets of one model over one memory layout, of which ``plan`` is an example, and keeps what the next prices can use."""

    def __init__(self, spec: ModelSpec, plan: Plan) -> None:
        self.spec, self._plan, self._resident = spec, replace(plan, buckets=()), _resident(plan)
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._betterings: dict[tuple[Phase, int], Mapping[str, tuple[float, float]]] = {}

    def serves(self, plan: Plan) -> bool:
        """Whether ``plan`` lies in memory like this."""
        return self._plan == replace(plan, buckets=()) and self._resident == _resident(plan)

    def seconds(self, profile: HardwareProfile, bucket: BucketPlan, load: PassLoad, samples: tuple[int, int]) -> float:
        """Simulated seconds of a pass, extrapolated from so many layers."""
        kept = self._of(bucket)
        key = load.shape, samples
        if key not in kept.estimators:
            plan = replace(self._plan, buckets=(bucket,), packet_bytes=coarse_packet_bytes(self.spec, self._plan, bucket))
            kept.estimators[key] = PassEstimator(self.spec, plan, bucket, profile, load.shape, samples)
        kept.estimators[key].profile = profile
        kept.timing, kept.work = kept.estimators[key].timing(load), kept.layer_work.seconds(profile, load)
        return kept.timing.seconds

    def num_tasks(self, bucket: BucketPlan, load: PassLoad, samples: tuple[int, int]) -> int | None:
        """Tasks to simulate for this price; None where their list is not made yet."""
        kept = self._kept.get(_key(bucket))
        found = None if kept is None else kept.estimators.get((load.shape, samples))
        return None if found is None else sum(tasks.num_tasks for tasks in found.outlines)

    def bettered(self, bucket: BucketPlan, answer: Mapping[str, float], share: Mapping[str, float]) -> None:
        """Note what a search has made of the program's answer: the CPU's share of each op before and after."""
        self._betterings[bucket.phase, bucket.max_tokens] = {name: (answer[name], share[name]) for name in share}

    def better(self, bucket: BucketPlan, answer: Mapping[str, float]) -> Mapping[str, float]:
        """An answer for such passes, bettered as the last one was."""
        known = self._betterings.get((bucket.phase, bucket.max_tokens), {})
        return {name: _as_before(value, *known[name]) if name in known else value for name, value in answer.items()}

    def priced(self, phase: Phase, max_tokens: int) -> list[Kept]:
        """The buckets for such passes that were priced before."""
        return [kept for kept in self._kept.values() if (kept.bucket.phase, kept.bucket.max_tokens) == (phase, max_tokens) and kept.timing is not None]

    def _of(self, bucket: BucketPlan) -> Kept:
        key = _key(bucket)
        if key not in self._kept:
            while len(self._kept) >= MOST_KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = Kept(bucket=bucket, layer_work=LayerWork(self.spec, self._plan, bucket), estimators={})
        self._kept.move_to_end(key)
        return self._kept[key]


def _as_before(value: float, before: float, after: float) -> float:
    """``value`` moved as ``before`` was moved to ``after``: in proportion, or by the difference where there was next to nothing."""
    return min(1.0, max(0.0, value * after / before if before > LITTLE else value + after - before))


def _key(bucket: BucketPlan) -> Hashable:
    """Equal for equal buckets."""
    splits = _by_form(bucket, lambda layer: tuple(layer.items()))
    return bucket.phase, bucket.max_tokens, bucket.micro_batches, bucket.host_attention, bucket.host_prefill_attention, splits


def _resident(plan: Plan) -> Hashable:
    """The resident rows, which are the same in all buckets."""
    return _by_form(plan.buckets[0], lambda layer: tuple((name, split.resident) for name, split in layer.items()))


def _by_form(bucket: BucketPlan, form_of: Callable[[Mapping[str, Split]], Hashable]) -> Hashable:
    """What all layers are like, quickly: most of them share one mapping."""
    forms: dict[Hashable, int] = {}
    seen: dict[int, int] = {}
    for layer in bucket.splits:
        if id(layer) not in seen:
            seen[id(layer)] = forms.setdefault(form_of(layer), len(forms))
    return tuple(forms), tuple(seen[id(layer)] for layer in bucket.splits)
