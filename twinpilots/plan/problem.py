"""What a planner is asked (`Problem`), how long ops take on each device, and how many sequences fit: the ground that all policies stand on.

Owns op times read off the profile at a token count, and the search over chunk, packet and number of sequences. Knows nothing of who computes what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from twinpilots.config import KvDtype
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.cost import linear_s
from twinpilots.plan.draft import (
    CHUNK_SHARE,
    TIGHT_CHUNK_TOKENS,
    CpuShare,
    Draft,
    PlanOptions,
    Residency,
    chunk_choices,
    fill_resident,
    fits,
    make_plan,
    most_sequences,
    nothing_resident,
    ring_rule,
    taken,
    tight_ring,
)
from twinpilots.plan.memory import Templates, gpu_memory, layer_templates
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.spill import spilled
from twinpilots.plan.workload import Limits, Workload

SMALL_RING_GAIN = 2  # the smallest ring must hold so many times the sequences
CPU_CHUNK_SHARE = 16  # without a GPU, activations take at most this fraction of host memory


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a policy is asked: the arguments of every builder, and the ops of one layer of every format class."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    limits: Limits
    options: PlanOptions
    templates: Templates

    @staticmethod
    def of(spec: ModelSpec, profile: HardwareProfile, workload: Workload, limits: Limits, options: PlanOptions) -> Problem:
        return Problem(spec=spec, profile=profile, workload=workload, limits=limits, options=options, templates=layer_templates(spec, options.unit_rows))

    @property
    def kv_dtype(self) -> KvDtype:
        return self.options.kv_dtype or self.spec.weight_dtype

    @property
    def ops(self) -> Mapping[str, OpSpec]:
        """The ops of the first layer and lm_head: shapes and units of all layers, but only the first layer's formats."""
        return self.templates[0]

    @cached_property
    def alike(self) -> Mapping[str, tuple[tuple[int, OpSpec], ...]]:
        """By op name: (number of layers, their op) for every format that the op has. lm_head counts once."""
        counts = Counter(self.spec.format_classes)
        found: dict[str, dict[str, tuple[int, OpSpec]]] = {}
        for number, ops in enumerate(self.templates):
            for name, op in ops.items():
                before = found.setdefault(name, {}).get(op.rate_key, (0, op))[0]
                found[name][op.rate_key] = (1 if op.layer < 0 else before + counts[number], op)
        return {name: tuple(each.values()) for name, each in found.items()}

    def mean(self, name: str, value: Callable[[OpSpec], float]) -> float:
        """The mean of ``value`` over the layers' ops of this name."""
        alike = self.alike[name]
        return sum(count * value(op) for count, op in alike) / sum(count for count, _ in alike)

    def total_bytes(self, name: str) -> int:
        """Bytes of this op in all layers."""
        return sum(count * op.weight_bytes for count, op in self.alike[name])

    def plan(self, draft: Draft, residency: Residency, cpu_share: CpuShare) -> Plan:
        plan = make_plan(self.spec, self.workload, self.options, draft, residency, cpu_share)
        return spilled(self.spec, plan, self.limits, self.templates) if self.limits.disk_bytes else plan

    def fits(self, plan: Plan) -> bool:
        return fits(self.spec, plan, self.limits)

    def within(self, limits: Limits) -> Problem:
        return replace(self, limits=limits)

    @property
    def without_disk(self) -> Problem:
        return self.within(self.limits.without_disk) if self.limits.disk_bytes else self


Place = Callable[[Problem, Draft, int], Plan | None]


def no_cpu(_phase: Phase, _tokens: int) -> Mapping[str, float]:
    return {}


def drafts(problem: Problem, base: Draft, *, smallest_ring: bool = False) -> Iterator[Draft]:
    """``base`` with the chunks to try, preferred ones first, and a ring by the rule of `draft.py` or the smallest one."""
    limits = problem.limits
    device_bytes = limits.gpu_bytes if base.uses_gpu else limits.host_bytes * CHUNK_SHARE // CPU_CHUNK_SHARE
    packet_bytes, depth = (tight_ring(problem.spec, problem.options.unit_rows) if smallest_ring else ring_rule(limits.gpu_bytes)) if has_ring(base) else (0, 0)
    for chunk in chunk_choices(problem.spec, problem.workload, problem.workload.concurrency, device_bytes, disk=limits.disk_bytes > 0):
        yield replace(base, pass_tokens=chunk, packet_bytes=packet_bytes, ring_depth=depth)


def has_ring(draft: Draft) -> bool:
    return draft.uses_gpu and draft.streams


def tight_drafts(problem: Problem, base: Draft) -> Iterator[Draft]:
    """What to try where no draft fits: chunks of a few tokens and the smallest ring, the last one the least that a plan of this kind can do with."""
    packet_bytes, depth = tight_ring(problem.spec, problem.options.unit_rows) if has_ring(base) else (0, 0)
    for chunk in TIGHT_CHUNK_TOKENS:
        yield replace(base, pass_tokens=chunk, packet_bytes=packet_bytes, ring_depth=depth)


def fill(problem: Problem, draft: Draft, target: Mapping[str, float] | None = None) -> Residency:
    """As many resident rows as GPU memory holds beside KV, ring and activations of ``draft``."""
    empty = problem.plan(draft, nothing_resident(problem.spec, problem.ops), no_cpu)
    budget = problem.limits.gpu_bytes - gpu_memory(problem.spec, empty).total
    return fill_resident(problem.spec, problem.templates, max(0, budget), target)


def best_fit(problem: Problem, base: Draft, place: Place) -> Plan | None:
    """The plan with the most sequences at once over the drafts' chunks (the first of equals), or None when not even one sequence fits.

    ``place(problem, draft, n)`` is the plan for n sequences, or None. A ring of single units streams at about half the link's rate (docs/performance.md), so it
    must make room for twice the sequences. The tight drafts are for want of anything better.
    """
    plan = _most_at_once(problem, drafts(problem, base), place)
    if has_ring(base) and (plan is None or SMALL_RING_GAIN * plan.max_num_seqs <= problem.workload.concurrency):
        crowded = _most_at_once(problem, drafts(problem, base, smallest_ring=True), place)
        if crowded is not None and (plan is None or crowded.max_num_seqs >= SMALL_RING_GAIN * plan.max_num_seqs):
            plan = crowded
    return plan or _most_at_once(problem, tight_drafts(problem, base), place)


def _most_at_once(problem: Problem, choices: Iterable[Draft], place: Place) -> Plan | None:
    best: Plan | None = None
    for draft in choices:
        made: dict[int, Plan] = {}

        def works(count: int, draft: Draft = draft, made: dict[int, Plan] = made) -> bool:
            plan = place(problem, draft, count)
            if plan is None or not problem.fits(plan):
                return False
            made[count] = plan
            return True

        if best is not None and not works(best.max_num_seqs + 1):  # most drafts hold no more than the first: one try tells
            continue
        count = most_sequences(problem.workload.concurrency, works)
        if count and (best is None or count > best.max_num_seqs):
            best = made[count]
        if best is not None and best.max_num_seqs == problem.workload.concurrency:
            break
    return best


def one_needs(problem: Problem, base: Draft, place: Place) -> list[Limits]:
    """What one sequence takes: in the smallest chunks, with a ring by the rule or the smallest one.

    The smallest ring takes less of the GPU, but more of the host: it has more packets, and so more instructions. Nor is the smallest chunk always the least
    of both: what it leaves of the GPU may go to rows whose other copy the host then needs as well.
    """
    smallest = [list(choices)[-1] for choices in (drafts(problem, base), drafts(problem, base, smallest_ring=True))]
    plans = (place(problem, draft, 1) for draft in (*smallest, *tight_drafts(problem, base)))
    return [taken(problem.spec, plan) for plan in plans if plan is not None]


def sized(draft: Draft, count: int, gpu_seqs: int) -> Draft:
    return replace(draft, num_seqs=count, gpu_seqs=gpu_seqs, pass_tokens=max(count, draft.pass_tokens))


# -- times of ops --------------------------------------------------------------------------------------------------------------------------


def attention_times(problem: Problem, tokens: float, seqs: int, context: float) -> tuple[float, float]:
    """Seconds of one layer's attention over host KV: on the CPU where it lies, and on the GPU with the KV's way up and the new KV's way down."""
    spec, profile = problem.spec, problem.profile
    gpu, link = profile.gpu, profile.link
    assert gpu is not None and link is not None
    per_token = spec.kv_token_bytes(problem.kv_dtype)
    kv_bytes, flops = seqs * context * per_token, spec.attention_flops(tokens, context)
    up_s, down_s = kv_bytes / link.up_bytes_per_s, tokens * per_token / link.down_bytes_per_s
    on_cpu, on_gpu = (side.attention_s(kv_bytes, flops, seqs, kv_dtype=problem.kv_dtype) + side.task_s for side in (profile.cpu, gpu))
    return on_cpu, up_s + down_s + on_gpu


def cpu_linear_s(problem: Problem, op: OpSpec, tokens: float) -> float:
    """Seconds of one layer's op on the CPU: the mean where its format differs between the layers."""
    cpu = problem.profile.cpu
    return cpu.task_s + problem.mean(op.name, lambda each: linear_s(each, each.rows, tokens, cpu))


def gpu_linear_s(problem: Problem, op: OpSpec, tokens: float) -> float:
    gpu = problem.profile.gpu
    assert gpu is not None
    return gpu.task_s + problem.mean(op.name, lambda each: linear_s(each, each.rows, tokens, gpu))


def load_s(problem: Problem, op: OpSpec) -> float:
    link = problem.profile.link
    assert link is not None
    return problem.mean(op.name, lambda each: each.weight_bytes) / link.up_bytes_per_s
