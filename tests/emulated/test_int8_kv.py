"""int8 KV through the whole engine: logits near those of fp32 KV wherever KV lies and moves, memory as planned, and the same bits however a prompt is cut."""

from __future__ import annotations

from typing import Any

import pytest

from tests.emulated.test_policies import assert_memory_as_planned, generate, open_llm
from tests.hand_plans import random_plan
from tests.harness import PROMPTS, Rig, ZooModel, log_softmax, relative_rms
from twinpilots import LLM, SamplingParams

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("balanced_machine")]
# Relative RMS of the log-probabilities of fp32 models against fp32 KV. Keys and values are rounded to 1/254 of their head's largest number.
TOLERANCE = 2e-2


@pytest.mark.parametrize(("family", "policy"), [("llama", "flexgen"), ("gemma2", "stream")])
def test_policies_stay_near_fp32_kv_within_its_memory(family: str, policy: str, zoo_model: ZooModel) -> None:
    model = zoo_model(family)
    with open_llm(model, policy, kv_cache_dtype="int8") as llm:
        _, logprobs = generate(llm)
        assert llm.plan.kv_dtype == "int8"
        assert_memory_as_planned(model, llm, model.third_bytes)
    for found, (_, reference) in zip(logprobs, model.references, strict=True):
        assert 0 < relative_rms(found[0], log_softmax(reference[0])) < TOLERANCE


@pytest.mark.parametrize("seed", range(2))
def test_hand_plans_give_the_cpus_logits_under_adversarial_timing(seed: int, zoo_model: ZooModel) -> None:
    """KV on both sides, streamed and attended by the CPU; queues as late and as early as the waits allow, released slots poisoned. A sum in another order may
    round a key to the next code, so the two are not equal to the last bit."""
    model = zoo_model(("llama-llama3", "gemma3")[seed])
    with Rig(model.path, random_plan(model.spec, 70 + seed, gpu=False, kv_dtype="int8")) as alone, Rig(
        model.path, random_plan(model.spec, 70 + seed, kv_dtype="int8"), adversarial_seed=seed + 1
    ) as rig:  # fmt: skip
        alone.generate(PROMPTS, 1)
        rig.generate(PROMPTS, 3)
    for number, (_, logits) in enumerate(model.references):
        found, wanted = rig.logits[str(number)][0], alone.logits[str(number)][0]
        assert relative_rms(found, wanted) < 1e-3
        assert relative_rms(log_softmax(found), log_softmax(logits[0])) < TOLERANCE


def test_a_request_has_the_same_bits_alone_batched_in_chunks_and_after_a_hit(zoo_model: ZooModel) -> None:
    """A prompt's own tokens are attended as the cache keeps them, so it does not matter how it is cut."""
    model, common = zoo_model("llama"), [(7 * i) % 120 + 3 for i in range(40)]
    prompts = [[*common, 9], [*common[:35], 50, 51], common[:18], [5, 6]]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3)

    def outputs(batches: list[list[list[int]]], **options: Any) -> list[Any]:
        with LLM(str(model.path), device="cpu", threads=1, kv_cache_dtype="int8", **options) as llm:
            done = [one for batch in batches for one in llm.generate(batch, params, use_tqdm=False)]
            return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in done]

    together = outputs([prompts, prompts], max_num_seqs=4)
    assert together[:4] == together[4:], "the second time most of each prompt is found"
    assert together[:4] == outputs([[prompt] for prompt in prompts], enable_prefix_caching=False)
    plan = random_plan(model.spec, 5, gpu=False, kv_dtype="int8", max_pass_tokens=5, max_num_seqs=4)
    assert together[:4] == outputs([prompts], plan=plan), "five tokens at a time"
