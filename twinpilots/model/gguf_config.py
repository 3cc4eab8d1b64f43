"""From GGUF metadata to the config.json that describes the same model: llama, qwen2, qwen3, gemma2, gemma3, phi3.

Owns: `config_from_gguf`, so that `families.spec_from_config` stays the only way to a `ModelSpec`. Follows llama.cpp's reading of the fields.
Knows nothing of tensors' contents, except the rotary factors that GGUF keeps as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from twinpilots.errors import UnsupportedModelError
from twinpilots.model.config_reader import MAX_LAYERS, ConfigReader
from twinpilots.model.families import FULL, SLIDING, spec_from_config
from twinpilots.model.spec import ModelSpec

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3"}
ROPE_FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
Factors = Mapping[str, Sequence[float]]


def spec_from_gguf(
    fields: Mapping[str, Any], *, name: str, tensors: Collection[str] = (), rope_factors: Factors | None = None, dtype: str = "fp16"
) -> ModelSpec:
    """The model of a GGUF file. ``tensors``: its tensor names; ``rope_factors``: the contents of `ROPE_FACTOR_TENSORS` that it has."""
    return spec_from_config(config_from_gguf(fields, name=name, tensors=tensors, rope_factors=rope_factors), name=name, dtype=dtype)


def config_from_gguf(fields: Mapping[str, Any], *, name: str, tensors: Collection[str] = (), rope_factors: Factors | None = None) -> dict[str, Any]:
    """A Hugging Face config of the same model. Raises UnsupportedModelError or CheckpointError as `spec_from_config` does."""
    reader = ConfigReader(fields, name)
    arch = reader.text("general.architecture")
    if arch not in MODEL_TYPES:
        raise UnsupportedModelError(f"{name}: GGUF architecture '{arch}' is not supported; supported are {', '.join(sorted(MODEL_TYPES))}")
    if reader.integer("split.count", 1, low=0) > 1:
        raise UnsupportedModelError(f"{name}: split GGUF files are not supported; merge them with llama-gguf-split --merge")
    if reader.integer(f"{arch}.expert_count", 0, low=0):
        raise UnsupportedModelError(f"{name}: mixture-of-experts GGUF files are not supported ({arch}.expert_count)")
    config = _sizes(reader, arch, tensors)
    config |= _attention(reader, arch, config)
    if arch == "phi3":
        original = reader.optional_integer("phi3.rope.scaling.original_context_length")
        config["original_max_position_embeddings"] = original or config["max_position_embeddings"]
    config["rope_parameters"] = _rope(reader, arch, config, rope_factors or {})
    return config


def _sizes(c: ConfigReader, arch: str, tensors: Collection[str]) -> dict[str, Any]:
    heads = c.integer(f"{arch}.attention.head_count")
    tokens = _list_length(c, "tokenizer.ggml.tokens")
    return {
        "model_type": MODEL_TYPES[arch], "hidden_size": c.integer(f"{arch}.embedding_length"), "intermediate_size": c.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": c.integer(f"{arch}.block_count", high=MAX_LAYERS), "num_attention_heads": heads,
        "num_key_value_heads": c.integer(f"{arch}.attention.head_count_kv", heads), "vocab_size": c.integer(f"{arch}.vocab_size", tokens),
        "max_position_embeddings": c.integer(f"{arch}.context_length"), "rms_norm_eps": c.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors, "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu",
    }  # fmt: skip


def _list_length(c: ConfigReader, key: str) -> int | None:
    """The length of a list field, None when missing."""
    value = c.values.get(key)
    return len(value) if isinstance(value, list) else None


def _attention(c: ConfigReader, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    derived = config["hidden_size"] // config["num_attention_heads"]
    head_dim = c.integer(f"{arch}.attention.key_length", derived)
    if c.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{c.where}: heads whose keys and values differ in size are not supported ({arch}.attention.value_length)")
    window = c.optional_integer(f"{arch}.attention.sliding_window", low=0)
    result: dict[str, Any] = {"head_dim": head_dim, "sliding_window": window or None}
    if arch.startswith("gemma"):
        # llama.cpp: only the 27B models scale queries by hidden/heads instead of head_dim; they are told by their layers.
        largest = (arch, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62))
        result["query_pre_attn_scalar"] = derived if largest else head_dim
        result |= _pattern(c, f"{arch}.attention.sliding_window_pattern", config["num_hidden_layers"])
        result["attn_logit_softcapping"] = c.optional_number(f"{arch}.attn_logit_softcapping")
        result["final_logit_softcapping"] = c.optional_number(f"{arch}.final_logit_softcapping")
    return result


def _pattern(c: ConfigReader, key: str, num_layers: int) -> dict[str, Any]:
    """Which layers slide: a period, or one flag per layer (true: slides); the family's own pattern when missing."""
    value = c.values.get(key)
    if isinstance(value, list):
        if len(value) != num_layers or not all(isinstance(flag, bool) for flag in value):
            raise c.error(key, f"a period or {num_layers} flags")
        return {"layer_types": [SLIDING if flag else FULL for flag in value]}
    period = c.optional_integer(key)
    return {} if period is None else {"layer_types": [SLIDING if (i + 1) % period else FULL for i in range(num_layers)]}


def _rope(c: ConfigReader, arch: str, config: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    full = {"rope_theta": c.number(f"{arch}.rope.freq_base", 10_000.0), **_scaling(c, arch, config, factors)}
    rotary = c.integer(f"{arch}.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        full["partial_rotary_factor"] = (rotary + 0.5) / config["head_dim"]  # the half keeps int() from losing one
    if arch != "gemma3":
        return full
    local = {"rope_type": "default", "rope_theta": c.number("gemma3.rope.freq_base_swa", 10_000.0)}
    return {"full_attention": full, "sliding_attention": local}


def _scaling(c: ConfigReader, arch: str, config: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    prefix = f"{arch}.rope.scaling"
    original = c.integer(f"{prefix}.original_context_length", config["max_position_embeddings"])
    if "rope_freqs.weight" in factors:
        return {"rope_type": "factors", "factors": list(factors["rope_freqs.weight"])}
    if "rope_factors_short.weight" in factors and "rope_factors_long.weight" in factors:
        ratio = config["max_position_embeddings"] / original
        default = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return {
            "rope_type": "longrope", "short_factor": list(factors["rope_factors_short.weight"]), "long_factor": list(factors["rope_factors_long.weight"]),
            "attention_factor": c.number(f"{prefix}.attn_factor", default), "original_max_position_embeddings": original,
        }  # fmt: skip
    kind = c.text(f"{prefix}.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    factor = c.number(f"{prefix}.factor", 1.0)
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return {"rope_type": kind, "factor": factor}
