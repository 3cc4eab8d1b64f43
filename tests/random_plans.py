"""Hypothesis strategies: tiny random models, unit-aligned splits that differ from op to op, rings that do not divide evenly, rows on the disk, and pass
shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.tasks import PassShape


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pass to expand."""

    spec: ModelSpec
    plan: Plan
    shape: PassShape

    @property
    def bucket(self) -> BucketPlan:
        return self.plan.buckets[0]


@st.composite
def specs(draw: st.DrawFn, max_layers: int = 3) -> ModelSpec:
    kv_heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    bias = st.booleans()
    return ModelSpec(
        name="tiny", family="llama", vocab_size=draw(st.integers(1, 7)), hidden_size=draw(st.integers(2, 6)), num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=draw(st.integers(1, 9)), layers=(LayerSpec(),) * draw(st.integers(1, max_layers)),
        max_model_len=64, weight_dtype=draw(st.sampled_from(["fp32", "bf16"])), activation="silu", gated_mlp=draw(st.booleans()),
        post_norms=draw(st.booleans()), qkv_bias=draw(bias), o_bias=draw(bias), mlp_bias=draw(bias),
    )  # fmt: skip


@st.composite
def _split(draw: st.DrawFn, rows: int, unit: int) -> Split:
    """Any three-way split on unit boundaries; whole-op placements are frequent."""
    edges = [*range(0, rows, unit), rows]
    whole = draw(st.sampled_from(["resident", "streamed", "cpu", "mixed", "mixed"]))
    if whole != "mixed":
        return Split(**{name: rows if name == whole else 0 for name in ("resident", "streamed", "cpu")})
    low, high = sorted((draw(st.sampled_from(edges)), draw(st.sampled_from(edges))))
    return Split(resident=low, streamed=high - low, cpu=rows - high)


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 3) -> Case:
    spec, unit_rows = draw(specs(max_layers)), draw(st.integers(1, 4))
    splits: list[dict[str, Split]] = [{} for _ in range(spec.num_layers + 1)]
    for op in spec.ops(unit_rows):
        splits[op.layer][op.name] = draw(_split(op.rows, op.unit_rows))
    micro_batches = draw(st.integers(1, 3))
    bucket = BucketPlan(phase="decode", max_tokens=8, micro_batches=micro_batches, splits=tuple(splits))
    host_kv_layers = draw(st.sampled_from([(), tuple(range(0, spec.num_layers, 2)), tuple(range(spec.num_layers))]))
    groups = st.just((True, False, False)) if host_kv_layers else st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any)
    shape = tuple(draw(groups) for _ in range(micro_batches))
    packet_bytes = draw(st.integers(1, 6)) * 64
    ring_bytes = smallest_ring(spec, unit_rows, packet_bytes, draw(st.integers(1, 3))) + draw(st.integers(0, 1)) * 64
    plan = Plan(
        model="tiny", policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=unit_rows, buckets=(bucket,), ring_bytes=ring_bytes, packet_bytes=packet_bytes,
        page_size=4, gpu_pages=8, host_pages=0 if host_kv_layers else 8, kv_dtype="fp32", max_num_seqs=8, max_pass_tokens=8, max_model_len=64,
        host_kv_layers=host_kv_layers, kv_staging_pages=8,
    )  # fmt: skip
    plan.check(spec)
    return Case(spec=spec, plan=plan, shape=shape)


@st.composite
def disk_cases(draw: st.DrawFn, max_layers: int = 3) -> Case:
    """Cases whose rows that are not resident lie on the disk in part; staging rings from one read upwards that do not divide evenly."""
    case = draw(cases(max_layers))
    spec, plan, found = case.spec, case.plan, [dict[str, int]() for _ in range(case.spec.num_layers + 1)]
    for op in spec.ops(plan.unit_rows):
        split = case.bucket.splits[op.layer][op.name]
        edges = [edge for edge in (*range(0, op.rows, op.unit_rows), op.rows) if edge >= split.resident]
        found[op.layer][op.name] = op.rows - draw(st.sampled_from([edges[0], *edges]))  # all of it is frequent
    one = smallest_ring(spec, plan.unit_rows, plan.packet_bytes, 1)
    staging_bytes = one * draw(st.integers(1, 5)) + 64 * draw(st.integers(0, 3))
    plan = replace(plan, disk_rows=tuple(found), staging_bytes=staging_bytes)
    plan.check(spec)
    return replace(case, plan=plan)
