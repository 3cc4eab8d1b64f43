"""`auto` is the best plan that the simulator knows, no plan beats the plan bound, and solving is quick."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from tests.planning import DEMO, RTX_4090, llama, llama_70b, memory_of, smollm2, workload
from twinpilots.errors import DeviceUnavailableError, LimitError
from twinpilots.hardware.presets import PRESETS
from twinpilots.model.dummy import dummy_spec
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.draft import fill_resident, fits
from twinpilots.plan.memory import layer_templates
from twinpilots.plan.pricing import price_plan, waves_of
from twinpilots.plan.program import Machine, PhaseTerms, Program, solve_program
from twinpilots.plan.solver import price, resolve_buckets, solve
from twinpilots.plan.workload import Limits, Workload

TINY = llama(layers=3)


def terms(**changes: object) -> PhaseTerms:
    """Two ops of 10 s on either device; no attention."""
    values: dict[str, object] = {
        "passes": 1.0, "cpu_s": {"q_proj": 10.0, "gate_up_proj": 10.0}, "gpu_s": {"q_proj": 0.0, "gate_up_proj": 0.0},
        "attention_cpu_s": 0.0, "attention_gpu_s": 0.0, "kv_bytes": 0.0, "streamed_kv_bytes": 0.0, "new_kv_bytes": 0.0, "micro_batches": 1000,
    }  # fmt: skip
    return PhaseTerms(**{**values, **changes})  # type: ignore[arg-type]


def program(phase: PhaseTerms, gpu_budget: float = 0.0, kv: float = 0.0) -> Program:
    machine = Machine(op_bytes={"q_proj": 100.0, "gate_up_proj": 100.0}, up_bytes_per_s=10.0, down_bytes_per_s=10.0)
    return Program(machine=machine, phases=(phase,), gpu_budget_bytes=gpu_budget, host_budget_bytes=1e9, kv_capacity_bytes=kv)


def test_the_program_balances_link_and_cpu() -> None:
    """200 bytes at 10 B/s over the link or 20 s on the CPU: half each, 10 s (a thousand micro-batches: no chain to speak of)."""
    found = solve_program(program(terms()))
    assert found is not None and found.seconds == pytest.approx(10.0, rel=1e-2)
    assert sum(found.phases[0].cpu.values()) == pytest.approx(1.0, abs=0.02)


def test_the_program_fills_gpu_memory_first() -> None:
    found = solve_program(program(terms(), gpu_budget=100.0))
    assert found is not None and found.seconds == pytest.approx(5.0, rel=1e-2)
    assert 100 * sum(found.resident.values()) == pytest.approx(100.0)


def test_the_programs_chain_adds_up_stages_of_one_micro_batch() -> None:
    """With the GPU computing at 10 s an op, each of the two stages takes at least half of its 10 s, one after the other."""
    slow = {"q_proj": 10.0, "gate_up_proj": 10.0}
    found = solve_program(program(terms(gpu_s=slow, micro_batches=1), gpu_budget=200.0))
    assert found is not None and found.seconds == pytest.approx(10.0)


def test_a_dear_hand_off_keeps_the_cpu_out() -> None:
    cheap, dear = ({"attention": seconds, "mlp": seconds} for seconds in (0.1, 50.0))
    for handoff_s, expected in ((cheap, 1.0), (dear, 0.0)):
        found = solve_program(program(terms(handoff_s=handoff_s, micro_batches=1, gpu_s={"q_proj": 1.0, "gate_up_proj": 1.0})))
        assert found is not None and (sum(found.phases[0].cpu.values()) > 0.5) == bool(expected)


def test_the_program_knows_when_memory_does_not_suffice() -> None:
    assert solve_program(replace(program(terms()), host_budget_bytes=199.0)) is None
    assert solve_program(replace(program(terms(), gpu_budget=50.0, kv=49.0), host_budget_bytes=199.0)) is not None


def test_the_program_places_kv_where_attention_is_cheap() -> None:
    kv = {"attention_cpu_s": 1.0, "attention_gpu_s": 0.5, "kv_bytes": 100.0, "streamed_kv_bytes": 100.0}
    found = solve_program(program(terms(**kv, streamed_kv=False), gpu_budget=0.0, kv=100.0))
    assert found is not None and (found.gpu_kv, found.phases[0].host_cpu_kv) == (0.0, 1.0)


CASES: list[tuple[ModelSpec, str, Workload]] = [
    (TINY, "demo", workload(1, 20, 4)), (TINY, "rtx-4090", workload(5, 20, 4)), (smollm2(), "demo", workload(1)), (smollm2(), "demo", workload(8)),
    (smollm2(), "demo", workload(16)), (smollm2(), "demo", workload(32)), (smollm2(), "rtx-3060", workload(8)),
    (llama_70b(), "rtx-4090", workload(64, 512, 128)), (llama_70b(), "h100", workload(8, 2000, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].num_layers}-{case[1]}-{case[2].num_requests}")
def test_auto_is_at_least_as_fast_as_every_policy_and_none_beats_the_bounds(case: tuple[ModelSpec, str, Workload]) -> None:
    spec, name, work = case
    profile = PRESETS[name]
    found = solve(spec, profile, work, memory_of(profile))
    rates = {policy: each.tokens_per_s for policy, each in found.candidates.items() if each.tokens_per_s is not None}
    assert found.prediction.tokens_per_s == rates["auto"] == max(rates.values())
    assert rates["auto"] <= found.prediction.plan_bound <= found.prediction.hardware_bound
    assert all((each.tokens_per_s is None) == (each.reason is not None) for each in found.candidates.values())
    found.plan.check(spec)
    assert found.plan.policy == "auto" and fits(spec, found.plan, memory_of(profile))


def test_both_pilots_beat_either_alone_where_memory_is_short() -> None:
    found = solve(smollm2(), DEMO, workload(), memory_of(DEMO)).candidates
    alone = max(found[policy].tokens_per_s or 0.0 for policy in ("cpu", "stream", "layer-split"))
    assert (found["auto"].tokens_per_s or 0.0) > 1.4 * alone


def test_plentiful_memory_does_not_crowd_the_other_pilot_out() -> None:
    """Two equal processors and room for everything: both compute, and more memory is no worse than less."""
    work, roomy = workload(8, 64, 8), Limits(gpu_bytes=1 << 30, host_bytes=DEMO.host_memory_bytes)
    found = solve(smollm2(), DEMO, work, roomy)
    assert found.price.busy_frac["cpu"] > 0.5 and found.price.busy_frac["gpu"] > 0.5
    assert found.prediction.tokens_per_s > 1.2 * (found.candidates["resident"].tokens_per_s or 0.0)
    assert found.prediction.tokens_per_s > 0.99 * solve(smollm2(), DEMO, work, memory_of(DEMO)).prediction.tokens_per_s


def test_a_model_that_fits_is_resident() -> None:
    found = solve(smollm2(), RTX_4090, workload(), memory_of(RTX_4090))
    assert all(split.streamed == split.cpu == 0 for bucket in found.plan.buckets for layer in bucket.splits for split in layer.values())


def test_solving_is_deterministic() -> None:
    first, second = (solve(smollm2(), DEMO, workload(8), memory_of(DEMO)) for _ in range(2))
    assert first.plan == second.plan and first.prediction == second.prediction


def test_a_named_policy_alone_is_priced_the_same() -> None:
    both = solve(smollm2(), DEMO, workload(), memory_of(DEMO))
    alone = solve(smollm2(), DEMO, workload(), memory_of(DEMO), policy="stream", compare=False)
    assert alone.prediction.tokens_per_s == both.candidates["stream"].tokens_per_s and set(alone.candidates) == {"stream"}
    assert price(smollm2(), DEMO, workload(), alone.plan) == alone.prediction


def test_waves_are_priced() -> None:
    """Twice the requests that fit at once take twice the time."""
    plan = solve(smollm2(), DEMO, workload(8), memory_of(DEMO), policy="stream", compare=False).plan
    once = price_plan(smollm2(), DEMO, workload(8), plan)
    twice = price_plan(smollm2(), DEMO, replace(workload(16)), plan)
    assert waves_of(plan, workload(16)) == (2, 8, 0)
    assert twice.prefill_s + twice.decode_s == pytest.approx(2 * (once.prefill_s + once.decode_s))
    assert twice.tokens_per_s == pytest.approx(once.tokens_per_s)


def test_the_metric_is_generated_tokens_over_prefill_and_decode() -> None:
    found = solve(TINY, DEMO, workload(4, 20, 9), memory_of(DEMO)).price
    assert found.tokens_per_s == pytest.approx(4 * 9 / (found.prefill_s + found.decode_s))
    assert found.decode_s == pytest.approx(8 * found.step_s)  # the first token comes out of prefill


def test_when_nothing_fits_the_smallest_limit_is_named_and_works() -> None:
    spec, work = smollm2(), workload(4)
    with pytest.raises(LimitError, match="auto needs at least") as caught:
        solve(spec, DEMO, work, Limits(gpu_bytes=1 << 20, host_bytes=200 << 20))
    tier, flag = ("gpu_bytes", "gpu") if "--gpu-memory" in str(caught.value) else ("host_bytes", "host")
    value, unit = re.findall(rf"--{flag}-memory to (\d+)([KMG])iB", str(caught.value))[0]
    need = int(value) << {"K": 10, "M": 20, "G": 30}[unit]
    limits = replace(Limits(gpu_bytes=1 << 20, host_bytes=200 << 20), **{tier: need})
    assert fits(spec, solve(spec, DEMO, work, limits).plan, limits)
    with pytest.raises(LimitError):
        solve(spec, DEMO, work, replace(limits, **{tier: need - (2 << 20)}))


def test_a_machine_without_a_gpu_plans_for_its_cpu() -> None:
    bare = replace(DEMO, gpu=None, link=None, gpu_memory_bytes=0)
    found = solve(smollm2(), bare, workload(), memory_of(bare))
    assert not found.plan.uses_gpu and found.prediction.tokens_per_s <= found.prediction.plan_bound
    assert "needs a GPU" in (found.candidates["stream"].reason or "")
    with pytest.raises(DeviceUnavailableError):
        solve(smollm2(), bare, workload(), memory_of(bare), policy="stream")


def test_new_rates_move_the_boundary_and_nothing_else() -> None:
    spec, work = smollm2(), workload()
    plan = solve(spec, DEMO, work, memory_of(DEMO)).plan
    slow = {key: replace(curve, y=tuple(3 * y for y in curve.y)) for key, curve in DEMO.cpu.linear.items()}
    drifted = replace(DEMO, cpu=replace(DEMO.cpu, linear=slow))
    moved = resolve_buckets(spec, drifted, plan, work)
    moved.check(spec)
    assert replace(moved, buckets=plan.buckets) == plan
    old, new = (sum(split.cpu for layer in each.bucket_for("decode", 16).splits for split in layer.values()) for each in (plan, moved))
    assert new < old
    for before, after in zip(plan.buckets, moved.buckets, strict=True):
        assert [{n: s.resident for n, s in layer.items()} for layer in before.splits] == [{n: s.resident for n, s in layer.items()} for layer in after.splits]
    assert price_plan(spec, drifted, work, moved).tokens_per_s > price_plan(spec, drifted, work, plan).tokens_per_s


def test_a_named_policys_plan_is_left_alone() -> None:
    plan = solve(smollm2(), DEMO, workload(), memory_of(DEMO), policy="stream", compare=False).plan
    assert resolve_buckets(smollm2(), DEMO, plan, workload()) is plan


def test_solving_eighty_layers_is_quick() -> None:
    solve(TINY, DEMO, workload(1, 20, 4), memory_of(DEMO))  # scipy's import is not the solver's time
    began = time.process_time()
    solve(llama_70b(), RTX_4090, workload(64, 512, 128), memory_of(RTX_4090))
    assert time.process_time() - began < 3.0  # about 0.7 s on an idle core; the margin is for a busy one


def test_a_named_policys_plan_is_a_start_for_auto() -> None:
    """FlexGen's plan streams all of the MLP; with part of it computed where it lies, decoding is quicker, and nothing in memory moves."""
    spec, machine = dummy_spec("opt-30b"), PRESETS["t4"]
    solution = solve(spec, machine, workload(144, 512, 32), memory_of(machine))
    flexgen = solution.candidates["flexgen"].tokens_per_s
    assert flexgen is not None and solution.prediction.tokens_per_s > 1.03 * flexgen


def test_a_phase_may_do_without_the_gpu() -> None:
    """Where hand-offs cost half a decode step and prompts are long, both pilots read the prompts and the CPU decodes alone."""
    assert DEMO.link is not None
    slow_to_meet = replace(DEMO, link=replace(DEMO.link, handoff_s=2e-4), gpu_memory_bytes=24 << 20)
    solution = solve(smollm2(), slow_to_meet, workload(1, 512, 32), memory_of(slow_to_meet))
    decode, prefill = (solution.plan.bucket_for(phase, tokens) for phase, tokens in (("decode", 1), ("prefill", solution.plan.max_pass_tokens)))  # type: ignore[arg-type]
    assert not any(split.gpu for layer in decode.splits for split in layer.values()), "the GPU takes part in decode"
    assert any(split.gpu for layer in prefill.splits for split in layer.values()) and any(split.cpu for layer in prefill.splits for split in layer.values())
    best_other = max(each.tokens_per_s or 0.0 for name, each in solution.candidates.items() if name != "auto")
    assert solution.prediction.tokens_per_s > 1.05 * best_other


def test_a_share_that_the_linear_program_left_a_hair_below_zero_is_nothing_resident() -> None:
    spec = llama_70b()
    templates = layer_templates(spec, 64)
    target = dict.fromkeys(templates[0], 0.5) | {"k_proj": -1e-17}
    residency = fill_resident(spec, templates, 8 << 30, target, leftover=False)
    assert {layer["k_proj"] for layer in residency[:-1]} == {0} and all(rows >= 0 for layer in residency for rows in layer.values())
