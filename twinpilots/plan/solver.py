"""Finds the plan: the linear program on a small grid, rounded to units, priced by the simulator, improved step by step, compared with every named policy.

Owns `solve`, `price`, `resolve_buckets`, `Solution` and `Prediction`. Pure: the same input gives the same plan. Knows nothing of devices or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from twinpilots.config import KvDtype
from twinpilots.errors import DeviceUnavailableError, LimitError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.auto import PHASES, first_layers, improve, least_memory, resolved_buckets, rounded_plans, waits_for_disk, with_small_buckets
from twinpilots.plan.bounds import BoundKind, pass_bound
from twinpilots.plan.draft import Needs, PlanOptions, shortage, smallest_limit
from twinpilots.plan.enumeration import enumerated, searchable
from twinpilots.plan.estimate import EXACT_LAYERS
from twinpilots.plan.memory import MemoryUse, plan_memory
from twinpilots.plan.plan import POLICIES, Plan, Policy
from twinpilots.plan.policies import RULES, find_policy, has_devices, needs_of, refusal
from twinpilots.plan.polish import polish
from twinpilots.plan.pricing import Price, phase_loads, price_plan, waves_of
from twinpilots.plan.problem import Problem, best_fit, one_needs
from twinpilots.plan.rebalance import can_move, options, with_bucket
from twinpilots.plan.space import op_groups
from twinpilots.plan.terms import decode_pass, prefill_pass
from twinpilots.plan.workload import Limits, Workload

SEARCH_TASKS = 100_000  # whose time the search of a small model's whole space takes at most
POLISH_TASKS = 12_000  # and what is left to find by steps of one unit from its end;
COARSE_POLISH_TASKS = 48_000  # where that search moved several ops together
REBALANCING_TASKS = 45_000  # what solving a plan's buckets once more is worth, at most
SIMULATED_TASKS_PER_S = 15_000  # of one core, about: what a second of searching is worth in tasks
NAMED: tuple[Policy, ...] = tuple(policy for policy in POLICIES if policy != "auto")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Simulated, not measured. ``prefill_s``: all prompts of the workload; ``step_s``: the mean decode step; bounds in tokens/s."""

    prefill_s: float
    step_s: float
    tokens_per_s: float
    plan_bound: float
    hardware_bound: float
    bottleneck: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What became of one policy: its rate, or why it has none."""

    tokens_per_s: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Solution:
    plan: Plan
    prediction: Prediction
    memory: MemoryUse
    candidates: Mapping[Policy, Candidate]
    price: Price


def solve(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    limits: Limits,
    *,
    policy: Policy = "auto",
    unit_rows: int | None = None,
    kv_dtype: KvDtype | None = None,
    max_model_len: int | None = None,
    compare: bool = True,
    proportionate: bool = False,
) -> Solution:
    """The plan of ``policy``, with its prediction and all other policies beside it (``compare=False``: a named policy alone, and no reasons why others
    have none, which is quicker).

    ``proportionate``: the local search takes no longer than the workload itself is predicted to take, about.

    Raises LimitError with the smallest limit that would do when the policy (for auto: every policy) cannot run one sequence, and
    DeviceUnavailableError when it needs a GPU, or may use a disk, that the profile does not have.
    """
    options = PlanOptions(unit_rows=unit_rows or 64, kv_dtype=kv_dtype, max_model_len=max_model_len)
    problem = Problem.of(spec, profile, workload, limits, options)
    if limits.disk_bytes:
        _need_disk(profile)
    wanted = NAMED if compare or policy == "auto" else (policy,)
    asked = find_policy(problem, policy) if policy != "auto" else None
    if policy != "auto" and asked is None:
        raise refusal(problem, policy)
    found = {name: asked if name == policy else find_policy(problem, name) for name in wanted}
    priced = {name: (plan, price_plan(spec, profile, workload, plan)) for name, plan in found.items() if plan is not None}
    if compare or policy == "auto":
        auto = _auto(problem, priced, proportionate)
        if auto is not None:
            priced["auto"] = auto
        elif policy == "auto":
            raise _nothing_fits(problem)
    plan, price = priced[policy]
    plan.check(spec)
    points = {(*waves_of(each, workload), each.max_pass_tokens) for each, _ in priced.values()}
    return Solution(
        plan=plan, prediction=_prediction(problem, price, points), memory=plan_memory(spec, plan), price=price,
        candidates={name: _candidate(problem, name, priced) for name in POLICIES if name in priced or (compare and name in NAMED)},
    )  # fmt: skip


def price(spec: ModelSpec, profile: HardwareProfile, workload: Workload, plan: Plan, limits: Limits | None = None) -> Prediction:
    """What the simulator says of any plan, hand-set ones included. The bounds hold for ``limits`` (default: the machine's memory)."""
    limits = limits or Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes)
    options = PlanOptions(unit_rows=plan.unit_rows, kv_dtype=plan.kv_dtype, max_model_len=plan.max_model_len)
    problem = Problem.of(spec, profile, workload, limits, options)
    return _prediction(problem, price_plan(spec, profile, workload, plan), {(*waves_of(plan, workload), plan.max_pass_tokens)})


def resolve_buckets(spec: ModelSpec, profile: HardwareProfile, plan: Plan, workload: Workload) -> Plan:
    """``plan`` with new boundaries between streamed and CPU rows for ``profile`` (one whose rates have drifted): same residency, KV and buffers.

    A bucket changes only where the simulator says that its passes get faster. A named policy keeps its rule, so only ``auto`` plans change.
    """
    if plan.policy != "auto" or not (plan.uses_gpu and plan.uses_cpu) or not plan.ring_bytes:
        return plan
    options = PlanOptions(unit_rows=plan.unit_rows, kv_dtype=plan.kv_dtype, max_model_len=plan.max_model_len)
    limits = Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes)
    return resolved_buckets(Problem.of(spec, profile, workload, limits, options), plan)


# -- the parts of solve --------------------------------------------------------------------------------------------------------------------


def _need_disk(profile: HardwareProfile) -> None:
    if profile.disk_bytes_per_s is None:
        raise DeviceUnavailableError(
            f"nobody has measured the disk of {profile.name}, so nothing can be planned on it; leave --disk away, or name --hardware that has disk_bytes_per_s"
        )


def _auto(problem: Problem, named: Mapping[Policy, tuple[Plan, Price]], proportionate: bool) -> tuple[Plan, Price] | None:
    """The best plan without the disk; with it, where the work does not fit memory at once and a plan that uses it is faster, or the only one."""
    in_memory = {name: pair for name, pair in named.items() if not pair[0].uses_disk}
    best = _best(problem.without_disk, in_memory, proportionate)
    if problem.limits.disk_bytes and (best is None or best[1].num_waves > 1):
        other = _best(problem, named, proportionate)
        best = max((pair for pair in (best, other) if pair is not None), key=lambda pair: pair[1].tokens_per_s, default=None)
    return best


def _best(problem: Problem, named: Mapping[Policy, tuple[Plan, Price]], proportionate: bool) -> tuple[Plan, Price] | None:
    """The best of the program's improved roundings and the named plans, and of what the local search makes of the best of these; None when there is none."""
    found = [*named.values(), *((plan, _priced(problem, plan)) for plan in _programmed(problem))]
    best_first = sorted(found, key=lambda pair: -pair[1].tokens_per_s)
    if problem.profile.gpu is not None and found and not waits_for_disk(problem, best_first[0][0], best_first[0][1].seconds):
        most_tasks = int(SIMULATED_TASKS_PER_S * best_first[0][1].seconds) if proportionate else None
        improved = [with_small_buckets(problem, plan) for plan in _improved(problem, [plan for plan, _ in best_first], best_first[0][1].seconds, most_tasks)]
        found += [(plan, _priced(problem, plan)) for plan in improved]
        if most_tasks is None or most_tasks >= REBALANCING_TASKS:
            best = max(found, key=lambda pair: pair[1].tokens_per_s)[0]
            found += [(plan, _priced(problem, plan)) for plan in _rebalanced(problem, best)]
    plan, price = max(found, key=lambda pair: pair[1].tokens_per_s, default=(None, None))
    return None if plan is None or price is None else (plan.with_policy("auto"), price)


def _improved(problem: Problem, best_first: list[Plan], seconds: float, most_tasks: int | None) -> list[Plan]:
    """Better plans than the best, if all goes well: of the whole space where that is small, and what steps from the best lead to."""
    budget = SEARCH_TASKS if most_tasks is None else min(SEARCH_TASKS, most_tasks * 3 // 4)
    groups = searchable(problem, budget) if not problem.limits.disk_bytes else None  # that space has no disk
    if groups is None:
        return polish(problem, best_first, most_tasks)
    plan = enumerated(problem, groups, seconds, budget)
    found = [] if plan is None else [plan]
    steps = POLISH_TASKS if groups == op_groups(problem) else COARSE_POLISH_TASKS
    return [*found, *polish(problem, [*found, best_first[0]], steps if most_tasks is None else min(steps, most_tasks // 4), starts=1)]


def _rebalanced(problem: Problem, plan: Plan) -> list[Plan]:
    """A named policy's plan with the buckets of its full passes solved, each by itself, over the memory that it has laid out; none where that brings nothing.
    The program's plans have been searched for that already, and few layers whole."""
    if plan.policy == "auto" or problem.spec.num_layers <= EXACT_LAYERS or not can_move(plan):
        return []
    found = plan
    for phase in PHASES:
        passes = phase_loads(problem.workload, plan, phase)
        if passes:
            bucket, load, _ = passes[len(passes) // 2]
            tried = options(problem.spec, problem.profile, plan, bucket, load)
            found = with_bucket(found, bucket, min(tried, key=lambda option: option.seconds).bucket)
    return [found] if found != plan and problem.fits(found) else []


def _priced(problem: Problem, plan: Plan) -> Price:
    return price_plan(problem.spec, problem.profile, problem.workload, plan)


def _programmed(problem: Problem) -> list[Plan]:
    """The program's improved rounding, with resident rows in all layers and in the first; where memory is too short for its buffers, whatever fits at all."""
    if problem.profile.gpu is None or problem.profile.link is None:
        return []
    rounded = rounded_plans(problem)
    if rounded:
        gathered = first_layers(problem, rounded[0])
        return [improve(problem, rounded), *([gathered.plan(problem)] if gathered is not None else [])]
    return [plan for rule in least_memory(problem) if (plan := best_fit(problem, *rule)) is not None]


def _nothing_fits(problem: Problem) -> LimitError:
    return shortage(_needs(problem, "auto"), problem.limits, "auto")


def _needs(problem: Problem, policy: Policy) -> Needs:
    """What plans for one sequence take under other limits."""
    if policy != "auto":
        return lambda limits: needs_of(problem.within(limits), policy)
    least = least_memory(problem) if problem.profile.gpu is not None else ()

    def needs(limits: Limits) -> list[Limits]:
        within = problem.within(limits)
        named = [need for each in RULES if has_devices(problem, each) for need in needs_of(within, each)]
        return named + [need for rule in least for need in one_needs(within, *rule)]

    return needs


def least_disk(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload, limits: Limits, *, policy: Policy = "auto", unit_rows: int | None = None,
    kv_dtype: KvDtype | None = None, max_model_len: int | None = None,
) -> int | None:  # fmt: skip
    """The smallest part of the weights that must lie on the disk so that ``policy`` fits these limits; None where no part is enough, or there is no disk."""
    if profile.disk_bytes_per_s is None:
        return None
    options = PlanOptions(unit_rows=unit_rows or 64, kv_dtype=kv_dtype, max_model_len=max_model_len)
    problem = Problem.of(spec, profile, workload, limits, options)
    return smallest_limit("disk_bytes", _needs(problem, policy), limits)


def _candidate(problem: Problem, name: Policy, priced: Mapping[Policy, tuple[Plan, Price]]) -> Candidate:
    if name in priced:
        return Candidate(tokens_per_s=priced[name][1].tokens_per_s, reason=None)
    return Candidate(tokens_per_s=None, reason=str(refusal(problem, name)))


def _prediction(problem: Problem, price: Price, points: Iterable[tuple[int, int, int, int]]) -> Prediction:
    plan_bound, hardware_bound = workload_bounds(problem, points)
    return Prediction(
        prefill_s=price.prefill_s, step_s=price.step_s, tokens_per_s=price.tokens_per_s, plan_bound=plan_bound, hardware_bound=hardware_bound,
        bottleneck=price.bottleneck,
    )  # fmt: skip


def workload_bounds(problem: Problem, points: Iterable[tuple[int, int, int, int]]) -> tuple[float, float]:
    """(plan bound, hardware bound) in tokens/s: the best over the grid points (waves, GPU sequences, host sequences, chunk) that plans were made for."""
    grid = sorted({(waves, on_gpu + on_host, chunk) for waves, on_gpu, on_host, chunk in points})
    at_plan = max(_bound(problem, *point, "plan") for point in grid)
    at_hardware = max(_bound(problem, *point, "hardware") for point in grid)
    return at_plan, max(at_plan, at_hardware)


def _bound(problem: Problem, waves: int, num_seqs: int, chunk: int, kind: BoundKind) -> float:
    seconds = 0.0
    for each in (prefill_pass(problem, num_seqs, chunk), decode_pass(problem, num_seqs)):
        loads = each.loads()
        bounds = [pass_bound(problem.spec, problem.profile, problem.limits, load, kind, kv_dtype=problem.kv_dtype).seconds for load in loads]
        seconds += each.passes * sum(bounds) / len(bounds)
    return problem.workload.generated_tokens / (waves * seconds)
