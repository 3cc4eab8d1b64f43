"""Explanations hold: duals are what small changes do, what-ifs are solved again and never lose, reasons follow from the figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.machines import machine, processor, without_gpu
from tests.planning import DEMO, RTX_4090, llama, llama_70b, memory_of, smollm2, workload
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan import what_if
from twinpilots.plan.draft import PlanOptions
from twinpilots.plan.explain import Explanation, dram_bytes, explain
from twinpilots.plan.plan import Policy
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import Machine, PhaseTerms, Program, solve_program
from twinpilots.plan.sensitivity import duals
from twinpilots.plan.solver import solve
from twinpilots.plan.what_if import CHANGES, GIB, more_gpu_memory, one_more_core, twice_the_link
from twinpilots.plan.workload import Workload


def program(*, gpu_budget: float = 50.0, up: float = 1.0, cpu_s: float = 40.0) -> Program:
    """One op of 100 bytes, free on the GPU; 1 byte/s over the link, ``cpu_s`` seconds for all of it on the CPU: T = 50 / (1 / cpu_rate + 1 / link_rate)."""
    terms = PhaseTerms(
        passes=10.0, cpu_s={"gate_up_proj": cpu_s}, gpu_s={"gate_up_proj": 0.0}, attention_cpu_s=0.0, attention_gpu_s=0.0, kv_bytes=0.0, streamed_kv_bytes=0.0,
        new_kv_bytes=0.0, micro_batches=8,
    )  # fmt: skip
    steel = Machine(op_bytes={"gate_up_proj": 100.0}, up_bytes_per_s=up, down_bytes_per_s=1.0)
    return Program(phases=(terms,), machine=steel, gpu_budget_bytes=gpu_budget, host_budget_bytes=1000.0, kv_capacity_bytes=1.0)


def solved_s(**changes: float) -> float:
    found = solve_program(program(**changes))
    assert found is not None
    return found.seconds


def explained(spec: ModelSpec, profile: HardwareProfile, work: Workload, policy: Policy = "auto") -> tuple[Explanation, float]:
    limits = memory_of(profile)
    found = solve(spec, profile, work, limits, policy=policy, compare=policy == "auto")
    return explain(spec, profile, work, limits, found.plan, found.price), found.prediction.tokens_per_s


# -- duals -----------------------------------------------------------------------------------------------------------------------------------


def test_the_duals_of_a_program_with_a_known_answer() -> None:
    """Half of 100 bytes is not resident: a share c on the CPU and 0.5 - c streamed finish together, 40 c = 100 (0.5 - c): T = 14.3 s, 10 passes."""
    found = duals(program())
    assert found is not None and found.seconds == pytest.approx(10 * 100 / 7, rel=1e-3)
    prices = found.prices(0)
    assert prices["cpu"] == pytest.approx(100 / 140, rel=1e-3) and prices["link"] == pytest.approx(40 / 140, rel=1e-3)


@pytest.mark.parametrize("changes", [{"gpu_budget": 50.5}, {"up": 1.01}, {"cpu_s": 39.6}])
def test_the_duals_promise_what_solving_again_finds(changes: dict[str, float]) -> None:
    known = duals(program())
    assert known is not None
    gained_s, promised_s = solved_s() - solved_s(**changes), known.seconds - known.seconds_after(program(**changes))
    assert gained_s > 0 and promised_s == pytest.approx(gained_s, rel=0.02)


def test_a_program_without_an_answer_has_no_duals() -> None:
    assert duals(replace(program(), host_budget_bytes=10.0)) is None


# -- changes ---------------------------------------------------------------------------------------------------------------------------------


def problem_of(profile: HardwareProfile) -> Problem:
    return Problem.of(llama(), profile, workload(), memory_of(profile), PlanOptions())


def test_one_more_core_computes_more_and_reads_what_dram_has_left() -> None:
    """2 cores read 2 of DRAM's 4 MB/s: a third may read half as much again. Where DRAM is used up, only computing gains."""
    roomy = one_more_core(problem_of(machine())).profile
    assert roomy.cpu_cores == 3
    assert roomy.cpu.read_bytes_per_s == pytest.approx(3e6) and roomy.cpu.flops_per_s == pytest.approx(12e6)
    assert roomy.cpu.linear["fp16/out"](1) == pytest.approx(machine().cpu.linear["fp16/out"](1) / 1.5)
    short = one_more_core(problem_of(machine(dram_bytes_per_s=2e6))).profile
    assert short.cpu.linear["fp16/out"](1) == machine().cpu.linear["fp16/out"](1)
    assert short.cpu.linear["fp16/out"](512) == pytest.approx(machine().cpu.linear["fp16/out"](512) / 1.5)


def test_twice_the_link_takes_twice_as_much_from_host_memory_at_a_time() -> None:
    dragged = machine(cpu=processor(2e6, 8e6, copy_slowdown=1.25))  # a fifth of the CPU's time is lost; then two fifths
    altered = twice_the_link(problem_of(dragged)).profile
    assert altered.link is not None and altered.link.up_bytes_per_s == 2e6 and altered.link.down_bytes_per_s == 1e6
    assert altered.cpu.copy_slowdown == pytest.approx(1 / 0.6)
    assert twice_the_link(problem_of(machine(cpu=processor(2e6, 8e6, copy_slowdown=1.9)))).profile.cpu.copy_slowdown == 2.0


def test_one_more_gib_raises_the_limit_and_the_memory() -> None:
    altered = more_gpu_memory(problem_of(machine()))
    assert altered.limits.gpu_bytes == altered.profile.gpu_memory_bytes == machine().gpu_memory_bytes + GIB


# -- whole explanations ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [(llama(layers=8), DEMO, workload(4, 64, 16)), (llama_70b(), RTX_4090, workload(16, 512, 128))], ids=["demo", "70b"])
def test_what_ifs_are_solved_again_and_never_lose(case: tuple[ModelSpec, HardwareProfile, Workload]) -> None:
    found, tokens_per_s = explained(*case)
    assert [answer.change for answer in found.what_if] == list(CHANGES)
    for answer in found.what_if:
        assert answer.ratio == pytest.approx(answer.tokens_per_s / tokens_per_s) and answer.ratio >= 1.0


def test_the_quick_answer_is_near_a_full_search_and_near_the_duals() -> None:
    spec, work = llama_70b(), workload(16, 512, 128)
    found, tokens_per_s = explained(spec, RTX_4090, work)
    for answer in found.what_if:
        altered = CHANGES[answer.change][0](Problem.of(spec, RTX_4090, work, memory_of(RTX_4090), PlanOptions()))
        full = solve(spec, altered.profile, work, altered.limits).prediction.tokens_per_s / tokens_per_s
        assert answer.ratio == pytest.approx(full, abs=0.02)
        assert answer.dual_ratio == pytest.approx(full, abs=0.1)
    memory = next(answer for answer in found.what_if if "GPU memory" in answer.change)
    assert memory.ratio > 1.005, "the CPU reads 1 GiB of 110 less in every step"


def test_memory_is_filled_anew_only_where_there_is_more_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    monkeypatch.setattr(what_if, "refilled", lambda altered, _plan: filled.append(altered.limits.gpu_bytes) or [])
    explained(smollm2(), DEMO, workload())
    assert filled == [memory_of(DEMO).gpu_bytes + GIB]


def test_phases_say_who_is_busy_and_prices_add_up() -> None:
    found, _ = explained(llama_70b(), RTX_4090, workload(16, 512, 128))
    assert set(found.limits) == {"prefill", "decode"}
    for limit in found.limits.values():
        assert limit.resource == max(limit.busy_frac, key=lambda name: limit.busy_frac[name])
        assert all(0.0 <= share <= 1.0 + 1e-6 for share in limit.busy_frac.values())
        assert limit.prices is not None and sum(limit.prices.values()) == pytest.approx(1.0, abs=1e-4)


def test_reasons_follow_from_the_figures() -> None:
    found, _ = explained(llama_70b(), RTX_4090, workload(16, 512, 128))
    reasons = {(why.phase, why.name): why for why in found.operations}
    assert set(reasons) == {(phase, name) for phase in ("prefill", "decode") for name in llama_70b().layer_ops(0, 64) | {"lm_head": None}}
    for why in reasons.values():
        assert why.resident + why.streamed + why.cpu == pytest.approx(1.0) and why.link_s is not None and why.cpu_s is not None
        if "the link brings it sooner" in why.reason:
            assert why.cpu == pytest.approx(0, abs=0.005) and why.link_s <= why.cpu_s
        if "sooner than the link" in why.reason:
            assert why.streamed == pytest.approx(0, abs=0.005) and why.cpu_s <= why.link_s
        if "finish together" in why.reason:
            assert min(why.streamed, why.cpu) > 0.004
    assert reasons["prefill", "q_proj"].link_s == pytest.approx(80 * 8192 * 8192 * 2 / 24e9)


def test_a_named_policy_is_its_rule_and_is_planned_again_by_it() -> None:
    found, _ = explained(llama(), DEMO, workload(4, 32, 8), "hetegen")
    assert {why.reason for why in found.operations} == {"the rule of hetegen: one ratio for every operation"}
    assert all(limit.prices is None for limit in found.limits.values()) and all(answer.dual_ratio is None for answer in found.what_if)
    assert len(found.what_if) == len(CHANGES)


def test_without_a_gpu_only_a_core_can_be_added() -> None:
    bare = without_gpu(DEMO)
    found, _ = explained(smollm2(), bare, workload(4, 32, 8))
    assert [answer.change for answer in found.what_if] == ["one more CPU core"] and found.what_if[0].ratio > 1.0
    assert {why.reason for why in found.operations} == {"the only processor"}
    assert found.limits["decode"].resource == "cpu"


def test_host_memory_is_read_for_what_is_streamed_and_for_what_the_cpu_computes() -> None:
    """Policy cpu reads every weight and all KV once a pass, and streams nothing."""
    spec, limits, work = llama(), memory_of(DEMO), workload(4, 32, 8)
    found = solve(spec, DEMO, work, limits, policy="cpu", compare=False)
    problem = Problem.of(spec, DEMO, work, limits, PlanOptions())
    one = found.price.passes[-1]
    contexts = [c.num_seqs * c.kv_len for group in one.load.groups(-1, 0, 3) for c in group.classes]
    assert dram_bytes(problem, found.plan, one) == spec.linear_bytes + sum(contexts) * spec.kv_bytes_per_token("bf16")
