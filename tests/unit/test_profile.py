"""Profiles are data: curves interpolate, JSON comes back equal, nonsense is refused by name; presets describe plausible machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.machines import machine, without_gpu
from twinpilots.errors import UserError
from twinpilots.hardware.presets import PRESETS, copy_slowdown, load_hardware
from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile, roofline_curve


def test_a_curve_is_flat_before_linear_between_and_goes_on_after_its_points() -> None:
    curve = Curve(x=(1, 2, 4), y=(10, 20, 60))
    assert [curve(x) for x in (0, 1, 1.5, 2, 3, 4, 5)] == [10, 10, 15, 20, 40, 60, 80]
    assert Curve(x=(1, 2), y=(10, 8))(5) == 8  # times never fall beyond what was measured
    assert Curve(x=(3,), y=(7,))(100) == 7


@pytest.mark.parametrize("x, y", [((), ()), ((1, 1), (1, 2)), ((2, 1), (1, 2)), ((1, 2), (1,))])
def test_a_curve_needs_ascending_points(x: tuple[float, ...], y: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Curve(x=x, y=y)


def test_a_roofline_reads_until_the_knee_and_computes_after_it() -> None:
    curve = roofline_curve(2, 1e9, 4e9)  # knee at 4 tokens
    assert curve(1) == curve(4) == 2e-9
    assert curve(8) == pytest.approx(4e-9)
    assert curve(16384) == pytest.approx(8192e-9)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_gives_an_equal_profile_back(name: str) -> None:
    assert HardwareProfile.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_a_machine_without_a_gpu_survives_json() -> None:
    profile = without_gpu(machine())
    assert HardwareProfile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 99}, "schema is 99"),
        ({"cpu": {}}, "linear"),
        ({"nonsense": 1}, "nonsense"),
        ({"host_memory_bytes": "much"}, "host_memory_bytes .* 'much'"),
        ({"dram_bytes_per_s": 0}, "dram_bytes_per_s .* got 0"),
        ({"gpu": None}, "gpu and link come together"),
    ],
)
def test_a_malformed_profile_is_refused_by_field(change: dict[str, object], message: str) -> None:
    data = {**json.loads(machine().to_json()), **change}
    with pytest.raises(ValueError, match=message):
        HardwareProfile.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"schema": 1}'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        HardwareProfile.from_json(text)


@pytest.mark.parametrize("name", ["attention_bytes_per_s", "flops_per_s", "task_s", "copy_slowdown"])
def test_rates_are_finite_and_positive(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=name):
            replace(machine().cpu, **{name: value})


def test_the_presets_are_those_that_the_design_names_with_their_hosts() -> None:
    host_gb = {"t4": 208, "a10g": 275, "rtx-3060": 64, "rtx-4090": 192, "a6000": 252, "h100": 512}  # a10g: 256 GiB
    assert set(PRESETS) == {"demo", *host_gb}
    for name, size in host_gb.items():
        assert round(PRESETS[name].host_memory_bytes / 1e9) == size
        assert not PRESETS[name].emulated
        assert "not measured" in PRESETS[name].source
    assert PRESETS["demo"].emulated
    assert PRESETS["demo"].gpu_memory_bytes == 32 << 20


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_promises_less_than_its_peaks(name: str) -> None:
    profile = PRESETS[name]
    assert profile.gpu is not None and profile.link is not None
    for processor in (profile.cpu, profile.gpu):
        assert isinstance(processor, ComputeProfile)
        for dtype, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
            for dim in ("out", "in"):
                assert processor.linear_s(f"{dtype}/{dim}", 1, 1) > size / processor.read_bytes_per_s
                assert processor.linear_s(f"{dtype}/{dim}", 1, 8192) > 2 * 8192 / processor.flops_per_s
    assert profile.cpu.read_bytes_per_s <= profile.dram_bytes_per_s


def test_a_copy_slows_a_processor_by_its_share_of_dram() -> None:
    assert copy_slowdown(80e9, 20e9) == pytest.approx(4 / 3)
    assert copy_slowdown(30e9, 24e9) == 2.0  # never more than measured
    assert copy_slowdown(10e9, 20e9) == 2.0


def test_hardware_loads_by_name_or_file(tmp_path) -> None:
    assert load_hardware("t4") is PRESETS["t4"]
    file = tmp_path / "mine.json"
    file.write_text(machine().to_json())
    assert load_hardware(str(file)) == machine()


def test_unknown_hardware_is_an_error_that_lists_the_presets(tmp_path) -> None:
    with pytest.raises(UserError, match=r"'rtx-9999' is neither a preset \(demo, t4, .*h100\) nor a file"):
        load_hardware("rtx-9999")
    for content in (b"not json", b"\xff\xfe", b"{}"):
        file = tmp_path / "broken.json"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.json"):
            load_hardware(str(file))
