"""A GGUF file of a llama-like model's true shapes with random weights, for llama.cpp: the format by hand, because a bare box has no package for it.

Owns the few parts of the format that such a file needs (version 3, little endian), and the tensors' names. Knows nothing of llama.cpp's options.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks.gpu_stock import random_block
from twinpilots.errors import UserError
from twinpilots.model.spec import ModelSpec

ALIGNMENT = 32
F32, TYPE_OF = 0, {"fp16": 1, "bf16": 30}  # ggml's numbers of tensor types
UINT32, FLOAT32, STRING = 4, 6, 8  # and of metadata values
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    """What llama.cpp asks of a llama model. No tokenizer: it makes up as many tokens as there are."""
    rope = spec.ropes[0]
    return {
        "general.architecture": "llama", "general.name": spec.name, "llama.vocab_size": spec.vocab_size, "llama.context_length": spec.max_model_len,
        "llama.embedding_length": spec.hidden_size, "llama.block_count": spec.num_layers, "llama.feed_forward_length": spec.intermediate_size,
        "llama.attention.head_count": spec.num_heads, "llama.attention.head_count_kv": spec.num_kv_heads, "llama.attention.key_length": spec.head_dim,
        "llama.attention.value_length": spec.head_dim, "llama.attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "llama.rope.dimension_count": rope.rotary_dim, "llama.rope.freq_base": float(rope.inv_freq[1] ** (-rope.rotary_dim / 2)),
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip


def tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape with the inputs last); norms have one dimension."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes = {
        "q_proj": (spec.q_size, hidden), "k_proj": (spec.kv_size, hidden), "v_proj": (spec.kv_size, hidden), "o_proj": (hidden, spec.q_size),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    yield "token_embd.weight", (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (hidden,)
        for name, shape in shapes.items():
            yield f"blk.{layer}.{NAMES[name]}.weight", shape
    yield "output_norm.weight", (hidden,)
    if not spec.tied:
        yield "output.weight", (spec.vocab_size, hidden)


def write_random_gguf(spec: ModelSpec, path: Path) -> None:
    """UserError for a model that is no llama in 16 bit."""
    if spec.norm != "rmsnorm" or not spec.gated_mlp or spec.qkv_bias or spec.qk_norm or len(spec.ropes) != 1 or spec.weight_dtype not in TYPE_OF:
        raise UserError(f"{spec.name} is no plain llama in 16 bit; such a GGUF is not made here")
    kind, block = TYPE_OF[spec.weight_dtype], random_block(spec)
    infos, offset = [], 0
    for name, shape in tensors(spec):
        num_bytes = int(np.prod(shape)) * (4 if len(shape) == 1 else 2)
        infos.append((name, shape, offset, num_bytes))
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        pairs = metadata(spec)
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(pairs)))
        for key, value in pairs.items():
            file.write(_string(key) + _value(value))
        for name, shape, at, _ in infos:
            file.write(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), F32 if len(shape) == 1 else kind, at))
        _pad(file)
        for _, shape, _, num_bytes in infos:
            _write_tensor(file, len(shape) == 1, num_bytes, memoryview(block))  # type: ignore[arg-type]
            _pad(file)


def _write_tensor(file: BinaryIO, is_norm: bool, num_bytes: int, block: memoryview) -> None:
    if is_norm:
        file.write(np.ones(num_bytes // 4, np.float32).tobytes())
        return
    for at in range(0, num_bytes, len(block)):
        file.write(block[: num_bytes - at])


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    return struct.pack("<If", FLOAT32, value) if isinstance(value, float) else struct.pack("<II", UINT32, value)
