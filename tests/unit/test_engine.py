"""Promise: whatever arrives, leaves or runs out of memory, every request gets the tokens it would get alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import VOCAB, LetterTokenizer, ToyExecutor, alone, code, greedy, logits_of, run_all, toy_engine, toy_plan
from twinpilots.errors import LimitError, TwinPilotsError
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams
from twinpilots.runtime.sampler import log_sum_exp

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Every kind of plan, mostly with too little memory."""
    where = draw(st.sampled_from(["gpu", "both", "host", "stream", "cpu-only", "layer-split"]))
    pages = st.integers(8, 24)
    staging = draw(st.integers(8, 14))
    return toy_plan(
        micro_batches=draw(st.integers(1, 4)),
        host_attention="gpu" if where == "stream" else draw(st.sampled_from(["cpu", "gpu"])),
        host_prefill_attention="gpu" if where == "stream" else draw(st.sampled_from(["cpu", "gpu"])),
        uses_gpu=where != "cpu-only",
        uses_cpu=where != "stream",
        gpu_pages=draw(pages) if where in ("gpu", "both", "stream", "layer-split") else 0,
        host_pages=draw(pages) if where in ("both", "host", "stream", "cpu-only") else 0,
        host_kv_layers=(0,) if where == "layer-split" else (),
        kv_staging_pages=staging if where == "stream" else draw(st.sampled_from([0, 3, staging])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_pass_tokens=draw(st.integers(1, 24)),
        max_model_len=32,
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, list[int], SamplingParams, int | None]]:
    """Requests: (arrival step, prompt, params, abort step or None)."""
    requests = []
    for number in range(draw(st.integers(1, 7))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14))
        if requests and draw(st.booleans()):  # begins like an earlier one, often beyond a page or two
            earlier = draw(st.sampled_from(requests))[1]
            prompt = (earlier[: draw(st.integers(1, 14))] + prompt)[:16]  # with 16 more tokens at most the length limit
        params = SamplingParams(
            n=draw(st.sampled_from([1, 1, 2])),
            temperature=draw(st.sampled_from([0.0, 0.8])),
            seed=number,
            max_tokens=draw(st.integers(1, 16)),
            prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        )
        requests.append((draw(st.integers(0, 12)), prompt, params, draw(st.one_of(st.none(), st.none(), st.integers(0, 25)))))
    return requests


@settings(max_examples=120, deadline=None)
@given(plan=plans(), workload=workloads(), growth=st.sampled_from([0, 3, 256]))
def test_random_arrivals_aborts_and_preemptions_never_change_a_token(plan: Plan, workload: list, growth: int) -> None:
    engine = toy_engine(plan, growth_tokens=growth)
    done, aborted, step = {}, set(), 0
    while step < 30 or engine.has_unfinished():
        for number, (arrives, prompt, params, _) in enumerate(workload):
            if arrives == step:
                engine.add_request(str(number), prompt, params)
        for number, (arrives, _, _, aborts) in enumerate(workload):
            if aborts == step and aborts >= arrives and engine.abort(str(number)) is not None:
                aborted.add(str(number))
        done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
        step += 1
        assert step < 3000
    assert set(done) | aborted == {str(number) for number in range(len(workload))}
    assert engine.kv.pools["gpu"].num_free == plan.gpu_pages and engine.kv.pools["host"].num_free == plan.host_pages
    for name, output in done.items():
        _, prompt, params, _ = workload[int(name)]
        expected = alone(prompt, params)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
        assert output.prompt_logprobs == expected.prompt_logprobs


def test_the_toy_model_itself_decodes_greedily() -> None:
    output = alone([5, 17, 9], GREEDY)
    assert list(output.outputs[0].token_ids) == greedy([5, 17, 9], 12)
    assert (output.outputs[0].finish_reason, output.finished, output.prompt_token_ids) == ("length", True, (5, 17, 9))


def test_preemption_happens_when_pages_run_out_and_costs_no_token() -> None:
    engine = toy_engine(toy_plan(gpu_pages=9, host_pages=0, max_model_len=32))
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=20))
    done = run_all(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [list(done[str(i)].outputs[0].token_ids) for i in range(6)] == [greedy(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("prompt_length", [3, 9, 10, 11, 14])
def test_longrope_computes_a_sequence_anew_when_it_outgrows_the_short_table(prompt_length: int) -> None:
    engine = toy_engine(long_after=10)
    prompt = list(range(prompt_length))
    engine.add_request("a", prompt, GREEDY)
    expected = greedy(prompt, 12, long_after=10, long_offset=64)
    assert list(run_all(engine)["a"].outputs[0].token_ids) == expected
    assert expected != greedy(prompt, 12)


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it() -> None:
    tokens = greedy([1, 2], 12)
    text = LetterTokenizer().decode(tokens)
    cut = next(i for i in range(3, len(text) - 2) if text.find(text[i : i + 3]) == i)
    engine = toy_engine(tokenizer=LetterTokenizer())
    engine.add_request("a", [1, 2], SamplingParams(temperature=0.0, max_tokens=12, stop=["never", text[cut : cut + 3]]))
    shown = []
    while engine.has_unfinished():
        shown += [output.outputs[0].text for output in engine.step()]
    assert shown[-1] == text[:cut]
    assert all(text[:cut].startswith(piece) for piece in shown), "nothing that a stop string takes back was ever shown"


def test_stop_reasons_are_told_apart() -> None:
    tokens = greedy([1, 2], 12)
    first_seen = next(i for i in range(1, 12) if tokens.index(tokens[i]) == i)
    stop = tokens[first_seen]
    for eos, params, reason in [
        ((stop,), SamplingParams(temperature=0.0, max_tokens=12), ("stop", None)),
        ((), SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop]), ("stop", stop)),
        ((stop,), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), ("length", None)),
    ]:
        engine = toy_engine(eos=eos, tokenizer=LetterTokenizer())
        engine.add_request("a", [1, 2], params)
        output = run_all(engine)["a"].outputs[0]
        assert (output.finish_reason, output.stop_reason) == reason
        kept = tokens[: first_seen + 1] if reason[0] == "stop" else tokens
        assert list(output.token_ids) == kept
        assert output.text == LetterTokenizer().decode(kept[:-1] if reason[0] == "stop" else kept)


def test_min_tokens_keeps_the_end_token_and_stop_strings_away() -> None:
    stop = greedy([1, 2], 1)[0]
    engine = toy_engine(eos=(stop,), tokenizer=LetterTokenizer())
    engine.add_request("a", [1, 2], SamplingParams(temperature=0.0, max_tokens=8, min_tokens=5))
    output = run_all(engine)["a"].outputs[0]
    assert stop not in output.token_ids[:5] and len(output.token_ids) >= 5
    engine.add_request("b", [1, 2], SamplingParams(temperature=0.0, max_tokens=8, min_tokens=4, stop=[chr(97 + i) for i in range(26)]))
    assert len(run_all(engine)["b"].outputs[0].token_ids) == 5


def test_logprobs_are_those_of_the_raw_logits() -> None:
    engine = toy_engine(tokenizer=LetterTokenizer())
    engine.add_request("a", [4, 5, 6], SamplingParams(temperature=0.7, seed=3, max_tokens=4, logprobs=2, prompt_logprobs=0, logit_bias={7: 5.0}))
    output = run_all(engine)["a"]
    tokens = [4, 5, 6, *output.outputs[0].token_ids]
    raw = [logits_of([code(t, i) for i, t in enumerate(tokens[:end])]) for end in range(1, len(tokens))]
    rows = [row.astype(np.float64) - log_sum_exp(row) for row in raw]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 3
    for i in (1, 2):
        assert output.prompt_logprobs[i][tokens[i]].logprob == rows[i - 1][tokens[i]]
    assert output.outputs[0].logprobs is not None and len(output.outputs[0].logprobs) == 4
    for row, named, token in zip(rows[2:], output.outputs[0].logprobs, tokens[3:], strict=True):
        assert set(named) == {token, *np.argsort(-row)[:2].tolist()}
        assert all(entry.logprob == row[t] and entry.rank == 1 + (row > row[t]).sum() for t, entry in named.items())
        assert named[token].decoded_token == LetterTokenizer().decode([token])
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(row[t] for row, t in zip(rows[2:], tokens[3:], strict=True)))


def test_n_sequences_of_a_request_differ_and_are_repeatable() -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=6)
    engine = toy_engine()
    engine.add_request("a", [1], params)
    engine.add_request("b", [1], params)
    done = run_all(engine)
    first, second = ([o.token_ids for o in done[name].outputs] for name in "ab")
    assert first == second and len(set(first)) == 3 and [o.index for o in done["a"].outputs] == [0, 1, 2]


def test_without_a_seed_requests_differ_and_the_engine_seed_repeats_them() -> None:
    def tokens(seed: int) -> list[tuple[int, ...]]:
        engine = toy_engine(seed=seed)
        for name in "ab":
            engine.add_request(name, [1], SamplingParams(max_tokens=8))
        done = run_all(engine)
        return [done[name].outputs[0].token_ids for name in "ab"]

    assert tokens(1) == tokens(1) != tokens(2)
    assert len(set(tokens(1))) == 2


def test_abort_frees_everything_and_returns_what_was_made() -> None:
    engine = toy_engine(toy_plan(max_num_seqs=1))
    engine.add_request("a", [1, 2], SamplingParams(n=2, temperature=0.0, max_tokens=20))
    engine.step()
    engine.step()
    output = engine.abort("a")
    assert output is not None and output.finished and [o.finish_reason for o in output.outputs] == ["abort", "abort"]
    assert list(output.outputs[0].token_ids) == greedy([1, 2], 2) and output.outputs[1].token_ids == ()
    assert not engine.has_unfinished() and engine.step() == [] and engine.abort("a") is None
    engine.check_integrity()
    assert engine.kv.pools["gpu"].num_free == 64


def test_a_pass_that_fails_leaves_everything_as_before_it() -> None:
    engine = toy_engine()
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.step()
    working = engine.executor

    class Broken(ToyExecutor):
        def execute(self, batch: object, *, more: bool) -> np.ndarray:
            raise RuntimeError(f"lost ({more}, {batch is None})")

    engine.executor = Broken(working.spec, working.plan)
    with pytest.raises(RuntimeError, match="lost"):
        engine.step()
    engine.check_integrity()
    engine.executor = working
    assert list(run_all(engine)["a"].outputs[0].token_ids) == greedy([1, 2, 3], 12)


def test_logits_that_are_not_numbers_are_an_error_not_token_zero() -> None:
    engine = toy_engine()
    engine.executor.execute = lambda batch, more: np.full((batch.num_logits, VOCAB), np.nan, np.float32)  # type: ignore[method-assign]
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(TwinPilotsError, match="request a at position 0 are not finite"):
        engine.step()


def test_bad_requests_are_refused_before_any_work() -> None:
    engine = toy_engine(toy_plan(gpu_pages=4, host_pages=6, max_model_len=40))
    engine.add_request("twice", [1], GREEDY)
    cases = [
        (ValueError, "already in use", "twice", [1], GREEDY),
        (ValueError, "empty prompt", "x", [], GREEDY),
        (ValueError, r"prompt token 53 .* vocabulary \[0, 53\)", "x", [53], GREEDY),
        (ValueError, "logit_bias token 99", "x", [1], SamplingParams(logit_bias={99: 1.0})),
        (ValueError, "no tokenizer", "x", [1], SamplingParams(stop="a")),
        (LimitError, "prompt has 40 tokens, max_model_len=40", "x", [1] * 40, GREEDY),
        (LimitError, "KV pages for 25 tokens, the largest tier holds 24", "x", [1] * 10, SamplingParams(max_tokens=16)),
    ]
    for error, message, name, prompt, params in cases:
        with pytest.raises(error, match=message):
            engine.add_request(name, prompt, params)
    assert list(run_all(engine)) == ["twice"]


def test_unlimited_max_tokens_ends_where_the_memory_or_the_model_does() -> None:
    for pages, length in ((6, 25), (64, 40)):
        engine = toy_engine(toy_plan(gpu_pages=pages, host_pages=0, max_model_len=40))
        engine.add_request("a", [1, 2], SamplingParams(temperature=0.0, max_tokens=None))
        output = run_all(engine)["a"].outputs[0]
        assert (2 + len(output.token_ids), output.finish_reason) == (length, "length")


def test_the_executor_learns_whether_prefetching_pays() -> None:
    engine = toy_engine()
    engine.add_request("a", [1], SamplingParams(temperature=0.0, max_tokens=3))
    run_all(engine)
    assert engine.executor.more == [True, True, False]


def test_prompt_and_generated_tokens_count_once_despite_preemption() -> None:
    engine = toy_engine(toy_plan(gpu_pages=9, host_pages=0, max_model_len=32))
    counted = [0, 0]
    execute = engine.executor.execute

    def counting(batch: object, *, more: bool) -> np.ndarray:
        counted[0] += batch.num_prompt_tokens  # type: ignore[attr-defined]
        counted[1] += batch.num_generated  # type: ignore[attr-defined]
        return execute(batch, more=more)

    engine.executor.execute = counting  # type: ignore[method-assign]
    for i in range(5):
        engine.add_request(str(i), [i] * 7, SamplingParams(temperature=0.0, max_tokens=18))
    run_all(engine)
    assert engine.scheduler.num_preemptions > 0 and counted == [35, 90]


def test_a_prompt_that_begins_like_another_reads_only_the_rest() -> None:
    engine = toy_engine()
    first, second = [*range(10), 20, 21], [*range(10), 30]  # pages of 4 tokens: two full ones in common
    engine.add_request("a", first, GREEDY)
    assert run_all(engine)["a"].num_cached_tokens == 0
    engine.add_request("b", second, GREEDY)
    engine.step()
    assert engine.executor.batches[-1].num_tokens == 3, "11 tokens less two pages"  # type: ignore[attr-defined]
    output = run_all(engine)["b"]
    assert list(output.outputs[0].token_ids) == greedy(second, 12) and output.num_cached_tokens == 8
    assert (engine.kv.counts.queried_tokens, engine.kv.counts.hit_tokens) == (23, 8)


def test_a_conversation_goes_on_from_its_last_answer() -> None:
    engine = toy_engine()
    engine.add_request("a", [1, 2, 3], GREEDY)
    longer = [1, 2, 3, *run_all(engine)["a"].outputs[0].token_ids, 7, 8]
    engine.add_request("b", longer, GREEDY)
    output = run_all(engine)["b"]
    assert output.num_cached_tokens == 12, "3 + 12 tokens, the last of them never computed: 14 are, in three full pages"
    assert list(output.outputs[0].token_ids) == greedy(longer, 12)


def test_a_repeated_prompt_leaves_one_token_to_compute_and_prompt_logprobs_compute_all() -> None:
    engine = toy_engine()
    for name, params, cached in (("a", GREEDY, 0), ("b", GREEDY, 4), ("c", SamplingParams(temperature=0.0, prompt_logprobs=0), 0)):
        engine.add_request(name, [1, 2, 3, 4, 5, 6, 7, 8], params)
        output = run_all(engine)[name]
        assert output.num_cached_tokens == cached and list(output.outputs[0].token_ids) == greedy([1, 2, 3, 4, 5, 6, 7, 8], params.max_tokens or 0)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 8


def test_sequences_that_share_pages_survive_each_others_end() -> None:
    engine, prompt = toy_engine(), list(range(12))
    engine.add_request("first", prompt, SamplingParams(temperature=0.0, max_tokens=1))
    run_all(engine)
    for name in "abc":
        engine.add_request(name, [*prompt, ord(name) % VOCAB], GREEDY)
    engine.step()
    assert engine.kv.pools["gpu"].num_free == 64 - 3 - 3, "three pages together, one each"
    engine.abort("a")
    engine.check_integrity()
    done = run_all(engine)
    assert all(list(done[name].outputs[0].token_ids) == greedy([*prompt, ord(name) % VOCAB], 12) for name in "bc")


def test_what_was_used_last_is_forgotten_last() -> None:
    engine = toy_engine(toy_plan(gpu_pages=8, host_pages=0, max_model_len=32))
    one = SamplingParams(temperature=0.0, max_tokens=1)
    old, new = [1] * 13, [2] * 13
    for prompt in (old, new, old, [3] * 9):  # 4 pages each, the last of which is not full: 3 + 3 remembered, and two more needed
        engine.add_request("a", prompt, one)
        run_all(engine)
    for prompt, cached in ((old, 12), (new, 8)):  # the end of `new` has been taken
        engine.add_request("b", prompt, one)
        assert run_all(engine)["b"].num_cached_tokens == cached


def test_without_sharing_nothing_is_remembered() -> None:
    engine = toy_engine(share=False)
    for name in "ab":
        engine.add_request(name, list(range(12)), GREEDY)
        assert run_all(engine)[name].num_cached_tokens == 0
    assert engine.kv.counts.queried_tokens == 0
