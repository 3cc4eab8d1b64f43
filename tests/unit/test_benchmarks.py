"""Benchmarks: the arithmetic of rounds, the order of turns, and the pipe to a contender's process."""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import pytest

from twinpilots.benchmarks import throughput
from twinpilots.benchmarks.contender import Contender, Run, serve
from twinpilots.benchmarks.summary import best_other, bootstrap_lower_bound, compare
from twinpilots.demo import Result, results_table
from twinpilots.errors import UserError

STATS: dict[str, Any] = {
    "device": "emulated:demo", "emulated": True, "seconds": 2.0, "busy_s": {"cpu": 1.0, "gpu": 1.5, "link": 0.5},
    "tokens_per_s": {"measured": 10.0, "predicted": 11.0, "plan_bound": 12.0, "hardware_bound": 20.0},
}  # fmt: skip


def test_ratios_are_of_paired_rounds() -> None:
    # The machine halves its speed in round 2: the ratio of medians would be 2.0, each round's ratio is 1.5.
    ratio = compare([30.0, 15.0, 30.0], [20.0, 10.0, 20.0])
    assert ratio.rounds == (1.5, 1.5, 1.5)
    assert ratio.median == ratio.lower_bound == 1.5


def test_the_lower_bound_is_below_the_median_and_above_the_worst() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
    bound = bootstrap_lower_bound(values)
    assert min(values) <= bound < 1.3
    assert bound == bootstrap_lower_bound(values), "the same rounds give the same bound"


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_bad_rounds_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError):
        compare(ours, theirs)


def test_the_best_other() -> None:
    assert best_other({"auto": 3.0, "cpu": 2.0, "stream": 1.0}, "auto") == "cpu"
    assert best_other({"auto": 3.0}, "auto") is None


def test_turns_alternate_and_prompts_repeat() -> None:
    standings = [throughput.Standing(policy=policy) for policy in ("a", "b")]
    assert [[standing.policy for standing in throughput.turn(standings, number)] for number in (0, 1)] == [["a", "b"], ["b", "a"]]
    assert throughput.prompts(2, 5) == throughput.prompts(2, 5)
    assert [len(prompt) for prompt in throughput.prompts(2, 5)] == [5, 5]


def test_the_document_and_its_table() -> None:
    def runs(*seconds: float) -> list[Run]:
        return [Run(seconds=value, generated=60, stats=STATS) for value in seconds]

    standings = [
        throughput.Standing(policy="stream", runs=runs(4.0, 6.0, 4.0)),
        throughput.Standing(policy="auto", runs=runs(2.0, 3.0, 2.0)),
        throughput.Standing(policy="resident", reason="needs 200 MiB"),
    ]
    args = argparse.Namespace(model="toy", num_prompts=2, input_len=3, output_len=30, rounds=3)
    document = throughput.summarize(args, standings, _profile())
    assert json.loads(json.dumps(document)) == document | {"ratios": {"stream": {"median": 2.0, "lower_bound": 2.0, "rounds": [2.0, 2.0, 2.0]}}}
    assert (document["reference"], document["best_other"]) == ("auto", "stream")
    assert document["contenders"]["auto"]["median_tokens_per_s"] == 30.0
    assert document["contenders"]["resident"]["reason"] == "needs 200 MiB"
    text = throughput.document_text(document)
    assert "emulated GPU" in text
    assert "resident: needs 200 MiB" in text
    assert "2.000, at least 2.000 with 95 % confidence" in text
    assert throughput.limits_text(_profile()).startswith("limits")


def _profile() -> Any:
    from twinpilots.hardware.presets import load_hardware

    return load_hardware("demo")


def test_a_contender_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match="/no/such/model"):
        Contender({"model": "/no/such/model"}, [[1]], 1)


def test_the_childs_end_reports_whatever_happens() -> None:
    replies = io.StringIO()
    serve(io.StringIO("{}\n"), replies)
    assert json.loads(replies.getvalue())["user"] is False


def test_the_demos_table_compares_with_the_best_single_device_policy() -> None:
    def result(policy: str, measured: float) -> Result:
        return Result(policy=policy, stats=STATS | {"tokens_per_s": STATS["tokens_per_s"] | {"measured": measured, "predicted": None}}, texts=())

    lines = results_table([result("stream", 10.0), result("cpu", 20.0), result("auto", 30.0)]).splitlines()
    assert "1.50x" in lines[3]
    assert "1.0 s (50 %)" in lines[3]
    assert lines[3].split()[:3] == ["auto", "30.0", "-"]
