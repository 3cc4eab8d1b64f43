"""`LLM` end to end on the CPU alone: everything that `SamplingParams` promises, and the same bits alone, batched and after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.harness import NUM_TOKENS, PROMPTS, SavedModel, log_softmax
from twinpilots import LLM, SamplingParams
from twinpilots.errors import LimitError, UserError

LONGEST = zoo.MAX_POSITIONS


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **changes})


@pytest.fixture(scope="module")
def model(zoo_model: Any) -> SavedModel:
    saved: SavedModel = zoo_model("qwen3")
    return saved


@pytest.fixture(scope="module")
def llm(model: SavedModel) -> Iterator[LLM]:
    with LLM(str(model.path), device="cpu", max_num_seqs=8) as opened:
        yield opened


def run(llm: LLM, prompts: Any, params: Any) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


def test_token_ids_need_no_tokenizer_and_give_no_text(llm: LLM, model: SavedModel) -> None:
    outputs = run(llm, PROMPTS, greedy())
    model.assert_tokens([output.outputs[0].token_ids for output in outputs])
    assert [list(output.prompt_token_ids) for output in outputs] == PROMPTS
    assert {(output.outputs[0].text, output.outputs[0].finish_reason, output.prompt) for output in outputs} == {("", "length", None)}
    assert run(llm, PROMPTS[0], greedy())[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids, "one prompt of ids is one prompt"
    with pytest.raises(UserError, match="no tokenizer"):
        run(llm, "text", greedy())


def test_no_prompts_give_no_outputs_and_an_empty_prompt_is_refused(llm: LLM) -> None:
    assert run(llm, [], greedy()) == []
    with pytest.raises(ValueError, match="empty prompt"):
        run(llm, [[]], greedy())
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 131\)"):
        run(llm, [[1], [131]], greedy())
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        run(llm, [[1]], [greedy(), greedy()])
    assert len(run(llm, [[1]], greedy())) == 1, "a refused call leaves nothing behind"


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    outputs = run(llm, PROMPTS, [greedy(max_tokens=n) for n in (1, 4, 7)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4, 7]


def test_n_sequences_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    first, again = (run(llm, [PROMPTS[0]], params)[0] for _ in range(2))
    found = [output.token_ids for output in first.outputs]
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len(set(found)) == 3
    assert [output.token_ids for output in again.outputs] == found
    beside = run(llm, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], [greedy(), params, greedy()])[1]
    assert [output.token_ids for output in beside.outputs] == found, "nor do neighbours matter"


def test_logprobs_are_the_log_softmax_of_the_raw_logits(llm: LLM, model: SavedModel) -> None:
    output = run(llm, [PROMPTS[0]], greedy(logprobs=2, max_tokens=3, logit_bias={5: -3.0}))[0].outputs[0]
    expected = log_softmax(model.references[0][1])
    assert output.logprobs is not None
    first = output.logprobs[0]
    best = np.argsort(-expected[0])[:2]
    assert set(best.tolist()) <= set(first) and output.token_ids[0] in first
    for token, found in first.items():
        assert found.logprob == pytest.approx(expected[0][token], abs=1e-4)
        assert found.rank == 1 + int((expected[0] > expected[0][token]).sum())
    assert output.cumulative_logprob == pytest.approx(sum(named[token].logprob for named, token in zip(output.logprobs, output.token_ids, strict=True)))


def test_prompt_logprobs_are_those_of_the_reference(llm: LLM, model: SavedModel) -> None:
    import torch

    prompt = PROMPTS[0]
    output = run(llm, [prompt], greedy(prompt_logprobs=0, max_tokens=1))[0]
    with torch.no_grad():
        expected = log_softmax(zoo.load_reference(model.path)(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].numpy())
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, named in enumerate(output.prompt_logprobs[1:], start=1):
        assert named is not None
        assert named[prompt[position]].logprob == pytest.approx(expected[position - 1][prompt[position]], abs=1e-4)


def test_logit_bias_bans_and_forces(llm: LLM) -> None:
    usual = run(llm, [PROMPTS[0]], greedy())[0].outputs[0].token_ids
    banned = run(llm, [PROMPTS[0]], greedy(logit_bias={usual[0]: -100.0}))[0].outputs[0].token_ids
    assert usual[0] not in banned
    assert run(llm, [PROMPTS[0]], greedy(logit_bias={42: 100.0}))[0].outputs[0].token_ids == (42,) * NUM_TOKENS


def test_stopping(llm: LLM) -> None:
    usual = run(llm, [PROMPTS[0]], greedy())[0].outputs[0].token_ids
    stop = usual[2]
    at = usual.index(stop)
    output = run(llm, [PROMPTS[0]], greedy(stop_token_ids=[stop]))[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (usual[: at + 1], "stop", stop)
    longer = run(llm, [PROMPTS[0]], greedy(stop_token_ids=[stop], min_tokens=at + 3))[0].outputs[0].token_ids
    assert len(longer) >= at + 3 and stop not in longer[: at + 2]
    eos = run(llm, [PROMPTS[0]], greedy(ignore_eos=False, logit_bias={2: 100.0}))[0].outputs[0]
    assert (eos.token_ids, eos.finish_reason) == ((2,), "stop")
    late = run(llm, [PROMPTS[0]], greedy(ignore_eos=False, logit_bias={2: 100.0}, min_tokens=4))[0].outputs[0]
    assert (late.token_ids.index(2), late.finish_reason) == (4, "stop")
    with pytest.raises(ValueError, match="stop strings"):
        run(llm, [PROMPTS[0]], greedy(stop="a"))


def test_output_ends_at_the_models_own_limit(llm: LLM) -> None:
    for max_tokens in (500, None):
        output = run(llm, [PROMPTS[0]], greedy(max_tokens=max_tokens))[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (LONGEST - len(PROMPTS[0]), "length")
    with pytest.raises(LimitError, match=f"{LONGEST}"):
        run(llm, [[1] * LONGEST], greedy())
    output = run(llm, [[1] * (LONGEST - 1)], greedy())[0].outputs[0]
    assert len(output.token_ids) == 1


def test_more_requests_than_run_at_once_all_come_back_in_order(llm: LLM, model: SavedModel) -> None:
    before = llm.stats()["tokens"]
    outputs = run(llm, PROMPTS * 7, greedy())
    for start in range(0, 21, 3):
        model.assert_tokens([output.outputs[0].token_ids for output in outputs[start : start + 3]])
    after = llm.stats()["tokens"]
    assert after["generated"] - before["generated"] == 21 * NUM_TOKENS
    assert after["prompt"] - before["prompt"] == 7 * sum(map(len, PROMPTS))


def test_a_stream_grows_and_can_be_left(llm: LLM, model: SavedModel) -> None:
    lengths = [len(output.outputs[0].token_ids) for output in llm.stream(PROMPTS[0], greedy())]
    assert lengths[0] == 1 and lengths == sorted(set(lengths)) and lengths[-1] == NUM_TOKENS
    left = llm.stream(PROMPTS[0], greedy(max_tokens=50))
    next(left)
    left.close()
    model.assert_tokens([output.outputs[0].token_ids for output in run(llm, PROMPTS, greedy())])


def test_stop_strings_and_text_need_a_tokenizer() -> None:
    pytest.importorskip("gguf")
    from tests import smollm2

    with LLM(smollm2.MODEL, device="cpu") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=30, stop=["9,"])
        output = run(llm, [smollm2.PROMPT], params)[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == (" 6, 7, 8, ", "stop", "9,")
        counted = run(llm, [smollm2.PROMPT], SamplingParams(temperature=0.0, max_tokens=5, logprobs=0))[0].outputs[0]
        assert "".join(named[token].decoded_token or "" for named, token in zip(counted.logprobs or (), counted.token_ids, strict=True)) == counted.text


# -- the same bits -----------------------------------------------------------------------------------------------------------------------------


def bits(llm: LLM, prompts: list[list[int]]) -> list[tuple[tuple[int, ...], list[float]]]:
    """(tokens, logprobs of the whole vocabulary at every step) of each prompt."""
    outputs = [output.outputs[0] for output in run(llm, prompts, greedy(logprobs=-1))]
    return [(output.token_ids, [named[token].logprob for named in output.logprobs or () for token in sorted(named)]) for output in outputs]


@pytest.mark.parametrize("device", ["cpu", "emulated:demo"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_deterministic_gives_the_same_bits_alone_batched_and_after_a_restart(family: str, device: str, zoo_model: Any, balanced_machine: None) -> None:
    model = zoo_model(family)
    options: dict[str, Any] = {"device": device, "deterministic": True, "unit_rows": 8, "max_num_seqs": 4}
    if device != "cpu":
        options |= {"gpu_memory": 2 * model.third_bytes, "policy": "hetegen"}
    with LLM(str(model.path), **options) as llm:
        alone = [bits(llm, [prompt])[0] for prompt in PROMPTS]
        plan = llm.plan
        assert all(bucket.splits == plan.buckets[0].splits for bucket in plan.buckets), "one split for every bucket"
        assert bits(llm, PROMPTS) == alone
        assert bits(llm, [*PROMPTS[::-1], [9] * 30])[:3] == alone[::-1]
    with LLM(str(model.path), **options) as llm:
        assert llm.plan == plan, "frozen and kept"
        assert bits(llm, PROMPTS) == alone


@pytest.mark.parametrize("device", ["cpu", "emulated:demo"])
def test_a_frozen_plan_holds_the_longest_sequence_where_memory_does(device: str, zoo_model: Any, balanced_machine: None) -> None:
    model = zoo_model("opt")
    with LLM(str(model.path), device=device, deterministic=True, unit_rows=8, max_num_seqs=2, policy="cpu" if device == "cpu" else "stream") as llm:
        assert llm.plan.max_model_len == LONGEST
        assert len(run(llm, [[7] * 90], greedy(max_tokens=None))[0].outputs[0].token_ids) == LONGEST - 90


def test_the_cpu_alone_always_gives_the_same_bits(model: SavedModel) -> None:
    found = []
    for threads in (1, 2):
        with LLM(str(model.path), device="cpu", threads=threads, max_num_seqs=4) as llm:
            found += [bits(llm, PROMPTS), [bits(llm, [prompt])[0] for prompt in PROMPTS]]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"), device="cpu")
