"""The shape of a model: parameters, bytes and FLOPs of every operation. Pure arithmetic.

Owns: `ModelSpec` (what the decoder computes), `OpSpec` (one linear operation and the units it may be split in).
Knows nothing of devices, files, plans or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import lcm
from typing import Literal

from twinpilots.config import KvDtype
from twinpilots.model.weight_format import FORMATS, FormatName, WeightFormat

WeightDtype = Literal["fp32", "bf16", "fp16"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
OpName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "fc1", "down_proj", "fc2", "lm_head"]
BYTES_PER_WEIGHT: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
KV_SCALE_BYTES = 4  # of int8 KV: fp32, one per token, head, and k or v
KV_PAGE_ALIGN_BYTES = 64  # of a page of int8 KV
INPUT_SPLIT: tuple[OpName, ...] = ("o_proj", "down_proj", "fc2")  # split along the input, all others along the output


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """One rotary table. ``inv_freq`` has ``rotary_dim / 2`` entries (rad per position); ``scale`` multiplies cos and sin.

    ``long_inv_freq`` (longrope) replaces ``inv_freq`` for a sequence longer than ``original_max_position``.
    """

    rotary_dim: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    original_max_position: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What differs between the layers of one model: the attention window (tokens, None: all), the rotary table (None: no rotary), and the formats of its
    quantised ops (all others keep the model's weight dtype)."""

    window: int | None = None
    rope: int | None = 0
    formats: tuple[tuple[OpName, FormatName], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One linear op: ``y[M, n_out] = x[M, n_in] @ W``, split along ``split_dim`` in units.

    ``rows`` is the extent of the split dimension: n_out for "out" ops (q, k, v, gate_up, fc1, lm_head), n_in for "in" ops (o, down, fc2).
    For gate_up_proj a row is one gate row together with its up row. ``row_bytes`` counts the weights of one row, biases excluded. ``fast``: the CPU pilot
    rounds this op's activations to 8 bits.
    ``expert`` is None for a dense layer; ``active_frac`` is the fraction of tokens that reach the op (1.0 when dense).
    """

    name: OpName
    layer: int  # -1 for lm_head
    rows: int
    width: int  # the extent of the other dimension (of one weight row: hidden size for gate_up)
    unit_rows: int
    row_elements: int  # weights in one row: width, or 2 * width for gate_up_proj
    format: WeightFormat
    split_dim: Literal["out", "in"]
    has_bias: bool
    fast: bool = False
    expert: int | None = None
    active_frac: float = 1.0

    @cached_property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.row_elements, self.split_dim)

    @property
    def rate_key(self) -> str:
        """The op's kind in a hardware profile: "fp16/out", "q4_1/in", "q4_1/fast/out"."""
        return f"{self.format.name}{'/fast' if self.fast else ''}/{self.split_dim}"

    @property
    def num_units(self) -> int:
        return -(-self.rows // self.unit_rows)

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.row_bytes

    def flops(self, tokens: float) -> float:
        """Floating-point operations for ``tokens`` tokens (2 per weight and token)."""
        return 2.0 * self.rows * self.row_elements * tokens * self.active_frac

    def round_rows(self, rows: float) -> int:
        """``rows`` rounded to the nearest unit boundary in [0, rows]."""
        return min(self.rows, max(0, round(rows / self.unit_rows)) * self.unit_rows)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that the planner and the decoder need to know about a dense decoder-only model."""

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_model_len: int
    weight_dtype: WeightDtype
    activation: Activation
    gated_mlp: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # gain = norm_offset + weight (1.0 for Gemma)
    post_norms: bool = False  # a norm after attention and after the MLP, before the residual is added (Gemma 2 and 3)
    qk_norm: bool = False  # a per-head norm of q and k before rotary (Qwen3, Gemma 3)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    ropes: tuple[RopeSpec, ...] = ()
    learned_positions: int = 0  # rows of a learned position table (OPT); 0: none
    learned_position_offset: int = 0
    attention_scale: float | None = None  # multiplies q k^T; None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    tied: bool = False
    head_format: FormatName | None = None  # of lm_head (and with it of a tied embedding); None: the weight dtype
    embed_format: FormatName | None = None  # of an untied embedding table
    input_block: int = 1  # o_proj, down_proj and fc2 are cut at multiples of this many inputs: of the blocks of all their formats, in every layer
    fast_activations: bool = False  # the CPU pilot rounds the activations of quantised linears to 8 bits
    num_experts: int = 0  # 0: dense. Planning names experts; executing them comes later
    experts_per_token: int = 0
    extra: dict[str, str] = field(default_factory=dict, compare=False)  # free-form provenance shown to the user

    def __post_init__(self) -> None:
        positive = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_model_len")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"ModelSpec.{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        for name, chosen in {item for layer in self.layers for item in layer.formats}:
            if name in INPUT_SPLIT and self.input_block % FORMATS[chosen].block:
                raise ValueError(f"input_block {self.input_block} is not a multiple of the {FORMATS[chosen].block} inputs of a block of {chosen} ({name})")

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def weight_bytes_per_element(self) -> int:
        return BYTES_PER_WEIGHT[self.weight_dtype]

    def format_of(self, layer: int, name: OpName) -> WeightFormat:
        """The format of an op's weights (layer -1: lm_head)."""
        chosen = self.head_format if layer < 0 else dict(self.layers[layer].formats).get(name)
        return FORMATS[chosen or self.weight_dtype]

    @property
    def formats(self) -> tuple[object, ...]:
        """Everything about the formats of the weights: equal for models that differ in nothing else, and only then."""
        return tuple(layer.formats for layer in self.layers), self.head_format, self.embed_format, self.fast_activations

    @cached_property
    def format_classes(self) -> tuple[int, ...]:
        """The class of each layer: layers of one class have the same formats. Classes are numbered in the order of their first layers."""
        numbers: dict[tuple[tuple[OpName, FormatName], ...], int] = {}
        return tuple(numbers.setdefault(layer.formats, len(numbers)) for layer in self.layers)

    @cached_property
    def one_layer_per_class(self) -> ModelSpec:
        """The same model with one layer of each format class: enough to ask about shapes and bytes."""
        classes = self.format_classes
        return self.of_layers(tuple(classes.index(number) for number in range(max(classes) + 1)))

    def of_layers(self, layers: tuple[int, ...]) -> ModelSpec:
        """The same model with these of its layers alone."""
        made = self._made_short
        if layers not in made:
            made[layers] = replace(self, layers=tuple(self.layers[layer] for layer in layers))
        return made[layers]

    @cached_property
    def _made_short(self) -> dict[tuple[int, ...], ModelSpec]:
        """By layers: plans are priced by the same few of them again and again, whose ops are then made once."""
        return {}

    def ops(self, unit_rows: int) -> tuple[OpSpec, ...]:
        """All linear ops in execution order: layer 0's q, k, v, o, MLP, ..., lm_head last. Heads and blocks of quantised weights are never cut."""
        made = self._made_ops
        if unit_rows not in made:
            made[unit_rows] = _ops(self, unit_rows)
        return made[unit_rows]

    @cached_property
    def _made_ops(self) -> dict[int, tuple[OpSpec, ...]]:
        """By unit: pricing a plan asks for the ops of the same few models again and again."""
        return {}

    def layer_ops(self, layer: int, unit_rows: int) -> dict[str, OpSpec]:
        """The ops of one layer by name."""
        return {op.name: op for op in self.ops(unit_rows) if op.layer == layer}

    @cached_property
    def rate_keys(self) -> tuple[str, ...]:
        """The kinds of linears that the model has, as hardware profiles name them."""
        return tuple(sorted({op.rate_key for op in self.ops(64)}))

    @cached_property
    def linear_bytes(self) -> int:
        """Bytes of all linears with lm_head; the embedding's gather, biases and norms excluded."""
        return sum(op.weight_bytes for op in self.ops(64))

    @property
    def table_format(self) -> WeightFormat:
        """The format that token embeddings are gathered from."""
        return FORMATS[(self.head_format if self.tied else self.embed_format) or self.weight_dtype]

    @property
    def table_bytes(self) -> int:
        """Bytes of the token table (0 when tied: lm_head's tensor serves both)."""
        return 0 if self.tied else self.vocab_size * self.table_format.row_bytes(self.hidden_size, "out")

    @property
    def position_bytes(self) -> int:
        """Bytes of the learned position table."""
        return self.learned_positions * self.hidden_size * self.weight_bytes_per_element

    @property
    def embedding_bytes(self) -> int:
        """Bytes of both tables."""
        return self.table_bytes + self.position_bytes

    @cached_property
    def small_bytes(self) -> int:
        """Bytes of norms and biases, kept in fp32 on every device that computes."""
        per_layer = self.hidden_size * (2 + 2 * self.post_norms) * (2 if self.norm == "layernorm" else 1)
        per_layer += 2 * self.head_dim * self.qk_norm + (self.q_size + 2 * self.kv_size) * self.qkv_bias
        per_layer += self.hidden_size * self.o_bias + (self.hidden_size + self.intermediate_size * (1 + self.gated_mlp)) * self.mlp_bias
        return 4 * (per_layer * self.num_layers + self.hidden_size * (2 if self.norm == "layernorm" else 1))

    @cached_property
    def num_parameters(self) -> int:
        """Parameters as published: a tied table counts once; norms and biases included."""
        tables = self.hidden_size * (self.learned_positions + (0 if self.tied else self.vocab_size))
        return sum(op.rows * op.row_elements for op in self.ops(64)) + tables + self.small_bytes // 4

    def kv_token_bytes(self, kv_dtype: KvDtype) -> int:
        """Bytes of K and V of one token in one layer, the scales of int8 counted."""
        if kv_dtype == "int8":
            return 2 * (self.kv_size + KV_SCALE_BYTES * self.num_kv_heads)
        return 2 * self.kv_size * BYTES_PER_WEIGHT[kv_dtype]

    def kv_page_bytes(self, kv_dtype: KvDtype, page_size: int) -> int:
        """Bytes of one page of one layer (docs/execution.md, "KV pages"): of int8 the codes, then the scales, on an address that suits them, rounded up."""
        if kv_dtype != "int8":
            return page_size * self.kv_token_bytes(kv_dtype)
        codes, scales = 2 * self.kv_size * page_size, 2 * self.num_kv_heads * page_size * KV_SCALE_BYTES
        scales_offset = -(-codes // KV_SCALE_BYTES) * KV_SCALE_BYTES
        return -(-(scales_offset + scales) // KV_PAGE_ALIGN_BYTES) * KV_PAGE_ALIGN_BYTES

    def kv_bytes_per_token(self, kv_dtype: KvDtype) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.kv_token_bytes(kv_dtype) * self.num_layers

    def attention_flops(self, query_tokens: float, context: float) -> float:
        """FLOPs of softmax(qK^T)V of one layer for ``query_tokens`` queries that each see ``context`` tokens."""
        return 4.0 * self.q_size * query_tokens * context


def _ops(spec: ModelSpec, unit_rows: int) -> tuple[OpSpec, ...]:
    head_unit = max(1, unit_rows // spec.head_dim) * spec.head_dim
    whole_heads = lcm(spec.head_dim, spec.input_block)
    o_unit = max(1, unit_rows // whole_heads) * whole_heads
    mlp_unit = lcm(unit_rows, spec.input_block)  # the CPU's slices of down_proj are its rows of gate_up_proj: one grid for both

    def op(name: OpName, layer: int, rows: int, width: int, unit: int, *, bias: bool = False, pair: int = 1) -> OpSpec:
        chosen = spec.format_of(layer, name)
        return OpSpec(
            name=name, layer=layer, rows=rows, width=width, unit_rows=unit, row_elements=width * pair, format=chosen,
            split_dim="in" if name in INPUT_SPLIT else "out", has_bias=bias, fast=spec.fast_activations and chosen.is_quantized,
        )  # fmt: skip

    result = []
    for layer in range(spec.num_layers):
        result += [
            op("q_proj", layer, spec.q_size, spec.hidden_size, head_unit, bias=spec.qkv_bias),
            op("k_proj", layer, spec.kv_size, spec.hidden_size, head_unit, bias=spec.qkv_bias),
            op("v_proj", layer, spec.kv_size, spec.hidden_size, head_unit, bias=spec.qkv_bias),
            op("o_proj", layer, spec.q_size, spec.hidden_size, o_unit, bias=spec.o_bias),
        ]
        if spec.gated_mlp:
            result += [
                op("gate_up_proj", layer, spec.intermediate_size, spec.hidden_size, mlp_unit, bias=spec.mlp_bias, pair=2),
                op("down_proj", layer, spec.intermediate_size, spec.hidden_size, mlp_unit, bias=spec.mlp_bias),
            ]
        else:
            result += [
                op("fc1", layer, spec.intermediate_size, spec.hidden_size, mlp_unit, bias=spec.mlp_bias),
                op("fc2", layer, spec.intermediate_size, spec.hidden_size, mlp_unit, bias=spec.mlp_bias),
            ]
    result.append(op("lm_head", -1, spec.vocab_size, spec.hidden_size, unit_rows))
    return tuple(result)
