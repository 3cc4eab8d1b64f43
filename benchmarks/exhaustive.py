"""The best plan of a small problem, found by looking at all of them: what `auto` is measured against.

Owns the search with proof: of the plan space (`twinpilots/plan/space.py`) every plan is priced by the simulator unless its lower bound says that it cannot beat
the best one known. Every plan that is simulated is compared with its bound.

The two phases share a residency and nothing else, so the best of each is looked for by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from twinpilots.plan.lower_bound import phase_bound
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.pricing import price_phase, price_plan
from twinpilots.plan.problem import Problem
from twinpilots.plan.space import NO_RING, Setting, Sizes, Space, largest_ring, op_groups, settings

TOLERANCE = 2e-3  # plans that are better than the best by less than this share are not looked for


@dataclass(frozen=True, kw_only=True)
class Found:
    """``seconds`` of the best plan; ``plan`` is None when no plan of the space fits or beats what the search was given."""

    seconds: float
    plan: Plan | None
    plans: int  # of both phases, that the space holds
    priced: int  # of these, by the simulator


@dataclass
class _Phase:
    """The combinations of one residency in one phase of one setting, best bound first; those that were priced."""

    order: np.ndarray
    bounds: np.ndarray
    at: int = 0
    priced: dict[int, float] = field(default_factory=dict)
    best_s: float = float("inf")


class Exhaustive:
    """The search over one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.space, self.sizes = problem, Space(problem, op_groups(problem)), Sizes(problem)
        self.bounds: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}
        self.phases: dict[tuple[object, ...], _Phase] = {}
        self.priced = 0

    def run(self, known_s: float) -> Found:
        """The best plan, if it is better than ``known_s`` by more than the tolerance."""
        best_s, best = known_s, None
        for bound_s, setting, residency in self._candidates(known_s):
            if bound_s >= best_s * (1 - TOLERANCE):
                break
            found = self._best_of(setting, residency, best_s * (1 - TOLERANCE))
            if found is not None:
                best_s, best = found
        return Found(seconds=best_s, plan=best, plans=sum(len(bounds) for bounds, _ in self.bounds.values()), priced=self.priced)

    def _candidates(self, known_s: float) -> list[tuple[float, Setting, int]]:
        """Settings and residencies that fit GPU memory and whose bound is below ``known_s``, best bound first."""
        found: list[tuple[float, Setting, int]] = []
        for setting in settings(self.problem):
            room = self.problem.limits.gpu_bytes - self.sizes.fixed_bytes(setting)
            if room < 0:
                continue
            least = self.sizes.waves(setting) * (self._bounds(setting, "prefill")[1] + self._bounds(setting, "decode")[1])
            chosen = np.nonzero((self.space.bytes <= room) & (least < known_s * (1 - TOLERANCE)))[0]
            found += [(float(least[number]), setting, int(number)) for number in chosen]
        return sorted(found, key=lambda each: each[0])

    def _bounds(self, setting: Setting, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        """(the bound of every combination, the least of every residency). The larger of the rings bounds all of them."""
        largest = replace(setting, ring=largest_ring(self.problem))
        key = largest.key(phase)
        if (key, NO_RING) not in self.bounds:
            every = phase_bound(self.problem, self._plan(largest, phase, 0), phase, self.space.grid).bound
            for name, bound in (("", every), (NO_RING, np.where(self.space.streaming, np.inf, every))):
                self.bounds[key, name] = bound, self.space.least(bound)
        return self.bounds[key, NO_RING if setting.ring == NO_RING else ""]

    def _plan(self, setting: Setting, phase: Phase, combination: int) -> Plan:
        return self.sizes.of_phase(setting, phase, self.space.splits(combination))

    def _price(self, setting: Setting, phase: Phase, combination: int) -> float:
        p = self.problem
        plan = self._plan(setting, phase, combination)
        seconds = sum(each.seconds for each in price_phase(p.spec, p.profile, p.workload, plan, phase))
        self.priced += 1
        bound = self._bounds(setting, phase)[0][combination]
        assert bound <= seconds * (1 + 1e-9), f"the bound {bound} exceeds the simulated {seconds}: {setting}, {phase}, {plan.buckets[0].splits}"
        return seconds

    def _phase(self, setting: Setting, phase: Phase, residency: int) -> _Phase:
        key = (*setting.key(phase), residency)
        if key not in self.phases:
            members = self.space.members(residency)
            bounds = self._bounds(setting, phase)[0][members]
            order = np.argsort(bounds, kind="stable")
            self.phases[key] = _Phase(members[order], bounds[order])
        return self.phases[key]

    def _least(self, setting: Setting, phase: Phase, residency: int, below_s: float) -> _Phase:
        """Price combinations until none that is left can be the best, or under ``below_s``."""
        found = self._phase(setting, phase, residency)
        while found.at < len(found.order) and found.bounds[found.at] < min(found.best_s * (1 - TOLERANCE), below_s):
            combination = int(found.order[found.at])
            found.priced[combination] = self._price(setting, phase, combination)
            found.best_s = min(found.best_s, found.priced[combination])
            found.at += 1
        return found

    def _best_of(self, setting: Setting, residency: int, below_s: float) -> tuple[float, Plan] | None:
        """(seconds, plan) of the best plan with this residency, if it takes less than ``below_s`` and fits."""
        waves = self.sizes.waves(setting)
        prefill_least = float(self._bounds(setting, "prefill")[1][residency])
        decode = self._least(setting, "decode", residency, below_s / waves - prefill_least)
        prefill = self._least(setting, "prefill", residency, below_s / waves - decode.best_s)
        pairs = sorted((waves * (d_s + p_s), d, p) for d, d_s in decode.priced.items() for p, p_s in prefill.priced.items() if waves * (d_s + p_s) < below_s)
        for seconds, d, p in pairs:
            plan = self.sizes.whole(setting, {"decode": self.space.splits(d), "prefill": self.space.splits(p)})
            if self.problem.fits(plan):  # GPU memory does; host memory is only known for a whole plan
                return seconds, plan
        return None


def seconds_of(problem: Problem, plan: Plan) -> float:
    """Simulated seconds of the whole workload."""
    return price_plan(problem.spec, problem.profile, problem.workload, plan).seconds
