"""The benchmark's worker on the emulated GPU: points of several plans over one host memory, decoding after prompts that were never computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks import gpu_cases
from benchmarks.gpu_cases import FamilyTask, run_family
from benchmarks.gpu_points import MIB, Point
from twinpilots.hardware.presets import PRESETS


def test_engines_of_several_plans_follow_one_another_over_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "stored_profile", lambda device, spec: PRESETS["demo"])  # nothing is judged here: no need to measure
    monkeypatch.setattr(gpu_cases, "num_runs", lambda policy, pass_s, limit_s: (1, 3))
    model: dict[str, Any] = {"model": "dummy:smollm2-135m", "quantization": None, "gpu_memory": 24 * MIB}
    points = [Point(**model, kind="decode", num_seqs=3, context=40), Point(**model, kind="prefill", num_seqs=1, context=24)]
    events: list[Mapping[str, Any]] = []
    task = FamilyTask(
        device="emulated:demo", points=[asdict(point) for point in points], budget_s=60.0,
        cases=[(0, "stream"), (0, "auto"), (1, "stream"), (0, "resident")],
    )  # fmt: skip
    run_family(task, events.append)
    rates, *rest = [event for event in events if event["event"] != "begin"]
    assert rates["rates"]["dram_bytes_per_s"] >= rates["rates"]["cpu_read_bytes_per_s"]
    stream, auto, prefill, resident = rest
    assert [case["ok"] for case in rest] == [True, True, True, None], rest
    assert "resident needs at least" in resident["detail"]
    for case, tokens in ((stream, 9), (auto, 9), (prefill, 2 * 24)):
        found = case["figures"]
        assert found["finite"] and found["tokens"] == tokens and found["footprint_bytes"] <= found["gpu_memory"] == 24 * MIB
        assert found["tokens_per_s"] > 0 and found["hardware_bound"] >= found["plan_bound"] > 0 and found["predicted"] > 0
        assert 0 <= found["driver_frac"] < 1
    assert stream["figures"]["bytes"]["link_weights"] > auto["figures"]["bytes"]["link_weights"], "each under its own plan"
    assert stream["figures"]["num_seqs"] == 3 and stream["figures"]["passes"] == 3
