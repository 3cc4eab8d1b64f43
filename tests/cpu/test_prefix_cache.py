"""Promise: a request gives bit-equal tokens and logprobs alone, batched, and whatever it finds in the prefix cache; windows and long rotary tables included."""

from __future__ import annotations

import random
from typing import Any

import pytest

from twinpilots import LLM, SamplingParams

PAGE = 16


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "phi3-longrope"])
def test_hits_change_no_bit(zoo_model: Any, family: str) -> None:
    rng = random.Random(7)
    common = [rng.randrange(3, 131) for _ in range(3 * PAGE)]
    prompts = [common[: rng.randint(1, len(common))] + [rng.randrange(3, 131) for _ in range(rng.randint(1, 9))] for _ in range(8)]
    params = [SamplingParams(temperature=rng.choice([0.0, 0.9]), seed=i, max_tokens=12, ignore_eos=True, logprobs=2) for i in range(len(prompts))]
    found: list[Any] = []
    for share in (False, True):
        with LLM(str(zoo_model(family).path), device="cpu", max_num_seqs=4, threads=1, enable_prefix_caching=share) as llm:
            alone = [llm.generate([prompt], one, use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)]
            together = llm.generate(prompts, params, use_tqdm=False)
            cached = [output.num_cached_tokens for output in together]
            counts = llm.stats()["prefix_cache"]
        assert (sum(cached) > 0) == (counts["hit_tokens"] > 0) == (share and family != "phi3-longrope")
        assert all(count % PAGE == 0 and count < len(prompt) for count, prompt in zip(cached, prompts, strict=True))
        found += [[(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs] for outputs in (alone, together)]
    assert found[0] == found[1] == found[2] == found[3]
