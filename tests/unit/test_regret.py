"""`python -m benchmarks.regret`: its hand-set plans are what they say and keep the limits, and regret is the best of them against auto."""

from __future__ import annotations

import pytest

from benchmarks.regret import Outcome, Point, coarse_sweep, fine_sweep, report
from tests.machines import machine
from twinpilots.benchmarks.summary import compare
from twinpilots.model.dummy import dummy_spec
from twinpilots.plan.draft import PlanOptions
from twinpilots.plan.problem import Problem
from twinpilots.plan.workload import Limits, Workload


def problem(gpu_bytes: int) -> Problem:
    work = Workload(num_requests=4, input_len=32, output_len=32, max_num_seqs=4)
    return Problem.of(dummy_spec("smollm2-135m"), machine(), work, Limits(gpu_bytes=gpu_bytes, host_bytes=1 << 33), PlanOptions())


def test_the_sweep_has_the_policies_and_a_grid_and_keeps_the_limits() -> None:
    asked = problem(100 << 20)
    hands = list(coarse_sweep(asked))
    assert {"cpu", "stream", "layer-split", "hetegen"} <= {hand.name for hand in hands if hand.point is None}
    points = [hand.point for hand in hands if hand.point is not None]
    assert {point.gpu_seqs for point in points} == {0, 2, 4} and {point.micro_batches for point in points} == {1, 2}
    assert all(asked.fits(hand.plan) for hand in hands) and len({hand.name for hand in hands}) == len(hands)


def test_a_point_is_the_plan_that_its_name_says() -> None:
    point = Point(gpu_seqs=2, decode=0.5, prefill=0.5, micro_batches=2)
    for hand in fine_sweep(problem(100 << 20), point):
        assert hand.point is not None
        for phase, wanted in (("decode", 0.5), ("prefill", hand.point.prefill)):
            bucket = hand.plan.bucket_for(phase, 4 if phase == "decode" else hand.plan.max_pass_tokens)  # type: ignore[arg-type]
            split = bucket.splits[15]["gate_up_proj"]
            assert split.resident > 0 and split.cpu == pytest.approx(wanted * (split.rows - split.resident), abs=hand.plan.unit_rows)
            assert bucket.micro_batches == 2
        assert hand.plan.gpu_pages == 2 * 4 == hand.plan.host_pages


def test_what_does_not_fit_is_not_swept() -> None:
    assert not [hand for hand in coarse_sweep(problem(1 << 20)) if hand.point is not None]


def test_regret_is_the_best_hand_set_plan_against_auto() -> None:
    auto = [10.0, 12.0, 11.0]
    finals = {"slow": compare([9.0, 9.0, 9.0], auto), "fast": compare([10.5, 12.6, 11.55], auto)}
    found = Outcome(num_seqs=4, auto_tokens_per_s=11.0, screened={"slow": 9.0, "fast": 11.0}, finals=finals)
    assert found.best == "fast" and found.regret == pytest.approx(0.05)
    assert "| 4 | 11.0 | 2 | fast | +5.0 % | +5.0 % |" in report([found])
