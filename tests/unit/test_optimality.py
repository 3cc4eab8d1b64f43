"""`auto` against the best of all plans of small problems, and the search that finds the best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.exhaustive import TOLERANCE, Exhaustive, seconds_of
from benchmarks.optimality import GOOD, outcome, random_problem, report
from twinpilots.plan.plan import Plan
from twinpilots.plan.polish import SMALL_STARTS, point_of, polish
from twinpilots.plan.solver import SIMULATED_TASKS_PER_S, solve

# (seed, number) of problems whose space is searched in about a second: no named policy, rounding of the program or single step solves these but the second
QUICK = ((0, 3), (0, 4), (1, 119), (1, 88))


@pytest.mark.parametrize(("seed", "number"), QUICK)
def test_auto_is_within_a_percent_of_the_best_of_all_plans(seed: int, number: int) -> None:
    """The whole is `python -m benchmarks.optimality`; the search checks its bound against every plan that it simulates."""
    found = outcome(seed, number)
    assert found.gap is not None and found.gap <= GOOD
    assert found.plans > 10_000


def best_of(number: int, known: float) -> tuple[float, float, Plan | None]:
    problem = random_problem(0, number)
    auto_s = seconds_of(problem, solve(problem.spec, problem.profile, problem.workload, problem.limits).plan)
    found = Exhaustive(problem).run(known * auto_s)
    return auto_s, found.seconds, found.plan


def test_the_search_finds_a_plan_as_good_as_autos_by_itself() -> None:
    """Told of nothing better than a quarter more, it must come to auto's time or less; the plan that it names takes just that."""
    auto_s, best_s, plan = best_of(4, 1.25)
    problem = random_problem(0, 4)
    assert plan is not None and best_s <= auto_s * (1 + TOLERANCE)
    assert seconds_of(problem, plan) == pytest.approx(best_s) and problem.fits(plan)
    plan.check(problem.spec)


def test_polish_keeps_the_limits_and_is_never_worse() -> None:
    problem = random_problem(0, 4)
    start = solve(problem.spec, problem.profile, problem.workload, problem.limits, policy="stream", compare=False).plan
    point = point_of(problem, start)
    assert point is not None and point.plan(problem).buckets[0].splits == start.buckets[0].splits  # the plan, seen as a point, is the plan
    (polished,) = polish(problem, [start])
    polished.check(problem.spec)
    assert problem.fits(polished) and seconds_of(problem, polished) <= seconds_of(problem, start)


def test_a_search_in_proportion_takes_about_as_long_as_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, asked = random_problem(0, 4), []
    monkeypatch.setattr("twinpilots.plan.solver.searchable", lambda _problem, _most_tasks: None)
    monkeypatch.setattr("twinpilots.plan.solver.polish", lambda _problem, _plans, most_tasks: asked.append(most_tasks) or [])
    for times in (1, 1000):
        work = replace(problem.workload, num_requests=times * problem.workload.num_requests)
        found = solve(problem.spec, problem.profile, work, problem.limits, proportionate=True)
        assert asked[-1] == int(SIMULATED_TASKS_PER_S * found.price.seconds)
    solve(problem.spec, problem.profile, problem.workload, problem.limits)
    assert 0 < asked[0] < asked[1] and asked[2] is None


def test_a_search_without_tasks_to_spend_makes_nothing() -> None:
    problem = random_problem(0, 4)
    start = solve(problem.spec, problem.profile, problem.workload, problem.limits, policy="stream", compare=False).plan
    assert polish(problem, [start], most_tasks=0) == [] and polish(problem, [start], most_tasks=SMALL_STARTS) != []


def test_the_report_names_the_worst_problem() -> None:
    text = report([outcome(0, 4)])
    assert "1 problems" in text and "(problem 4)" in text
