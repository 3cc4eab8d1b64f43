"""Why a plan is as it is: what limits each phase, why every operation is computed where it is, and what more hardware would buy.

Owns `Explanation` and `explain`. Figures come from the program's terms (seconds if all of an operation went one way), its duals and the simulator; the
wording of reasons is here, their layout in `report.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import attention_kv_bytes
from twinpilots.plan.draft import PlanOptions
from twinpilots.plan.memory import disk_bytes
from twinpilots.plan.plan import BucketPlan, Phase, Plan
from twinpilots.plan.pricing import BUSY_ENOUGH, Price, PricedPass, waves_of
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import BLOCKS, PhaseTerms, Resource
from twinpilots.plan.tasks import HOST_KV
from twinpilots.plan.terms import Choice, planned_phases
from twinpilots.plan.what_if import GridPoint, WhatIf, grid_point, what_ifs
from twinpilots.plan.workload import Limits, Workload

PHASES: tuple[Phase, ...] = ("prefill", "decode")
NEARLY = 0.005  # a share under this is rounding
RULES = {
    "twinpilots": "whole operations, so that both devices finish together", "flexgen": "a resident percentage, the rest streamed",
    "hetegen": "one ratio for every operation", "layer-split": "whole layers on either device", "stream": "the GPU computes all",
    "cpu": "the CPU computes all", "resident": "all in GPU memory",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PhaseLimit:
    """``busy_frac``: the simulated share of a pass that each resource works. ``resource``: the busiest, or "hand-offs" when none is busy enough.
    ``prices``: seconds saved per second less work on a resource, by the program's duals (None without a program)."""

    resource: str
    busy_frac: Mapping[str, float]
    prices: Mapping[Resource, float] | None


@dataclass(frozen=True, kw_only=True)
class Why:
    """One operation in one phase, mean over the layers: its shares, the seconds of a pass if all of it went one way, and the reason in words."""

    phase: Phase
    name: str
    resident: float
    streamed: float
    cpu: float
    link_s: float | None
    gpu_s: float | None
    cpu_s: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    limits: Mapping[Phase, PhaseLimit]
    operations: tuple[Why, ...]
    what_if: tuple[WhatIf, ...]


def explain(spec: ModelSpec, profile: HardwareProfile, workload: Workload, limits: Limits, plan: Plan, price: Price) -> Explanation:
    """Explain ``plan``, which the simulator gives ``price``."""
    options = PlanOptions(unit_rows=plan.unit_rows, kv_dtype=plan.kv_dtype, max_model_len=plan.max_model_len)
    problem = Problem.of(spec, profile, workload, limits if plan.uses_disk else limits.without_disk, options)
    point = grid_point(problem, plan)
    passes = {phase: [p for p in price.passes if p.phase == phase] for phase in PHASES}
    shown = [phase for phase in PHASES if passes[phase]]
    found = _limits(problem, plan, point, {phase: passes[phase] for phase in shown})
    return Explanation(
        limits=found, operations=tuple(why for phase in shown for why in _operations(problem, plan, passes[phase][0].bucket, found[phase])),
        what_if=what_ifs(problem, plan, price.tokens_per_s, point),
    )  # fmt: skip


# -- what limits -----------------------------------------------------------------------------------------------------------------------------


def _limits(problem: Problem, plan: Plan, point: GridPoint | None, passes: Mapping[Phase, list[PricedPass]]) -> dict[Phase, PhaseLimit]:
    known = point.duals if point is not None else None
    found: dict[Phase, PhaseLimit] = {}
    for phase, of_phase in passes.items():
        busy = _busy(problem, plan, of_phase)
        busiest = max((name for name in busy), key=lambda name: busy[name])
        resource = busiest if busy[busiest] >= BUSY_ENOUGH else "hand-offs"
        found[phase] = PhaseLimit(resource=resource, busy_frac=busy, prices=known.prices(PHASES.index(phase)) if known is not None else None)
    return found


def _busy(problem: Problem, plan: Plan, passes: list[PricedPass]) -> dict[str, float]:
    seconds = sum(p.seconds for p in passes)
    queues = {"cpu": "cpu", "gpu": "gpu", "link": "link_in", "link_out": "link_out"}
    queues |= {"disk": "disk"} if plan.uses_disk else {}
    queues |= {"disk_out": "disk_out"} if plan.kv_on_disk else {}
    busy = {name: sum(p.count * p.timing.busy_s[queue] for p in passes) / seconds for name, queue in queues.items()}
    dram = sum(p.count * dram_bytes(problem, plan, p) for p in passes) / problem.profile.dram_bytes_per_s
    return {**busy, "dram": min(1.0, dram / seconds)}


def dram_bytes(problem: Problem, plan: Plan, one: PricedPass) -> float:
    """Bytes that a pass takes from host memory: streamed rows, the CPU's rows once per micro-batch, KV that moves or is attended there; and what the disk
    brings there."""
    spec = problem.spec
    batches = len(one.load.micro_batches)
    weights = 0.0
    for op in spec.ops(plan.unit_rows):
        split = one.bucket.splits[op.layer][op.name]
        weights += op.row_bytes * (split.streamed + split.cpu * (batches if op.layer >= 0 else 1))
    attended = [c for group in one.load.groups(-1, HOST_KV, HOST_KV + 1) for c in group.classes]
    kv = sum(c.num_seqs * attention_kv_bytes(spec, c, layer.window, problem.kv_dtype) for c in attended for layer in spec.layers)
    return weights + kv + one.timing.bytes["link_kv"] * (2 if plan.kv_on_disk else 1) + disk_bytes(spec, plan)


# -- why -------------------------------------------------------------------------------------------------------------------------------------

Shares = Mapping[str, tuple[float, float, float]]  # by operation: the fractions of its rows that are resident, streamed, the CPU's


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What the reasons of one phase are read off: shares, the program's terms (None without two devices), the link's seconds by operation, who is busy."""

    plan: Plan
    shares: Shares
    terms: PhaseTerms | None
    link_s: Mapping[str, float]
    limit: PhaseLimit


def _operations(problem: Problem, plan: Plan, bucket: BucketPlan, limit: PhaseLimit) -> list[Why]:
    terms = _terms(problem, plan, bucket)
    case = _Case(plan=plan, shares=mean_shares(bucket), terms=terms, link_s=_link_s(problem), limit=limit)
    found = []
    for name, (resident, streamed, cpu) in case.shares.items():
        link_s, gpu_s, cpu_s = (None, None, None) if terms is None else (case.link_s[name], terms.gpu_s[name], terms.cpu_s[name])
        found.append(
            Why(
                phase=bucket.phase, name=name, resident=resident, streamed=streamed, cpu=cpu, link_s=link_s, gpu_s=gpu_s, cpu_s=cpu_s,
                reason=_reason(case, name),
            )
        )  # fmt: skip
    return found


def mean_shares(bucket: BucketPlan) -> dict[str, tuple[float, float, float]]:
    """(resident, streamed, CPU) fractions of every operation's rows over all its layers."""
    sums: dict[str, list[int]] = {}
    for layer in bucket.splits:
        for name, split in layer.items():
            total = sums.setdefault(name, [0, 0, 0])
            for place, rows in enumerate((split.resident, split.streamed, split.cpu)):
                total[place] += rows
    return {name: (total[0] / sum(total), total[1] / sum(total), total[2] / sum(total)) for name, total in sums.items()}


def _terms(problem: Problem, plan: Plan, bucket: BucketPlan) -> PhaseTerms | None:
    if problem.profile.gpu is None:
        return None
    _, on_gpu, on_host = waves_of(plan, problem.workload)
    kv = (bucket.host_attention, bucket.host_prefill_attention) if on_host else ("none", "none")
    choice = Choice(num_seqs=on_gpu + on_host, chunk=plan.max_pass_tokens, micro_batches=bucket.micro_batches, decode_kv=kv[0], prefill_kv=kv[1])
    return planned_phases(problem, choice)[PHASES.index(bucket.phase)]


def _link_s(problem: Problem) -> dict[str, float]:
    """Seconds of every operation's weights, over all its layers, on the link."""
    found: dict[str, float] = {}
    for op in problem.spec.ops(problem.options.unit_rows) if problem.profile.link is not None else ():
        found[op.name] = found.get(op.name, 0.0) + op.weight_bytes / problem.profile.link.up_bytes_per_s  # type: ignore[union-attr]
    return found


def _reason(case: _Case, name: str) -> str:
    resident, streamed, cpu = case.shares[name]
    if case.terms is None:
        return "the only processor"
    if case.plan.policy != "auto":
        return f"the rule of {case.plan.policy}: {RULES[case.plan.policy]}"
    if streamed < NEARLY and cpu < NEARLY:
        return "all of it is in GPU memory"
    if streamed < NEARLY:
        return _why_cpu(case, case.terms, name, 1.0 - resident)
    if cpu < NEARLY:
        return _why_streamed(case, case.terms, name)
    rival = "link" if case.limit.busy_frac["link"] >= case.limit.busy_frac["gpu"] else "GPU"
    return f"shared, so that CPU and {rival} finish together"


def _why_cpu(case: _Case, terms: PhaseTerms, name: str, rest: float) -> str:
    """Nothing is streamed: what is not resident is computed where it lies."""
    if terms.cpu_s[name] <= case.link_s[name]:
        return "the CPU computes what is not in GPU memory sooner than the link brings it"
    return f"the CPU is slower ({time_text(rest * terms.cpu_s[name])} against {time_text(rest * case.link_s[name])}), but the link has no time left"


def _why_streamed(case: _Case, terms: PhaseTerms, name: str) -> str:
    """The CPU takes none of it: too slow at so many tokens, busy with what suits it better, or kept out of the block by its hand-offs."""
    gain_s = case.link_s[name] - terms.cpu_s[name]
    if gain_s <= 0:
        return "the link brings it sooner than the CPU computes it"
    block = next(block for block, members in BLOCKS.items() if name in members)
    handoff_s = (terms.handoff_s or {}).get(block, 0.0)
    elsewhere = [other for other, shares in case.shares.items() if shares[2] >= NEARLY]
    if elsewhere and case.limit.busy_frac["cpu"] >= BUSY_ENOUGH:
        extra = "" if any(other in BLOCKS[block] for other in elsewhere) else f" (here it would add {time_text(handoff_s)} of hand-offs)"
        return f"the CPU's time goes to {', '.join(elsewhere)}{extra}"
    if handoff_s >= gain_s:
        return f"the CPU's hand-offs ({time_text(handoff_s)}) would cost more than it saves"
    return "simulated no sooner with a share on the CPU"


def time_text(seconds: float) -> str:
    """Seconds with three digits, in ms under one second."""
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"
