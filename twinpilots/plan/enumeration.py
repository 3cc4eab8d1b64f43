"""Search of the whole plan space of a small model: what `auto` does where there are few enough plans.

Owns `enumerated`. A lower bound rules most plans out, a played pass ranks the rest, and the simulator prices the most promising. The search ends when no plan
is left whose bound is under the best one's time, or when its budget is spent: pure, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twinpilots.plan.estimate import EXACT_LAYERS
from twinpilots.plan.grid import Floats, some_of
from twinpilots.plan.lower_bound import Seconds, phase_bound
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.played import phase_about
from twinpilots.plan.pricing import CONTEXTS, phase_loads, price_phase
from twinpilots.plan.problem import Problem
from twinpilots.plan.space import NO_RING, Groups, Setting, Sizes, Space, largest_ring, num_combinations, rings, settings, small_groups

PHASES: tuple[Phase, ...] = ("decode", "prefill")
TOLERANCE = 5e-3  # plans that are better than the best by less than this share are not looked for
PROOF_TASKS = 20_000  # whose time may go to what is not likely to be better
FIRST_PAIRS, MORE_PAIRS = 100, 3  # settings with a residency that are played in the first round, and how many times more in each further one
MISSES, LAST_MISSES = 12, 60  # priced in vain, one after another, before a round ends, and before the search does
OVERSTATED = 1.02  # so much may a played time exceed the simulated before any was compared
WORSE = 1.1  # what looks worse than the best by more is forgotten
NEXT_BEST = 3  # combinations of one phase that are priced for one residency
MOST_COMBINATIONS = 60_000  # of splits, in a space that is searched
BOUNDS_SHARE = 0.6  # of the search's time, that may go to bounding all of them
TASKS_PER_LAYER = 25  # and micro-batch, that pricing a phase simulates, about
Ring = tuple[int, int]
_By = Literal["likely", "bound"]
BY: tuple[_By, ...] = ("likely", "bound")  # first what is likely, then what cannot be excluded


@dataclass(frozen=True, eq=False)
class _Phase:
    """What all settings alike to one phase know of it, by combination. ``about``: of each ring, infinite where nothing was played."""

    plan: Plan
    seconds: Seconds
    least: Mapping[_By, Floats]  # of every residency
    least_without_ring: Mapping[_By, Floats]
    about: Mapping[Ring, Floats]
    priced: dict[tuple[Ring, int], float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Case:
    """A setting with what is known of its phases, and the least seconds of every residency (infinite where it does not fit)."""

    setting: Setting
    waves: int
    phases: Mapping[Phase, _Phase]
    least: Mapping[_By, Floats]
    ring: Ring  # that tells how long it takes; nothing is streamed without one, so any will do


def enumerated(problem: Problem, groups: Groups, known_s: float, most_tasks: int) -> Plan | None:
    """The best plan found of those in the space, if any takes less than ``known_s``; about the time of simulating ``most_tasks`` tasks is spent."""
    return _Enumeration(problem, groups, known_s, most_tasks).run()


def searchable(problem: Problem, most_tasks: int) -> Groups | None:
    """How to group the ops so that the space is small enough to be searched; None where no way is, or where there are too many settings."""
    if problem.spec.num_layers > EXACT_LAYERS or problem.profile.gpu is None or problem.profile.link is None:
        return None
    groups = small_groups(problem, MOST_COMBINATIONS)
    if groups is None:
        return None
    size, left = num_combinations(problem, groups), most_tasks * BOUNDS_SHARE
    seen: set[tuple[object, ...]] = set()
    for setting in settings(problem):
        for phase, batches in (("decode", setting.decode_batches), ("prefill", setting.prefill_batches)):
            key = replace(setting, ring=NO_RING).key(phase)  # type: ignore[arg-type]
            left -= 0 if key in seen else bound_tasks(problem, len(CONTEXTS) if phase == "decode" else 1, batches, size)
            seen.add(key)
        if left < 0:
            return None
    return groups


def bound_tasks(problem: Problem, num_loads: int, batches: int, size: int) -> int:
    """Time of bounding so many combinations of a phase, in simulated tasks, about."""
    return played_tasks(problem, num_loads, batches, size // 50)


def played_tasks(problem: Problem, num_loads: int, batches: int, size: int) -> int:
    """Time of playing them."""
    return num_loads * problem.spec.num_layers * batches * (40 + size // 16)


class _Enumeration:
    def __init__(self, problem: Problem, groups: Groups, known_s: float, most_tasks: int) -> None:
        self.problem, self.space, self.sizes = problem, Space(problem, groups), Sizes(problem)
        self.best_s, self.left = known_s, most_tasks
        self.best: Plan | None = None
        self.pool: list[tuple[float, _Case, int]] = []  # played and not priced: seconds, about
        self.overstated = OVERSTATED  # by how much at most the played time exceeds the simulated, as far as was seen
        self.kept = most_tasks // 5  # for the simulator
        self.largest = largest_ring(problem)
        self.phases: dict[tuple[object, ...], _Phase] = {}
        self.known: dict[tuple[object, ...], _Phase] = {}
        self.cases = list(self._cases())
        self.ring_bytes = {ring: self.sizes.plan(replace(case.setting, ring=ring)).ring_bytes for case in self.cases[:1] for ring in rings(problem)}

    @property
    def below_s(self) -> float:
        return self.best_s * (1 - TOLERANCE)

    def run(self) -> Plan | None:
        if not self.cases:
            return None
        self._look("likely", self.kept)
        self._look("bound", max(self.kept, self.left - PROOF_TASKS))
        self._price_best(LAST_MISSES)
        return self.best

    def _look(self, by: _By, kept: int) -> None:
        """Play and price all that may be better than the best, in rounds, those of the least seconds first, while there are more than ``kept`` tasks left."""
        least, most = np.stack([case.least[by] for case in self.cases]), FIRST_PAIRS
        while self.left > kept and (pairs := self._next(least, most)):
            most *= MORE_PAIRS
            wanted: dict[tuple[_Phase, Phase], NDArray[np.bool_]] = {}
            for case, residencies in pairs:
                for phase in PHASES:
                    key = case.phases[phase], phase
                    wanted[key] = wanted.get(key, False) | self._promising(case, phase, residencies, by)
            for (of_phase, phase), chosen in wanted.items():
                self._play(of_phase, phase, np.nonzero(chosen & np.isinf(next(iter(of_phase.about.values()))))[0])
            self.pool += self._ranked(pairs)
            self._price_best(MISSES)

    def _next(self, least: Floats, most: int) -> list[tuple[_Case, NDArray[np.intp]]]:
        """The cases and residencies of the lowest bounds that were not looked at yet, as far as they may hold a better plan."""
        flat = least.ravel()
        open_ = np.nonzero(flat < self.below_s)[0]
        if len(open_) > most:
            open_ = open_[np.argpartition(flat[open_], most)[:most]]
        flat[open_] = inf
        numbers, residencies = np.unravel_index(open_, least.shape)
        return [(self.cases[number], residencies[numbers == number]) for number in np.unique(numbers)]

    # -- bounds --------------------------------------------------------------------------------------------------------------------------------

    def _cases(self) -> Iterator[_Case]:
        for setting in settings(self.problem):
            fits = self.sizes.fits(setting, self.space)
            if not np.any(fits):
                continue
            phases = {phase: self._phase(setting, phase) for phase in PHASES}
            waves, ringless = self.sizes.waves(setting), setting.ring == NO_RING
            by_phase = [each.least_without_ring if ringless else each.least for each in phases.values()]
            least = {by: np.where(fits, waves * (by_phase[0][by] + by_phase[1][by]), inf) for by in BY}
            yield _Case(setting, waves, phases, least, self.largest if ringless else setting.ring)

    def _phase(self, setting: Setting, phase: Phase) -> _Phase:
        alike = replace(setting, ring=self.largest).key(phase)
        if alike not in self.phases:
            self.phases[alike] = self._bounded(replace(setting, ring=self.largest), phase)
        return self.phases[alike]

    def _bounded(self, setting: Setting, phase: Phase) -> _Phase:
        """Settings of different keys may still bring the same passes."""
        plan = self.sizes.of_phase(setting, phase, self.space.splits(0))
        loads = phase_loads(self.problem.workload, plan, phase)
        key = (phase, *((load, count) for _, load, count in loads))
        if key not in self.known:
            seconds = phase_bound(self.problem, plan, phase, self.space.grid)
            self.left -= bound_tasks(self.problem, len(loads), plan.buckets[0].micro_batches, len(seconds.bound))
            least = {by: self.space.least(getattr(seconds, by)) for by in BY}
            without = {by: self.space.least(np.where(self.space.streaming, inf, getattr(seconds, by))) for by in BY}
            about = {ring: np.full(len(seconds.bound), inf) for ring in rings(self.problem) if ring != NO_RING}
            self.known[key] = _Phase(plan, seconds, least, without, about)
        return self.known[key]

    # -- playing -------------------------------------------------------------------------------------------------------------------------------

    def _promising(self, case: _Case, phase: Phase, residencies: NDArray[np.intp], by: _By) -> NDArray[np.bool_]:
        """Which combinations of these residencies may be part of a better plan."""
        mine, other = case.phases[phase], case.phases["decode" if phase == "prefill" else "prefill"]
        wanted = np.zeros(len(self.space.bytes), dtype=bool)
        wanted[residencies] = True
        owner = self.space.owner
        chosen: NDArray[np.bool_] = wanted[owner] & (getattr(mine.seconds, by) < (self.below_s / case.waves - other.least[by])[owner])
        return chosen

    def _play(self, mine: _Phase, phase: Phase, combinations: NDArray[np.intp]) -> None:
        if not len(combinations):
            return
        grid = some_of(self.space.axes, combinations)
        sizes = [(self.ring_bytes[ring], ring[0]) for ring in mine.about]
        loads = len(phase_loads(self.problem.workload, mine.plan, phase))
        self.left -= played_tasks(self.problem, loads, mine.plan.buckets[0].micro_batches, len(sizes) * len(combinations))
        for about, seconds in zip(mine.about.values(), phase_about(self.problem, mine.plan, phase, grid, sizes), strict=True):
            about[combinations] = seconds

    # -- pricing -------------------------------------------------------------------------------------------------------------------------------

    def _price_best(self, most_misses: int) -> None:
        """Simulate those that look best until it is no use: for a while, or as far as what looked worse than it was can have hidden a better plan."""
        misses = 0
        self.pool.sort(key=lambda each: -each[0])
        while self.pool and misses < most_misses and self.left > 0 and self.pool[-1][0] < self.best_s * self.overstated:
            about_s, case, residency = self.pool.pop()
            before_s = self.best_s
            if not self._fits(case, residency):
                self.left -= 1
                continue
            found_s = self._price_pair(case, residency)
            self.overstated = max(self.overstated, about_s / found_s)
            misses = 0 if self.best_s < before_s else misses + 1

    def _ranked(self, pairs: list[tuple[_Case, NDArray[np.intp]]]) -> Iterator[tuple[float, _Case, int]]:
        for case, residencies in pairs:
            decode_s, prefill_s = (self.space.least(self._about(case, phase))[residencies] for phase in PHASES)
            least = case.waves * (decode_s + prefill_s)
            yield from ((float(least[at]), case, int(residencies[at])) for at in np.nonzero(least < self.best_s * WORSE)[0])

    def _about(self, case: _Case, phase: Phase) -> Floats:
        about = case.phases[phase].about[case.ring]
        return np.where(self.space.streaming, inf, about) if case.setting.ring == NO_RING else about

    def _fits(self, case: _Case, residency: int) -> bool:
        """Whether any of the plans that would be priced keeps the limits: of host memory, how much packets take is only known for a whole plan."""
        decode, prefill = (self._promised(case, phase, residency) for phase in PHASES)
        return any(self.problem.fits(self._whole(case, one, two)) for one in decode for two in prefill)

    def _whole(self, case: _Case, decode: int, prefill: int) -> Plan:
        return self.sizes.whole(case.setting, {"decode": self.space.splits(decode), "prefill": self.space.splits(prefill)})

    def _promised(self, case: _Case, phase: Phase, residency: int) -> list[int]:
        """The combinations of a residency that look best."""
        members = self.space.members(residency)
        about = self._about(case, phase)[members]
        return [int(members[at]) for at in np.argsort(about, kind="stable")[:NEXT_BEST] if about[at] < inf]

    def _price_pair(self, case: _Case, residency: int) -> float:
        """Seconds of the best plan with this residency, whether it fits host memory or not."""
        found = {phase: self._price_phase(case, phase, residency) for phase in PHASES}
        for decode_s, decode in found["decode"]:
            for prefill_s, prefill in found["prefill"]:
                seconds = case.waves * (decode_s + prefill_s)
                if seconds >= self.best_s:
                    break
                plan = self._whole(case, decode, prefill)
                if self.problem.fits(plan):
                    self.best_s, self.best = seconds, plan
        return case.waves * (found["decode"][0][0] + found["prefill"][0][0])

    def _price_phase(self, case: _Case, phase: Phase, residency: int) -> list[tuple[float, int]]:
        """(seconds, combination), best first, of those that may be the best of this residency."""
        about = self._about(case, phase)
        found: list[tuple[float, int]] = []
        for at in self._promised(case, phase, residency):
            if found and about[at] >= found[0][0] * self.overstated:
                break
            found = sorted([*found, (self._price(case, phase, at), at)])
        return found

    def _price(self, case: _Case, phase: Phase, combination: int) -> float:
        p, priced, ring = self.problem, case.phases[phase].priced, case.ring
        if (ring, combination) not in priced:
            plan = self.sizes.of_phase(replace(case.setting, ring=ring), phase, self.space.splits(combination))
            priced[ring, combination] = sum(each.seconds for each in price_phase(p.spec, p.profile, p.workload, plan, phase))
            self.left -= TASKS_PER_LAYER * p.spec.num_layers * plan.buckets[0].micro_batches
        return priced[ring, combination]
