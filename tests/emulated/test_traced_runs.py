"""Traces of real runs, by the real command line: valid, ordered in every row, adding up to what stats() says, with the prediction beside the measurement."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.emulated
MODEL, NUM_LAYERS = "smollm2-135m", 30
TASK_CATEGORIES = ("compute", "link", "embed")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "twinpilots", *arguments], capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(stats, trace) of a generation under a policy that uses both devices and streams."""
    folder = tmp_path_factory.mktemp("traced")
    prompts, trace = folder / "prompts.jsonl", folder / "trace.json"
    prompts.write_text('{"prompt": [5, 6, 7, 8]}\n{"prompt": [9, 10]}\n')
    done = run_cli(
        "generate", MODEL, "--prompts-file", str(prompts), "--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--device", "emulated:demo",
        "--policy", "hetegen", "--json", "--trace", str(trace),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["stats"], json.loads(trace.read_text())


def rows_of(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    return rows


def process(trace: dict[str, Any], name: str) -> int:
    return next(event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name" and event["args"]["name"] == name)


def test_events_of_a_row_follow_one_another(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    rows = rows_of(traced[1])
    for row in rows.values():
        assert all(event["dur"] >= 0 for event in row)
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in zip(row, row[1:], strict=False))


def test_durations_add_up_to_what_stats_says(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stats, trace = traced
    predicted = {process(trace, "CPU, predicted"), process(trace, "GPU (emulated), predicted")}
    tasks = [event for row in rows_of(trace).values() for event in row if event["cat"] in TASK_CATEGORIES]

    def seconds(events: list[dict[str, Any]]) -> float:
        return sum(event["dur"] for event in events) * 1e-6

    for measured, busy_s in ((True, stats["busy_s"]), (False, stats["predicted_busy_s"])):
        chosen = [event for event in tasks if (event["pid"] in predicted) != measured]
        side = "measured" if measured else "predicted"
        for name, shown in (("cpu", f"CPU, {side}"), ("gpu", f"GPU (emulated), {side}")):
            mine = [event for event in chosen if event["cat"] == "compute" and event["pid"] == process(trace, shown)]
            assert seconds(mine) == pytest.approx(busy_s[name], rel=0.01 if measured else 0.15, abs=1e-6 * len(mine))
        link = [event for event in chosen if event["cat"] == "link"]
        assert link and seconds(link) == pytest.approx(busy_s["link"], rel=0.01 if measured else 0.15, abs=1e-6 * len(link))


def test_every_pass_is_there_measured_and_predicted(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stats, trace = traced
    driver = process(trace, "driver: passes")
    measured, predicted = rows_of(trace)[driver, 1], rows_of(trace)[driver, 2]
    assert [event["args"]["pass"] for event in measured] == [event["args"]["pass"] for event in predicted] == list(range(len(measured)))
    assert sum(event["args"]["generated"] for event in measured) == stats["tokens"]["generated"] == 12
    assert sum(event["args"]["prompt_tokens"] for event in measured) == stats["tokens"]["prompt"] == 6
    assert sum(event["dur"] for event in measured) * 1e-6 == pytest.approx(stats["seconds"], rel=1e-3)
    assert trace["otherData"]["passes"] == trace["otherData"]["passes_kept"] == len(measured)


def test_tasks_say_what_they_are(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    tasks = [event for row in rows_of(traced[1]).values() for event in row if event["cat"] in TASK_CATEGORIES]
    assert all({"pass", "layer", "op", "kind", "tokens"} <= set(event["args"]) for event in tasks)
    linears = [event for event in tasks if event["args"]["op"] == "gate_up_proj"]
    assert {event["args"]["tokens"] for event in linears} >= {2, 6} and {event["args"]["layer"] for event in linears} == set(range(NUM_LAYERS))
    waits = [event for row in rows_of(traced[1]).values() for event in row if event["cat"] == "wait"]
    assert waits and any(event["args"]["for"].startswith("RAW") for event in waits)


def test_the_link_counter_ends_at_the_bytes_moved(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    stats, trace = traced
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert all(a["ts"] <= b["ts"] for a, b in zip(counters, counters[1:], strict=False))
    assert counters[-1]["args"] == {kind: stats["bytes"][f"link_{kind}"] for kind in ("activations", "kv", "weights")}
    assert counters[-1]["args"]["weights"] > 0


def test_a_trace_that_cannot_be_written_is_refused_before_loading(tmp_path: Path) -> None:
    done = run_cli("generate", str(tmp_path / "missing"), "--prompt", "x", "--trace", str(tmp_path / "nowhere" / "t.json"))
    assert done.returncode == 2
    assert "--trace" in done.stderr and "nowhere" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_contenders_of_a_benchmark_share_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = run_cli(
        "bench", "throughput", MODEL, "--policies", "stream,cpu", "--device", "emulated:demo", "--rounds", "2", "--num-prompts", "2", "--input-len", "8",
        "--output-len", "8", "--trace", str(path), "--trace-passes", "4", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trace = json.loads(path.read_text())
    for policy in ("stream", "cpu"):
        passes = rows_of(trace)[process(trace, f"{policy}: driver: passes"), 1]
        assert [event["args"]["pass"] for event in passes] == [0, 5, 6, 7], "the last round's first pass and its last ones"
