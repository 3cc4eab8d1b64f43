"""Promise: wherever KV lies and is attended, a prompt that begins like an earlier one gets the tokens that transformers gives it."""

from __future__ import annotations

import pytest

from tests.harness import ZooModel, assert_same_tokens, greedy_references
from twinpilots import LLM, SamplingParams

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("balanced_machine")]
COMMON = [(7 * i) % 120 + 3 for i in range(40)]
PROMPTS = [COMMON + [9], COMMON[:35] + [50, 51, 52], COMMON[:18], COMMON + [9, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("policy", ["twinpilots", "flexgen", "stream", "layer-split"])
def test_hits_in_gpu_and_host_memory(zoo_model: ZooModel, policy: str) -> None:
    model = zoo_model("llama")
    references = greedy_references(model.path, PROMPTS, GREEDY.max_tokens or 0)
    with LLM(str(model.path), policy=policy, device="emulated:demo", unit_rows=8, max_num_seqs=2, gpu_memory=model.third_bytes) as llm:
        first = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        rest = llm.generate(PROMPTS[1:], GREEDY, use_tqdm=False)
        llm._open_session.engine.check_integrity()
    for output, (tokens, logits) in zip(first + rest, references, strict=True):
        assert_same_tokens(output.outputs[0].token_ids, tokens, logits)
    assert [output.num_cached_tokens for output in rest[:2]] == [32, 16]
