"""From a Hugging Face config to a `ModelSpec`: OPT, Llama 1 to 3.x, Mistral, Qwen2/2.5, Qwen3, Phi-3/3.5, Gemma 2, Gemma 3 (text).

Owns: `spec_from_config` and one short function per family that says how it differs from Llama. What a config means follows the modeling files of
transformers; anything they do that we do not run is an `UnsupportedModelError`. Knows nothing of files or tensors (see `tensor_names`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinpilots.errors import CheckpointError, UnsupportedModelError
from twinpilots.model.config_reader import MAX_LAYERS, ConfigReader
from twinpilots.model.rope import read_rope
from twinpilots.model.spec import BYTES_PER_WEIGHT, Activation, LayerSpec, ModelSpec, RopeSpec, WeightDtype

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu",
}  # fmt: skip
DTYPES: dict[str, WeightDtype] = {
    "float32": "fp32", "float": "fp32", "fp32": "fp32", "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16",
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
# Fields that switch on what we do not run, with the values that switch it off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,), "use_bidirectional_attention": (None, False), "_remove_final_layer_norm": (None, False),
    "do_layer_norm_before": (None, True), "layer_norm_elementwise_affine": (None, True),
    "num_local_experts": (None, 0, 1), "num_experts": (None, 0, 1), "kv_lora_rank": (None,), "add_cross_attention": (None, False),
}  # fmt: skip

Overrides = dict[str, Any]


def spec_from_config(config: Mapping[str, Any], *, name: str, dtype: str | None = None) -> ModelSpec:
    """The model that ``config`` (the content of a config.json) describes. ``dtype`` overrides the config's weight dtype.

    Raises UnsupportedModelError for an architecture or feature that we do not run, CheckpointError for a missing or malformed field.
    """
    reader, family = _resolve(ConfigReader(config, name))
    for key, off in REFUSED.items():
        if reader.values.get(key) not in off:
            raise UnsupportedModelError(f"{name}: {key} = {str(reader.values[key])[:60]} is not supported; use a checkpoint without it")
    weight_dtype = _weight_dtype(reader, dtype)
    common = _common(reader, family, weight_dtype)
    return ModelSpec(name=name, **{**common, **family.read(reader, common)})


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type differs from Llama: ``read`` returns the ModelSpec fields to set, given the config and the common fields."""

    name: str
    read: Callable[[ConfigReader, Overrides], Overrides]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields that configs of the family leave out


def _llama(c: ConfigReader, common: Overrides) -> Overrides:
    bias = c.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": c.flag("mlp_bias"), **_one_rope(c, common)}


def _mistral(c: ConfigReader, common: Overrides) -> Overrides:
    kinds = c.optional_texts("layer_types", len(common["layers"])) or []
    if FULL in kinds and c.values.get("sliding_window") is not None:
        raise UnsupportedModelError(f"{c.where}: layer_types of a Mistral with full attention in some layers is not supported; set sliding_window to null")
    return {"layers": _same_window(c, common), **_one_rope(c, common)}


def _qwen2(c: ConfigReader, common: Overrides) -> Overrides:
    return {"qkv_bias": True, "layers": _qwen_windows(c, common), **_one_rope(c, common)}


def _qwen3(c: ConfigReader, common: Overrides) -> Overrides:
    bias = c.flag("attention_bias")
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, "layers": _qwen_windows(c, common), **_one_rope(c, common)}


def _phi3(c: ConfigReader, common: Overrides) -> Overrides:
    return {"layers": _same_window(c, common), **_one_rope(c, common)}


def _gemma2(c: ConfigReader, common: Overrides) -> Overrides:
    return {
        **_gemma(c, common),
        "attention_softcap": c.optional_number("attn_logit_softcapping"),
        "layers": _alternating(c, common, pattern=2),
        **_one_rope(c, common),
    }


def _gemma3(c: ConfigReader, common: Overrides) -> Overrides:
    pattern = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", 6))
    layers = _alternating(c, common, pattern=pattern)
    local, full = _two_ropes(c, common)
    layers = tuple(LayerSpec(window=layer.window, rope=0 if layer.window else 1) for layer in layers)
    return {**_gemma(c, common), "qk_norm": True, "layers": layers, "ropes": (local, full)}


def _gemma(c: ConfigReader, common: Overrides) -> Overrides:
    """What Gemma 2 and 3 share: gains stored less one, norms on both sides of each block, an embedding scaled by a factor of the weights' precision."""
    bias = c.flag("attention_bias")
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_scale": c.number("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": c.optional_number("final_logit_softcapping"),
        "embed_scale": round_to(common["hidden_size"] ** 0.5, common["weight_dtype"]),
    }


def _opt(c: ConfigReader, common: Overrides) -> Overrides:
    width = c.integer("word_embed_proj_dim", common["hidden_size"])
    if width != common["hidden_size"]:
        raise UnsupportedModelError(f"{c.where}: word_embed_proj_dim {width} (projected embeddings, as in opt-350m) is not supported")
    bias = c.flag("enable_bias", True)
    return {
        "num_kv_heads": common["num_heads"],
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "learned_positions": common["max_model_len"] + 2,
        "learned_position_offset": 2,
        "layers": tuple(LayerSpec(rope=None) for _ in common["layers"]),
    }


_GEMMA_DEFAULTS = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_GEMMA2_DEFAULTS = {**_GEMMA_DEFAULTS, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
FAMILIES: dict[str, Family] = {
    "llama": Family(name="llama", read=_llama),
    "mistral": Family(name="mistral", read=_mistral, defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(name="qwen2", read=_qwen2, defaults={"sliding_window": 4096}),
    "qwen3": Family(name="qwen3", read=_qwen3, defaults={"sliding_window": 4096, "head_dim": 128}),
    "phi3": Family(name="phi3", read=_phi3, defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}),
    "gemma2": Family(name="gemma2", read=_gemma2, defaults=_GEMMA2_DEFAULTS),
    "gemma3_text": Family(name="gemma3", read=_gemma3, defaults={**_GEMMA_DEFAULTS, "max_position_embeddings": 131072, "vocab_size": 262208}),
    "opt": Family(name="opt", read=_opt, defaults={"tie_word_embeddings": True}),
}
_RENAMED = {"ffn_dim": "intermediate_size", "activation_function": "hidden_act", "hidden_activation": "hidden_act"}


def round_to(value: float, dtype: WeightDtype) -> float:
    """``value`` rounded to the nearest number of ``dtype`` (ties to even)."""
    if dtype == "bf16":
        bits = int(np.float32(value).view(np.uint32))
        return float(np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32))
    return float(np.float16(value)) if dtype == "fp16" else float(np.float32(value))


def _resolve(reader: ConfigReader) -> tuple[ConfigReader, Family]:
    """The reader of the text model (nested ``text_config`` included, defaults and old spellings filled in) and its family."""
    model_type = reader.text("model_type")
    nested = reader.section("text_config")
    values = dict(reader.values)
    if nested is not None:
        inherited = {key: values[key] for key in ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config") if values.get(key) is not None}
        values = {**inherited, **nested.values}
        model_type = nested.text("model_type", "gemma3_text" if model_type == "gemma3" else model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(f"{reader.where}: architecture '{model_type}' is not supported; supported are {', '.join(sorted(FAMILIES))}")
    values = {**family.defaults, **values}
    for old, new in _RENAMED.items():
        if values.get(old) is not None:
            values[new] = values[old]
    return ConfigReader(values, reader.where), family


def _common(c: ConfigReader, family: Family, weight_dtype: WeightDtype) -> Overrides:
    """The fields that every family reads alike."""
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    kv_heads = c.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{c.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = c.optional_integer("head_dim", high=65536)
    if head_dim is None:
        if hidden % heads:
            raise CheckpointError(f"{c.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is missing")
        head_dim = hidden // heads
    activation = c.text("hidden_act", "relu" if family.name == "opt" else "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"{c.where}: activation '{activation}' is not supported; supported are {', '.join(ACTIVATIONS)}")
    return {
        "family": family.name, "vocab_size": c.integer("vocab_size"), "hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads,
        "head_dim": head_dim, "intermediate_size": c.integer("intermediate_size"),
        "layers": (LayerSpec(),) * c.integer("num_hidden_layers", high=MAX_LAYERS),
        "max_model_len": c.integer("max_position_embeddings"), "weight_dtype": weight_dtype, "activation": ACTIVATIONS[activation],
        "norm_eps": c.number("rms_norm_eps", 1e-6), "tied": c.flag("tie_word_embeddings"),
    }  # fmt: skip


def _weight_dtype(c: ConfigReader, dtype: str | None) -> WeightDtype:
    text = dtype or c.text("dtype", c.text("torch_dtype", "float32")).removeprefix("torch.")
    if text not in DTYPES:
        raise UnsupportedModelError(f"{c.where}: weight dtype '{text}' is not supported; supported are {', '.join(BYTES_PER_WEIGHT)}")
    return DTYPES[text]


def _same_window(c: ConfigReader, common: Overrides) -> tuple[LayerSpec, ...]:
    """One window for every layer (Mistral, Phi-3); null: none."""
    return (LayerSpec(window=c.optional_integer("sliding_window")),) * len(common["layers"])


def _qwen_windows(c: ConfigReader, common: Overrides) -> tuple[LayerSpec, ...]:
    """Qwen: layers from ``max_window_layers`` on slide, when ``use_sliding_window`` says so."""
    count = len(common["layers"])
    window = c.optional_integer("sliding_window") if c.flag("use_sliding_window") else None
    first = c.integer("max_window_layers", 28, low=0)
    default = [SLIDING if window is not None and i >= first else FULL for i in range(count)]
    return _windows(c, c.optional_texts("layer_types", count) or default, window)


def _alternating(c: ConfigReader, common: Overrides, *, pattern: int) -> tuple[LayerSpec, ...]:
    """Gemma: every ``pattern``-th layer attends to everything, the others slide, unless ``layer_types`` says otherwise."""
    count = len(common["layers"])
    default = [SLIDING if (i + 1) % pattern else FULL for i in range(count)]
    return _windows(c, c.optional_texts("layer_types", count) or default, c.optional_integer("sliding_window"))


def _windows(c: ConfigReader, kinds: list[str], window: int | None) -> tuple[LayerSpec, ...]:
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise UnsupportedModelError(f"{c.where}: layer type '{unknown[0]}' is not supported; supported are {FULL} and {SLIDING}")
    if SLIDING in kinds and window is None:
        raise c.error("sliding_window", "an integer, because layer_types has sliding layers")
    return tuple(LayerSpec(window=window if kind == SLIDING else None) for kind in kinds)


def _one_rope(c: ConfigReader, common: Overrides) -> Overrides:
    """One rotary table for all layers, from either spelling: ``rope_parameters``, or ``rope_scaling`` beside ``rope_theta``."""
    rope = c.section("rope_scaling") or c.section("rope_parameters") or ConfigReader({}, c.where)
    by_layer = [rope.section(kind) for kind in (FULL, SLIDING) if kind in rope]
    present = [section for section in by_layer if section is not None]
    if present:
        if any(section.values != present[0].values for section in present):
            raise UnsupportedModelError(f"{c.where}: rope_parameters that differ by layer type are supported for Gemma 3 only")
        rope = present[0]
    return {"ropes": (_rope(c, rope, common, default_theta=10_000.0),)}


def _two_ropes(c: ConfigReader, common: Overrides) -> tuple[RopeSpec, RopeSpec]:
    """Gemma 3: the sliding layers' table (never scaled by the old spelling) and the full layers' table."""
    empty = ConfigReader({}, c.where)
    new = c.section("rope_parameters") or empty
    full = c.section("rope_scaling") or new.section(FULL) or empty
    local = new.section(SLIDING) or empty
    full_spec = _rope(c, full, common, default_theta=1_000_000.0)
    theta = local.number("rope_theta", c.number("rope_local_base_freq", 10_000.0))
    local_values = {"rope_type": "default", **local.values, "rope_theta": theta}
    return _rope(c, ConfigReader(local_values, local.where), common, default_theta=theta), full_spec


def _rope(c: ConfigReader, rope: ConfigReader, common: Overrides, *, default_theta: float) -> RopeSpec:
    phi3 = common["family"] == "phi3"
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if phi3 and rope_type in ("su", "yarn"):  # early Phi-3 configs spelled longrope so
        rope_type = "longrope"
    theta = rope.number("rope_theta", c.number("rope_theta", default_theta))
    partial = rope.number("partial_rotary_factor", c.number("partial_rotary_factor", 1.0))
    if partial != 1.0 and (not phi3 or partial > 1.0):
        raise UnsupportedModelError(f"{c.where}: partial_rotary_factor {partial} is not supported for {common['family']}; only Phi-3 rotates a part of a head")
    longest = int(common["max_model_len"])
    original = c.optional_integer("original_max_position_embeddings") or rope.integer("original_max_position_embeddings", longest)
    return read_rope(rope, rope_type=rope_type, theta=theta, rotary_dim=int(common["head_dim"] * partial), max_positions=longest, original_max=original)
