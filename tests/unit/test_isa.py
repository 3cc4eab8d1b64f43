"""Tiles are used where they measured faster, and a machine keeps to what it chose: bits must not change from one start to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from twinpilots.hardware.isa import MOST_AT_1_ROW, MOST_AT_512_ROWS, choose, settle_isa
from twinpilots.hardware.store import isa_path
from twinpilots.kernels.native import AMX, AVX512_VNNI


class FakeKernels:
    """A machine on which tiles take ``ratio[rows]`` of the time of vectors."""

    def __init__(self, ratio: dict[int, float], best_isa: int = AMX) -> None:
        self.ratio, self.best_isa, self.isa_was_set = ratio, best_isa, False
        self.isa = AVX512_VNNI
        self.measured = 0

    def set_isa(self, level: int) -> None:
        self.isa, self.isa_was_set = level, True

    def linear_seconds(self, isa: int, weights: object, rows: int) -> float:
        self.measured += 1
        noise = 3.0 if self.measured <= 4 else 1.0  # the first round is disturbed
        return noise * rows * (self.ratio[rows] if isa == AMX else 1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("at_1", "at_512", "expected"),
    [
        (1.0, 0.1, AMX), (MOST_AT_1_ROW - 0.01, MOST_AT_512_ROWS - 0.01, AMX),
        (MOST_AT_1_ROW + 0.01, 0.1, AVX512_VNNI), (0.9, MOST_AT_512_ROWS + 0.01, AVX512_VNNI),
    ],
)  # fmt: skip
def test_tiles_are_taken_where_prompts_gain_and_single_rows_hardly_lose(at_1: float, at_512: float, expected: int) -> None:
    assert choose({AMX: {1: at_1, 512: at_512}, AVX512_VNNI: {1: 1.0, 512: 1.0}}) == expected
    kernels = FakeKernels({1: at_1, 512: at_512})
    settle_isa(kernels)
    assert kernels.isa == expected


def test_the_choice_is_kept_even_if_a_later_measurement_would_differ() -> None:
    settle_isa(FakeKernels({1: 1.0, 512: 0.1}))
    later = FakeKernels({1: 2.0, 512: 2.0})
    settle_isa(later)
    assert (later.isa, later.measured) == (AMX, 0)
    isa_path().write_text('{"isa": "sse9"}')  # a damaged note: once more
    settle_isa(again := FakeKernels({1: 2.0, 512: 2.0}))
    assert again.isa == AVX512_VNNI and again.measured > 0


def test_nothing_is_measured_without_tiles_or_when_somebody_chose() -> None:
    without = FakeKernels({1: 1.0, 512: 0.1}, best_isa=AVX512_VNNI)
    settle_isa(without)
    chosen = FakeKernels({1: 1.0, 512: 0.1})
    chosen.set_isa(1)
    settle_isa(chosen)
    assert (without.measured, without.isa_was_set, chosen.measured, chosen.isa) == (0, False, 0, 1)
    assert not isa_path().exists()


def test_a_cache_that_cannot_be_written_only_costs_the_next_start_a_measurement(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    settle_isa(kernels := FakeKernels({1: 1.0, 512: 0.1}))
    assert kernels.isa == AMX
    assert "measured again next time" in caplog.text
