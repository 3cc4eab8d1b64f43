"""`benchmarks.competition`: what may be lost to a process on one core."""

from __future__ import annotations

import pytest

from benchmarks.competition import row_of


def test_a_cores_share_and_fifteen_percent_may_be_lost() -> None:
    fine = row_of(1, [100.0, 120.0, 90.0], [40.0, 42.0, 45.0], num_cores=2)
    assert fine["lost_frac"] == pytest.approx(0.6), "the median of the rounds' ratios"
    assert fine["allowed_frac"] == pytest.approx(0.65)
    assert fine["met"]
    assert not row_of(1, [100.0], [57.0], num_cores=4)["met"], "of four cores one is a quarter"
