"""Where everything of a plan lies: host arena and GPU memory, allocated once, before the first pass.

Owns the address of every buffer, weight, table and page. The sizes come from `plan.memory`, so that what the planner promised is what is taken.
Knows nothing of tasks or of how weights are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twinpilots.device.memory import Purpose
from twinpilots.kernels.abi import NULL, Space, address
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.packets import ALIGN_BYTES, align
from twinpilots.plan.plan import Plan

Alloc = Callable[[int, Purpose, int], int]  # (num_bytes, purpose, alignment) -> offset
Take = Callable[[int, Purpose], int]


def token_buffers(spec: ModelSpec) -> dict[str, int]:
    """Width in floats of each activation buffer with one row per token."""
    hidden = spec.hidden_size
    return {
        "x": hidden, "h": hidden, "qkv": spec.q_size + 2 * spec.kv_size, "attn": spec.q_size, "act": spec.intermediate_size, "part": hidden, "peer": hidden,
    }  # fmt: skip


def logit_buffers(spec: ModelSpec) -> dict[str, int]:
    """Width in floats of each activation buffer with one row per logit row."""
    return {"head": spec.hidden_size, "logits": spec.vocab_size}


def small_tensors(spec: ModelSpec) -> dict[str, int]:
    """Number of fp32 values of every norm, bias and rotary table that a computing device keeps. Names are the checkpoint's tensor ids."""
    layer_norm = spec.norm == "layernorm"
    sizes: dict[str, int] = {}

    def norm(name: str, size: int) -> None:
        sizes[name] = size
        if layer_norm:
            sizes[f"{name}.bias"] = size

    for layer in range(spec.num_layers):
        norm(f"{layer}.attn_norm", spec.hidden_size)
        norm(f"{layer}.mlp_norm", spec.hidden_size)
        if spec.post_norms:
            norm(f"{layer}.attn_post_norm", spec.hidden_size)
            norm(f"{layer}.mlp_post_norm", spec.hidden_size)
        if spec.qk_norm:
            sizes[f"{layer}.q_norm"] = sizes[f"{layer}.k_norm"] = spec.head_dim
        if spec.qkv_bias:
            sizes |= {f"{layer}.q_proj.bias": spec.q_size, f"{layer}.k_proj.bias": spec.kv_size, f"{layer}.v_proj.bias": spec.kv_size}
        if spec.o_bias:
            sizes[f"{layer}.o_proj.bias"] = spec.hidden_size
        if spec.mlp_bias:
            first = ("gate_proj", "up_proj") if spec.gated_mlp else ("fc1",)
            sizes |= {f"{layer}.{name}.bias": spec.intermediate_size for name in first}
            sizes[f"{layer}.{'down_proj' if spec.gated_mlp else 'fc2'}.bias"] = spec.hidden_size
    norm("final_norm", spec.hidden_size)
    return sizes


def rope_table_sizes(spec: ModelSpec, max_model_len: int) -> dict[str, int]:
    """Number of fp32 values of each cos and sin table; longrope keeps the short rows and then the long ones."""
    sizes = {}
    for number, rope in enumerate(spec.ropes):
        rows = max_model_len * (2 if rope.long_inv_freq else 1)
        sizes[f"rope{number}.cos"] = sizes[f"rope{number}.sin"] = rows * (rope.rotary_dim // 2)
    return sizes


def page_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of one page of one layer: K and V of page_size tokens."""
    return spec.kv_page_bytes(plan.kv_dtype, plan.page_size)


@dataclass
class KvRegion:
    """One tier's pages: the address of each layer that lives here."""

    base: int
    layers: dict[int, int]  # model layer -> ordinal in this tier
    layer_bytes: int

    def layer(self, layer: int) -> int:
        return self.base + self.layers[layer] * self.layer_bytes


@dataclass
class Layout:
    """Addresses (`abi.address`) of everything in one space, or NULL/absent when the device does not compute."""

    space: Space
    buffers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (address, row stride in floats)
    small: dict[str, int] = field(default_factory=dict)
    weights: dict[tuple[int, str], int] = field(default_factory=dict)  # (layer, op) -> address of the first row kept in this space
    rows: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)  # which rows of the op lie here
    kv: KvRegion | None = None
    ring: int = NULL
    staging: tuple[int, int] = (NULL, NULL)

    def weight(self, op: OpSpec, row: int) -> int:
        """The address of ``row`` of an op's packed weights."""
        key = (op.layer, op.name)
        return self.weights[key] + (row - self.rows[key][0]) * op.row_bytes


def lay_out(spec: ModelSpec, plan: Plan, space: Space, alloc: Alloc) -> Layout:
    """Allocates everything that ``plan`` keeps in ``space`` through ``alloc`` and returns where it lies."""
    layout = Layout(space)
    on_gpu = space == Space.GPU

    def take(num_bytes: int, purpose: Purpose) -> int:
        return address(space, alloc(align(num_bytes), purpose, ALIGN_BYTES)) if num_bytes else NULL

    _lay_out_weights(spec, plan, layout, take)
    computes = plan.uses_gpu if on_gpu else plan.uses_cpu
    if computes:
        for name, count in (small_tensors(spec) | rope_table_sizes(spec, plan.max_model_len)).items():
            layout.small[name] = take(4 * count, "weights")
    for name, width in token_buffers(spec).items():
        if computes or (not on_gpu and name == "x"):
            layout.buffers[name] = (take(4 * width * plan.max_pass_tokens, "workspace"), width)
    for name, width in logit_buffers(spec).items():
        if computes or (not on_gpu and name == "logits"):
            layout.buffers[name] = (take(4 * width * plan.max_num_seqs, "workspace"), width)
    layout.kv = _lay_out_kv(spec, plan, on_gpu, take)
    if on_gpu:
        layout.ring = take(plan.ring_bytes, "ring")
        layout.staging = (take(plan.kv_staging_pages * page_bytes(spec, plan), "kv"), take(plan.kv_staging_pages * page_bytes(spec, plan), "kv"))
    return layout


def _lay_out_weights(spec: ModelSpec, plan: Plan, layout: Layout, take: Take) -> None:
    for op in spec.ops(plan.unit_rows):
        resident = plan.buckets[0].splits[op.layer][op.name].resident
        if layout.space == Space.GPU:
            first, last = 0, resident
        else:
            first, last = (0 if op.name == "lm_head" and spec.tied else resident), op.rows
        if first < last:
            layout.weights[op.layer, op.name] = take((last - first) * op.row_bytes, "weights")
            layout.rows[op.layer, op.name] = (first, last)
    if layout.space == Space.HOST:
        if not spec.tied:
            layout.small["embed"] = take(spec.table_bytes, "weights")
        if spec.learned_positions:
            layout.small["positions"] = take(spec.position_bytes, "weights")


def _lay_out_kv(spec: ModelSpec, plan: Plan, on_gpu: bool, take: Take) -> KvRegion | None:
    layers = [layer for layer in range(spec.num_layers) if (layer in plan.host_kv_layers) != on_gpu] if plan.host_kv_layers else list(range(spec.num_layers))
    pages = plan.gpu_pages if on_gpu or plan.host_kv_layers else plan.host_pages
    layer_bytes = pages * page_bytes(spec, plan)
    if not layers or not layer_bytes:
        return None
    return KvRegion(take(layer_bytes * len(layers), "kv"), {layer: i for i, layer in enumerate(layers)}, layer_bytes)
