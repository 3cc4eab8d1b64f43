"""History corrects the profile where it was observed, follows a jump, fades, and leaves the rest alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from twinpilots.hardware.presets import PRESETS
from twinpilots.plan.expected import ATTENTION, DOWN, UP
from twinpilots.stats.correction import WorkTime
from twinpilots.stats.evidence import DECAY, JUMP_RECORDS, Evidence
from twinpilots.stats.tracker import Tracker

PROFILE = PRESETS["t4"]
KEY = "fp16/out"


def record(ratio: float, size: float = 8, resource: str = "cpu", key: str = KEY) -> WorkTime:
    return WorkTime(resource=resource, key=key, size=size, expected_s=0.02, seconds=0.02 * ratio)  # type: ignore[arg-type]


def tracked(*ratios: float, **kind: object) -> Tracker:
    tracker = Tracker(PROFILE)
    for ratio in ratios:
        tracker.observe([record(ratio, **kind)], 0.05)  # type: ignore[arg-type]
    return tracker


def test_without_history_the_profile_stands():
    assert Tracker(PROFILE).profile() == PROFILE


def test_the_estimate_goes_to_what_is_measured_and_the_rest_stays():
    found = tracked(*[1.5] * 40).profile()
    assert found.cpu.linear[KEY](8) == pytest.approx(1.5 * PROFILE.cpu.linear[KEY](8), rel=0.03)
    assert found.gpu is not None and PROFILE.gpu is not None
    assert found.gpu.linear[KEY](8) == PROFILE.gpu.linear[KEY](8) and found.link == PROFILE.link


def test_attention_and_the_link_are_corrected_too():
    assert PROFILE.link is not None
    found = tracked(*[2.0] * 30, key=ATTENTION, size=500).profile()
    assert found.cpu.attention_bytes_per_s == pytest.approx(PROFILE.cpu.attention_bytes_per_s / 2, rel=0.05)
    found = tracked(*[2.0] * 30, resource="link", key=UP, size=1).profile()
    assert found.link is not None and found.link.up_bytes_per_s == pytest.approx(PROFILE.link.up_bytes_per_s / 2, rel=0.05)


def test_the_fixed_parts_of_attention_and_of_kv_copies_grow_with_the_rest():
    """Else a correction would reach long contexts and big copies only."""
    assert PROFILE.link is not None
    fixed = replace(PROFILE, cpu=replace(PROFILE.cpu, attention_seq_s=1e-5), link=replace(PROFILE.link, load_kv_s=2e-5, store_kv_s=3e-5))
    tracker = Tracker(fixed)
    for _ in range(30):
        tracker.observe([record(2.0, 500, key=ATTENTION), record(2.0, 1, "link", UP), record(3.0, 1, "link", DOWN)], 0.05)
    found = tracker.profile()
    assert found.cpu.attention_s(1e6, 1e3, 4) == pytest.approx(2 * fixed.cpu.attention_s(1e6, 1e3, 4), rel=0.05)
    assert found.link is not None and (found.link.load_kv_s, found.link.store_kv_s) == pytest.approx((4e-5, 9e-5), rel=0.05)


def test_a_slow_change_is_followed_as_old_records_fade():
    tracker = tracked(*[1.0] * 50, *[1.1] * 20)
    assert math.log(tracker.factor("cpu", KEY, 8)) == pytest.approx(math.log(1.1) * (1 - DECAY**20), rel=0.1)


def test_a_jump_is_followed_within_three_passes():
    tracker = tracked(*[1.0] * 50, *[3.0] * JUMP_RECORDS)
    assert tracker.factor("cpu", KEY, 8) == pytest.approx(3.0, rel=0.1)


def test_a_single_pause_is_no_jump():
    tracker = tracked(*[1.0] * 50, 40.0, *[1.0] * 3)
    assert tracker.factor("cpu", KEY, 8) == pytest.approx(1.0, abs=0.02)


def test_noise_is_no_jump_and_is_known():
    rng = random.Random(1)
    tracker = tracked(*[rng.lognormvariate(0.0, 0.1) for _ in range(200)])
    assert tracker.factor("cpu", KEY, 8) == pytest.approx(1.0, abs=0.1)
    assert 0.01 < tracker.error_frac("cpu", KEY, 8) < 0.1
    assert tracked(*[1.2] * 50).error_frac("cpu", KEY, 8) < 0.005


def test_neighbouring_token_counts_learn_less_with_distance():
    tracker = tracked(*[2.0] * 20)
    near, far = (tracker.factor("cpu", KEY, tokens) for tokens in (16, 1024))
    assert 1.0 < far < near < 2.0


def test_what_is_no_longer_seen_is_believed_less_and_less():
    tracker = tracked(*[2.0] * 20)
    for _ in range(400):
        tracker.observe([], 0.05)
    assert tracker.factor("cpu", KEY, 8) == pytest.approx(1.0, abs=0.03)


def test_drift_counts_by_its_share_of_the_pass():
    tracker = tracked(*[1.0] * 30)
    before = tracker.snapshot()
    assert tracker.drift(before)[0] == 0
    for _ in range(10):
        tracker.observe([record(2.0)], 0.5)  # 0.04 of 0.5 seconds
    drift, words = tracker.drift(before)
    assert 0.0 < drift < 0.25 and words.startswith("fp16/out on the cpu takes ")


def test_records_of_nothing_are_passed_over():
    tracker = Tracker(PROFILE)
    tracker.observe([WorkTime(resource="cpu", key=KEY, size=8, expected_s=0.0, seconds=0.0)], 0.05)
    assert tracker.profile() == PROFILE


def test_what_was_learned_survives_a_restart_and_is_soon_outweighed():
    before = tracked(*[1.4] * 30)
    after = Tracker(PROFILE)
    after.recall(before.as_dict())
    assert after.factor("cpu", KEY, 8) == pytest.approx(1.4, rel=0.05)
    aged = Tracker(PROFILE)
    aged.recall(before.as_dict(), 0.1)
    assert 1.0 < aged.factor("cpu", KEY, 8) < after.factor("cpu", KEY, 8)
    for _ in range(12):
        after.observe([record(1.0)], 0.05)
    assert after.factor("cpu", KEY, 8) == pytest.approx(1.0, abs=0.1)


def test_a_passing_load_at_the_end_of_a_run_does_not_rule_the_next():
    after = Tracker(PROFILE)
    after.recall(tracked(*[4.0] * 30).as_dict())
    assert 1.3 < after.factor("cpu", KEY, 8) < 1.5


@pytest.mark.parametrize(
    "data", [{"cpu x": {}}, {"cpu x": {"noise": 0.1, "sizes": [[8, -1, 0]]}}, {"disk x": {"noise": 0, "sizes": []}}, {"cpu x": {"noise": "a", "sizes": []}}]
)
def test_what_is_no_history_is_refused_whole(data: dict[str, object]):
    tracker = Tracker(PROFILE)
    with pytest.raises(ValueError):
        tracker.recall({"cpu good": {"noise": 0.1, "sizes": []}, **data})
    assert tracker.evidence == {}


def test_evidence_stays_small():
    evidence = Evidence()
    for number in range(2000):
        evidence.add(1.0 + number % 3 / 10, 1 + number % 700, number)
    assert len(evidence.bins) < 110
