"""Small random models of every family, built with transformers and saved as safetensors directories: the references of the token tests.

Owns: the zoo of configs, deterministic random weights with well-spread logits, and greedy reference generation (transformers, eager, fp32).
Sizes are odd on purpose: hidden 40, vocabulary 131, grouped and ungrouped heads, head_dim unlike hidden/heads where the family allows it.

    path = zoo.save("gemma3", seed=1, path=tmp_path / "model")
    tokens, logits = zoo.reference_generate(path, [5, 17, 99], 12)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 131
WINDOW = 7
MAX_POSITIONS = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MHA = {"num_key_value_heads": 4}
_GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "num_hidden_layers": 4}
_NESTED_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
# Two values lie close together at head_dim 12 unless the base is small: these make short sequences feel every rotary pair.
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE_SWITCH = 16  # longrope models of the zoo change tables beyond this length


def _longrope(pairs: int) -> dict[str, Any]:
    short = [1.0 + 0.05 * i for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": short, "long_factor": [1.0 + 0.6 * i for i in range(pairs)]}


# name -> (transformers model_type, what differs from _SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"ffn_dim": 72, **_MHA}),
    "opt-untied": ("opt", {"ffn_dim": 72, "tie_word_embeddings": False, "enable_bias": False, **_MHA}),
    "llama": ("llama", {"head_dim": 12}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **_MHA}),
    "llama-linear": ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "llama-llama3": ("llama", {"head_dim": 12, "rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"head_dim": 12, "rope_parameters": _YARN}),
    "mistral": ("mistral", {"head_dim": 12, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-plain": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12, "attention_bias": True}),
    "phi3": ("phi3", {"sliding_window": 9, **_MHA}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": LONGROPE_SWITCH, "rope_parameters": {**_longrope(4), "partial_rotary_factor": 0.8}}),
    "gemma2": ("gemma2", {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 7, "rope_parameters": _NESTED_ROPE, "sliding_window_pattern": 3}),
    "gemma3-nested": ("gemma3", {**_GEMMA, "rope_parameters": _NESTED_ROPE, "layer_types": ["sliding_attention", "full_attention"] * 2}),
}

# The same in sizes that quantised blocks divide. "llama-256" has room for k-quants.
_BLOCKS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160}
BLOCK_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-64": ("llama", _BLOCKS),
    "opt-64": ("opt", {"hidden_size": 64, "ffn_dim": 160, **_MHA}),
    "llama-256": ("llama", {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}),
}


def build(family: str, seed: int) -> Any:
    """The random fp32 transformers model of ``family``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = _config(family)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, centre=0.0 if "gemma" in family else 1.0))
    return model


def save(family: str, seed: int, path: str | Path, dtype: str = "float32", max_shard_size: str | None = None) -> Path:
    """Build the model and write it as a safetensors directory (fp32, bfloat16 or float16; sharded when ``max_shard_size`` says so)."""
    import torch

    model = build(family, seed).to(getattr(torch, dtype))
    model.save_pretrained(path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    return Path(path)


def reference_generate(path: str | Path, prompt_ids: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """Greedy continuation by transformers in fp32 with eager attention: (n token ids, logits [n, vocab] fp32).

    The whole sequence is recomputed for every token: no cache, so longrope's change of tables applies to all of it.
    """
    return greedy(load_reference(path), prompt_ids, n)


def greedy(model: Any, prompt_ids: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """`reference_generate` with a model that is loaded already."""
    import torch

    tokens = list(prompt_ids)
    rows = []
    with torch.no_grad():
        for _ in range(n):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
            rows.append(logits.numpy().copy())
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt_ids) :], np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32)


def load_reference(path: str | Path) -> Any:
    """The saved model in fp32 with eager attention. Gemma's embedding factor keeps the rounding of the stored dtype, as in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    config = json.loads((Path(path) / "config.json").read_text())
    stored = getattr(torch, config.get("dtype") or "float32")
    for module in model.modules():
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, torch.Tensor):
            scale.copy_(scale.to(stored).float())
    return model


def margins(logits: np.ndarray) -> np.ndarray:
    """Top-1 minus top-2 of every row of ``logits`` [steps, vocab]: below 1e-4 the reference itself is undecided."""
    top = np.sort(logits, axis=-1)[:, -2:]
    return top[:, 1] - top[:, 0]


def _config(family: str) -> Any:
    from transformers import AutoConfig

    model_type, changes = (FAMILIES | BLOCK_FAMILIES)[family]
    values = json.loads(json.dumps({**_SIZES, **changes}))  # a deep copy: transformers edits rope dicts in place
    if model_type != "gemma3":
        return AutoConfig.for_model(model_type, **values)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return AutoConfig.for_model("gemma3", text_config=values, vision_config=vision, mm_tokens_per_image=4)


def _scaled(name: str, noise: Any, centre: float) -> Any:
    """Random values of a sane size for this parameter: norms around ``centre``, linears about 1 / sqrt(fan in), logits a few units wide."""
    if noise.ndim == 1:
        if centre == 0.0 and "post_" in name:
            centre = 1.0  # Gemma's branches must outweigh the tied embedding, or every token repeats itself
        return centre + 0.25 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise
    if noise.ndim > 2 or "vision" in name or "multi_modal" in name:
        return 0.02 * noise
    if "embed" in name or "lm_head" in name:
        return (0.25 if centre == 0.0 else 0.5) * noise
    gain = 2.0 if any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2", "qkv", "q_proj", "k_proj")) else 1.2
    return gain / noise.shape[-1] ** 0.5 * noise
