"""The search of a small model's whole plan space, and the two ways in which it looks at all splits at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks.exhaustive import seconds_of
from benchmarks.optimality import random_problem
from twinpilots.plan.enumeration import PHASES, enumerated, searchable
from twinpilots.plan.grid import some_of
from twinpilots.plan.lower_bound import phase_bound
from twinpilots.plan.plan import Phase
from twinpilots.plan.played import phase_about
from twinpilots.plan.pricing import price_phase
from twinpilots.plan.problem import Problem
from twinpilots.plan.solver import SEARCH_TASKS
from twinpilots.plan.space import NO_RING, Setting, Sizes, Space, largest_ring, num_combinations, op_groups, settings, small_groups
from twinpilots.plan.workload import Limits

COARSE = [("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_up_proj", "down_proj"), ("lm_head",)]


def some_settings(problem: Problem, count: int) -> list[Setting]:
    """Spread over all that stream."""
    found = [setting for setting in settings(problem) if setting.ring != NO_RING]
    return found[:: max(1, len(found) // count)]


def simulated(problem: Problem, space: Space, setting: Setting, phase: Phase, combination: int) -> float:
    plan = Sizes(problem).of_phase(setting, phase, space.splits(combination))
    return sum(each.seconds for each in price_phase(problem.spec, problem.profile, problem.workload, plan, phase))


@pytest.mark.parametrize("number", [15, 119])  # two layers with slow-downs, one without
def test_arrays_that_grow_with_the_pass_say_what_plain_ones_say(number: int) -> None:
    problem = random_problem(1, number)
    space, sizes = Space(problem, op_groups(problem)), Sizes(problem)
    combinations = np.arange(0, len(space.owner), 97)
    for setting, phase in product(some_settings(problem, 4), PHASES):
        plan = sizes.of_phase(setting, phase, space.splits(0))
        grown = phase_bound(problem, plan, phase, space.grid)
        plain = phase_bound(problem, plan, phase, some_of(space.axes, combinations))
        assert np.array_equal(grown.bound[combinations], plain.bound)


@pytest.mark.parametrize("number", [15, 32])  # with slow-downs, without
def test_the_bound_never_exceeds_the_simulated_time_and_a_played_pass_is_close_to_it(number: int) -> None:
    problem = random_problem(1, number)
    space, sizes, ratios = Space(problem, op_groups(problem)), Sizes(problem), []
    for setting, phase in product(some_settings(problem, 3), PHASES):
        plan = sizes.of_phase(replace(setting, ring=largest_ring(problem)), phase, space.splits(0))
        bound = phase_bound(problem, plan, phase, space.grid).bound
        chosen = np.argsort(bound)[:2000:250]
        (about,) = phase_about(problem, plan, phase, some_of(space.axes, chosen), [(sizes.plan(setting).ring_bytes, setting.ring[0])])
        for seconds, combination in zip(about, chosen, strict=True):
            exact = simulated(problem, space, setting, phase, int(combination))
            assert bound[combination] <= exact * (1 + 1e-9)
            ratios.append(seconds / exact if exact else 1.0)
    errors = np.abs(np.array(ratios) - 1)
    assert np.median(errors) < 0.02 and np.mean(errors < 0.1) > 0.9


def test_where_nothing_is_streamed_the_bound_and_the_played_pass_are_the_simulation() -> None:
    problem = random_problem(1, 32)  # nobody slows anybody down
    space, sizes = Space(problem, op_groups(problem)), Sizes(problem)
    still = np.nonzero(~space.streaming)[0][::2000]
    for setting, phase in product(some_settings(problem, 3), PHASES):
        plan = sizes.of_phase(setting, phase, space.splits(0))
        bound = phase_bound(problem, plan, phase, space.grid).bound[still]
        (about,) = phase_about(problem, plan, phase, some_of(space.axes, still), [(plan.ring_bytes, plan.packet_bytes)])
        exact = [simulated(problem, space, setting, phase, int(combination)) for combination in still]
        assert about == pytest.approx(exact, rel=1e-9)
        if setting.gpu_seqs == setting.num_seqs or "gpu" not in (setting.prefill_attention, setting.decode_attention):
            assert bound == pytest.approx(exact, rel=1e-9)


def test_the_search_finds_the_best_that_pricing_every_plan_finds() -> None:
    """The slow twin: all plans of a space of few splits, without bounds."""
    problem = random_problem(1, 4)
    groups = [tuple(name if name in problem.ops else {"gate_up_proj": "fc1", "down_proj": "fc2"}[name] for name in names) for names in COARSE]
    space, sizes = Space(problem, groups), Sizes(problem)
    best_s = np.inf
    for setting in settings(problem):
        if setting.ring != largest_ring(problem) or setting.decode_batches != 1 or setting.gpu_seqs < problem.workload.num_requests or setting.chunk > 16:
            continue
        for residency in np.nonzero(space.bytes + sizes.fixed_bytes(setting) <= problem.limits.gpu_bytes)[0]:
            by_phase = [min(simulated(problem, space, setting, phase, int(each)) for each in space.members(int(residency))) for phase in PHASES]
            best_s = min(best_s, sizes.waves(setting) * sum(by_phase))
    plan = enumerated(problem, groups, np.inf, SEARCH_TASKS)
    assert plan is not None and problem.fits(plan)
    plan.check(problem.spec)
    assert seconds_of(problem, plan) <= best_s * 1.005


def test_the_size_of_a_space_is_known_before_it_is_made() -> None:
    for number in (3, 15, 32):
        problem = random_problem(1, number)
        groups = op_groups(problem)
        assert num_combinations(problem, groups) == len(Space(problem, groups).owner)
        assert small_groups(problem, 60_000) == groups and small_groups(problem, 2) is None
        coarser = small_groups(problem, num_combinations(problem, groups) - 1)
        assert coarser is not None and len(Space(problem, coarser).owner) <= num_combinations(problem, coarser) < num_combinations(problem, groups)


def test_only_small_spaces_are_searched() -> None:
    problem = random_problem(1, 3)
    assert searchable(problem, SEARCH_TASKS) is not None
    assert searchable(problem, 100) is None  # no time for its bounds
    deep = replace(problem.spec, layers=problem.spec.layers[:1] * 7)
    assert searchable(Problem.of(deep, problem.profile, problem.workload, problem.limits, problem.options), SEARCH_TASKS) is None
    busy = replace(problem.workload, num_requests=64, max_num_seqs=64)
    assert searchable(Problem.of(problem.spec, problem.profile, busy, problem.limits, problem.options), SEARCH_TASKS) is None


def test_a_plan_of_the_search_keeps_both_limits() -> None:
    """Host memory for less beside a GPU that is full: what fits under a lower limit is no better."""
    problem, seconds = random_problem(1, 88), []
    for host_bytes in (1_620_672, 1_600_000):
        tight = problem.within(Limits(gpu_bytes=problem.limits.gpu_bytes, host_bytes=host_bytes))
        plan = enumerated(tight, op_groups(problem), np.inf, SEARCH_TASKS)
        assert plan is not None and tight.fits(plan)
        seconds.append(seconds_of(problem, plan))
    assert seconds[0] <= seconds[1] * 1.01
