"""What more hardware would buy: the program's duals say it at first order, solving again says it for certain.

Owns `CHANGES` and `ON_DISK` (one more GiB, one more core, twice the link, twice the disk: how each alters machine and limits), `WhatIf` and `what_ifs`.
Solving again is quick and no full search: at the plan's own chunk and micro-batches the program is solved for the changed machine, rounded and simulated; where
the plan itself does better there, with more rows resident if there is room, it stays. Pure. Knows nothing of how answers are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from twinpilots.errors import UserError
from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile
from twinpilots.plan.auto import GAIN, MICRO_BATCHES, Trial, grid, nudged, program_of, rounded
from twinpilots.plan.cost import disk_rate
from twinpilots.plan.draft import Draft
from twinpilots.plan.plan import Plan
from twinpilots.plan.policies import build_policy
from twinpilots.plan.polish import refilled
from twinpilots.plan.pricing import price_plan
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import solve_program
from twinpilots.plan.sensitivity import Duals, duals
from twinpilots.plan.terms import Choice

GIB = 1 << 30
MOST_SLOWDOWN = 2.0  # a copy at full rate at most halves a processor (measured: 1.7 to 2.0 times)
SATURATED = "host memory is read at its limit already"
Alter = Callable[[Problem], Problem]


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """``tokens_per_s``: simulated after solving again; ``ratio``: to the plan as it is. ``dual_ratio``: the same from the duals alone, None without a
    program (another policy than auto, or no GPU). ``note`` says what keeps the change from helping where the profile knows it."""

    change: str
    tokens_per_s: float
    ratio: float
    dual_ratio: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """Where a plan stands on the solver's grid, and the duals of that point's program (None where it has no answer)."""

    draft: Draft
    choice: Choice
    duals: Duals | None


# -- changes ---------------------------------------------------------------------------------------------------------------------------------


def more_gpu_memory(problem: Problem) -> Problem:
    profile = replace(problem.profile, gpu_memory_bytes=problem.profile.gpu_memory_bytes + GIB)
    return replace(problem, profile=profile, limits=replace(problem.limits, gpu_bytes=problem.limits.gpu_bytes + GIB))


def one_more_core(problem: Problem) -> Problem:
    """Computing grows with the cores; reading only up to what DRAM has left beyond what these cores already read."""
    profile = problem.profile
    gain = (profile.cpu_cores + 1) / profile.cpu_cores
    return replace(problem, profile=replace(profile, cpu_cores=profile.cpu_cores + 1, cpu=_faster(profile.cpu, gain, _read_gain(profile))))


def _read_gain(profile: HardwareProfile) -> float:
    """How much faster host memory can be read with one more core."""
    return max(1.0, min((profile.cpu_cores + 1) / profile.cpu_cores, profile.dram_bytes_per_s / profile.cpu.read_bytes_per_s))


def _faster(cpu: ComputeProfile, gain: float, read_gain: float) -> ComputeProfile:
    """A linear of one token only waits for its weights: that time shrinks by ``read_gain``, and no token count takes less."""
    linear = {key: Curve(x=curve.x, y=tuple(max(y / gain, curve.y[0] / read_gain) for y in curve.y)) for key, curve in cpu.linear.items()}
    return replace(
        cpu.with_attention(read_gain, gain), linear=linear, elementwise_bytes_per_s=cpu.elementwise_bytes_per_s * read_gain,
        read_bytes_per_s=cpu.read_bytes_per_s * read_gain, flops_per_s=cpu.flops_per_s * gain,
    )  # fmt: skip


def twice_the_link(problem: Problem) -> Problem:
    """Both ways; but a second of copying then takes twice as much of host memory from the processors."""
    profile = problem.profile
    assert profile.gpu is not None and profile.link is not None
    link = replace(profile.link, up_bytes_per_s=2 * profile.link.up_bytes_per_s, down_bytes_per_s=2 * profile.link.down_bytes_per_s)
    cpu, gpu = (_dragged(side) for side in (profile.cpu, profile.gpu))
    return replace(problem, profile=replace(profile, link=link, cpu=cpu, gpu=gpu))


def _dragged(side: ComputeProfile) -> ComputeProfile:
    computing = side.copy_slowdown_computing
    return replace(side, copy_slowdown=_slowdown(side.copy_slowdown), copy_slowdown_computing=None if computing is None else _slowdown(computing))


def _slowdown(now: float) -> float:
    lost = 2 * (1 - 1 / now)
    return max(now, MOST_SLOWDOWN if lost >= 1 - 1 / MOST_SLOWDOWN else 1 / (1 - lost))


def twice_the_disk(problem: Problem) -> Problem:
    return replace(problem, profile=replace(problem.profile, disk_bytes_per_s=2 * disk_rate(problem.profile)))


CHANGES: dict[str, tuple[Alter, bool]] = {  # how it alters the problem, and whether it takes a GPU
    "one more GiB of GPU memory": (more_gpu_memory, True),
    "one more CPU core": (one_more_core, False),
    "twice the link": (twice_the_link, True),
}  # fmt: skip
ON_DISK: dict[str, tuple[Alter, bool]] = {"twice the disk": (twice_the_disk, False)}  # where rows lie there


# -- solving again ---------------------------------------------------------------------------------------------------------------------------


def what_ifs(problem: Problem, plan: Plan, tokens_per_s: float, point: GridPoint | None) -> tuple[WhatIf, ...]:
    """Every change that makes sense here, for a plan that the simulator gives ``tokens_per_s``."""
    found = []
    for name, (alter, takes_gpu) in (CHANGES | ON_DISK if plan.uses_disk else CHANGES).items():
        if not takes_gpu or problem.profile.gpu is not None:
            altered = alter(problem)
            promised = _dual_ratio(altered, point)
            again = _rate_again(problem, altered, plan, tokens_per_s, tokens_per_s * (promised or 1.0))
            note = SATURATED if alter is one_more_core and _read_gain(problem.profile) == 1.0 else ""
            found.append(WhatIf(change=name, tokens_per_s=again, ratio=again / tokens_per_s, dual_ratio=promised, note=note))
    return tuple(found)


def _rate_again(problem: Problem, altered: Problem, plan: Plan, least: float, promised: float) -> float:
    """The simulated rate after solving again. The answer is searched on only where the duals promise more, and it is never under ``least``, the rate
    without the change: what is there more need not be used. Where there is more memory, the plan is priced with it filled, too."""
    if plan.policy != "auto":
        return max(least, _rate(altered, _by_rule(altered, plan)))
    trial = _solved_again(altered, plan)
    rate = 0.0 if trial is None else _rate(altered, trial.plan(altered))
    if trial is not None and rate < promised > GAIN * least:
        rate = max(rate, _rate(altered, nudged(altered, trial).plan(altered)))
    fuller = refilled(altered, plan) if altered.limits.gpu_bytes > problem.limits.gpu_bytes else []
    return max(least, rate, *(_rate(altered, each) for each in (plan, *fuller)))


def _rate(problem: Problem, plan: Plan) -> float:
    return price_plan(problem.spec, problem.profile, problem.workload, plan).tokens_per_s


def _by_rule(altered: Problem, plan: Plan) -> Plan:
    """A named policy's own plan for the altered machine; the present one where the rule finds none."""
    try:
        return build_policy(plan.policy, altered.spec, altered.profile, altered.workload, altered.limits, altered.options)
    except UserError:
        return plan


def _solved_again(altered: Problem, plan: Plan) -> Trial | None:
    """The best of the program's answers that keeps the limits, wherever KV then lies, at the plan's chunk and micro-batches."""
    if altered.profile.gpu is None:
        return None
    ranked: list[tuple[float, int, Draft, Choice]] = []
    for draft, choice in grid(altered, plan.max_pass_tokens):
        shares = solve_program(program_of(altered, draft, choice), relaxed=True) if choice.micro_batches == _micro_batches(plan) else None
        if shares is not None:
            ranked.append((-(-altered.workload.num_requests // choice.num_seqs) * shares.seconds, len(ranked), draft, choice))
    for _, _, draft, choice in sorted(ranked, key=lambda item: item[:2]):
        shares = solve_program(program_of(altered, draft, choice))
        trial = rounded(altered, draft, shares) if shares is not None else None
        if trial is not None:
            return trial
    return None


# -- the plan's place on the grid ------------------------------------------------------------------------------------------------------------


def grid_point(problem: Problem, plan: Plan) -> GridPoint | None:
    """The solver's grid point that ``plan`` comes from; None for a plan that is on none: another policy's, or one of a single processor."""
    if plan.policy != "auto" or problem.profile.gpu is None or not (plan.uses_gpu and plan.uses_cpu) or plan.host_kv_layers or plan.kv_on_disk:
        return None
    decode = plan.bucket_for("decode", plan.max_num_seqs)
    kv = (decode.host_attention, decode.host_prefill_attention) if plan.host_pages else ("none", "none")
    for draft, choice in grid(problem, plan.max_pass_tokens):
        if (choice.decode_kv, choice.prefill_kv) == kv and choice.micro_batches == _micro_batches(plan):
            return GridPoint(draft=draft, choice=choice, duals=duals(program_of(problem, draft, choice)))
    return None


def _micro_batches(plan: Plan) -> int:
    """The grid's number of micro-batches that is nearest to the plan's in decode; the search goes beyond the grid."""
    return min(plan.bucket_for("decode", plan.max_num_seqs).micro_batches, max(MICRO_BATCHES))


def _dual_ratio(altered: Problem, point: GridPoint | None) -> float | None:
    if point is None or point.duals is None:
        return None
    after_s = point.duals.seconds_after(program_of(altered, point.draft, point.choice))
    return point.duals.seconds / after_s if after_s > 0 else None  # a step far beyond where the program is linear promises nothing
