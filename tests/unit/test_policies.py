"""Every named policy is what its name says, keeps the limits, and says what it would need when it cannot."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.planning import DEMO, RTX_4090, llama, llama_70b, memory_of, smollm2, workload
from twinpilots.errors import DeviceUnavailableError, LimitError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan import policies
from twinpilots.plan.draft import PlanOptions, chunk_choices, pages_of, ring_rule, split_of, unit_edge
from twinpilots.plan.memory import kv_page_bytes, layer_template, plan_memory
from twinpilots.plan.plan import Plan, Policy, Split
from twinpilots.plan.policies import FINDERS, build_policy
from twinpilots.plan.problem import Problem
from twinpilots.plan.workload import Limits, Workload

CASES = [(smollm2(), DEMO, workload()), (llama_70b(), RTX_4090, workload(64, 512, 128))]
OFFLOADING: tuple[Policy, ...] = ("twinpilots", "flexgen", "hetegen", "layer-split", "stream", "cpu")


def rows(plan: Plan, part: str) -> int:
    return sum(getattr(split, part) for bucket in plan.buckets for layer in bucket.splits for split in layer.values())


def smallest(message: str, tier: str) -> int:
    found = re.search(rf"at least (\d+)(KiB|MiB|GiB) of {tier} memory", message)
    assert found is not None, message
    return int(found[1]) << {"KiB": 10, "MiB": 20, "GiB": 30}[found[2]]


@pytest.mark.parametrize("policy", OFFLOADING)
@pytest.mark.parametrize("case", CASES, ids=["demo", "70b"])
def test_plans_are_complete_and_keep_both_limits(policy: Policy, case: tuple[ModelSpec, HardwareProfile, Workload]) -> None:
    spec, profile, work = case
    limits = memory_of(profile)
    plan = build_policy(policy, spec, profile, work, limits)
    plan.check(spec)
    use = plan_memory(spec, plan)
    assert use.gpu.total <= limits.gpu_bytes and use.host.total <= limits.host_bytes
    assert plan.policy == policy and Plan.from_json(plan.to_json()) == plan
    assert {bucket.phase for bucket in plan.buckets} == {"prefill", "decode"}
    assert plan.bucket_for("decode", work.concurrency).max_tokens == plan.max_num_seqs


@pytest.mark.parametrize("policy", OFFLOADING)
@pytest.mark.parametrize("unit_rows", [1, 24, 4096])
def test_any_unit_gives_a_valid_plan(policy: Policy, unit_rows: int) -> None:
    spec = llama(vocab=131, intermediate=72)
    limits = Limits(gpu_bytes=600_000, host_bytes=64 << 20)
    plan = build_policy(policy, spec, DEMO, workload(3, 40, 8), limits, PlanOptions(unit_rows=unit_rows, kv_dtype="fp32", max_model_len=100))
    plan.check(spec)
    assert plan_memory(spec, plan).gpu.total <= limits.gpu_bytes
    assert (plan.kv_dtype, plan.max_model_len) == ("fp32", 100)
    assert max(plan.gpu_pages, plan.host_pages) * plan.page_size >= 100  # one sequence of the greatest length fits


def test_stream_computes_nothing_on_the_cpu_and_cpu_streams_nothing() -> None:
    stream = build_policy("stream", smollm2(), DEMO, workload(), memory_of(DEMO))
    assert not stream.uses_cpu and rows(stream, "cpu") == 0 and stream.host_pages == 0 and rows(stream, "streamed") > 0
    cpu = build_policy("cpu", smollm2(), DEMO, workload(), memory_of(DEMO))
    assert not cpu.uses_gpu and rows(cpu, "resident") == rows(cpu, "streamed") == 0 and cpu.gpu_pages == cpu.ring_bytes == 0


def test_resident_holds_everything_or_refuses_with_a_limit_that_works() -> None:
    with pytest.raises(LimitError) as caught:
        build_policy("resident", smollm2(), DEMO, workload(), memory_of(DEMO))
    need = smallest(str(caught.value), "GPU")
    plan = build_policy("resident", smollm2(), DEMO, workload(), replace(memory_of(DEMO), gpu_bytes=need))
    assert rows(plan, "streamed") == rows(plan, "cpu") == 0
    with pytest.raises(LimitError):
        build_policy("resident", smollm2(), DEMO, workload(), replace(memory_of(DEMO), gpu_bytes=need - (1 << 20)))


def test_layer_split_keeps_whole_layers_with_their_kv() -> None:
    spec = smollm2()
    plan = build_policy("layer-split", spec, DEMO, workload(), memory_of(DEMO))
    assert rows(plan, "streamed") == 0 and plan.host_pages == 0
    for bucket in plan.buckets:
        for number, layer in enumerate(bucket.splits[:-1]):
            on_cpu = number in plan.host_kv_layers
            assert all((split.resident == 0) == on_cpu and (split.cpu == 0) == (not on_cpu) for split in layer.values())
        assert bucket.splits[-1]["lm_head"].resident == spec.vocab_size  # the head goes first, then layers from the end
    assert plan.host_kv_layers == tuple(range(len(plan.host_kv_layers)))
    layer_bytes = sum(op.weight_bytes for op in layer_template(spec, 64).values() if op.layer == 0) + plan.gpu_pages * kv_page_bytes(spec, plan)
    assert plan_memory(spec, plan).gpu.total + layer_bytes > DEMO.gpu_memory_bytes  # not one layer more would fit


def test_layer_split_leaves_a_head_that_does_not_fit_to_the_cpu() -> None:
    spec = smollm2()  # lm_head takes 54 MiB of its 257
    plan = build_policy("layer-split", spec, DEMO, workload(4), Limits(gpu_bytes=32 << 20, host_bytes=8 << 30))
    plan.check(spec)
    assert plan_memory(spec, plan).gpu.total <= 32 << 20
    assert all(bucket.splits[-1]["lm_head"].cpu == spec.vocab_size for bucket in plan.buckets)
    assert 0 < len(plan.host_kv_layers) < spec.num_layers


def test_hetegen_splits_every_linear_by_one_ratio_that_balances() -> None:
    problem = Problem.of(llama_70b(), RTX_4090, workload(64, 512, 128), memory_of(RTX_4090), PlanOptions())
    plan = build_policy("hetegen", problem.spec, problem.profile, problem.workload, problem.limits)
    alpha = policies.hetegen_alpha(problem, 1)
    assert alpha == pytest.approx(0.85 * 83.2 / (0.85 * 83.2 + 24), rel=0.01)  # at one token: shares as the CPU's and the link's rates
    for name, split in plan.bucket_for("decode", 1).splits[40].items():
        op = problem.ops[name]
        assert split.cpu == pytest.approx(alpha * (op.rows - split.resident), abs=op.unit_rows)


def test_twinpilots_places_whole_ops_as_balance_says_and_every_layer_alike() -> None:
    problem = Problem.of(smollm2(), DEMO, workload(), memory_of(DEMO), PlanOptions())
    plan = build_policy("twinpilots", problem.spec, problem.profile, problem.workload, problem.limits)
    assert rows(plan, "resident") == 0 and plan.gpu_pages == 0
    bucket = plan.bucket_for("decode", 16)
    placed = policies.balanced_ops(problem, 16, 16, 128 + 16, gpu_attention=bucket.host_attention == "gpu", cpu_attention=bucket.host_attention == "cpu")
    for layer in bucket.splits[:-1]:
        assert layer == bucket.splits[0]
        for name, split in layer.items():
            assert split == (Split(resident=0, streamed=0, cpu=split.rows) if placed[name] else Split(resident=0, streamed=split.rows, cpu=0))


def test_twinpilots_does_not_stream_a_model_that_fits() -> None:
    plan = build_policy("twinpilots", smollm2(), DEMO, workload(), Limits(gpu_bytes=1 << 30, host_bytes=8 << 30))
    assert rows(plan, "streamed") == rows(plan, "cpu") == 0


def test_flexgen_streams_weights_and_attends_host_kv_on_the_cpu() -> None:
    plan = build_policy("flexgen", llama_70b(), RTX_4090, workload(64, 512, 128), memory_of(RTX_4090))
    assert rows(plan, "cpu") == 0 and rows(plan, "streamed") > 0
    assert not plan.host_pages or (plan.uses_cpu and {bucket.host_attention for bucket in plan.buckets} == {"cpu"})


def test_flexgen_attends_prompts_of_host_kv_on_the_gpu() -> None:
    plan = build_policy("flexgen", llama_70b(), RTX_4090, workload(64, 512, 128), Limits(gpu_bytes=12 << 30, host_bytes=192 << 30))
    assert plan.host_pages and {bucket.host_prefill_attention for bucket in plan.buckets} == {"gpu"}
    assert plan.kv_staging_pages >= pages_of(512 + 128)  # room for a sequence at least


def test_sequences_that_do_not_fit_at_once_wait() -> None:
    spec, work = smollm2(), workload(64)
    plan = build_policy("stream", spec, DEMO, work, memory_of(DEMO))
    assert 1 <= plan.max_num_seqs < 64
    more = build_policy("stream", spec, DEMO, work, Limits(gpu_bytes=160 << 20, host_bytes=8 << 30))
    assert more.max_num_seqs > plan.max_num_seqs


@pytest.mark.parametrize("policy", [policy for policy in OFFLOADING if policy != "cpu"])
def test_the_named_gpu_limit_is_the_smallest_that_works(policy: Policy) -> None:
    spec, work = smollm2(), workload(4)
    with pytest.raises(LimitError) as caught:
        build_policy(policy, spec, DEMO, work, Limits(gpu_bytes=100_000, host_bytes=8 << 30))
    need = smallest(str(caught.value), "GPU")
    plan = build_policy(policy, spec, DEMO, work, Limits(gpu_bytes=need, host_bytes=8 << 30))
    assert plan_memory(spec, plan).gpu.total <= need
    with pytest.raises(LimitError):
        build_policy(policy, spec, DEMO, work, Limits(gpu_bytes=need - (1 << 20 if need > 16 << 20 else 1024), host_bytes=8 << 30))


def test_the_named_host_limit_works() -> None:
    with pytest.raises(LimitError, match="--host-memory") as caught:
        build_policy("cpu", smollm2(), DEMO, workload(4), Limits(gpu_bytes=0, host_bytes=100 << 20))
    need = smallest(str(caught.value), "host")
    assert build_policy("cpu", smollm2(), DEMO, workload(4), Limits(gpu_bytes=0, host_bytes=need)).max_num_seqs >= 1


def test_both_limits_are_named_when_both_are_short() -> None:
    with pytest.raises(LimitError, match=r"--gpu-memory to \S+ and --host-memory to") as caught:
        build_policy("stream", smollm2(), DEMO, workload(4), Limits(gpu_bytes=1000, host_bytes=1000))
    gpu, host = (int(value) << {"K": 10, "M": 20, "G": 30}[unit] for value, unit in re.findall(r"-memory to (\d+)([KMG])iB", str(caught.value)))
    build_policy("stream", smollm2(), DEMO, workload(4), Limits(gpu_bytes=gpu, host_bytes=host))


def test_without_a_gpu_only_the_cpu_plans() -> None:
    bare = replace(DEMO, gpu=None, link=None, gpu_memory_bytes=0)
    for policy in FINDERS:
        if policy == "cpu":
            build_policy(policy, smollm2(), bare, workload(), memory_of(bare))
        else:
            with pytest.raises(DeviceUnavailableError, match=f"policy {policy} needs a GPU"):
                build_policy(policy, smollm2(), bare, workload(), memory_of(bare))


def test_lengths_beyond_the_models_are_refused() -> None:
    with pytest.raises(LimitError, match="exceeds max_model_len 4096"):
        build_policy("cpu", llama(), DEMO, workload(1, 4000, 97), memory_of(DEMO))
    with pytest.raises(LimitError, match="max_model_len 5000 exceeds the 4096"):
        build_policy("cpu", llama(), DEMO, workload(1), memory_of(DEMO), PlanOptions(max_model_len=5000))


def test_a_ring_that_streams_at_the_links_rate_is_worth_a_sequence() -> None:
    """One more sequence beside a ring of single units would be dearly bought; where the ring by the rule leaves room for none, single units must do."""
    packet_bytes, depth = ring_rule(12 << 20)
    plan = build_policy("stream", smollm2(), DEMO, workload(), Limits(gpu_bytes=12 << 20, host_bytes=8 << 30))
    assert plan.max_num_seqs == 2 and plan.packet_bytes == packet_bytes and plan.ring_bytes >= packet_bytes * depth
    small = build_policy("stream", smollm2(), DEMO, workload(), Limits(gpu_bytes=4700 << 10, host_bytes=8 << 30))
    assert small.max_num_seqs == 1 and small.ring_bytes < plan.ring_bytes


def test_rules_of_ring_chunk_and_rounding() -> None:
    assert ring_rule(24 << 30) == (32 << 20, 24)  # packets of tens of MB, a ring of 1/32
    packet, depth = ring_rule(84 << 20)
    assert packet == 688128 and depth == 4  # 84 MiB / 128, in whole 4 KiB
    assert ring_rule(4 << 20) == (64 << 10, 4) and ring_rule(0) == (1024, 4)  # a small device: packets of 64 KiB while the ring is at most a 16th
    assert chunk_choices(llama_70b(), workload(64, 512, 128), 64, 24 << 30)[0] == 2048
    assert chunk_choices(llama_70b(), workload(64, 512, 128), 64, 1 << 30)[0] == 256  # 320 KB a token in an eighth of 1 GiB
    op = layer_template(llama(vocab=130), 64)["lm_head"]  # units at 0, 64, 128 and the tail's end 130
    assert [unit_edge(op, at) for at in (0, 31, 33, 64, 97, 128, 128.9, 129.1, 130)] == [0, 0, 64, 64, 128, 128, 128, 130, 130]
    assert split_of(op, 64, 0.25, streams=True, uses_cpu=True) == Split(resident=64, streamed=64, cpu=2)
    assert split_of(op, 64, 1.0, streams=True, uses_cpu=True) == Split(resident=64, streamed=0, cpu=66)
    assert split_of(op, 64, 0.0, streams=False, uses_cpu=True) == Split(resident=64, streamed=0, cpu=66)
