"""Promise: a long prompt does not hold up those who are being answered, and gets on all the same."""

from __future__ import annotations

from dataclasses import replace

from tests.toy import alone, run_all, toy_engine, toy_plan
from twinpilots.request import SamplingParams
from twinpilots.server.pacing import FIRST_TOKENS, LEAST_TOKENS, MOST_RATIO, Pacer


def settled(decode_s: float, token_s: float) -> Pacer:
    pacer = Pacer()
    for _ in range(40):
        pacer.observe(decode_s, 0, 8)
        pacer.observe(decode_s + 100 * token_s, 100, 8)
    return pacer


def test_a_mixed_pass_takes_about_so_many_times_a_decoding_one() -> None:
    assert settled(0.050, 0.001).prompt_tokens == (MOST_RATIO - 1) * 50
    assert settled(2.0, 0.001).prompt_tokens == (MOST_RATIO - 1) * 2000  # weights stream: a pass is long whatever it holds


def test_many_who_wait_for_a_first_token_outweigh_a_few_who_wait_for_a_next_one() -> None:
    pacer = settled(0.050, 0.001)
    assert [pacer.budget(*counts) for counts in ((1, 8), (8, 8), (24, 8), (31, 1))] == [75, 75, 225, 2325]


def test_a_prompt_always_gets_on_and_the_beginning_is_careful() -> None:
    assert settled(0.001, 0.01).prompt_tokens == LEAST_TOKENS
    assert Pacer().prompt_tokens == FIRST_TOKENS
    assert settled(0.05, 0.0).prompt_tokens > 100_000


def test_the_scheduler_keeps_to_the_budget_while_others_decode_and_the_tokens_are_the_same() -> None:
    engine = toy_engine(replace(toy_plan(), gpu_pages=16))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add_request("first", [1, 2, 3], params)
    engine.step()
    engine.scheduler.prompt_budget = 2
    engine.add_request("second", list(range(1, 12)), params)
    sizes = []
    done = {}
    while engine.has_unfinished():
        done.update({output.request_id: output for output in engine.step() if output.finished})
        sizes.append(sum(item.num_tokens for item in engine.executor.batches[-1].items if item.is_chunk))  # type: ignore[attr-defined]
        engine.check_integrity()
    assert max(sizes) == 2 and sum(sizes) >= 10
    for name, prompt in (("first", [1, 2, 3]), ("second", list(range(1, 12)))):
        assert done[name].outputs[0].token_ids == alone(prompt, params).outputs[0].token_ids
    engine.add_request("alone", list(range(1, 12)), params)
    run_all(engine)
