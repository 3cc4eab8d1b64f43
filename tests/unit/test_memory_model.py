"""What a plan occupies, computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning import DEMO, llama, memory_of, smollm2, workload
from twinpilots.model.spec import RopeSpec
from twinpilots.plan import memory
from twinpilots.plan.draft import Draft, PlanOptions, everything_resident, make_plan, nothing_resident
from twinpilots.plan.memory import layer_template, plan_memory
from twinpilots.plan.plan import Plan
from twinpilots.plan.policies import build_policy
from twinpilots.plan.workload import Limits, Workload

SPEC = llama()  # 4 layers, hidden 64, q 64, kv 32, intermediate 160, vocabulary 130, fp16
LAYER_BYTES = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64)


def plan_of(*, resident: bool, gpu_seqs: int, num_seqs: int = 2, uses_cpu: bool = True, staging_seqs: int = 0, host_kv_layers: tuple[int, ...] = ()) -> Plan:
    draft = Draft(
        policy="auto", num_seqs=num_seqs, gpu_seqs=gpu_seqs, pass_tokens=32, micro_batches={"prefill": 1, "decode": 1}, uses_cpu=uses_cpu,
        packet_bytes=4096, ring_depth=4, staging_seqs=staging_seqs, host_kv_layers=host_kv_layers,
    )  # fmt: skip
    residency = (everything_resident if resident else nothing_resident)(SPEC, layer_template(SPEC, 64))
    return make_plan(SPEC, workload(num_seqs, 40, 8), PlanOptions(), draft, residency, lambda _phase, _tokens: {})


def test_activations_are_nine_fp32_buffers_of_pass_rows_and_logit_rows() -> None:
    plan = plan_of(resident=True, gpu_seqs=2)
    per_token = 4 * 64 + (64 + 2 * 32) + 64 + 160  # x, h, part, peer; qkv; attn; act
    assert memory.activation_bytes(SPEC, plan, "gpu") == 4 * (32 * per_token + 2 * 64) + memory.align(4 * 2 * 130)


def test_a_host_that_does_not_compute_holds_the_embedding_rows_and_logits_only() -> None:
    plan = plan_of(resident=True, gpu_seqs=2, uses_cpu=False)
    assert set(memory.activation_buffers(SPEC, plan, "cpu")) == {"x", "logits"}
    assert memory.activation_bytes(SPEC, plan, "cpu") == 4 * 32 * 64 + memory.align(4 * 2 * 130)


def test_resident_and_host_rows_are_all_rows() -> None:
    head = 130 * 64 * 2
    resident, hosted = plan_of(resident=True, gpu_seqs=2), plan_of(resident=False, gpu_seqs=2)
    assert memory.resident_bytes(SPEC, resident) == 4 * LAYER_BYTES + head
    assert memory.resident_bytes(SPEC, hosted) == 0
    embedding = head  # untied: a table of its own, never on the GPU
    assert memory.host_weight_bytes(SPEC, resident) == embedding
    assert memory.host_weight_bytes(SPEC, hosted) == 4 * LAYER_BYTES + head + embedding
    assert memory.streamed_bytes(SPEC, hosted, hosted.buckets[0]) == 4 * LAYER_BYTES + head


def test_a_tied_head_stays_on_the_host_as_a_whole() -> None:
    tied = replace(SPEC, tied=True)
    assert memory.host_weight_bytes(tied, plan_of(resident=True, gpu_seqs=2)) == 130 * 64 * 2
    assert memory.host_weight_bytes(tied, plan_of(resident=False, gpu_seqs=2)) == 4 * LAYER_BYTES + 130 * 64 * 2


def test_small_tensors_are_fp32_on_each_device() -> None:
    rotary = 2 * 48 * 8 * 4  # cos and sin of 48 positions, 8 pairs
    assert memory.small_tensor_bytes(SPEC, 48) == 4 * (4 * 2 * 64 + 64) + rotary
    longrope = replace(SPEC, ropes=(RopeSpec(rotary_dim=16, inv_freq=(1.0,) * 8, long_inv_freq=(1.0,) * 8, original_max_position=8),))
    assert memory.rotary_bytes(longrope, 48) == 2 * rotary


def test_every_norm_and_bias_is_counted() -> None:
    spec = replace(SPEC, norm="layernorm", qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, post_norms=True)
    per_layer = 4 * 64 * 2 + 2 * 16 + (64 + 2 * 32) + 64 + (160 + 64 + 160)
    assert sum(memory.small_tensors(spec).values()) == per_layer + 2 * 64


def test_kv_pages_by_tier() -> None:
    page = 2 * 32 * 16 * 2  # K and V, 32 columns, 16 tokens, fp16
    mixed = plan_of(resident=False, gpu_seqs=1, num_seqs=3)  # 48 tokens: 3 pages each
    assert memory.kv_page_bytes(SPEC, mixed) == page
    assert (memory.gpu_kv_bytes(SPEC, mixed), memory.host_kv_bytes(SPEC, mixed)) == (3 * 4 * page, 6 * 4 * page)
    split = plan_of(resident=False, gpu_seqs=2, host_kv_layers=(0, 1, 2))
    assert (memory.gpu_kv_bytes(SPEC, split), memory.host_kv_bytes(SPEC, split)) == (6 * 1 * page, 6 * 3 * page)


def test_staging_is_two_slots_of_one_layer() -> None:
    plan = plan_of(resident=False, gpu_seqs=0, num_seqs=3, staging_seqs=2)
    assert memory.kv_staging_bytes(SPEC, plan) == 2 * 6 * (2 * 32 * 16 * 2)


def test_totals_add_up_and_a_device_that_computes_nothing_has_nothing() -> None:
    use = plan_memory(SPEC, plan_of(resident=False, gpu_seqs=1, num_seqs=3, staging_seqs=1))
    assert use.gpu.total == use.gpu.weights + use.gpu.kv + use.gpu.ring + use.gpu.staging + use.gpu.workspace
    assert use.gpu.ring >= 4 * 4096
    cpu_only = replace(plan_of(resident=False, gpu_seqs=0), uses_gpu=False)
    assert plan_memory(SPEC, cpu_only).gpu.total == 0


def test_shared_splits_count_once_per_layer() -> None:
    """Layers that share one mapping are counted, not visited: the same bytes as with one mapping for each layer."""
    plan = build_policy("layer-split", smollm2(), DEMO, workload(), memory_of(DEMO))
    copied = replace(plan, buckets=tuple(replace(b, splits=tuple(dict(layer) for layer in b.splits)) for b in plan.buckets))
    assert plan_memory(smollm2(), plan) == plan_memory(smollm2(), copied)


@pytest.mark.parametrize("gpu_mib", [40, 84, 200])
def test_stream_fills_the_gpu_to_within_one_unit(gpu_mib: int) -> None:
    spec = smollm2()
    limits = Limits(gpu_bytes=gpu_mib << 20, host_bytes=8 << 30)
    use = plan_memory(spec, build_policy("stream", spec, DEMO, workload(8), limits)).gpu
    assert limits.gpu_bytes - 64 * 2 * 576 * 2 < use.total <= limits.gpu_bytes


@pytest.mark.parametrize("field", ["num_requests", "input_len", "output_len", "max_num_seqs"])
def test_workloads_and_limits_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        Workload(**{"num_requests": 1, "input_len": 1, "output_len": 1, "max_num_seqs": 1, field: 0})
    with pytest.raises(ValueError, match="gpu_bytes must not be negative"):
        Limits(gpu_bytes=-1, host_bytes=1)
