"""A slow decoder in numpy, written from `ModelSpec` and docs/execution.md alone: the twin that every fast path can be held against.

logits = reference.forward(checkpoint, [5, 17, 99])      # fp64, [tokens, vocab]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import erf

from twinpilots.model.spec import ModelSpec, RopeSpec

Array = Any


def forward(checkpoint: Any, tokens: list[int]) -> Array:
    """Logits [tokens, vocab] of a whole sequence, no cache, fp64 arithmetic on the checkpoint's weights."""
    spec: ModelSpec = checkpoint.spec

    def w(tensor_id: str) -> Array:
        return checkpoint.tensor(tensor_id).float32().astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        return apply_norm(spec, x, w(name), w(f"{name}.bias") if spec.norm == "layernorm" else None)

    def linear(x: Array, name: str, bias: bool) -> Array:
        return x @ w(name).T + (w(f"{name}.bias") if bias else 0.0)

    x = w("embed")[tokens] * spec.embed_scale
    if spec.learned_positions:
        x = x + w("positions")[np.arange(len(tokens)) + spec.learned_position_offset]
    for layer in range(spec.num_layers):
        p = f"{layer}."
        a = linear(attention(spec, layer, norm(x, p + "attn_norm"), linear, norm, w), p + "o_proj", spec.o_bias)
        x = x + (norm(a, p + "attn_post_norm") if spec.post_norms else a)
        h = norm(x, p + "mlp_norm")
        if spec.gated_mlp:
            act = activate(spec.activation, linear(h, p + "gate_proj", spec.mlp_bias)) * linear(h, p + "up_proj", spec.mlp_bias)
            m = linear(act, p + "down_proj", spec.mlp_bias)
        else:
            m = linear(activate(spec.activation, linear(h, p + "fc1", spec.mlp_bias)), p + "fc2", spec.mlp_bias)
        x = x + (norm(m, p + "mlp_post_norm") if spec.post_norms else m)
    logits = norm(x, "final_norm") @ w("lm_head").T
    return logits if spec.logit_softcap is None else spec.logit_softcap * np.tanh(logits / spec.logit_softcap)


def attention(spec: ModelSpec, layer: int, h: Array, linear: Any, norm: Any, w: Any) -> Array:
    """Heads' outputs [tokens, q_size]."""
    count, p, shape = len(h), f"{layer}.", spec.layers[layer]
    q = linear(h, p + "q_proj", spec.qkv_bias).reshape(count, spec.num_heads, spec.head_dim)
    k = linear(h, p + "k_proj", spec.qkv_bias).reshape(count, spec.num_kv_heads, spec.head_dim)
    v = linear(h, p + "v_proj", spec.qkv_bias).reshape(count, spec.num_kv_heads, spec.head_dim)
    if spec.qk_norm:
        q, k = apply_norm(spec, q, w(p + "q_norm"), None), apply_norm(spec, k, w(p + "k_norm"), None)
    if shape.rope is not None:
        q, k = rotate(spec.ropes[shape.rope], q), rotate(spec.ropes[shape.rope], k)
    k, v = (np.repeat(t, spec.num_heads // spec.num_kv_heads, axis=1) for t in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * spec.softmax_scale
    if spec.attention_softcap is not None:
        scores = spec.attention_softcap * np.tanh(scores / spec.attention_softcap)
    distance = np.arange(count)[:, None] - np.arange(count)[None, :]
    seen = (distance >= 0) & (distance < (shape.window or count))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(count, spec.q_size)


def rotate(rope: RopeSpec, x: Array) -> Array:
    """Rotate-half on the first rotary_dim dims of x [tokens, heads, head_dim]; longrope looks at the sequence's length."""
    long = rope.long_inv_freq is not None and len(x) > (rope.original_max_position or 0)
    inv_freq = np.array(rope.long_inv_freq if long else rope.inv_freq)
    angles = np.arange(len(x))[:, None] * inv_freq
    cos, sin = (f(angles)[:, None, :] * rope.scale for f in (np.cos, np.sin))
    half = rope.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def apply_norm(spec: ModelSpec, x: Array, gain: Array, bias: Array | None) -> Array:
    gain = gain + spec.norm_offset
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.norm_eps) * gain
    return y if bias is None else y + bias


def activate(name: str, x: Array) -> Array:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
