"""`dummy:NAME`: the true shapes of well-known models, and random weights for them.

Owns: the registry of configs (as published on the hub) and `DummyCheckpoint`. Planning needs `dummy_spec` only. Knows nothing of files.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from twinpilots.errors import UserError
from twinpilots.kernels.quant_format import dequantize
from twinpilots.model.families import spec_from_config
from twinpilots.model.quantized import tensor_format
from twinpilots.model.spec import ModelSpec
from twinpilots.model.tensor_names import is_small, tensor_shapes
from twinpilots.model.tensors import Array, RawTensor, convert
from twinpilots.model.weight_format import FormatName, WeightFormat

QUANTIZED_BLOCKS = 8_191  # of them kept quantised; prime, too
BLOCK = 1_048_573  # random values kept; prime, so that the rows of a tiled tensor differ
_ALL_32 = np.array([160] * 8 + [0] * 4, np.uint8)  # ggml's twelve bytes of eight 6-bit scales and mins that all are 32


def _sizes(hidden: int, layers: int, heads: int, mlp: int, kv_heads: int | None = None) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp, "num_key_value_heads": kv_heads or heads,
        "dtype": "bfloat16",
    }  # fmt: skip


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = _sizes(hidden, layers, heads, 4 * hidden)
    return {**sizes, "model_type": "opt", "ffn_dim": 4 * hidden, "vocab_size": 50272, "max_position_embeddings": 2048, "dtype": "float16"}


def _llama(hidden: int, layers: int, heads: int, mlp: int, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    base = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "float16"}
    return {**_sizes(hidden, layers, heads, mlp, kv_heads), **base, **more}


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


_LLAMA1: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500_000.0, "dtype": "bfloat16"}
_LLAMA31: dict[str, Any] = {**_LLAMA3, "max_position_embeddings": 131072}
_MISTRAL: dict[str, Any] = {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096, "dtype": "bfloat16"}
_QWEN25: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
}  # fmt: skip
_QWEN3: dict[str, Any] = {**_QWEN25, "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
_GEMMA2: dict[str, Any] = {"model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-13b": _llama(5120, 40, 40, 13824, **_LLAMA1),
    "llama-33b": _llama(6656, 60, 52, 17920, **_LLAMA1),
    "llama-2-7b": _llama(4096, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 28672, 8),
    "llama-3-8b": _llama(4096, 32, 32, 14336, 8, **_LLAMA3),
    "llama-3-70b": _llama(8192, 80, 64, 28672, 8, **_LLAMA3),
    "llama-3.1-405b": _llama(16384, 126, 128, 53248, 8, **_LLAMA31, rope_scaling=_llama3_rope(8.0)),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, 8, **_LLAMA31, rope_scaling=_llama3_rope(32.0), tie_word_embeddings=True),
    "mistral-7b": _llama(4096, 32, 32, 14336, 8, **_MISTRAL),
    "qwen2.5-7b": _llama(3584, 28, 28, 18944, 4, **_QWEN25),
    "qwen2.5-32b": _llama(5120, 64, 40, 27648, 8, **_QWEN25),
    "qwen3-8b": _llama(4096, 36, 32, 12288, 8, **_QWEN3),
    "qwen3-32b": _llama(5120, 64, 64, 25600, 8, **_QWEN3),
    "gemma-2-27b": _llama(4608, 46, 32, 36864, 16, **_GEMMA2, head_dim=128, query_pre_attn_scalar=144, sliding_window=4096, dtype="bfloat16"),
    "minitron-8b": _llama(4096, 40, 32, 11520, 8, vocab_size=131072, head_dim=128, max_position_embeddings=8192, rope_theta=1e6),
    "smollm2-135m": _llama(576, 30, 9, 1536, 3, vocab_size=49152, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, dtype="bfloat16"),
}


def dummy_spec(name: str, dtype: str | None = None) -> ModelSpec:
    """The spec of ``dummy:NAME`` (the prefix may be left out). Raises UserError, listing the known names."""
    short = name.removeprefix("dummy:").lower()
    if short not in CONFIGS:
        raise UserError(f"unknown model 'dummy:{short}'; known are {', '.join(CONFIGS)}")
    return spec_from_config(CONFIGS[short], name=f"dummy:{short}", dtype=dtype)


class DummyCheckpoint:
    """Random weights of a spec's true shapes, made when asked for: a `Checkpoint` without a file.

    Linears are about N(0, 1 / fan in), so that activations keep their size; norms are the identity, biases zero. Deterministic in (spec, seed). What the
    spec keeps quantised repeats a few blocks of random codes: making it takes no longer than copying it.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        self.seed = seed
        self.source_dtype: str = spec.weight_dtype
        self.generation_config: dict[str, Any] = {"eos_token_ids": [], "bos_token_id": None}
        self.fingerprint = f"dummy-{zlib.crc32(repr(spec).encode()):08x}-{seed}"
        self._shapes = tensor_shapes(spec)
        self._block = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        self._quantized: dict[tuple[FormatName, int], Array] = {}  # by format and fan in

    def tensor(self, tensor_id: str) -> RawTensor:
        """The tensor of our id. ``embed`` and a tied ``lm_head`` are equal."""
        shape = self._shapes[tensor_id]
        if is_small(tensor_id):
            value = 1.0 - self.spec.norm_offset if tensor_id.endswith("norm") else 0.0
            return RawTensor(data=np.full(shape, value, np.float32), dtype="fp32")
        chosen = tensor_format(self.spec, tensor_id)
        if chosen is not None:
            return RawTensor(data=dequantize(self.blocks(tensor_id), chosen), dtype="fp32")
        shift = self._shift(tensor_id) % BLOCK
        block = np.roll(self._block, shift) * np.float32(shape[-1] ** -0.5)
        values = convert(RawTensor(data=block, dtype="fp32"), self.spec.weight_dtype, tensor_id)
        return RawTensor(data=np.resize(values.data, shape), dtype=values.dtype)

    def blocks(self, tensor_id: str) -> Array:
        """Row blocks of a quantised tensor."""
        chosen, (rows, width) = tensor_format(self.spec, tensor_id), self._shapes[tensor_id]
        assert chosen is not None, f"{tensor_id} is not quantised"
        key = chosen.name, width
        if key not in self._quantized:
            self._quantized[key] = _random_blocks(chosen, width, self.seed)
        return np.resize(np.roll(self._quantized[key], self._shift(tensor_id) % QUANTIZED_BLOCKS, 0), (rows, width // chosen.block, chosen.block_bytes))

    def _shift(self, tensor_id: str) -> int:
        """Where in the random values a tensor begins."""
        return zlib.crc32(("embed" if tensor_id == "lm_head" and self.spec.tied else tensor_id).encode())

    def close(self) -> None:
        """Nothing is held."""


def _random_blocks(chosen: WeightFormat, width: int, seed: int) -> Array:
    """``[QUANTIZED_BLOCKS, block_bytes]`` of row blocks: random codes, and scales that spread them evenly about zero with a variance of 1 / width. Works for
    every format, also those that weights are never quantised to."""
    blocks = np.random.default_rng(seed).integers(0, 256, (QUANTIZED_BLOCKS, chosen.block_bytes), dtype=np.uint8)
    levels = 1 << chosen.bits
    step, middle = (12 / (width * (levels**2 - 1))) ** 0.5, (levels - 1) / 2
    if chosen.name == "q6_k":
        blocks[:, 192:208], step = 32, step / 32
    elif chosen.block == 256:
        blocks[:, 4:16], step = _ALL_32, step / 32
    first = 208 if chosen.name == "q6_k" else 0
    blocks[:, first : first + 2] = np.array([step], np.float16).view(np.uint8)
    second = {"q4_1": -middle * step, "q5_1": -middle * step, "q4_k": middle * step, "q5_k": middle * step}.get(chosen.name)
    if chosen.name.startswith("q4_z"):
        second = middle
    if second is not None:
        blocks[:, 2:4] = np.array([second], np.float16).view(np.uint8)
    return blocks
