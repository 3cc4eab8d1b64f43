"""Promise: chaining decoding passes changes nothing that a user sees, but how often the driver is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpu.native_twin import native
from tests.hand_plans import random_plan
from tests.harness import PROMPTS, Rig, SavedModel
from twinpilots import LLM, SamplingParams
from twinpilots.errors import NotFiniteError
from twinpilots.plan import driver
from twinpilots.plan.plan import Plan
from twinpilots.runtime.weights import OFFSET_MASK
from twinpilots.trace import PREDICTED

MOST = 16
Requests = Mapping[str, tuple[int, list[int], SamplingParams]]  # by name: (arrives when so many tokens are there in all, prompt, params)
Found = dict[str, tuple[tuple[int, ...], str | None, Any]]


@pytest.fixture(scope="module")
def model(zoo_model: Any) -> SavedModel:
    native()  # without it nothing is chained
    saved: SavedModel = zoo_model("qwen3")
    return saved


def cpu_plan(model: SavedModel, **overrides: Any) -> Plan:
    return random_plan(model.spec, 3, gpu=False, **({"page_size": 16, "host_pages": 40} | overrides))


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **({"ignore_eos": True} | options))


def play(rig: Rig, requests: Requests) -> Found:
    """Every request's tokens and why it ended."""
    found: Found = {}
    counts: dict[str, int] = {}
    left = dict(requests)
    while left or rig.engine.has_unfinished():
        for name, (arrives, prompt, params) in tuple(left.items()):
            if arrives <= sum(counts.values()) or not rig.engine.has_unfinished():
                rig.engine.add_request(name, prompt, params)
                del left[name]
        for output in rig.engine.step():
            one = output.outputs[0]
            assert len(one.token_ids) > counts.get(output.request_id, 0), "an output without anything new"
            counts[output.request_id] = len(one.token_ids)
            found[output.request_id] = one.token_ids, one.finish_reason, one.stop_reason
        rig.engine.check_integrity()
    return found


def chained_and_not(model: SavedModel, plan: Plan, requests: Requests, growth_tokens: int = 256) -> tuple[Rig, Found]:
    """The same of both, and the rig that chained."""
    with Rig(model.path, plan, growth_tokens=growth_tokens) as rig:
        single = play(rig, requests)
        assert not rig.chains
    with Rig(model.path, plan, growth_tokens=growth_tokens, most_passes=MOST) as rig:
        assert play(rig, requests) == single
        assert max(rig.chains) > 1
    return rig, single


def mixed(model: SavedModel) -> Requests:
    """Requests that come at any time, and what may not be chained among them."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, model.spec.vocab_size, int(rng.integers(1, 20))).tolist() for _ in range(10)]
    return {
        str(number): (int(number * rng.integers(0, 9)), prompt, greedy(int(rng.integers(1, 40)))) for number, prompt in enumerate(prompts)
    } | {
        "drawn": (30, [1, 2, 3], SamplingParams(seed=1, max_tokens=30, ignore_eos=True)), "told": (60, [5, 6], greedy(7, logprobs=1)),
        "few": (20, [9, 8], SamplingParams(seed=2, max_tokens=25, temperature=1.4, top_k=30, top_p=0.9, min_p=0.01, ignore_eos=True)),
    }  # fmt: skip


def test_tokens_are_the_same_with_arrivals_and_page_boundaries_alone_and_in_a_batch(model: SavedModel) -> None:
    requests = mixed(model)
    rig, together = chained_and_not(model, cpu_plan(model), requests)
    assert rig.scheduler.num_preemptions == 0
    for name in ("2", "drawn", "few"):
        _, prompt, params = requests[name]
        rig, alone = chained_and_not(model, cpu_plan(model), {name: (0, prompt, params)})
        assert alone[name] == together[name] and sum(rig.chains) == params.max_tokens - 1


@pytest.mark.parametrize("plan", [{"host_pages": 7}, {"kv_dtype": "int8"}, {"page_size": 4, "host_pages": 30}], ids=["few pages", "int8", "small pages"])
def test_tokens_are_the_same_under_pressure_and_with_codes(model: SavedModel, plan: dict[str, Any]) -> None:
    rig, _ = chained_and_not(model, cpu_plan(model, **plan), mixed(model), growth_tokens=0)
    assert "host_pages" not in plan or rig.scheduler.num_preemptions > 0, "pages never ran out"


def test_a_sequence_that_stops_in_a_chain_ends_there_and_its_place_is_free(model: SavedModel) -> None:
    with Rig(model.path, cpu_plan(model)) as rig:
        tokens = play(rig, {"a": (0, PROMPTS[0], greedy(40))})["a"][0]
    place = next(i for i in range(5, 40) if tokens[i] not in tokens[:i])
    drawn = SamplingParams(seed=3, max_tokens=40, ignore_eos=True)  # the numbers that a chain did not use are used by the next one
    requests = {"a": (0, PROMPTS[0], greedy(40, stop_token_ids=[tokens[place]])), "b": (0, PROMPTS[2], drawn), "c": (0, PROMPTS[1], greedy(3))}
    rig, found = chained_and_not(model, cpu_plan(model, max_num_seqs=2), requests)
    assert found["a"] == (tokens[: place + 1], "stop", tokens[place])
    assert len(found["b"][0]) == 40 and len(found["c"][0]) == 3


def test_prefixes_that_chains_computed_are_shared(model: SavedModel) -> None:
    with Rig(model.path, cpu_plan(model), most_passes=MOST) as rig:
        first = play(rig, {"a": (0, PROMPTS[0], greedy(40))})["a"][0]
        again = PROMPTS[0] + list(first[:30])
        rest = play(rig, {"b": (0, again, greedy(10))})["b"][0]
        assert rest == first[30:40] and rig.kv.counts.hit_tokens == 32, "two full pages, one of them all of chained tokens"


def test_logits_that_are_not_finite_are_an_error_after_the_tokens_before_them(model: SavedModel) -> None:
    bad = len(PROMPTS[0]) + 10  # a position that is reached within a chain
    with Rig(model.path, cpu_plan(model), most_passes=MOST) as rig:
        where = rig.executor.host_layout.small["rope0.cos"] & OFFSET_MASK
        half = model.spec.ropes[0].rotary_dim // 2
        rig.executor.host.view(where + 4 * half * bad, np.float32, (half,))[:] = np.nan
        rig.engine.add_request("a", PROMPTS[0], greedy(40))
        outputs = []
        with pytest.raises(NotFiniteError, match=f"request a at position {bad} "):
            while rig.engine.has_unfinished():
                outputs += rig.engine.step()
        assert rig.chains == [10, 0], "the first token comes alone; ten more, and then nothing"
        rig.engine.check_integrity()
    assert len(outputs[-1].outputs[0].token_ids) == 11


def test_who_is_in_a_hurry_waits_for_one_pass(model: SavedModel) -> None:
    with Rig(model.path, cpu_plan(model), most_passes=MOST) as rig:
        rig.engine.add_request("a", PROMPTS[0], greedy(60))
        rig.engine.step()
        rig.executor.hurry()
        for _ in range(2):
            rig.engine.step()
        assert rig.chains == [1, MOST]


def test_a_word_to_a_live_engine_ends_the_chain(model: SavedModel) -> None:
    with LLM(str(model.path), device="cpu", max_num_seqs=4) as llm, llm.open_engine() as engine:
        engine.hurry()  # nobody drives yet
        engine.add("a", PROMPTS[0], greedy(40))
        engine.step()
        engine.hurry()
        engine.step()
        assert engine.session.engine.last_passes == 1
        while engine.num_unfinished:
            engine.step()
        assert engine.session.engine.last_passes > 1


def test_a_chain_is_as_long_as_a_tenth_of_a_second_allows() -> None:
    assert [driver.most_passes(seconds) for seconds in (0.0001, 0.008, 0.02, 0.06, 3.0)] == [16, 12, 5, 1, 1]


@pytest.fixture(scope="module")
def traced(model: SavedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Stats and trace events, by the passes that a chain may have."""
    found = {}
    for most in (1, MOST):
        path: Path = tmp_path_factory.mktemp("trace") / "trace.json"
        with pytest.MonkeyPatch.context() as patch, LLM(str(model.path), device="cpu", max_num_seqs=4) as llm:
            patch.setattr(driver, "MOST_PASSES", most)
            with llm.trace(path):
                llm.generate(PROMPTS, greedy(30), use_tqdm=False)
            stats = llm.stats() | {"passes": llm._open_session.stats.passes, "most": llm._open_session.engine.last_passes}
            found[most] = stats, json.loads(path.read_text())["traceEvents"]
    return found


def test_stats_count_every_pass_of_a_chain(traced: Any) -> None:
    single, chained = (traced[most][0] for most in (1, MOST))
    assert chained["most"] > 1 == single["most"]
    for name in ("tokens", "bytes", "passes", "weights_frac"):
        assert chained[name] == single[name]
    assert 0 < chained["busy_s"]["cpu"] < chained["seconds"]
    assert chained["tokens_per_s"]["predicted"] is not None


def test_a_trace_shows_every_pass_of_a_chain_where_it_was(traced: Any) -> None:
    passes: dict[int, dict[int, tuple[float, float]]] = {}
    for most, (_, events) in traced.items():
        spans = [event for event in events if event["ph"] == "X" and event["cat"] == "pass" and event["tid"] == 1]
        passes[most] = {event["args"]["pass"]: (event["ts"], event["ts"] + event["dur"]) for event in spans}
    assert len(passes[1]) == len(passes[MOST]) == traced[MOST][0]["passes"]
    tasks = [event for event in traced[MOST][1] if event["ph"] == "X" and "layer" in event["args"] and event["pid"] < PREDICTED]
    assert {event["args"]["pass"] for event in tasks} == set(passes[MOST])
    for event in tasks:
        begin, end = passes[MOST][event["args"]["pass"]]
        assert begin - 0.002 <= event["ts"] and event["ts"] + event["dur"] <= end + 0.002  # written with three digits
    ends = [end for _, end in sorted(passes[MOST].items())]
    assert all(later[0] >= earlier[1] - 0.002 for earlier, later in zip(ends, ends[1:], strict=False))
