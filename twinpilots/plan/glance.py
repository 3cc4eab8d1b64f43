"""Re-solves a bucket at a glance: a few candidates from what the last search has left behind, instead of a search.

Owns `glance`: as `rebalance.options`, in under 50 ms of one core, to be followed by a search when there is time. Pure. Knows nothing of when to ask.
"""

from __future__ import annotations

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.priced import Layout
from twinpilots.plan.pricing import SAMPLES
from twinpilots.plan.rebalance import SCALES, Option, Search, Sequences, can_move, scaled_mlp, side_of

MOST_TASKS = 3000  # that a glance may simulate, in tasks whose list is there: about 7 us each
MAKING = 2.5  # times as many for a bucket whose list must be made,
PRICING = 3  # and as many for each layer of the model at any price


def glance(spec: ModelSpec, profile: HardwareProfile, plan: Plan, bucket: BucketPlan, load: PassLoad, layout: Layout) -> tuple[Option, ...]:
    """Ways to run passes like ``load``: the bucket as it is first, then the most promising others."""
    look = _Glance(Search(spec, profile, plan, bucket, Sequences.of(load), layout))
    if can_move(plan) and profile.gpu is not None and profile.link is not None:
        look.around()
    return tuple(look.found)


class _Glance:
    """``found``: what was priced so far, the bucket as it is first."""

    def __init__(self, search: Search) -> None:
        self.search, self.layout = search, search.layout
        self.found = [search.priced(search.bucket)]
        known = [self._num_tasks(kept.bucket) or 0 for kept in self.layout.priced(search.bucket.phase, search.bucket.max_tokens)]
        self.usual_tasks = max(known)
        self.pricing_tasks = PRICING * search.spec.num_layers
        self.tasks_left = float(MOST_TASKS - self.pricing_tasks - (self._num_tasks(search.bucket) or 0))

    def around(self) -> None:
        """The program's answer as the last search had to better it, the most promising of what was priced before, the answer itself, steps from the best."""
        search, bucket = self.search, self.search.bucket
        batches, side = bucket.micro_batches, search.side_now
        answer = search.answer(batches, side)
        if answer is not None:
            self._price(search.made(self.layout.better(bucket, answer), batches, side), always=True)
        promising = self._promising()
        if promising is not None:
            self._price(promising)
        if answer is not None:
            self._price(search.made(answer, batches, side))
        for factor in reversed(SCALES):
            best = min(self.found, key=lambda option: option.seconds).bucket
            self._price(search.made(scaled_mlp(search.shares_of(best), factor), best.micro_batches, side_of(best)))

    def _price(self, bucket: BucketPlan, *, always: bool = False) -> None:
        """Unless that is done, impossible, or (but for ``always``) too much."""
        cost = self.pricing_tasks + (self._num_tasks(bucket) or MAKING * self.usual_tasks)
        if (always or cost <= self.tasks_left) and all(bucket != option.bucket for option in self.found) and self.search.has_room(bucket):
            self.tasks_left -= cost
            self.found.append(self.search.priced(bucket))

    def _num_tasks(self, bucket: BucketPlan) -> int | None:
        return self.layout.num_tasks(bucket, self.search.sequences.load(bucket), SAMPLES)

    def _promising(self) -> BucketPlan | None:
        """What was priced before and should now be quicker than all that was found, by what it took then."""
        best, least_s, sides = None, min(option.seconds for option in self.found), self.search.sides()
        for kept in self.layout.priced(self.search.bucket.phase, self.search.bucket.max_tokens):
            about_s = kept.about_s(self.search.profile, self.search.sequences.load(kept.bucket))
            if about_s < least_s and side_of(kept.bucket) in sides:
                best, least_s = kept.bucket, about_s
        return best
