"""History corrects the profile where it was observed, fades, and leaves the rest alone."""

from __future__ import annotations

import pytest

from twinpilots.hardware.presets import PRESETS
from twinpilots.stats.tracker import DECAY, OpTime, Tracker

PROFILE = PRESETS["t4"]


def record(ratio: float, tokens: int = 8, device: str = "cpu") -> OpTime:
    processor = PROFILE.cpu if device == "cpu" else PROFILE.gpu
    assert processor is not None
    seconds = ratio * (1e9 * processor.linear["fp16/out"](tokens) + 7 * processor.task_s)
    return OpTime(device=device, key="fp16/out", tokens=tokens, elements=1e9, num_tasks=7, seconds=seconds)  # type: ignore[arg-type]


def test_without_history_the_profile_stands():
    assert Tracker(PROFILE).profile().cpu.linear["fp16/out"](8) == PROFILE.cpu.linear["fp16/out"](8)


def test_the_estimate_goes_to_what_is_measured():
    tracker = Tracker(PROFILE)
    for _ in range(40):
        tracker.observe([record(1.5)])
    assert tracker.profile().cpu.linear["fp16/out"](8) == pytest.approx(1.5 * PROFILE.cpu.linear["fp16/out"](8), rel=0.03)
    assert tracker.profile().gpu.linear["fp16/out"](8) == PROFILE.gpu.linear["fp16/out"](8)


def test_old_records_fade():
    tracker = Tracker(PROFILE)
    for _ in range(100):
        tracker.observe([record(3.0)])
    for _ in range(50):
        tracker.observe([record(1.0)])
    assert tracker.factor("cpu", "fp16/out", 8) == pytest.approx(3.0 ** (DECAY**50), rel=0.02)


def test_neighbouring_token_counts_learn_less_with_distance():
    tracker = Tracker(PROFILE)
    for _ in range(20):
        tracker.observe([record(2.0, tokens=8)])
    near, far = (tracker.factor("cpu", "fp16/out", tokens) for tokens in (16, 1024))
    assert 1.0 < far < near < 2.0


def test_records_of_nothing_are_passed_over():
    tracker = Tracker(PROFILE)
    tracker.observe([OpTime(device="cpu", key="fp16/out", tokens=8, elements=0.0, num_tasks=0, seconds=0.0)])
    assert tracker.profile() == PROFILE
