"""Plans on the disk: only where memory is too small, within every limit, never faster than the bounds say, refused with limits that work, and explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.limits import Case, random_case, untruth
from tests.planning import DEMO, llama, memory_of, workload
from twinpilots.config import EngineConfig
from twinpilots.errors import DeviceUnavailableError, LimitError, NotRunnableError
from twinpilots.hardware.presets import PRESETS
from twinpilots.model.dummy import dummy_spec
from twinpilots.plan.draft import PlanOptions, fits, limit_step
from twinpilots.plan.estimate import estimate_pass
from twinpilots.plan.explain import explain
from twinpilots.plan.memory import disk_bytes, plan_memory
from twinpilots.plan.picture import plot
from twinpilots.plan.plan import POLICIES, Plan
from twinpilots.plan.policies import READS_DISK, build_policy
from twinpilots.plan.pricing import waves_of
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import Disk, Machine, PhaseTerms, Program, solve_program
from twinpilots.plan.report import plan_document, plan_text
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.solver import Solution, least_disk, solve
from twinpilots.plan.what_if import twice_the_disk
from twinpilots.plan.workload import Limits, Workload
from twinpilots.planner import Planner

SPEC = llama(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=2048, vocab=512)
WORK = workload(4, 64, 16)
SHORT = Limits(gpu_bytes=16 << 20, host_bytes=32 << 20, disk_bytes=1 << 30)  # of 60 MiB of weights
SLOW = replace(DEMO, disk_bytes_per_s=5e7)


@pytest.fixture(scope="module")
def found() -> Solution:
    return solve(SPEC, SLOW, WORK, SHORT)


def test_what_neither_memory_holds_lies_on_the_disk_and_no_more(found: Solution) -> None:
    use = plan_memory(SPEC, found.plan)
    assert fits(SPEC, found.plan, SHORT) and 0 < use.disk.weights == found.memory.disk.total
    assert 0 <= SHORT.host_bytes - use.host.total < 0.05 * SHORT.host_bytes  # a unit of every layer, and what reads of all of it would have taken
    with pytest.raises(LimitError):
        solve(SPEC, SLOW, WORK, SHORT.without_disk)


def test_every_bucket_may_run_with_the_rows_where_they_are(found: Solution) -> None:
    found.plan.check(SPEC)
    assert Plan.from_json(found.plan.to_json()) == found.plan
    for bucket in found.plan.buckets:
        expand(SPEC, found.plan, bucket, ((True, False, False),))


def test_a_pass_takes_what_the_disk_needs_and_no_less_than_the_bounds(found: Solution) -> None:
    assert found.prediction.bottleneck == "disk" and found.price.busy_frac["disk"] > 0.95
    assert found.prediction.tokens_per_s <= found.prediction.plan_bound <= found.prediction.hardware_bound
    for one in found.price.passes:
        assert one.timing.seconds == pytest.approx(disk_bytes(SPEC, found.plan) / 5e7, rel=0.02)


def test_the_quick_estimate_of_a_deep_model_is_the_simulation(found: Solution) -> None:
    for one in found.price.passes:
        exact = simulate(expand(SPEC, found.plan, one.bucket, one.load.shape), SPEC, found.plan, SLOW, one.load)
        quick = estimate_pass(SPEC, found.plan, one.bucket, SLOW, one.load)
        assert quick.seconds == pytest.approx(exact.seconds, rel=0.03) and quick.busy_s["disk"] == pytest.approx(exact.busy_s["disk"], rel=0.03)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 500), st.sampled_from(("stream", "cpu", "flexgen")), st.floats(0.1, 0.9))
def test_policies_with_a_disk_keep_all_limits_and_refuse_truly(number: int, policy: str, share: float) -> None:
    case = random_case(3, number)
    while case.spec.name != "random":
        number += 1000
        case = random_case(3, number)
    work = replace(case.workload, num_requests=min(8, case.workload.num_requests), max_num_seqs=4)
    size = case.spec.linear_bytes + case.spec.embedding_bytes
    limits = Limits(gpu_bytes=case.limits.gpu_bytes, host_bytes=int(share * size) + (3 << 20), disk_bytes=int(share * size) + 1000)
    case = replace(case, workload=work, limits=limits, profile=PRESETS["rtx-3060"], policy=policy)
    refusal = case.plans(limits)
    assert refusal is None or not untruth(case, refusal)


@pytest.mark.parametrize(("host", "policy"), [(64, "auto"), (90, "cpu"), (64, "stream")])
def test_nothing_lies_on_the_disk_where_memory_suffices(host: int, policy: str) -> None:
    """With a disk allowed, everything is as without one: the plan and its price."""
    limits = Limits(gpu_bytes=SHORT.gpu_bytes, host_bytes=host << 20)
    plain = solve(SPEC, SLOW, WORK, limits, policy=policy, compare=False)  # type: ignore[arg-type]
    assert policy != "auto" or waves_of(plain.plan, WORK)[0] == 1
    allowed = solve(SPEC, SLOW, WORK, replace(limits, disk_bytes=1 << 30), policy=policy, compare=False)  # type: ignore[arg-type]
    assert allowed.plan == plain.plan and allowed.price == plain.price


def test_a_disk_lets_more_run_at_once_only_where_that_is_faster() -> None:
    """Sequences that do not fit at once run in waves; a plan on the disk that holds them all is taken if the simulator says that it is faster."""
    work, limits = workload(16, 200, 50), Limits(gpu_bytes=12 << 20, host_bytes=60 << 20)
    quick, slow = (replace(DEMO, disk_bytes_per_s=rate) for rate in (1e11, 1e4))
    plain = solve(SPEC, DEMO, work, limits)
    on_quick, on_slow = (solve(SPEC, profile, work, replace(limits, disk_bytes=1 << 30)) for profile in (quick, slow))
    assert on_slow.plan == plain.plan and not plain.plan.uses_disk
    assert on_quick.plan.uses_disk and on_quick.price.num_waves < plain.price.num_waves
    assert on_quick.prediction.tokens_per_s > plain.prediction.tokens_per_s


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ("auto", *READS_DISK)])
def test_policies_that_know_no_disk_say_what_they_need_instead(found: Solution, policy: str) -> None:
    reason = found.candidates[policy].reason  # type: ignore[index]
    assert found.candidates[policy].tokens_per_s is None and reason is not None and "-memory to" in reason and "--disk" not in reason  # type: ignore[index]


def test_a_refusal_with_too_little_disk_names_what_would_do() -> None:
    limits = replace(SHORT, disk_bytes=1 << 20)
    case = Case(spec=SPEC, profile=SLOW, workload=WORK, limits=limits, policy="stream")
    refusal = case.plans(limits)
    assert refusal is not None and "--gpu-memory to" in refusal and ", or --disk to" in refusal
    assert not untruth(case, refusal)
    assert "with the limits that it asks for" in untruth(case, refusal.split(", or --disk")[0] + ", or --disk to 1025KiB (too little)")


def test_the_least_disk_is_enough_and_no_less_is() -> None:
    need = least_disk(SPEC, SLOW, WORK, SHORT.without_disk)
    assert need is not None
    solve(SPEC, SLOW, WORK, replace(SHORT, disk_bytes=need))
    assert least_disk(SPEC, SLOW, WORK, replace(SHORT, disk_bytes=need - limit_step(need))) == need
    assert least_disk(SPEC, replace(SLOW, disk_bytes_per_s=None), WORK, SHORT.without_disk) is None
    assert least_disk(SPEC, SLOW, WORK, Limits(gpu_bytes=1000, host_bytes=1000)) is None  # no disk replaces a ring or a page


def test_a_machine_whose_disk_nobody_measured_has_none() -> None:
    with pytest.raises(DeviceUnavailableError, match="nobody has measured the disk of demo"):
        solve(SPEC, replace(SLOW, disk_bytes_per_s=None), WORK, SHORT)


def test_a_tied_head_stays_in_host_memory() -> None:
    spec = replace(SPEC, tied=True)
    plan = build_policy("stream", spec, SLOW, WORK, SHORT)
    plan.check(spec)
    assert plan.disk_rows and plan.disk_rows[-1] == {"lm_head": 0}


def test_without_a_gpu_the_cpu_reads_what_it_computes() -> None:
    bare = replace(SLOW, gpu=None, link=None, gpu_memory_bytes=0)
    solution = solve(SPEC, bare, WORK, SHORT)
    assert solution.plan.disk_rows and not solution.plan.uses_gpu and solution.prediction.bottleneck == "disk"


def _config(**changes: object) -> EngineConfig:
    return EngineConfig.of(
        **{
            **dict.fromkeys(("quantization", "gpu_memory", "host_memory", "max_model_len", "max_num_seqs", "threads", "unit_rows", "plan")),
            "dtype": "auto", "device": "cpu", "kv_cache_dtype": "auto", "policy": "auto", "seed": 0, "deterministic": False, **changes,
        }
    )  # type: ignore[arg-type]  # fmt: skip


def test_an_engine_runs_no_plan_with_rows_on_the_disk_and_makes_none(found: Solution, tmp_path: Path) -> None:
    """A hand-set one is refused in one line, as a value and as a file; a model that memory cannot hold is refused as ever."""
    (tmp_path / "plan.json").write_text(found.plan.to_json())
    for plan in (found.plan, tmp_path / "plan.json"):
        with pytest.raises(NotRunnableError, match="on the disk, which this version plans and predicts but does not run"):
            Planner(_config(plan=plan, gpu_memory="1GiB"), SPEC, replace(SLOW, gpu_memory_bytes=1 << 30), "test").plan_for(WORK)
    with pytest.raises(LimitError, match="-memory to"):
        Planner(_config(gpu_memory=SHORT.gpu_bytes, host_memory=SHORT.host_bytes), SPEC, SLOW, "test").plan_for(WORK)


# -- the program ---------------------------------------------------------------------------------------------------------------------------


def _program(**changes: object) -> Program:
    """One op of 100 bytes that nobody needs time for; 20 bytes fit the GPU, 30 the host, KV takes one."""
    terms = PhaseTerms(
        passes=3.0, cpu_s={"fc1": 1e-3}, gpu_s={"fc1": 1e-3}, attention_cpu_s=0.0, attention_gpu_s=0.0, kv_bytes=0.0, streamed_kv_bytes=0.0, new_kv_bytes=0.0,
    )  # fmt: skip
    steel = Machine(op_bytes={"fc1": 100.0}, up_bytes_per_s=1e6, down_bytes_per_s=1e6)
    plain = Program(
        phases=(terms,),
        machine=steel,
        gpu_budget_bytes=20.0,
        host_budget_bytes=31.0,
        kv_capacity_bytes=1.0,
        gpu_kv=0.0,
        disk=Disk(budget_bytes=60, bytes_per_s=5),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_program_puts_on_the_disk_what_nothing_else_holds() -> None:
    """100 bytes - 20 - 30 lie on the disk, which reads 5 a second: 10 s, three times."""
    shares = solve_program(_program())
    assert shares is not None and shares.resident["fc1"] == pytest.approx(0.2) and shares.seconds == pytest.approx(30.0)
    assert solve_program(_program(disk=Disk(budget_bytes=49, bytes_per_s=5))) is None
    assert solve_program(_program(disk=None)) is None


def test_beside_a_disk_that_all_wait_for_the_rest_is_still_done_soonest() -> None:
    """CPU and link are far quicker than the disk; their shares are those of a machine without one."""
    terms = replace(_program().phases[0], cpu_s={"fc1": 3e-4}, gpu_s={"fc1": 0.0}, micro_batches=8)  # against 1e-4 s over the link
    shares = solve_program(_program(phases=(terms,)))
    assert shares is not None and shares.seconds == pytest.approx(30.0)
    assert shares.phases[0].cpu["fc1"] == pytest.approx(0.8 / 4, rel=0.02) and shares.phases[0].streamed["fc1"] == pytest.approx(0.8 * 3 / 4, rel=0.02)


# -- explanation ---------------------------------------------------------------------------------------------------------------------------


def test_the_disk_is_what_limits_and_twice_of_it_buys_twice_as_much(found: Solution) -> None:
    told = explain(SPEC, SLOW, WORK, SHORT, found.plan, found.price)
    assert told.limits["decode"].resource == "disk" and told.limits["decode"].busy_frac["disk"] > 0.95
    answer = next(each for each in told.what_if if each.change == "twice the disk")
    assert 1.5 < answer.ratio <= 2.01
    if answer.dual_ratio is not None:  # the plan is one of the program's
        assert answer.ratio == pytest.approx(answer.dual_ratio, rel=0.1)
        assert told.limits["decode"].prices is not None and told.limits["decode"].prices["disk"] > 0.9
    others = [each.ratio for each in told.what_if if each.change not in ("twice the disk", "one more GiB of GPU memory")]
    assert max(others) < 1.1


def test_what_twice_the_disk_buys_is_what_planning_anew_finds(found: Solution) -> None:
    told = explain(SPEC, SLOW, WORK, SHORT, found.plan, found.price)
    again = solve(SPEC, replace(SLOW, disk_bytes_per_s=1e8), WORK, SHORT).prediction.tokens_per_s
    answer = next(each for each in told.what_if if each.change == "twice the disk")
    assert again * 0.97 <= answer.tokens_per_s <= again * 1.01
    problem = Problem.of(SPEC, SLOW, WORK, SHORT, PlanOptions())
    assert twice_the_disk(problem).profile.disk_bytes_per_s == 1e8


def test_the_report_says_what_lies_on_the_disk_and_that_it_is_not_run(found: Solution) -> None:
    document = plan_document(found, SPEC, SLOW, WORK, SHORT)
    assert document["memory"]["disk"]["weights"] == disk_bytes(SPEC, found.plan) and document["memory"]["disk"]["limit"] == SHORT.disk_bytes
    for operation in document["operations"]:
        assert operation["resident"] + operation["streamed"] + operation["cpu"] == pytest.approx(1.0)
        assert 0.0 <= operation["disk"] <= operation["streamed"] + operation["cpu"] + 1e-9
    text = " ".join(plan_text(document).split())
    assert "on the disk:" in text and "this version does not run such plans" in text and "bottleneck disk" in text
    in_memory = solve(SPEC, SLOW, WORK, memory_of(SLOW), policy="stream", compare=False)
    plain = plan_text(plan_document(in_memory, SPEC, SLOW, WORK, memory_of(SLOW)))
    assert "disk" not in plain


def test_the_picture_has_a_row_for_the_disk(found: Solution, tmp_path: Path) -> None:
    from twinpilots.plan.figures import batch_figures, pass_figures

    document = plan_document(found, SPEC, SLOW, WORK, SHORT)
    plot({**document, **pass_figures(SPEC, SLOW, found), **batch_figures([(4, found)])}, tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    assert "weights from the disk" in drawn and ">disk</text>" in drawn and "read, layer 0" in drawn


def test_opt_175b_on_a_t4_runs_from_the_disk() -> None:
    """What no plan without the disk can hold: 350 GB of weights on a machine with 202 GB of memory."""
    spec, profile = dummy_spec("opt-175b"), PRESETS["t4"]
    limits = Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes, disk_bytes=10**12)
    plan = build_policy("stream", spec, profile, Workload(num_requests=4, input_len=512, output_len=32, max_num_seqs=4), limits)
    plan.check(spec)
    assert fits(spec, plan, limits) and 0.38 < disk_bytes(spec, plan) / spec.linear_bytes < 0.42
