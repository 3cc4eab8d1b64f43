"""The adaptation benchmark, shortened: another process takes the CPU and goes, and the plan follows both times."""

from __future__ import annotations

import pytest

from benchmarks import adaptation


@pytest.mark.slow
def test_a_busy_cpu_is_followed_both_ways() -> None:
    scenario = next(each for each in adaptation.scenarios(32) if each.name == "cpu-load")
    outcome = adaptation.run(scenario)
    assert outcome.worst >= adaptation.GOOD and outcome.returns == 0
    assert outcome.mean > outcome.frozen_mean
    reasons = [change["reason"] for change in outcome.changes]
    assert any("on the cpu takes 2." in reason for reason in reasons) and any("on the cpu takes 0.3" in reason for reason in reasons)
