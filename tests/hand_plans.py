"""Random plans set by hand: every op of every layer split three ways, so that tests reach what no sensible planner would choose."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from twinpilots.model.spec import ModelSpec
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split


def random_splits(spec: ModelSpec, unit_rows: int, rng: random.Random, resident: list[dict[str, int]], *, gpu: bool, cpu: bool) -> tuple[dict[str, Split], ...]:
    """Unit-aligned splits over the given residency: each non-resident row streamed or on the CPU, at random."""
    splits: list[dict[str, Split]] = [{} for _ in range(spec.num_layers + 1)]
    for op in spec.ops(unit_rows):
        kept = resident[op.layer][op.name]
        left = op.rows - kept
        if not gpu:
            streamed = 0
        elif not cpu:
            streamed = left
        else:
            streamed = min(left, op.round_rows(rng.uniform(-0.2, 1.2) * left)) if left else 0
            streamed = max(0, streamed)
        splits[op.layer][op.name] = Split(resident=kept, streamed=streamed, cpu=left - streamed)
    return tuple(splits)


def random_plan(spec: ModelSpec, seed: int, *, unit_rows: int = 8, gpu: bool = True, cpu: bool = True, resident_frac: float = 0.33, **overrides: Any) -> Plan:
    """A plan for small models: two decode and two prefill buckets with different splits over one residency, pages on both tiers."""
    rng = random.Random(seed)
    resident: list[dict[str, int]] = [{} for _ in range(spec.num_layers + 1)]
    for op in spec.ops(unit_rows):
        # A negative draw keeps nothing, a large one everything: both ends must be reached.
        resident[op.layer][op.name] = op.round_rows(rng.uniform(-0.3, 0.6 + resident_frac) * op.rows) if gpu else 0
    max_tokens = overrides.pop("max_pass_tokens", 24)
    max_seqs = overrides.pop("max_num_seqs", 6)

    def bucket(phase: Any, tokens: int) -> BucketPlan:
        splits = random_splits(spec, unit_rows, rng, resident, gpu=gpu, cpu=cpu)
        where = (lambda: rng.choice(["cpu", "gpu"])) if gpu and cpu else (lambda: "gpu" if gpu else "cpu")
        return BucketPlan(
            phase=phase, max_tokens=tokens, micro_batches=rng.choice([1, 1, 2, 3]), splits=splits, host_attention=where(), host_prefill_attention=where()
        )

    buckets = (bucket("decode", 2), bucket("decode", max_seqs), bucket("prefill", 8), bucket("prefill", max_tokens))
    packet = rng.choice([1000, 3000, 8000])
    page_size = 4
    pages = -(-spec.max_model_len // page_size)
    values: dict[str, Any] = {
        "model": spec.name, "policy": "auto", "uses_gpu": gpu, "uses_cpu": cpu, "unit_rows": unit_rows, "buckets": buckets,
        "ring_bytes": smallest_ring(spec, unit_rows, packet, 2) + rng.choice([0, 64, 640]), "packet_bytes": packet, "page_size": page_size,
        "gpu_pages": pages * 2 if gpu else 0, "host_pages": pages * 4 if cpu or not gpu else pages, "kv_dtype": spec.weight_dtype, "max_num_seqs": max_seqs,
        "max_pass_tokens": max_tokens, "max_model_len": spec.max_model_len, "kv_staging_pages": pages * 2 if gpu else 0,
    }  # fmt: skip
    return Plan(**(values | overrides))


def plan_family(spec: ModelSpec, seed: int, count: int, *, unit_rows: int = 8, **overrides: Any) -> list[Plan]:
    """Plans between which a running engine may switch: one residency and one set of sizes; splits, buckets, packets and where host KV is attended differ."""
    rng = random.Random(seed)
    first = random_plan(spec, seed, unit_rows=unit_rows, **overrides)
    resident = [{name: split.resident for name, split in layer.items()} for layer in first.buckets[0].splits]

    def bucket(like: BucketPlan) -> BucketPlan:
        return replace(
            like, splits=random_splits(spec, unit_rows, rng, resident, gpu=first.uses_gpu, cpu=first.uses_cpu), micro_batches=rng.choice([1, 1, 2, 3]),
            host_attention=rng.choice(["cpu", "gpu"]), host_prefill_attention=rng.choice(["cpu", "gpu"]),
        )  # fmt: skip

    packets = [size for size in (600, 1000, 3000, 8000) if smallest_ring(spec, unit_rows, size, 2) <= first.ring_bytes]
    others = [replace(first, buckets=tuple(bucket(like) for like in first.buckets), packet_bytes=rng.choice(packets)) for _ in range(count - 1)]
    return [first, *others]
