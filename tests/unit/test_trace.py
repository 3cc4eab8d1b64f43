"""Traces: which passes are kept, a file that appears whole or not at all, rows that do not overlap. Real runs are in tests/emulated/test_traced_runs.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.planning import DEMO, llama, memory_of, workload
from twinpilots.errors import UserError
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.solver import solve
from twinpilots.runtime.stats import PassTimes, QueueTimes
from twinpilots.trace import Event, Recorder, TracedPass, check_writable, read_events, trace_events, write_trace


@pytest.fixture(scope="module")
def one() -> TracedPass:
    """A decode pass that ran exactly as simulated, 7 us of waiting before every task."""
    spec = llama()
    found = solve(spec, DEMO, workload(4, 32, 8), memory_of(DEMO), policy="hetegen", compare=False)
    priced = found.price.passes[-1]
    schedule = expand(spec, found.plan, priced.bucket, priced.load.shape)
    timing = simulate(schedule, spec, found.plan, DEMO, priced.load, keep_timeline=True)
    queues = {}
    for queue in {task.queue for task in schedule.tasks}:
        ends = [(int(1e9 * (1 + entry.start_s)), int(1e9 * (1 + entry.end_s))) for entry in timing.timeline if entry.queue == queue]
        times = np.array([(start - 7000, start, end) for start, end in ends], np.int64)
        queues[queue] = QueueTimes(times=times, rows=np.full(len(times), 4), num_bytes=np.full(len(times), 100))
    return TracedPass(
        number=0, began_ns=10**9, ended_ns=10**9 + int(1e9 * timing.seconds), num_prompt_tokens=0, num_generated=4, predicted_s=timing.seconds,
        times=PassTimes(schedule=schedule, queues=queues), plan=found.plan, bucket=priced.bucket, load=priced.load, profile=DEMO,
    )  # fmt: skip


def recorded(one: TracedPass, count: int, num_passes: int) -> Recorder:
    recorder = Recorder(num_passes=num_passes)
    for _ in range(count):
        recorder.add(lambda number: replace(one, number=number))
    return recorder


def test_the_first_quarter_and_the_last_passes_are_kept(one: TracedPass) -> None:
    assert [each.number for each in recorded(one, 100, 8).passes] == [0, 1, 94, 95, 96, 97, 98, 99]
    assert [each.number for each in recorded(one, 3, 8).passes] == [0, 1, 2]
    assert [each.number for each in recorded(one, 5, 1).passes] == [0]


def test_a_pass_that_ran_as_predicted_looks_the_same_on_both_sides(one: TracedPass) -> None:
    events = list(trace_events(llama(), recorded(one, 1, 4)))
    spans = [event for event in events if event["ph"] == "X" and event["cat"] not in ("wait", "pass")]
    measured, predicted = ([event for event in spans if (event["pid"] > 3) == side] for side in (False, True))
    assert len(measured) == len(predicted) == len(one.times.schedule.tasks)
    assert [event["name"] for event in sorted(measured, key=lambda e: e["ts"])] == [event["name"] for event in sorted(predicted, key=lambda e: e["ts"])]
    assert sum(event["dur"] for event in measured) == pytest.approx(sum(event["dur"] for event in predicted), rel=1e-3)


def test_passes_that_took_less_than_predicted_do_not_overlap_in_the_predicted_rows(one: TracedPass) -> None:
    """All ten begin at the same measured time: the predicted ones follow one another all the same."""
    rows: dict[tuple[int, int], list[Event]] = {}
    for event in trace_events(llama(), recorded(one, 10, 10)):
        if event["ph"] == "X" and (event["pid"] > 3 or (event["pid"], event["tid"]) == (1, 2)):
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    assert len(rows[1, 2]) == 10
    for row in rows.values():
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in zip(row, row[1:], strict=False))


def test_contenders_have_processes_of_their_own(one: TracedPass) -> None:
    first, second = (list(trace_events(llama(), recorded(one, 1, 4), label=name, contender=i)) for i, name in enumerate(("auto", "stream")))
    assert {event["pid"] for event in first} & {event["pid"] for event in second} == set()
    names = [event["args"]["name"] for event in second if event["name"] == "process_name"]
    assert names and all(name.startswith("stream: ") for name in names)


def test_a_file_comes_back_and_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    events: list[Event] = [{"ph": "M", "name": 'a "quoted" name', "args": {}}, {"ph": "X", "ts": 1.5}]

    def broken() -> Iterator[Event]:
        yield events[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trace(path, broken(), {})
    assert list(tmp_path.iterdir()) == []
    write_trace(path, events, {"model": "toy"})
    assert json.loads(path.read_text())["traceEvents"] == events == list(read_events(path))
    write_trace(path, [], {})
    assert json.loads(path.read_text())["traceEvents"] == [] and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []
    for bad in (tmp_path, tmp_path / "nowhere" / "trace.json"):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(bad)
