"""The live adaptation benchmark's arithmetic: who the oracle is, the shares of its throughput, which plans are measured by turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import adaptation_live
from benchmarks.adaptation_live import GOOD, Box, LiveOutcome, Stretch, finalists
from tests.planning import DEMO, memory_of, smollm2, workload
from twinpilots.plan.plan import Plan, Policy
from twinpilots.plan.solver import solve


def _stretch(adaptive_s: tuple[float, ...]) -> Stretch:
    others = {"in force": (0.060, 0.050, 0.500), "first": (0.080, 0.080, 0.001), "CPU 50%": (0.040, 0.048, 0.050)}
    return Stretch(event="an event", adaptive_s=adaptive_s, others_s=others, first="first")


def test_the_oracle_is_the_plan_of_the_least_median_and_shares_are_of_its_throughput() -> None:
    stretch = _stretch((0.060, 0.010, 0.900))
    assert stretch.best == "CPU 50%", "a single fast pass or a single slow one decides nothing"
    assert stretch.of_oracle == pytest.approx(0.048 / 0.060)
    assert stretch.first_of_oracle == pytest.approx(0.048 / 0.080)


def test_a_scenario_is_as_good_as_its_worst_stretch() -> None:
    outcome = LiveOutcome(scenario="one", stretches=[_stretch((0.048,)), _stretch((0.064,)), _stretch((0.050,))])
    assert outcome.worst == pytest.approx(0.75)
    assert not outcome.as_dict()["good"]
    assert LiveOutcome(scenario="two", stretches=[_stretch((0.048 / GOOD * 0.999,))]).as_dict()["good"]


def test_the_plan_in_force_and_the_first_one_are_always_measured_again_and_count_once() -> None:
    screened = {"in force": [9.0], "first": [8.0], "a": [3.0, 3.0], "b": [1.0, 7.0, 7.0], "c": [2.0], "d": [4.0]}
    assert finalists(screened, ["in force", "first"], 2) == ["in force", "first", "c", "a"]
    assert finalists({"in force": [1.0]}, ["in force", "in force"], 3) == ["in force"]


def _box(plan: Plan, num_seqs: int) -> Box:
    """Without an engine: all that the plans to compare with are made from."""
    box = Box.__new__(Box)
    items = [SimpleNamespace(end=100, sequence=SimpleNamespace(tier="host"))] * num_seqs
    box.live = SimpleNamespace(session=SimpleNamespace(plan=plan, last_pass=(SimpleNamespace(items=items), None)))  # type: ignore[assignment]
    box.llm = SimpleNamespace(spec=smollm2(), _profile=DEMO, _planner=SimpleNamespace(online=SimpleNamespace(profile=DEMO)))  # type: ignore[assignment]
    box.first, box._running = plan, ["a sequence"] * num_seqs
    return box


@pytest.mark.parametrize(("policy", "others"), [("cpu", {"in force", "first"}), ("hetegen", {"in force", "first", "CPU 100%, 1 micro-batches"})])
def test_a_plan_in_which_nothing_can_move_is_compared_with_itself_alone(monkeypatch: pytest.MonkeyPatch, policy: Policy, others: set[str]) -> None:
    """Its memory holds no other: a grid over it would ask for rows and a ring that are not there."""
    monkeypatch.setattr(adaptation_live, "options", lambda *_: ())
    plan = solve(smollm2(), DEMO, workload(4, 64, 32), memory_of(DEMO), policy=policy, compare=False).plan
    found = _box(plan, 4)._others()
    assert others <= set(found) and (policy != "cpu" or set(found) == others)
    assert all(any(bucket is each for each in plan.buckets) for name, bucket in found.items() if name in ("in force", "first"))
