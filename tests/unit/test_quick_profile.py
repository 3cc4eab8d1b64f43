"""The quick measurement keeps to its time: everything is measured once, then again while there is time, and who waits for it is told how long it took."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import pytest

from benchmarks.hidden_devices import HiddenDevices
from benchmarks.hidden_machine import random_machine
from tests.planning import llama
from twinpilots import profiling, rehearsal
from twinpilots.hardware import measure as measuring
from twinpilots.hardware.bench import MOST_RUNS, in_rounds
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.model.spec import ModelSpec
from twinpilots.online import PassDone


@dataclass
class Experiment:
    """Takes a second of a clock of its own, and says which run it is."""

    clock: Clock
    runs: int = 0

    def __call__(self) -> float:
        self.clock.now_s += 1.0
        self.runs += 1
        return float(self.runs)


@dataclass
class Clock:
    now_s: float = 0.0
    experiments: dict[str, Experiment] = field(default_factory=dict)

    def __call__(self) -> float:
        return self.now_s

    def rounds(self, until_s: float, *, least: int = 1, before: dict[str, float] | None = None) -> list[int]:
        self.experiments = {name: Experiment(self) for name in "abc"}
        in_rounds(self.experiments, until_s, self, least=least, before=before or {})
        return [each.runs for each in self.experiments.values()]


def test_each_experiment_runs_as_often_as_it_must_and_then_while_time_lasts() -> None:
    assert Clock().rounds(0.0) == [1, 1, 1]
    assert Clock().rounds(0.0, least=2) == [2, 2, 2]
    assert Clock().rounds(4.0) == [2, 1, 1], "time is up within a round"
    assert Clock().rounds(1e9) == [MOST_RUNS] * 3


def test_a_run_that_was_made_before_counts() -> None:
    assert Clock().rounds(0.0, before={"a": 5.0}) == [0, 1, 1]
    assert in_rounds({"a": lambda: 1.0}, 0.0, Clock(), least=1, before={"a": 5.0}) == {"a": 5.0}


def test_a_machine_is_measured_in_less_time_when_less_is_left_and_no_less_of_it() -> None:
    took_s, found = [], list[HardwareProfile]()
    for share_s in (0.0, math.inf):
        devices = HiddenDevices(random_machine(7, 0), 1 << 30, 7)
        spec = dummy_spec("llama-3-8b")  # few instructions go through all memory
        until_s = devices.clock() + share_s
        found.append(measuring.measure(devices, devices.gpu, spec, quick=True, peaks=devices.peaks, clock=devices.clock, until_s=until_s))
        took_s.append(devices.clock())
    assert took_s[0] < 0.9 * took_s[1]
    hurried, patient = found
    assert hurried.gpu is not None and patient.gpu is not None and hurried.link is not None
    assert hurried.cpu.linear.keys() == patient.cpu.linear.keys() and hurried.gpu.kv_attention.keys() == patient.gpu.kv_attention.keys()
    assert hurried.cpu.linear["bf16/out"](1) == pytest.approx(patient.cpu.linear["bf16/out"](1), rel=0.3)


def test_a_rehearsal_without_time_is_the_shortest_that_shows_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[PassDone]()
    kept = rehearsal.corrected

    def corrected(spec: ModelSpec, profile: HardwareProfile, passes: list[PassDone]) -> HardwareProfile:
        seen[:] = passes
        return kept(spec, profile, passes)

    monkeypatch.setattr(rehearsal, "corrected", corrected)
    spec = llama(hidden=128, intermediate=320, vocab=256)
    profile = replace(PRESETS["demo"], gpu=None, link=None, gpu_memory_bytes=0, step_overhead_s=0.0, step_seq_s=0.0)
    found = rehearsal.rehearse("cpu", 1, spec, profile, quick=True, until_s=0.0)
    assert {done.load.num_seqs for done in seen if done.bucket.phase == "decode"} == {1, 4}
    assert found.alone is not None and found.alone.step_s(1, 1) > 20e-6
    rehearsal.rehearse("cpu", 1, spec, profile, quick=True)
    assert 16 in {done.load.num_seqs for done in seen if done.bucket.phase == "decode"}


def test_a_quick_measurement_has_a_deadline_and_a_full_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    until: dict[str, float] = {}

    def measure(*_: object, until_s: float, **__: object) -> HardwareProfile:
        until["measure"] = until_s
        return PRESETS["demo"]

    def rehearse(*_: object, until_s: float, **__: object) -> HardwareProfile:
        until["rehearse"] = until_s
        return PRESETS["demo"]

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    began_s = time.perf_counter()
    profiling.measure_machine("cpu", llama(), quick=True, store=False)
    assert began_s < until["measure"] < until["rehearse"] < time.perf_counter() + profiling.QUICK_S
    profiling.measure_machine("cpu", llama(), store=False)
    assert until == {"measure": math.inf, "rehearse": math.inf}


def test_who_had_to_wait_is_told_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*_: object, **__: object) -> HardwareProfile:
        time.sleep(0.25)
        return PRESETS["demo"]

    monkeypatch.setattr(profiling, "stored_profile", lambda *_, **__: None)
    monkeypatch.setattr(profiling, "measure_machine", slowly)
    said = list[str]()
    profiling.load_or_measure("cpu", llama(), tell=said.append)
    assert len(said) == 1 and "quickly, in 0." in said[0] and "twinpilots profile MODEL --device cpu" in said[0]
