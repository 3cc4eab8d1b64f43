"""A task list computes the model: any split, any placement of KV, any micro-batches, in list order and in every order that its waits allow."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataflow import reference, run_serially, run_shuffled
from tests.random_plans import Case, cases
from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.packets import align, cut_packets, smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.schedule import expand
from twinpilots.plan.tasks import Schedule


def _expand(case: Case, poison: bool = False) -> Schedule:
    return expand(case.spec, case.plan, case.bucket, case.shape, poison=poison)


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans())
def test_tasks_in_list_order_compute_the_model(case: Case, poison: bool) -> None:
    schedule = _expand(case, poison)
    assert np.allclose(run_serially(case, schedule), reference(case, schedule, 1)[0], rtol=1e-9)


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans(), st.randoms(use_true_random=False))
def test_tasks_in_any_order_that_the_waits_allow_compute_the_model(case: Case, poison: bool, random) -> None:
    schedule = _expand(case, poison)
    for got, expected in zip(run_shuffled(case, schedule, 3, random), reference(case, schedule, 3), strict=True):
        assert np.allclose(got, expected, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_row_of_every_op_is_computed_once_per_micro_batch(case: Case) -> None:
    computed: Counter[tuple[int, str, int, int]] = Counter()
    for task in _expand(case).tasks:
        if task.kind in ("linear", "linear_in"):
            computed.update((task.layer, task.op, row, task.mb) for row in range(task.row0, task.row1))
    micro_batches = range(len(case.shape))
    ops = case.spec.ops(case.plan.unit_rows)
    expected = {(op.layer, op.name, row, mb) for op in ops for row in range(op.rows) for mb in (micro_batches if op.layer >= 0 else (-1,))}
    assert set(computed) == expected
    assert set(computed.values()) == {1}


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_packet_is_loaded_once_in_order_and_holds_each_streamed_row_once(case: Case) -> None:
    schedule = _expand(case)
    assert [task.packet for task in schedule.tasks if task.kind == "load"] == list(range(len(schedule.packets)))
    rows = Counter((s.layer, s.op, row) for packet in schedule.packets for s in packet.segments for row in range(s.row0, s.row1))
    assert set(rows.values()) <= {1}
    assert len(rows) == case.bucket.streamed_rows
    for packet in schedule.packets:
        assert 0 <= packet.ring_lo <= packet.ring_lo + packet.num_bytes <= case.plan.ring_bytes
        ends = [segment.offset + segment.num_bytes for segment in packet.segments]
        assert all(end <= segment.offset for end, segment in zip(ends, packet.segments[1:], strict=False))
        assert ends[-1] <= packet.num_bytes


def _small(gpu: bool, cpu: bool, **changes: object) -> Case:
    """A model of two layers wholly on one device (or in even thirds when on both)."""
    spec = ModelSpec(
        name="tiny", family="llama", vocab_size=12, hidden_size=4, num_heads=3, num_kv_heads=3, head_dim=2, intermediate_size=12, layers=(LayerSpec(),) * 2,
        max_model_len=64, weight_dtype="fp32", activation="silu", **changes,
    )  # fmt: skip
    splits: list[dict[str, Split]] = [{} for _ in range(3)]
    for op in spec.ops(2):
        third = op.round_rows(op.rows / 3) if cpu else op.round_rows(op.rows / 2)
        on_both = Split(resident=third, streamed=third if cpu else op.rows - third, cpu=op.rows - 2 * third if cpu else 0)
        splits[op.layer][op.name] = on_both if gpu else Split(resident=0, streamed=0, cpu=op.rows)
    bucket = BucketPlan(phase="decode", max_tokens=8, micro_batches=1, splits=tuple(splits))
    plan = Plan(
        model="tiny", policy="auto", uses_gpu=gpu, uses_cpu=cpu, unit_rows=2, buckets=(bucket,), ring_bytes=smallest_ring(spec, 2, 128, 2), packet_bytes=128,
        page_size=4, gpu_pages=8, host_pages=8, kv_dtype="fp32", max_num_seqs=8, max_pass_tokens=8, max_model_len=64, kv_staging_pages=4,
    )  # fmt: skip
    return Case(spec=spec, plan=plan, shape=((gpu, False, not gpu),))


def test_a_plan_of_the_cpu_alone_has_tasks_on_the_cpu_alone() -> None:
    schedule = _expand(_small(gpu=False, cpu=True))
    assert {task.queue for task in schedule.tasks} == {"cpu"}
    assert not schedule.packets


def test_a_plan_of_the_gpu_alone_leaves_only_the_embedding_to_the_cpu() -> None:
    case = _small(gpu=True, cpu=False)
    assert [task.kind for task in _expand(case).queue("cpu")] == ["embed"]


def test_both_devices_in_one_layer_exchange_inputs_of_attention_and_partial_sums_and_nothing_else() -> None:
    """KV on the GPU: q/k/v up, attention outputs down, partial sums both ways after o_proj and after the MLP."""
    tasks = _expand(_small(gpu=True, cpu=True)).tasks
    copies = Counter((task.kind, task.src) for task in tasks if task.layer == 0 and task.kind in ("send", "recv"))
    embedded = {("recv", "host.x"): 1}
    assert copies == Counter({("recv", "host.qkv"): 3, ("send", "gpu.attn"): 1, ("send", "gpu.part"): 2, ("recv", "host.part"): 2, **embedded})


def test_a_bias_joins_the_sum_once_on_each_copy_of_the_residual() -> None:
    case = _small(gpu=True, cpu=True, o_bias=True)
    adds = [task for task in _expand(case).tasks if task.kind == "add" and task.layer == 0]
    assert [(task.queue, task.bias) for task in adds] == [("gpu", "o_proj"), ("cpu", "o_proj"), ("gpu", ""), ("cpu", "")]
    assert all(task.terms[0].endswith("part" if task.queue == "gpu" else "peer") for task in adds), "the GPU's partial sum comes first on both devices"


def test_a_packet_larger_than_the_ring_is_refused() -> None:
    case = _small(gpu=True, cpu=True)
    with pytest.raises(ValueError, match="does not fit the ring"):
        cut_packets(case.spec, replace(case.plan, ring_bytes=32), case.bucket)


def test_packet_sizes_are_aligned_and_smallest_ring_holds_the_asked_depth() -> None:
    assert (align(1), align(64), align(65)) == (64, 64, 128)
    case = _small(gpu=True, cpu=True)
    assert smallest_ring(case.spec, 2, 256, 3) == 768
