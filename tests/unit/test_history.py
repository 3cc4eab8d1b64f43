"""What a run learns is there at the next start, older records counting less; what is damaged is said and ignored."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from twinpilots import history
from twinpilots.hardware.presets import PRESETS
from twinpilots.stats.correction import WorkTime
from twinpilots.stats.tracker import Tracker

PROFILE = PRESETS["t4"]
NOW_S = 1e9


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def learned(ratio: float = 1.3) -> Tracker:
    tracker = Tracker(PROFILE)
    for _ in range(30):
        tracker.observe([WorkTime(resource="cpu", key="fp16/out", size=8, expected_s=0.01, seconds=0.01 * ratio)], 0.05)
    return tracker


def factor_after(age_s: float) -> float:
    tracker = Tracker(PROFILE)
    assert history.recall(tracker, NOW_S + age_s)
    return tracker.factor("cpu", "fp16/out", 8)


def test_the_next_run_starts_from_it_and_age_takes_its_weight() -> None:
    history.store(learned(), NOW_S)
    fresh, month = factor_after(0.0), factor_after(30 * 86400.0)
    assert fresh == pytest.approx(1.3, rel=0.03) and 1.0 < month < fresh


def test_another_profile_has_another_history() -> None:
    history.store(learned(), NOW_S)
    assert not history.recall(Tracker(replace(PROFILE, source="measured anew")), NOW_S)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "saved_s": 0, "records": {"cpu x": {"noise": 1, "sizes": [["a", 1, 1]]}}}'])
def test_a_damaged_file_is_a_warning(text: str, caplog: pytest.LogCaptureFixture) -> None:
    history.store(learned(), NOW_S)
    history.history_path(PROFILE).write_text(text)
    tracker = Tracker(PROFILE)
    with caplog.at_level(logging.WARNING, "twinpilots"):
        assert not history.recall(tracker, NOW_S)
    assert "damaged and ignored" in caplog.text and "--forget" in caplog.text
    assert tracker.evidence == {}


def test_forgetting_removes_it() -> None:
    history.store(learned(), NOW_S)
    assert history.forget() == 1 and history.forget() == 0
    assert not history.recall(Tracker(PROFILE), NOW_S)


def test_nothing_learned_is_not_stored() -> None:
    history.store(Tracker(PROFILE), NOW_S)
    assert not history.history_path(PROFILE).exists()


def test_the_file_is_plain_json() -> None:
    history.store(learned(), NOW_S)
    document = json.loads(history.history_path(PROFILE).read_text())
    assert document["profile"] == PROFILE.name and "cpu fp16/out" in document["records"]
