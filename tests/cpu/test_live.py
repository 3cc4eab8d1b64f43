"""Promise: requests may come and go while passes run; each gets what it would get alone, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import NUM_TOKENS, PROMPTS, SavedModel
from twinpilots import LLM, SamplingParams
from twinpilots.errors import LimitError
from twinpilots.plan.workload import Workload

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def model(zoo_model: Any) -> SavedModel:
    saved: SavedModel = zoo_model("qwen3")
    return saved


@pytest.fixture(scope="module")
def llm(model: SavedModel) -> Iterator[LLM]:
    with LLM(str(model.path), device="cpu", max_num_seqs=4) as opened:
        yield opened


def test_requests_join_and_leave_while_others_run(llm: LLM, model: SavedModel) -> None:
    found: dict[str, Any] = {}
    with llm.open_engine() as engine:
        assert engine.step() == []
        engine.add("0", PROMPTS[0], GREEDY)
        engine.step()
        engine.add("gone", [1, 2, 3], GREEDY)
        engine.add("1", PROMPTS[1], GREEDY)
        engine.step()
        gone = engine.abort("gone")
        assert gone is not None and gone.outputs[0].finish_reason == "abort" and engine.abort("gone") is None
        engine.add("2", PROMPTS[2], GREEDY)
        assert engine.num_unfinished == 3 and engine.num_running + engine.num_waiting == 3
        while engine.num_unfinished:
            found |= {output.request_id: output.outputs[0].token_ids for output in engine.step(partial=False)}
        pages = engine.stats()["pages"]["host"]
        assert pages["free"] == pages["total"] > 0
    model.assert_tokens([found[str(number)] for number in range(3)])


def test_what_is_in_flight_at_the_end_is_aborted(llm: LLM, model: SavedModel) -> None:
    with pytest.raises(ZeroDivisionError):
        with llm.open_engine() as engine:
            engine.add("0", PROMPTS[0], GREEDY)
            engine.step()
            raise ZeroDivisionError
    assert engine.num_unfinished == 0
    model.assert_tokens([output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])


def test_another_plan_is_fitted_only_when_nothing_is_in_flight(llm: LLM) -> None:
    small, hopeless = (Workload(num_requests=1, input_len=length, output_len=length, max_num_seqs=1) for length in (4, 50_000))
    with llm.open_engine() as engine:
        assert engine.fits(40, 40) and engine.fits(40, None) and not engine.fits(96, None)
        engine.add("0", PROMPTS[0], GREEDY)
        with pytest.raises(RuntimeError, match="1 requests are in flight"):
            engine.fit(small, 8)
        engine.abort("0")
        with pytest.raises(LimitError):
            engine.fit(hopeless, 100_000)
        engine.fit(small, 8)
        engine.add("0", PROMPTS[0], GREEDY)
        assert engine.step()
