"""Bounds are relaxations: hand-computed optima, and no simulated plan ever beats them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import machine, processor, without_gpu
from twinpilots.errors import LimitError
from twinpilots.hardware.presets import PRESETS
from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.bounds import pass_bound
from twinpilots.plan.load import PassLoad, decode_load
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.workload import Limits

SPEC = ModelSpec(
    name="tiny", family="llama", vocab_size=256, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=192, layers=(LayerSpec(),) * 3,
    max_model_len=512, weight_dtype="bf16", activation="silu",
)  # fmt: skip
BUCKET = BucketPlan(phase="decode", max_tokens=64, micro_batches=1, splits=())
WEIGHTS = SPEC.linear_bytes
ROOM = Limits(gpu_bytes=0, host_bytes=1 << 30)


def _seconds(profile, limits: Limits, kind="plan", load: PassLoad | None = None) -> float:
    return pass_bound(SPEC, profile, limits, load or decode_load(0, 1, 0, BUCKET), kind, kv_dtype="bf16").seconds


def test_one_token_beyond_gpu_memory_takes_the_weights_over_link_plus_cpu() -> None:
    """The roofline of small batches: T = W' / (B_link + B_cpu): 1 MB/s and 2 MB/s here."""
    load = PassLoad(decode_load(0, 1, 0, BUCKET).micro_batches, 1)
    kv_free = replace(machine(), cpu=processor(2e6, 8e9, attention_bytes_per_s=1e12, attention_flops_per_s=1e15))
    assert _seconds(kv_free, ROOM, load=load) == pytest.approx(WEIGHTS / 3e6, rel=1e-3)
    assert pass_bound(SPEC, kv_free, ROOM, load, "plan", kv_dtype="bf16").bottleneck in ("cpu", "link")


def test_the_hardware_bound_shares_dram_between_link_and_cpu() -> None:
    """4 MB/s of DRAM is more than link and CPU together; at 2.5 MB/s it is the limit."""
    kv_free = replace(machine(), cpu=processor(2e6, 8e9))
    assert _seconds(kv_free, ROOM, "hardware") == pytest.approx(WEIGHTS / 3e6, rel=0.01)
    scarce = replace(kv_free, dram_bytes_per_s=2.5e6)
    assert _seconds(scarce, ROOM, "hardware") == pytest.approx(WEIGHTS / 2.5e6, rel=0.01)
    assert pass_bound(SPEC, scarce, ROOM, decode_load(0, 1, 0, BUCKET), "hardware", kv_dtype="bf16").bottleneck == "dram"


def test_what_fits_the_gpu_neither_streams_nor_waits_for_the_cpu() -> None:
    fast = machine(gpu=processor(2e9, 8e12))
    bound = pass_bound(SPEC, fast, Limits(gpu_bytes=1 << 30, host_bytes=1 << 30), decode_load(1, 0, 0, BUCKET), "plan", kv_dtype="bf16")
    assert bound.seconds < 1.01 * WEIGHTS / 2e9
    assert bound.bottleneck == "gpu"


def test_contention_costs_the_processor_what_the_link_takes() -> None:
    kv_free = replace(machine(), cpu=processor(2e6, 8e9, copy_slowdown=2.0))
    # CPU share c and streamed s = 1 - c finish together: c W / 2e6 + s W / 1e6 / 2 = s W / 1e6, so c = s: W / 2 over the link
    assert _seconds(kv_free, ROOM) == pytest.approx(WEIGHTS / 2e6, rel=0.01)


def test_without_a_gpu_everything_runs_on_the_cpu() -> None:
    alone = without_gpu(replace(machine(), cpu=processor(2e6, 8e9)))
    assert _seconds(alone, ROOM) == pytest.approx(WEIGHTS / 2e6, rel=0.01)
    assert _seconds(alone, Limits(gpu_bytes=1 << 30, host_bytes=1 << 30)) == _seconds(alone, ROOM)


def test_what_fits_nowhere_is_a_limit_error_with_both_sizes() -> None:
    with pytest.raises(LimitError, match=r"need \d+ bytes, .* offer 2000"):
        _seconds(machine(), Limits(gpu_bytes=1000, host_bytes=1000))


def test_the_drivers_overhead_belongs_to_the_plan_bound_only() -> None:
    slow = machine(step_overhead_s=100.0)
    assert _seconds(slow, ROOM) == pytest.approx(_seconds(machine(), ROOM) + 100.0)
    assert _seconds(slow, ROOM, "hardware") == _seconds(machine(), ROOM, "hardware")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)), st.floats(0, 1), st.floats(0, 1), st.integers(1, 2), st.integers(0, 12), st.integers(1, 12), st.integers(0, 400),
    st.sampled_from(["cpu", "gpu"]),
)  # fmt: skip
def test_no_simulated_plan_beats_the_bound(preset, resident, streamed, micro_batches, num_gpu, num_host, context, host_attention) -> None:
    splits: list[dict[str, Split]] = [{} for _ in range(SPEC.num_layers + 1)]
    on_gpu = 0
    for op in SPEC.ops(16):
        low = op.round_rows(op.rows * resident)
        high = low + op.round_rows((op.rows - low) * streamed)
        on_gpu += low * op.row_bytes
        splits[op.layer][op.name] = Split(resident=low, streamed=high - low, cpu=op.rows - high)
    bucket = replace(BUCKET, splits=tuple(splits), micro_batches=micro_batches, host_attention=host_attention)
    plan = Plan(
        model="tiny", policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=16, buckets=(bucket,), ring_bytes=smallest_ring(SPEC, 16, 8192, 2),
        packet_bytes=8192, page_size=16, gpu_pages=99, host_pages=999, kv_dtype="bf16", max_num_seqs=64, max_pass_tokens=64, max_model_len=512,
        kv_staging_pages=99,
    )  # fmt: skip
    load = decode_load(num_gpu, num_host, context, bucket)
    kv_on_gpu = num_gpu * (context + 1) * SPEC.kv_bytes_per_token("bf16")
    limits = Limits(gpu_bytes=on_gpu + kv_on_gpu, host_bytes=1 << 30)
    timing = simulate(expand(SPEC, plan, bucket, load.shape), SPEC, plan, PRESETS[preset], load)
    bound = pass_bound(SPEC, PRESETS[preset], limits, load, "plan", kv_dtype="bf16").seconds
    assert bound <= timing.seconds * (1 + 1e-6)
    assert pass_bound(SPEC, PRESETS[preset], limits, load, "hardware", kv_dtype="bf16").seconds <= bound * (1 + 1e-6)
