"""int8 KV in plans: what a token and a page take, and that memory, costs, bounds and policies all count the same bytes and use its own measured rates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.machines import machine, processor, without_gpu
from tests.planning import DEMO, llama, smollm2, workload
from twinpilots import cli
from twinpilots.config import KvDtype
from twinpilots.hardware.profile import AttentionRates, HardwareProfile
from twinpilots.plan import cost, memory
from twinpilots.plan.bounds import pass_bound
from twinpilots.plan.draft import PlanOptions
from twinpilots.plan.load import SeqClass, decode_load
from twinpilots.plan.plan import POLICIES, BucketPlan, Plan, Policy
from twinpilots.plan.policies import build_policy
from twinpilots.plan.problem import Problem, attention_times
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits

SPEC = llama()  # 2 KV heads of 16, 4 layers, fp16
ROOM = Limits(gpu_bytes=1 << 20, host_bytes=1 << 30)
SEQS = SeqClass(3, 1, 101)


def test_a_token_has_a_code_per_element_and_a_scale_per_head_of_k_and_of_v() -> None:
    assert SPEC.kv_token_bytes("int8") == 2 * (32 + 2 * 4)
    assert SPEC.kv_bytes_per_token("int8") == 4 * SPEC.kv_token_bytes("int8")
    assert smollm2().kv_token_bytes("int8") == pytest.approx(smollm2().kv_token_bytes("bf16") * (64 + 4) / 128)


@pytest.mark.parametrize(("head_dim", "page_size", "wanted"), [(16, 16, 2 * 2 * 16 * 20), (20, 16, 2 * 2 * 16 * 24), (5, 3, 128), (7, 1, 64)])
def test_a_page_keeps_its_scales_on_their_alignment_and_is_a_multiple_of_64(head_dim: int, page_size: int, wanted: int) -> None:
    spec = replace(SPEC, head_dim=head_dim)
    assert spec.kv_page_bytes("int8", page_size) == wanted
    assert wanted >= page_size * spec.kv_token_bytes("int8")
    assert spec.kv_page_bytes("fp16", page_size) == page_size * spec.kv_token_bytes("fp16")


def plan_of(policy: Policy, kv_dtype: KvDtype, limits: Limits = ROOM) -> Plan:
    return build_policy(policy, SPEC, DEMO, workload(3, 40, 8), limits, PlanOptions(unit_rows=8, kv_dtype=kv_dtype))


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "auto"])
def test_every_policy_plans_with_it_within_the_limits(policy: Policy) -> None:
    limits = ROOM if policy == "resident" else Limits(gpu_bytes=200 << 10, host_bytes=1 << 30)
    plan = plan_of(policy, "int8", limits)
    use = memory.plan_memory(SPEC, plan)
    assert plan.kv_dtype == "int8"
    assert use.gpu.total <= limits.gpu_bytes
    assert use.gpu.kv + use.host.kv == (plan.gpu_pages + plan.host_pages) * 4 * (2 * 2 * 16 * 20)


def test_a_plan_for_the_same_sequences_keeps_half_the_bytes_and_prices_half_of_them() -> None:
    def found(kv_dtype: KvDtype) -> tuple[int, float]:
        big = Limits(gpu_bytes=1 << 30, host_bytes=1 << 33)
        plan = solve(smollm2(), DEMO, workload(8, 512, 64), big, policy="cpu", kv_dtype=kv_dtype).plan
        return memory.plan_memory(smollm2(), plan).host.kv, float(plan.host_pages)

    (half, pages), (whole, same_pages) = found("int8"), found("bf16")
    assert pages == same_pages
    assert half / whole == pytest.approx((64 + 4) / 128)


def test_costs_count_the_scales() -> None:
    assert cost.attention_kv_bytes(SPEC, SEQS, None, "int8") == 101 * 80
    assert cost.staged_kv_bytes(SPEC, SEQS, 16, "int8") == 3 * 7 * SPEC.kv_page_bytes("int8", 16), "whole pages of the 100 earlier tokens"
    assert cost.rope_append_bytes(SPEC, 5, "int8") - cost.rope_append_bytes(SPEC, 5, "fp16") == 5 * (80 - 128)


def test_bounds_count_its_bytes() -> None:
    """On a machine that does nothing but read, at a megabyte a second."""
    profile = without_gpu(machine(cpu=processor(1e6, 1e15)))
    load = decode_load(0, 2, 999, BucketPlan(phase="decode", max_tokens=2, micro_batches=1, splits=()))
    whole, codes = (pass_bound(SPEC, profile, ROOM, load, "hardware", kv_dtype=kv_dtype).seconds for kv_dtype in ("fp16", "int8"))
    assert whole - codes == pytest.approx(2 * 1000 * 4 * (128 - 80) / 1e6, rel=1e-6)


def with_rates(profile: HardwareProfile, rates: AttentionRates) -> HardwareProfile:
    assert profile.gpu is not None
    measured = {"int8": rates}
    return replace(profile, cpu=replace(profile.cpu, kv_attention=measured), gpu=replace(profile.gpu, kv_attention=measured))


def test_attention_has_the_rates_that_were_measured_over_its_type() -> None:
    profile = with_rates(DEMO, AttentionRates(bytes_per_s=1e6, flops_per_s=1e12, seq_s=0.5))
    assert cost.attention_s(SPEC, SEQS, None, "int8", profile.cpu) == pytest.approx(3 * (0.5 + 101 * 80 / 1e6))
    assert cost.attention_s(SPEC, SEQS, None, "fp16", profile.cpu) == cost.attention_s(SPEC, SEQS, None, "fp16", DEMO.cpu)
    assert DEMO.cpu.attention_s(1e6, 1.0, kv_dtype="int8") == DEMO.cpu.attention_s(1e6, 1.0), "not measured: the rates of the weights' type"
    on_cpu, _ = attention_times(Problem.of(SPEC, profile, workload(3, 40, 8), ROOM, PlanOptions(kv_dtype="int8")), 3, 3, 100)
    assert on_cpu == pytest.approx(3 * 0.5 + 3 * 100 * 80 / 1e6 + profile.cpu.task_s)


def test_profiles_keep_and_correct_these_rates() -> None:
    profile = with_rates(DEMO, AttentionRates(bytes_per_s=1e6, flops_per_s=1e9, seq_s=0.5))
    assert HardwareProfile.from_json(profile.to_json()) == profile
    faster = profile.cpu.with_attention(2, 4)
    assert faster.kv_attention["int8"] == AttentionRates(bytes_per_s=2e6, flops_per_s=4e9, seq_s=0.125)
    assert (faster.attention_bytes_per_s, faster.attention_flops_per_s) == (2 * DEMO.cpu.attention_bytes_per_s, 4 * DEMO.cpu.attention_flops_per_s)
    with pytest.raises(ValueError, match="bytes_per_s must be a finite number above 0"):
        AttentionRates(bytes_per_s=0, flops_per_s=1, seq_s=0)


def test_plan_shows_half_the_kv_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    def kv_bytes(kv_dtype: str) -> int:
        asked = ["plan", "dummy:smollm2-135m", "--hardware", "demo", "--policy", "cpu", "--kv-cache-dtype", kv_dtype, "--json"]
        assert cli.main(asked) == 0
        return int(json.loads(capsys.readouterr().out)["memory"]["host"]["kv"])

    assert kv_bytes("int8") / kv_bytes("auto") == pytest.approx((64 + 4) / 128)
