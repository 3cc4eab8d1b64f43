"""A plan change is logged with its reason, and neither stats nor a trace loses what ran before it."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import PROMPTS
from twinpilots import LLM, SamplingParams
from twinpilots.adaptation import Change
from twinpilots.online import PassDone, PassPrediction

FIRST_LEN = 16  # tokens of the prompt and of the output that the first plan is made for: too short for what comes


def test_a_longer_request_changes_the_plan_and_says_why(
    zoo_model: Any, balanced_machine: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("twinpilots.planner.DEFAULT_LEN", FIRST_LEN)
    params = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    with LLM(str(zoo_model("qwen3").path), device="cpu", max_num_seqs=2) as llm, caplog.at_level(logging.INFO, "twinpilots"):
        with llm.trace(tmp_path / "trace.json"):
            llm.generate([[5]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True), use_tqdm=False)
            assert llm.stats()["plan_changes"] == 0
            llm.generate([PROMPTS[0]], params, use_tqdm=False)
        stats = llm.stats()
    (message,) = [record.getMessage() for record in caplog.records if "plan changed" in record.getMessage()]
    assert message.startswith("plan changed for 1 requests of ") and "the present plan cannot hold it; predicted" in message and "of loading" in message
    assert f"longest sequence {2 * FIRST_LEN} -> " in message
    assert stats["plan_changes"] == 1 and stats["tokens"]["generated"] == 27
    assert stats["predicted_busy_s"]["cpu"] > 0 and stats["predicted_busy_s"]["gpu"] == stats["predicted_busy_s"]["link"] == 0.0
    passes = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event.get("cat") == "pass"]
    assert sum(event["args"]["generated"] for event in passes if event["tid"] == 1) == 27


def test_one_trace_at_a_time_and_none_after_it(zoo_model: Any, balanced_machine: None, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    with LLM(str(zoo_model("qwen3").path), device="cpu", max_num_seqs=2) as llm:
        with llm.trace(tmp_path / "one.json"):
            llm.generate([[5]], params, use_tqdm=False)
            with pytest.raises(RuntimeError, match="traced already"), llm.trace(tmp_path / "two.json"):
                pass
        before = (tmp_path / "one.json").read_bytes()
        llm.generate([[5]], params, use_tqdm=False)
    assert (tmp_path / "one.json").read_bytes() == before and not (tmp_path / "two.json").exists()


def test_no_pass_waits_for_a_simulation(zoo_model: Any, balanced_machine: None) -> None:
    """Loads of all kinds come and go: what they are predicted to take was simulated when the model was loaded."""
    model = zoo_model("llama")
    with LLM(str(model.path), device="cpu", max_num_seqs=4, unit_rows=8) as llm:
        online = llm._planner.online
        llm.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
        simulated = online.predictions.num_simulated
        outs = llm.generate(
            [[1, 2, 3 + i] * (i + 1) for i in range(4)], [SamplingParams(max_tokens=2 + 3 * i, temperature=0.0, ignore_eos=True) for i in range(4)]
        )
        stats = llm.stats()
    assert len(outs) == 4
    assert simulated > 0
    assert online.predictions.num_simulated == simulated
    assert stats["tokens_per_s"]["predicted"] > 0


def test_what_a_change_of_plan_takes_is_the_users_time_and_no_passs(zoo_model: Any, balanced_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the new plan's passes look slower than the old one's, and the change is undone."""
    switch_s = 0.5
    seen_s: list[float] = []
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)

    def after_pass(done: PassDone, _prediction: PassPrediction) -> Change | None:
        seen_s.append(done.seconds)
        return Change(plan=replace(llm.plan), reason="a test") if len(seen_s) == 1 else None

    with LLM(str(zoo_model("llama").path), device="cpu", max_num_seqs=1) as llm:
        llm.generate([[5]], params, use_tqdm=False)
        set_plan = llm._open_session.set_plan
        monkeypatch.setattr(llm._planner.online, "after_pass", after_pass)
        monkeypatch.setattr(llm._open_session, "set_plan", lambda *arguments: (time.sleep(switch_s), set_plan(*arguments)))
        before_s = llm.stats()["seconds"]
        for _ in range(2):  # accounting may bring the change when the first prompt is done
            llm.generate([[5]], params, use_tqdm=False)
        stats = llm.stats()
    assert stats["plan_changes"] == 1 and len(seen_s) > 1
    assert max(seen_s) < switch_s < stats["seconds"] - before_s
