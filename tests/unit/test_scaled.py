"""A machine of which only a few rates are known: the nearest preset at those rates, and the gaps of a measured profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.hidden_devices import measured
from benchmarks.hidden_machine import random_machine
from tests.machines import machine, without_gpu
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import Curve
from twinpilots.hardware.scaled import Anchors, filled, nearest, scaled
from twinpilots.hardware.store import latest_profile, save_first, save_profile
from twinpilots.model.dummy import dummy_spec


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_presets_own_rates_give_the_preset_back(name: str) -> None:
    found = scaled(Anchors.of(PRESETS[name]))
    assert nearest(Anchors.of(PRESETS[name])) is PRESETS[name]
    assert found.gpu is not None
    for mine, of in ((found.cpu, PRESETS[name].cpu), (found.gpu, PRESETS[name].gpu)):
        assert of is not None
        for key, curve in of.linear.items():
            assert mine.linear[key].y == pytest.approx(curve.y)
    assert found.link == PRESETS[name].link


def test_reading_and_computing_are_scaled_apart() -> None:
    """2 bytes at 2 MB/s: 1 us; 2 operations at 8 MFLOP/s: 0.25 us a token, up from four tokens. At half the reading and twice the computing: 2 us, 0.125 us."""
    made = scaled(Anchors(cpu_read=1e6, cpu_flops=16e6), machine())
    curve = made.cpu.curve("bf16/out")
    assert [curve(tokens) for tokens in (1, 4, 16, 64)] == pytest.approx([2e-6, 2e-6, 2e-6, 8e-6])
    assert made.gpu is None
    assert made.link is None
    assert "not a profile" in made.source


def test_the_gaps_of_a_measured_profile_are_filled_at_its_own_rates_and_the_rest_is_kept() -> None:
    own = Curve(x=(1.0, 8.0), y=(1e-9, 4e-9))
    profile = without_gpu(replace(machine(), cpu=replace(PRESETS["t4"].cpu, linear={"bf16/out": own})))
    found = filled(profile)
    assert found.cpu.curve("bf16/out") == own
    assert found.cpu.curve("q4_1/out")(1) == pytest.approx(PRESETS["t4"].cpu.curve("q4_1/out")(1))
    assert found.missing(dummy_spec("opt-6.7b").rate_keys) == ()


def test_a_few_measured_rates_describe_a_hidden_machine() -> None:
    hidden = random_machine(3, 1)
    found = measured(hidden, dummy_spec("smollm2-135m"), 8 << 30, 0, "scaled")
    assert found.link is not None
    assert found.gpu is not None
    assert found.link.up_bytes_per_s == pytest.approx(hidden.up, rel=0.15)
    assert found.cpu.curve("bf16/out")(1) == pytest.approx(2 / hidden.cpu.read, rel=0.25)  # what kernels reach of a peak is the preset's
    assert found.gpu_memory_bytes == 8 << 30
    assert not found.emulated


def test_a_scaled_preset_never_displaces_a_measured_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = (scaled(Anchors(cpu_read=read, cpu_flops=1e12)) for read in (1e10, 2e10))
    for each in (first, second):
        save_first("cpu", each)
        assert latest_profile("cpu") == each
    save_profile("key", machine(), latest_for="cpu")
    save_first("cpu", first)
    assert latest_profile("cpu") == machine()
