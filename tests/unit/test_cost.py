"""Every kind of task costs what its formula says, by hand-computed numbers; loads count tokens, KV and query-key pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines import machine
from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.cost import COSTS, TaskCost, linear_s, task_cost
from twinpilots.plan.load import GroupLoad, PassLoad, SeqClass, decode_load, pass_load, prefill_load
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import Kind, Task

SPEC = ModelSpec(
    name="tiny", family="llama", vocab_size=50, hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=16,
    layers=(LayerSpec(), LayerSpec(window=3)), max_model_len=64, weight_dtype="bf16", activation="silu",
)  # fmt: skip
BUCKET = BucketPlan(phase="decode", max_tokens=8, micro_batches=1, splits=({}, {}, {}))
PLAN = Plan(
    model="tiny", policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=4, buckets=(BUCKET,), ring_bytes=256, packet_bytes=128, page_size=4, gpu_pages=8,
    host_pages=8, kv_dtype="fp32", max_num_seqs=8, max_pass_tokens=8, max_model_len=64,
)  # fmt: skip
PROFILE = machine()  # CPU 2 MB/s, 8 MFLOP/s, GPU ten times that, 1 ms per task; link 1 MB/s up, 0.5 down, packets 1 ms, copies 2 ms
# 3 sequences with KV on the GPU, 2 streamed (2 query tokens each), 1 on the CPU; the logits of 4 rows
LOAD = PassLoad(((GroupLoad((SeqClass(3, 1, 10),)), GroupLoad((SeqClass(2, 2, 7),)), GroupLoad((SeqClass(1, 1, 5),))),), 4)


def _cost(kind: Kind, queue: Any, **fields: Any) -> TaskCost:
    return task_cost(Task(index=0, kind=kind, queue=queue, mb=0, **{"layer": 0, **fields}), SPEC, PLAN, PROFILE, LOAD)


def test_every_kind_of_task_has_a_price() -> None:
    assert set(COSTS) == set(get_args(Kind))


def test_a_linear_reads_its_weights_or_computes_whichever_takes_longer() -> None:
    """16 of gate_up's rows: 16 * 16 weights of 2 bytes for 8 tokens: 0.256 ms of reading, 0.512 ms of computing on the CPU."""
    cost = _cost("linear", "cpu", op="gate_up_proj", row0=0, row1=16)
    assert cost == TaskCost(pytest.approx(1e-3 + 256 * 2 * 8 / 8e6), dram_bytes=512, memory_frac=0.5)
    assert _cost("linear", "gpu", op="gate_up_proj", row0=0, row1=16).seconds == pytest.approx(1e-3 + 256 * 2 * 8 / 8e7)
    assert _cost("linear", "gpu", op="gate_up_proj", row0=4, row1=8).dram_bytes == 0
    head = _cost("linear", "cpu", op="lm_head", row0=0, row1=50, logit_rows=True, layer=-1)
    assert head.seconds == pytest.approx(1e-3 + max(400 * 2 / 2e6, 400 * 2 * 4 / 8e6))
    assert _cost("linear_in", "cpu", op="down_proj", row0=0, row1=4).seconds == pytest.approx(1e-3 + 32 * 2 * 8 / 8e6)


def test_an_experts_op_sees_its_active_fraction_of_the_tokens() -> None:
    op = replace(SPEC.layer_ops(0, 4)["down_proj"], expert=1, active_frac=0.25)
    assert linear_s(op, 16, 32, PROFILE.cpu) == pytest.approx(128 * 2 * 8 / 8e6)


def test_attention_takes_the_longer_of_reading_kv_and_computing_sequence_by_sequence() -> None:
    """CPU group: one query over 5 tokens of KV: 5 * 2 * 4 * 4 bytes, 4 * 8 * 5 FLOPs."""
    assert _cost("attend", "cpu", glo=2, ghi=3) == TaskCost(pytest.approx(1e-3 + 160 / 2e6), dram_bytes=160, memory_frac=1.0)
    # the second layer sees a window of 3 tokens
    assert _cost("attend", "cpu", glo=2, ghi=3, layer=1).seconds == pytest.approx(1e-3 + 96 / 2e6)
    # GPU: 3 sequences of 10 tokens, 2 of 7 tokens with queries at positions 5 and 6: 13 pairs
    assert _cost("attend", "gpu", glo=0, ghi=2).seconds == pytest.approx(1e-3 + (3 * 320 + 2 * 224) / 2e7)


def test_elementwise_tasks_move_bytes() -> None:
    hidden_bytes = 8 * 8 * 4  # 8 tokens
    assert _cost("norm", "cpu").seconds == pytest.approx(1e-3 + 2 * hidden_bytes / 2e6)
    assert _cost("add", "gpu", terms=("a", "b")).seconds == pytest.approx(1e-3 + 4 * hidden_bytes / 2e7)
    assert _cost("add", "gpu", terms=("a",), norm="mlp_post_norm").seconds == pytest.approx(1e-3 + 5 * hidden_bytes / 2e7)
    assert _cost("embed", "cpu").seconds == pytest.approx(1e-3 + 8 * 8 * (2 + 4) / 2e6)
    assert _cost("rope_append", "cpu", glo=2, ghi=3).seconds == pytest.approx(1e-3 + (2 * 16 * 4 + 2 * 4 * 4) / 2e6)
    assert _cost("poison", "gpu", columns=4000).seconds == pytest.approx(1e-3 + 4000 / 2e7)


def test_copies_pay_their_fixed_cost_and_the_rate_of_their_direction() -> None:
    assert _cost("send", "gpu", columns=16, glo=2, ghi=3) == TaskCost(pytest.approx(2e-3 + 64 / 5e5), 64, 64, "activations")
    assert _cost("recv", "gpu", columns=16) == TaskCost(pytest.approx(2e-3 + 512 / 1e6), 512, 512, "activations")
    assert _cost("load", "link_in", columns=128) == TaskCost(pytest.approx(1e-3 + 128 / 1e6), 128, 128, "weights")


def test_streamed_kv_moves_whole_pages_up_and_new_tokens_down() -> None:
    """2 sequences with 5 earlier tokens: 2 pages of 4 tokens each; 4 new tokens."""
    assert _cost("load_kv", "link_in", glo=1, ghi=2) == TaskCost(pytest.approx(1e-3 + 2 * 8 * 32 / 1e6), 512, 512, "kv")
    assert _cost("store_kv", "link_out", glo=1, ghi=2) == TaskCost(pytest.approx(1e-3 + 4 * 32 / 5e5), 128, 128, "kv")


def test_a_copy_of_kv_waits_for_a_linear_whose_core_it_shares() -> None:
    """As long as the linear has tokens: all 8 of the micro-batch, not just those whose KV is copied."""
    link = PROFILE.link
    assert link is not None
    shared = replace(PROFILE, link=replace(link, load_kv_s=1e-3, store_kv_s=2e-3, kv_copy_token_s=1e-2))

    def beyond_s(kind: Kind, queue: Any) -> float:
        task = Task(index=0, kind=kind, queue=queue, mb=0, layer=0, glo=1, ghi=2)
        return task_cost(task, SPEC, PLAN, shared, LOAD).seconds - task_cost(task, SPEC, PLAN, PROFILE, LOAD).seconds

    assert (beyond_s("load_kv", "link_in"), beyond_s("store_kv", "link_out")) == pytest.approx((0.081, 0.082))
    with pytest.raises(ValueError, match="kv_copy_token_s"):
        replace(link, kv_copy_token_s=-1e-9)


# -- loads ---------------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 30)))
def test_pairs_and_kv_of_a_sequence_count_what_each_query_sees(query_tokens: int, context: int, window: int | None) -> None:
    sequence = SeqClass(1, query_tokens, context + query_tokens)
    seen = [range(max(0, p + 1 - (window or 1000)), p + 1) for p in range(context, context + query_tokens)]
    assert sequence.pairs(window) == sum(len(tokens) for tokens in seen)
    assert sequence.kv_read(window) == len(set().union(*seen))


def test_equal_sequences_are_counted_together() -> None:
    group = GroupLoad.of([(1, 5), (2, 8), (1, 5)])
    assert group.classes == (SeqClass(2, 1, 5), SeqClass(1, 2, 8))
    assert (group.num_seqs, group.tokens, group.kv_tokens, group.score_pairs) == (3, 4, 18, 5 + 5 + 15)


def test_a_decode_step_deals_sequences_evenly_and_in_their_groups() -> None:
    bucket = replace(BUCKET, micro_batches=2)
    load = decode_load(3, 2, 9, bucket)
    assert [[group.num_seqs for group in mb] for mb in load.micro_batches] == [[2, 0, 1], [1, 0, 1]]
    assert load.shape == ((True, False, True),) * 2
    assert (load.tokens(), load.logit_rows, load.num_seqs) == (5, 5, 5)
    assert load.micro_batches[0][0].kv_tokens == 20
    streamed = decode_load(0, 2, 9, replace(bucket, host_attention="gpu"))
    assert streamed.shape == ((False, True, False),) * 2
    assert len(decode_load(1, 0, 9, replace(bucket, micro_batches=4)).micro_batches) == 1


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 8))
def test_micro_batches_differ_by_one_sequence_at_most(num_gpu: int, num_host: int, micro_batches: int) -> None:
    load = decode_load(num_gpu, num_host, 4, replace(BUCKET, micro_batches=micro_batches))
    sizes = [load.tokens(mb) for mb in range(len(load.micro_batches))]
    assert sum(sizes) == num_gpu + num_host
    assert max(sizes) - min(sizes) <= 1


def test_a_prompt_chunk_brings_its_tokens_and_asks_for_the_logits_it_needs() -> None:
    bucket = replace(BUCKET, phase="prefill", host_prefill_attention="gpu", host_attention="cpu")
    load = prefill_load(1, 1, 8, 16, bucket, logit_rows=0)
    assert load.micro_batches[0][1].classes == (SeqClass(1, 8, 24),)
    assert (load.tokens(), load.logit_rows) == (16, 0)
    assert prefill_load(1, 1, 8, 16, bucket).logit_rows == 2
    mixed = pass_load(bucket, [SeqClass(4, 1, 10)], [SeqClass(1, 8, 8)], prompt=True, logit_rows=5)
    assert (mixed.tokens(), mixed.tokens(0, 0, 1), mixed.logit_rows) == (12, 4, 5)
