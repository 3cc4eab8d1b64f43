"""When an engine loads another plan for the work that it is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning import DEMO, llama, workload
from twinpilots.config import EngineConfig
from twinpilots.plan.plan import Plan
from twinpilots.plan.workload import Workload
from twinpilots.planner import Planner

LONG, SHORT, OTHER = workload(num=2, input_len=64, output_len=64), workload(num=2, input_len=16, output_len=8), workload(num=2, input_len=16, output_len=16)


def planner_of(monkeypatch: pytest.MonkeyPatch, *, gain: float) -> tuple[Planner, Plan]:
    """A planner and the plan that is loaded: any work takes a second under it, and ``gain`` less under every other."""
    config = EngineConfig.of(
        dtype="auto", quantization=None, device="emulated:demo", gpu_memory=None, host_memory=None, max_model_len=None, max_num_seqs=None,
        kv_cache_dtype="auto", policy="auto", plan=None, threads=None, seed=0, deterministic=False, unit_rows=None,
    )  # fmt: skip
    planner = Planner(config, llama(), DEMO, "fingerprint")
    current = planner.plan_for(LONG)
    planner.rounds.loaded(current)

    def seconds(_: Planner, plan: Plan, work: Workload) -> float:
        return 1.0 if plan is current else 1.0 - gain

    monkeypatch.setattr(Planner, "_seconds", seconds)
    monkeypatch.setattr(planner, "_solve_s", 1.0)
    return planner, current


def rounds_until_changed(planner: Planner, current: Plan, work: Workload, most: int = 100) -> int | None:
    return next((number for number in range(1, most) if planner.better_plan(current, work, work.seq_len, 1.0, 0.97) is not None), None)


def note(planner: Planner, work: Workload, seconds: float) -> None:
    planner.note_round(work, seconds, work.num_requests * work.input_len, work.generated_tokens)


def test_work_that_comes_again_earns_the_plan_that_a_single_round_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain of 0.1 s a round: 20 rounds of a second have a tenth to spare for a second of searching and one of loading."""
    planner, current = planner_of(monkeypatch, gain=0.1)
    assert rounds_until_changed(planner, current, SHORT) == 20


def test_rounds_of_other_work_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.1)
    assert rounds_until_changed(planner, current, OTHER, most=16) is None
    found = rounds_until_changed(planner, current, SHORT)
    assert found is not None and found >= 15


def test_a_plan_that_runs_better_than_predicted_is_not_left_for_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.1)
    note(planner, SHORT, 0.89)
    assert rounds_until_changed(planner, current, SHORT) is None


def test_a_plan_that_disappoints_is_left_for_the_one_before_and_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.3)
    note(planner, SHORT, 1.1)
    assert rounds_until_changed(planner, current, SHORT) == 20
    better = planner.solve(SHORT, longest=SHORT.seq_len).plan
    planner.rounds.loaded(better)
    note(planner, SHORT, 1.4)
    back = [change for _ in range(64) if (change := planner.better_plan(better, SHORT, SHORT.seq_len, 1.0, 0.97)) is not None]
    assert back[0].plan is current and (back[0].now_s, back[0].then_s) == (1.4, 1.1)
    planner.rounds.loaded(current)
    assert rounds_until_changed(planner, current, SHORT) is None


def test_rounds_that_were_cut_short_are_not_taken_for_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts from the prefix cache, sequences that end at once; and one that generates half of what lengths are rounded up to counts twice."""
    planner, _ = planner_of(monkeypatch, gain=0.1)
    planner.note_round(SHORT, 0.1, SHORT.num_requests * SHORT.input_len // 2, SHORT.generated_tokens)
    planner.note_round(SHORT, 0.1, SHORT.num_requests * SHORT.input_len, SHORT.generated_tokens // 8)
    assert planner.rounds.seen_s(SHORT) is None
    planner.note_round(SHORT, 0.1, SHORT.num_requests * SHORT.input_len, SHORT.generated_tokens // 2)
    assert planner.rounds.seen_s(SHORT) == pytest.approx(0.2)


def test_what_gains_too_little_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.02)
    assert rounds_until_changed(planner, current, SHORT) is None


def test_a_great_gain_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.9)
    monkeypatch.setattr(planner, "_solve_s", 0.0)
    assert planner.better_plan(current, SHORT, SHORT.seq_len, 0.05, 0.97) is not None


def test_a_search_goes_by_the_rates_that_the_rounds_have_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, current = planner_of(monkeypatch, gain=0.1)
    before = planner.solve(SHORT, longest=SHORT.seq_len)
    assert planner.solve(SHORT, longest=SHORT.seq_len, at_present_rates=True) is before, "nothing was taught"
    planner.online.profile = replace(planner.online.profile, cpu=planner.online.profile.cpu.with_attention(0.5, 0.5))
    assert planner.solve(SHORT, longest=SHORT.seq_len) is before, "what is asked for other ends is remembered"
    change = next(change for _ in range(64) if (change := planner.better_plan(current, SHORT, SHORT.seq_len, 1.0, 0.97)) is not None)
    assert change.plan is not before.plan and change.plan is planner.solve(SHORT, longest=SHORT.seq_len).plan
