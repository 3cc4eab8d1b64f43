"""Bytes that a plan occupies on each tier: the formulas by which the planner keeps the limits and the runtime allocates.

Owns one named function per formula. Every buffer and every slice of weights is rounded up to 64 bytes. Knows nothing of devices, addresses or the
order in which things lie in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from twinpilots.errors import NotRunnableError
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.packets import align
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.reads import STAGING_DEPTH

Device = Literal["gpu", "cpu"]
Templates = tuple[Mapping[str, OpSpec], ...]  # by format class: the ops of one layer, and lm_head
FP32_BYTES = 4
KV_STAGING_SLOTS = 2  # streamed host KV is double-buffered
# Control block, mailboxes and event slots; and per program instruction: 272 bytes of record, 24 of trace, 24 of load segment, rounded up.
CONTROL_BYTES = 1 << 20
INSTRUCTION_BYTES = 320
SEGMENT_BYTES = 24  # destination, source, bytes of one piece of a load
KV_MOVES_PER_PASS = 8
PROGRAMS_PER_BUCKET = 4  # compiled shapes kept per bucket (the least recently used is dropped)
TASKS_PER_LAYER = 40  # and micro-batch: an upper estimate over all splits and groups
META_BUFFERS = 2  # this pass and the next
META_HEADER_WORDS = 80
META_WORDS_PER_TOKEN = 4  # token, position, rotary row, slot
META_WORDS_PER_SEQ = 6  # first row, length, KV length, two page offsets, logit row


@dataclass(frozen=True, kw_only=True)
class TierUse:
    """Bytes of one tier by purpose. ``weights`` holds linears, tables, norms, biases; ``workspace`` activations, programs and metadata."""

    weights: int
    kv: int
    ring: int
    staging: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.ring + self.staging + self.workspace


NOTHING = TierUse(weights=0, kv=0, ring=0, staging=0, workspace=0)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    gpu: TierUse
    host: TierUse
    disk: TierUse = NOTHING


def plan_memory(spec: ModelSpec, plan: Plan) -> MemoryUse:
    """What the runtime allocates for ``plan``, by tier and purpose."""
    return MemoryUse(
        gpu=gpu_memory(spec, plan), host=host_memory(spec, plan), disk=replace(NOTHING, weights=disk_bytes(spec, plan), kv=disk_kv_bytes(spec, plan))
    )


def gpu_memory(spec: ModelSpec, plan: Plan) -> TierUse:
    """The GPU's part alone, which the planner asks for most often."""
    if not plan.uses_gpu:
        return NOTHING
    return TierUse(
        weights=resident_bytes(spec, plan) + small_tensor_bytes(spec, plan.max_model_len),
        kv=gpu_kv_bytes(spec, plan),
        ring=align(plan.ring_bytes),
        staging=kv_staging_bytes(spec, plan),
        workspace=activation_bytes(spec, plan, "gpu"),
    )


def host_memory(spec: ModelSpec, plan: Plan) -> TierUse:
    """And the host's."""
    small = small_tensor_bytes(spec, plan.max_model_len) if plan.uses_cpu else 0
    return TierUse(
        weights=host_weight_bytes(spec, plan) + small,
        kv=host_kv_bytes(spec, plan),
        ring=0,
        staging=align(plan.staging_bytes) + (kv_staging_bytes(spec, plan) if plan.kv_on_disk else 0),
        workspace=activation_bytes(spec, plan, "cpu") + control_bytes(spec, plan),
    )


def gpu_layout_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Size of the GPU arena."""
    return gpu_memory(spec, plan).total


def host_layout_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Size of the host arena."""
    return host_memory(spec, plan).total


# -- activations and control ---------------------------------------------------------------------------------------------------------------


def activation_buffers(spec: ModelSpec, plan: Plan, device: Device) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every fp32 activation buffer of ``device``, by its name in docs/execution.md.

    The host always holds ``x`` (the embedding is gathered there) and ``logits`` (they are sampled there); everything else only lies where computing is done.
    """
    tokens, logits, hidden = plan.max_pass_tokens, plan.max_num_seqs, spec.hidden_size
    everything = {
        "x": (tokens, hidden), "h": (tokens, hidden), "part": (tokens, hidden), "peer": (tokens, hidden),
        "qkv": (tokens, spec.q_size + 2 * spec.kv_size), "attn": (tokens, spec.q_size), "act": (tokens, spec.intermediate_size),
        "head": (logits, hidden), "logits": (logits, spec.vocab_size),
    }  # fmt: skip
    if device == "gpu":
        return everything if plan.uses_gpu else {}
    return everything if plan.uses_cpu else {name: everything[name] for name in ("x", "logits")}


def activation_bytes(spec: ModelSpec, plan: Plan, device: Device) -> int:
    """Bytes of the activation buffers of ``device``."""
    return sum(align(rows * columns * FP32_BYTES) for rows, columns in activation_buffers(spec, plan, device).values())


def tasks_allowance(spec: ModelSpec, plan: Plan, bucket: BucketPlan, templates: Templates | None = None) -> int:
    """An upper estimate of the instructions of one pass: a fixed number per layer and micro-batch, and each packet's load and the linears that read it.
    With a disk a load may have its read, an op a linear more where its rows' homes change, and the CPU's rows from there reads and linears of their own."""
    packets = 0 if plan.packet_bytes == 0 else 2 * -(-streamed_bytes(spec, plan, bucket, templates) // plan.packet_bytes)
    tasks = (spec.num_layers + 1) * TASKS_PER_LAYER * bucket.micro_batches + packets * (1 + bucket.micro_batches)
    if not plan.disk_rows:
        return tasks
    by_cpu = sum(min(on_disk, split.cpu) * op.row_bytes * count for op, split, on_disk, count in _counted_homes(spec, plan, bucket))
    ops, pieces = len(spec.ops(plan.unit_rows)), 2 * -(-STAGING_DEPTH * by_cpu // plan.staging_bytes)
    return tasks + packets + ops * bucket.micro_batches + (pieces + ops if by_cpu else 0) * (1 + bucket.micro_batches)


def control_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Host bytes of control block, events, compiled programs and pass metadata: an allowance, not a measurement."""
    templates = layer_templates(spec, plan.unit_rows)
    alike: dict[tuple[int, int], int] = {}  # most buckets of a plan share their splits
    for bucket in plan.buckets:
        key = id(bucket.splits), bucket.micro_batches
        if key not in alike:
            alike[key] = tasks_allowance(spec, plan, bucket, templates)
    programs = sum(alike[id(bucket.splits), bucket.micro_batches] for bucket in plan.buckets) * PROGRAMS_PER_BUCKET * INSTRUCTION_BYTES
    words = META_HEADER_WORDS + META_WORDS_PER_TOKEN * plan.max_pass_tokens + META_WORDS_PER_SEQ * plan.max_num_seqs
    words += listed_pages(plan) + plan.kv_staging_pages
    return CONTROL_BYTES + align(programs) + align(META_BUFFERS * FP32_BYTES * words) + kv_move_bytes(spec, plan)


def listed_pages(plan: Plan) -> int:
    """Pages that the metadata of one pass may list: one that several sequences share is listed for each of them."""
    return plan.max_num_seqs * -(-plan.max_model_len // plan.page_size)


def kv_move_pages(plan: Plan) -> int:
    """KV pages that may change tiers during one pass: those of the longest sequence that both tiers hold."""
    return min(-(-plan.max_model_len // plan.page_size), plan.gpu_pages, plan.host_pages)


def kv_move_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Host bytes of the list of such a copy: a load segment per page and layer, and the copies' instructions."""
    pages = kv_move_pages(plan)
    return align(SEGMENT_BYTES * spec.num_layers * pages) + align(KV_MOVES_PER_PASS * INSTRUCTION_BYTES) if pages else 0


# -- weights -------------------------------------------------------------------------------------------------------------------------------


def resident_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the rows of all linears that lie in GPU memory."""
    return sum(align(split.resident * op.row_bytes) * count for op, split, count in counted_splits(spec, plan, plan.buckets[0]))


def streamed_bytes(spec: ModelSpec, plan: Plan, bucket: BucketPlan, templates: Templates | None = None) -> int:
    """Bytes of weights that a pass of ``bucket`` moves to the GPU. ``templates``: `layer_templates`, where they are at hand."""
    return sum(split.streamed * op.row_bytes * count for op, split, count in counted_splits(spec, plan, bucket, templates))


def host_weight_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the non-resident rows of all linears, the embedding table and the position table.

    With tied embeddings lm_head's tensor is the embedding table, and stays on the host as a whole.
    """
    total = align(spec.position_bytes) + align(spec.table_bytes)
    for op, split, count in counted_splits(spec, plan, plan.buckets[0]):
        rows = op.rows if spec.tied and op.name == "lm_head" else split.rows - split.resident
        total += align(rows * op.row_bytes) * count
    return total - _saved_bytes(spec, plan) if plan.disk_rows else total


def _saved_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Host bytes that rows on the disk save: of each op the slice that is not resident ends earlier."""
    saved = 0
    for op, split, on_disk, count in _counted_homes(spec, plan, plan.buckets[0]):
        rows = split.rows - split.resident
        saved += (align(rows * op.row_bytes) - align((rows - on_disk) * op.row_bytes)) * count
    return saved


def disk_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the rows whose home is the disk: what every pass reads."""
    return sum(on_disk * op.row_bytes * count for op, _, on_disk, count in _counted_homes(spec, plan, plan.buckets[0])) if plan.disk_rows else 0


def small_tensors(spec: ModelSpec) -> dict[str, int]:
    """Elements of every norm gain and bias of one layer, and ``final_norm`` (once per model); fp32 on each device that computes."""
    norms = {"attn_norm": spec.hidden_size, "mlp_norm": spec.hidden_size, "final_norm": spec.hidden_size}
    if spec.post_norms:
        norms |= {"attn_post_norm": spec.hidden_size, "mlp_post_norm": spec.hidden_size}
    found = dict(norms)
    if spec.norm == "layernorm":
        found |= {f"{name}_bias": size for name, size in norms.items()}
    if spec.qk_norm:
        found |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
    if spec.qkv_bias:
        found |= {"q_bias": spec.q_size, "k_bias": spec.kv_size, "v_bias": spec.kv_size}
    if spec.o_bias:
        found["o_bias"] = spec.hidden_size
    if spec.mlp_bias:
        found |= {"up_bias": spec.intermediate_size, "down_bias": spec.hidden_size}
        found |= {"gate_bias": spec.intermediate_size} if spec.gated_mlp else {}
    return found


def rotary_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """Bytes of the fp32 cos and sin tables [max_model_len][rotary_dim / 2] of every rope; longrope keeps a second pair."""
    table = [align(max_model_len * (rope.rotary_dim // 2) * FP32_BYTES * (2 if rope.long_inv_freq else 1)) for rope in spec.ropes]
    return 2 * sum(table)


def small_tensor_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """Bytes of norms, biases and rotary tables on one device."""
    once = ("final_norm", "final_norm_bias")
    sizes = small_tensors(spec).items()
    return sum(align(size * FP32_BYTES) * (1 if name in once else spec.num_layers) for name, size in sizes) + rotary_bytes(spec, max_model_len)


def check_runnable(spec: ModelSpec, plan: Plan) -> None:
    """Raise NotRunnableError for a plan that this version only predicts: one that keeps something on the disk."""
    if plan.uses_disk:
        weights, kv = disk_bytes(spec, plan), disk_kv_bytes(spec, plan)
        raise NotRunnableError(
            f"the plan keeps {weights} bytes of {spec.name}'s weights and {kv} of KV on the disk, which this version plans and predicts but does not run; give "
            "a plan with nothing on the disk (`twinpilots plan` without --disk), with more --host-memory or --quantization if need be"
        )


# -- KV ------------------------------------------------------------------------------------------------------------------------------------


def kv_page_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of one page of one layer: K and V of ``page_size`` tokens."""
    return spec.kv_page_bytes(plan.kv_dtype, plan.page_size)


def gpu_kv_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the GPU's KV pages: all layers but those whose KV stays with the CPU."""
    return align(plan.gpu_pages * (spec.num_layers - len(plan.host_kv_layers)) * kv_page_bytes(spec, plan))


def host_kv_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the host's KV pages: whole sequences (``host_pages``), or the host's layers of every sequence (``host_kv_layers``)."""
    if plan.kv_on_disk:
        return 0
    return align((plan.host_pages * spec.num_layers + plan.gpu_pages * len(plan.host_kv_layers)) * kv_page_bytes(spec, plan))


def disk_kv_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the KV pages whose home is the disk."""
    return align(plan.host_pages * spec.num_layers * kv_page_bytes(spec, plan)) if plan.kv_on_disk else 0


def kv_staging_bytes(spec: ModelSpec, plan: Plan) -> int:
    """GPU bytes through which host KV streams: two slots, each of one layer's pages of one micro-batch."""
    return KV_STAGING_SLOTS * align(plan.kv_staging_pages * kv_page_bytes(spec, plan))


# -- helpers -------------------------------------------------------------------------------------------------------------------------------


def layer_templates(spec: ModelSpec, unit_rows: int) -> Templates:
    """By format class, the ops of a layer and lm_head by name. All layers of a dense model have the same shapes and units; formats may differ."""
    short = spec.one_layer_per_class
    *ops, head = short.ops(unit_rows)
    return tuple({op.name: op for op in (*(op for op in ops if op.layer == layer), head)} for layer in range(short.num_layers))


def layer_template(spec: ModelSpec, unit_rows: int) -> dict[str, OpSpec]:
    """The ops of the first layer and lm_head by name: shapes and units of all layers."""
    return dict(layer_templates(spec, unit_rows)[0])


def counted_splits(spec: ModelSpec, plan: Plan, bucket: BucketPlan, templates: Templates | None = None) -> list[tuple[OpSpec, Split, int]]:
    """(op, split, number of layers that share the split): layers of one class with one and the same mapping are counted, not visited."""
    templates = templates or layer_templates(spec, plan.unit_rows)
    layers: dict[int, Mapping[str, Split]] = dict(zip(map(id, bucket.splits), bucket.splits, strict=True))
    if len(templates) == 1:
        return [(templates[0][name], split, count) for key, count in Counter(map(id, bucket.splits)).items() for name, split in layers[key].items()]
    counts = Counter(zip(map(id, bucket.splits), (*spec.format_classes, 0), strict=True))
    return [(templates[number][name], split, count) for (key, number), count in counts.items() for name, split in layers[key].items()]


def _counted_homes(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> list[tuple[OpSpec, Split, int, int]]:
    """(op, split, rows on the disk, number of layers that share them) of a plan that uses the disk."""
    templates = layer_templates(spec, plan.unit_rows)
    splits, homes = bucket.splits, plan.disk_rows
    alike: dict[tuple[int, int, int], tuple[int, int]] = {}  # by identities of the mappings and format class: (a layer, how many)
    for layer, number in enumerate((*spec.format_classes, 0)):
        key = id(splits[layer]), id(homes[layer]), number
        alike[key] = layer, alike.get(key, (0, 0))[1] + 1
    return [
        (templates[number][name], split, homes[layer][name], count) for (_, _, number), (layer, count) in alike.items() for name, split in splits[layer].items()
    ]  # fmt: skip
