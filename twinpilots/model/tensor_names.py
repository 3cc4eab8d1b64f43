"""Which tensor of a checkpoint holds which tensor of ours: names, slices and transforms as data, for Hugging Face and GGUF spellings.

Owns: our tensor ids and their shapes, and the tables that map them. Our ids: ``embed``, ``positions`` (OPT), ``final_norm``, ``lm_head``, and for layer L
``L.q_proj L.k_proj L.v_proj L.o_proj``, ``L.gate_proj L.up_proj L.down_proj`` or ``L.fc1 L.fc2``, ``L.attn_norm L.mlp_norm``,
``L.attn_post_norm L.mlp_post_norm`` (Gemma), ``L.q_norm L.k_norm``; ``+ ".bias"`` for biases and layernorms. Linear weights are ``[out, in]``, row-major.
Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from twinpilots.model.spec import ModelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Where one of our tensors lies: the file's tensor and its shape, then the rows to cut out, heads to un-permute, and a number to subtract."""

    name: str
    shape: Shape
    rows: tuple[int, int] | None = None
    unpermute_heads: int = 0  # llama-arch GGUF interleaves the two rotary halves of every q and k head
    subtract: float = 0.0  # Gemma GGUFs store gain + 1


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to name tensors. ``layer`` maps our per-layer names; ``fused`` names share one tensor, stacked in the order q, k, v or gate, up."""

    layer_prefix: str
    layer: Mapping[str, str]
    embed: str
    final_norm: str
    lm_head: str
    positions: str = ""


_LLAMA = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_PHI3 = {**_LLAMA, **dict.fromkeys(_QKV, "self_attn.qkv_proj"), **dict.fromkeys(_GATE_UP, "mlp.gate_up_proj")}
_GEMMA = {
    **_LLAMA, "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
_OPT = {
    **_LLAMA, "o_proj": "self_attn.out_proj", "fc1": "fc1", "fc2": "fc2", "attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm",
}  # fmt: skip
HF_LAYER_NAMES = {"phi3": _PHI3, "gemma2": _GEMMA, "gemma3": _GEMMA, "opt": _OPT}  # every other family: _LLAMA
HF_PREFIXES = {"opt": ("model.decoder.", "decoder.")}  # every other family:
_HF_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")

_GGUF = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm",
}  # fmt: skip
GGUF_LAYER_NAMES = {"phi3": {**_GGUF, **dict.fromkeys(_QKV, "attn_qkv"), **dict.fromkeys(_GATE_UP, "ffn_up")}}

# Tensors that are known to be unused: silent. (Vision parts of multimodal checkpoints, stored rotary tables.)
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|^rope_(freqs|factors_long|factors_short)\.|vision_tower\.|vision_model\.|multi_modal_projector\.|\.masked_bias$")


def hf_spelling(spec: ModelSpec, present: Collection[str]) -> Spelling:
    """The Hugging Face spelling of this family, with the prefix that ``present`` (the file's tensor names) uses."""
    norm = "final_layer_norm" if spec.family == "opt" else "norm"
    prefixes = HF_PREFIXES.get(spec.family, _HF_PREFIXES)
    prefix = next((p for p in prefixes if f"{p}{norm}.weight" in present), prefixes[0])
    head = "language_model.lm_head" if prefix.startswith("language_model.") else "lm_head"
    embed = f"{prefix}embed_tokens"
    if spec.tied and f"{embed}.weight" not in present and f"{head}.weight" in present:
        embed = head  # tied checkpoints keep one of the two names
    return Spelling(
        layer_prefix=f"{prefix}layers.{{}}.", layer=HF_LAYER_NAMES.get(spec.family, _LLAMA), embed=embed, final_norm=f"{prefix}{norm}", lm_head=head,
        positions=f"{prefix}embed_positions",
    )  # fmt: skip


def gguf_spelling(spec: ModelSpec) -> Spelling:
    """The GGUF spelling of this family."""
    return Spelling(layer_prefix="blk.{}.", layer=GGUF_LAYER_NAMES.get(spec.family, _GGUF), embed="token_embd", final_norm="output_norm", lm_head="output")


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the model by our id, in loading order, with its shape. ``lm_head`` is listed even when tied (same data as ``embed``)."""
    shapes: dict[str, Shape] = {"embed": (spec.vocab_size, spec.hidden_size)}
    if spec.learned_positions:
        shapes["positions"] = (spec.learned_positions, spec.hidden_size)
    for layer in range(spec.num_layers):
        shapes.update({f"{layer}.{name}": shape for name, shape in _layer_shapes(spec).items()})
    shapes.update(_norm_shapes(spec, "final_norm", spec.hidden_size))
    shapes["lm_head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def is_small(tensor_id: str) -> bool:
    """Whether the tensor is a norm or a bias: always fp32 (docs/execution.md)."""
    return tensor_id.endswith(("norm", ".bias"))


def tensor_plan(spec: ModelSpec, spelling: Spelling, dialect: Literal["hf", "gguf"] = "hf") -> dict[str, TensorSource]:
    """Our tensor ids -> where each lies in a checkpoint of this spelling."""
    gguf = dialect == "gguf"
    shapes = tensor_shapes(spec)
    plan = {}
    for tensor_id, shape in shapes.items():
        stem, kind = _stem(tensor_id)
        name, layer = _file_name(spec, spelling, stem)
        fused, rows = _fused_rows(layer, spelling, shapes, stem, kind)
        permuted = gguf and spec.family == "llama" and stem.endswith((".q_proj", ".k_proj"))
        heads = spec.num_heads if stem.endswith(".q_proj") else spec.num_kv_heads
        plan[tensor_id] = TensorSource(
            name=f"{name}.{kind}",
            shape=shape if rows is None else (fused, *shape[1:]),
            rows=rows,
            unpermute_heads=heads if permuted else 0,
            subtract=spec.norm_offset if gguf and stem.endswith("norm") else 0.0,
        )
    return plan


def harmless(spec: ModelSpec, spelling: Spelling, name: str) -> bool:
    """Whether an unused tensor of this name is expected in such a checkpoint."""
    return bool(HARMLESS.search(name)) or (spec.tied and name == f"{spelling.lm_head}.weight")


def _layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    hidden, q, kv, mlp = spec.hidden_size, spec.q_size, spec.kv_size, spec.intermediate_size
    shapes = _norm_shapes(spec, "attn_norm", hidden)
    shapes |= _linear_shapes("q_proj", q, hidden, spec.qkv_bias) | _linear_shapes("k_proj", kv, hidden, spec.qkv_bias)
    shapes |= _linear_shapes("v_proj", kv, hidden, spec.qkv_bias) | _linear_shapes("o_proj", hidden, q, spec.o_bias)
    for name in ("q_norm", "k_norm") if spec.qk_norm else ():
        shapes[name] = (spec.head_dim,)
    shapes |= _norm_shapes(spec, "mlp_norm", hidden)
    for name in ("attn_post_norm", "mlp_post_norm") if spec.post_norms else ():
        shapes |= _norm_shapes(spec, name, hidden)
    if spec.gated_mlp:
        shapes |= _linear_shapes("gate_proj", mlp, hidden, spec.mlp_bias) | _linear_shapes("up_proj", mlp, hidden, spec.mlp_bias)
        return shapes | _linear_shapes("down_proj", hidden, mlp, spec.mlp_bias)
    return shapes | _linear_shapes("fc1", mlp, hidden, spec.mlp_bias) | _linear_shapes("fc2", hidden, mlp, spec.mlp_bias)


def _norm_shapes(spec: ModelSpec, name: str, width: int) -> dict[str, Shape]:
    names = (name, f"{name}.bias") if spec.norm == "layernorm" else (name,)
    return dict.fromkeys(names, (width,))


def _linear_shapes(name: str, out: int, width: int, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {name: (out, width)}
    if bias:
        shapes[f"{name}.bias"] = (out,)
    return shapes


def _stem(tensor_id: str) -> tuple[str, str]:
    """``0.q_proj.bias`` -> (``0.q_proj``, ``bias``)."""
    return (tensor_id.removesuffix(".bias"), "bias") if tensor_id.endswith(".bias") else (tensor_id, "weight")


def _file_name(spec: ModelSpec, spelling: Spelling, stem: str) -> tuple[str, int | None]:
    if "." in stem:
        layer, name = stem.split(".", 1)
        return spelling.layer_prefix.format(layer) + spelling.layer[name], int(layer)
    if stem == "lm_head" and spec.tied:
        stem = "embed"
    return {"embed": spelling.embed, "positions": spelling.positions, "final_norm": spelling.final_norm, "lm_head": spelling.lm_head}[stem], None


def _fused_rows(layer: int | None, spelling: Spelling, shapes: Mapping[str, Shape], stem: str, kind: str) -> tuple[int, tuple[int, int] | None]:
    """(rows of the file's tensor, our rows in it) when several of our tensors share one; (0, None) otherwise."""
    if layer is None:
        return 0, None
    name = stem.split(".", 1)[1]
    group = [other for other in (*_QKV, *_GATE_UP) if spelling.layer.get(other) == spelling.layer[name]]
    if len(group) < 2:
        return 0, None
    suffix = ".bias" if kind == "bias" else ""
    sizes = [shapes[f"{layer}.{other}{suffix}"][0] for other in group]
    start = sum(sizes[: group.index(name)])
    return sum(sizes), (start, start + sizes[group.index(name)])
