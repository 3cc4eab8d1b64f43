"""The search behind policy ``auto``: solves the linear program on a grid, rounds its answers to plans, and improves the best by simulated coordinate search.

Owns `grid`, `rounded_plans`, `improve`, `nudged`, `first_layers` and `resolved_buckets`. The program ignores order, units and the ring; the simulator does
not, so it has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from twinpilots.plan.cost import disk_rate
from twinpilots.plan.draft import PAGE_TOKENS, Draft, Residency, chunk_choices, most_sequences, nothing_resident, pages_of, ring_rule, split_of, unit_edge
from twinpilots.plan.memory import disk_bytes, plan_memory
from twinpilots.plan.plan import BucketPlan, Phase, Plan, Split
from twinpilots.plan.pricing import bucket_seconds, phase_loads, price_phase, prompts_at_once, used_bucket, waves_of
from twinpilots.plan.problem import Place, Problem, fill, no_cpu, sized
from twinpilots.plan.program import BLOCKS, Disk, Machine, PhaseTerms, Program, Shares, solve_program
from twinpilots.plan.spill import most_on_disk, set_aside_bytes
from twinpilots.plan.terms import Choice, MeanPass, decode_pass, planned_phases, planned_terms, prefill_pass

HostKv = Literal["none", "cpu", "gpu"]
KV_MODES: tuple[tuple[HostKv, HostKv], ...] = (("none", "none"), ("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "gpu"))  # (decode, prefill)
MICRO_BATCHES = (1, 2)  # of the grid; the search goes on to MOST_MICRO_BATCHES
MOST_MICRO_BATCHES = 4
CHUNKS_TRIED = 2
ROUNDED_PRICED = 3  # answers of the program that the simulator prices
SCALES = (0.85, 1.15, 0.94, 1.06)  # factors tried on the CPU's shares, coarse then fine
PHASES: tuple[Phase, ...] = ("decode", "prefill")  # in the order that the search takes them
ROOMY = 1.05  # resident bytes beyond the program's by more than this are no rounding: memory does not bind
GAIN = 1.002  # an improvement worth keeping
DISK_BOUND = 1.01  # a time within this of what the disk needs is the disk's: the rest are the fixed costs of its reads


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan in the making. ``shares``: the CPU's share of every op in the two phases, the program's at first, then the search's."""

    draft: Draft
    residency: Residency
    shares: Mapping[Phase, Mapping[str, float]]

    def plan(self, problem: Problem) -> Plan:
        return problem.plan(self.draft, self.residency, lambda phase, _tokens: self.shares[phase])


# -- the program -----------------------------------------------------------------------------------------------------------------------------


def rounded_plans(problem: Problem) -> list[Trial]:
    """Trials that keep the limits: the program's best answers over the grid, one for each way of dealing with micro-batches and with KV at first."""
    ranked: list[tuple[float, int, Draft, Choice]] = []
    for draft, choice in grid(problem):
        shares = solve_program(program_of(problem, draft, choice), relaxed=True)
        if shares is not None:
            waves = -(-problem.workload.num_requests // choice.num_seqs)
            ranked.append((waves * shares.seconds, len(ranked), draft, choice))
    trials: list[Trial] = []
    best_first = [(draft, choice) for _, _, draft, choice in sorted(ranked, key=lambda item: item[:2])]
    for draft, choice in _varied(best_first):
        shares = solve_program(program_of(problem, draft, choice))
        trial = rounded(problem, draft, shares) if shares is not None else None
        if trial is not None:
            trials.append(trial)
        if len(trials) == ROUNDED_PRICED:
            break
    others = [_even(problem, trial) for trial in trials[:1]] + [_from_host(problem, *point) for point in best_first if point[1].decode_kv == "cpu"][:1]
    return trials + [trial for trial in others if trial is not None]


def _varied(ranked: list[tuple[Draft, Choice]]) -> list[tuple[Draft, Choice]]:
    """Best first, but the best of every number of micro-batches before the second best of any."""
    rank: dict[int, int] = {}
    keyed = []
    for place, (draft, choice) in enumerate(ranked):
        rank[choice.micro_batches] = rank.get(choice.micro_batches, -1) + 1
        keyed.append((rank[choice.micro_batches], place, draft, choice))
    return [(draft, choice) for _, _, draft, choice in sorted(keyed, key=lambda item: item[:2])]


def _even(problem: Problem, trial: Trial) -> Trial | None:
    """The trial with all ops treated alike: the same resident share of each, and the program's mean CPU share."""
    residency = fill(problem, trial.draft)
    shares: dict[Phase, Mapping[str, float]] = {}
    for phase, share in trial.shares.items():
        weight = {name: problem.mean(name, lambda op: op.weight_bytes) for name in problem.ops}
        shares[phase] = dict.fromkeys(problem.ops, sum(share[name] * weight[name] for name in problem.ops) / sum(weight.values()))
    even = replace(trial, residency=residency, shares=shares)
    return even if problem.fits(even.plan(problem)) else None


def _from_host(problem: Problem, draft: Draft, choice: Choice) -> Trial | None:
    """Everything in host memory: the pilots share prefill, whose weights are streamed, and the CPU decodes alone. The program cannot say that a phase does
    without the GPU, and so without hand-offs."""
    program = replace(program_of(problem, draft, choice), resident=dict.fromkeys(problem.ops, 0.0), gpu_kv=0.0)
    shares = solve_program(program, relaxed=True)
    if shares is None:
        return None
    trial = Trial(
        draft=replace(draft, gpu_seqs=0), residency=nothing_resident(problem.spec, problem.ops),
        shares={"prefill": shares.phases[0].cpu, "decode": dict.fromkeys(problem.ops, 1.0)},
    )  # fmt: skip
    return trial if problem.fits(trial.plan(problem)) else None


def grid(problem: Problem, only_chunk: int | None = None) -> Iterator[tuple[Draft, Choice]]:
    """The points that the program is solved at: chunks, where KV lies and is attended, micro-batches; each with as many sequences as fit."""
    packet_bytes, depth = ring_rule(problem.limits.gpu_bytes)
    workload, limits = problem.workload, problem.limits
    chunks = chunk_choices(problem.spec, workload, workload.concurrency, limits.gpu_bytes, disk=limits.disk_bytes > 0)[: 2 * CHUNKS_TRIED : 2]
    for chunk in chunks if only_chunk is None else [only_chunk]:
        base = Draft(
            policy="auto", num_seqs=1, gpu_seqs=0, pass_tokens=chunk, micro_batches={"prefill": 1, "decode": 1}, uses_cpu=True,
            packet_bytes=packet_bytes, ring_depth=depth,
        )  # fmt: skip
        for decode_kv, prefill_kv in KV_MODES:
            count = most_sequences(problem.workload.concurrency, lambda n, kv=decode_kv, base=base: _kv_fits(problem, base, n, kv))  # type: ignore[misc]
            for batches in MICRO_BATCHES if count > 1 else MICRO_BATCHES[:1]:
                if count:
                    yield _draft(problem, base, count, batches, decode_kv, prefill_kv), Choice(
                        num_seqs=count, chunk=max(chunk, count), micro_batches=batches, decode_kv=decode_kv, prefill_kv=prefill_kv
                    )  # fmt: skip


def _draft(problem: Problem, base: Draft, count: int, batches: int, decode_kv: HostKv, prefill_kv: HostKv) -> Draft:
    together = prompts_at_once(problem.workload, count, max(count, base.pass_tokens))
    staging = max(-(-count // batches) if decode_kv == "gpu" else 0, together if prefill_kv == "gpu" else 0)
    return replace(
        base, num_seqs=count, gpu_seqs=count if decode_kv == "none" else 0, pass_tokens=max(count, base.pass_tokens),
        micro_batches={"prefill": batches, "decode": batches}, staging_seqs=min(count, staging),
        host_attention="gpu" if decode_kv == "gpu" else "cpu", host_prefill_attention="gpu" if prefill_kv == "gpu" else "cpu",
    )  # fmt: skip


def _kv_bytes(problem: Problem, draft: Draft) -> int:
    """KV of all sequences of a draft, in whole pages."""
    spec = problem.spec
    return draft.num_seqs * pages_of(problem.workload.seq_len) * spec.num_layers * spec.kv_page_bytes(problem.kv_dtype, PAGE_TOKENS)


def _budgets(problem: Problem, draft: Draft) -> tuple[float, float]:
    """What GPU and host have for rows of linears and KV pages, beside everything else that this draft takes; what using the disk takes is set aside."""
    empty = replace(draft, gpu_seqs=draft.num_seqs)
    plan = problem.without_disk.plan(empty, nothing_resident(problem.spec, problem.ops), no_cpu)
    use = plan_memory(problem.spec, plan)
    aside = set_aside_bytes(problem.spec, plan, problem.limits, problem.templates) if problem.limits.disk_bytes else 0
    return problem.limits.gpu_bytes - (use.gpu.total - use.gpu.kv), problem.limits.host_bytes - aside - (use.host.total - problem.spec.linear_bytes)


def _kv_fits(problem: Problem, base: Draft, count: int, decode_kv: str) -> bool:
    draft = replace(base, num_seqs=count, gpu_seqs=count, pass_tokens=max(count, base.pass_tokens))
    on_gpu, on_host = _budgets(problem, draft)
    kv_bytes = _kv_bytes(problem, draft)
    if decode_kv == "none" and kv_bytes > on_gpu:
        return False
    spared = min(problem.limits.disk_bytes, most_on_disk(problem.spec))
    return on_gpu >= 0 and on_host >= 0 and kv_bytes + problem.spec.linear_bytes - spared <= on_gpu + on_host


def program_of(problem: Problem, draft: Draft, choice: Choice) -> Program:
    on_gpu, on_host = _budgets(problem, draft)
    return Program(
        phases=planned_phases(problem, choice), gpu_budget_bytes=on_gpu, host_budget_bytes=on_host, kv_capacity_bytes=_kv_bytes(problem, draft),
        gpu_kv=1.0 if choice.decode_kv == "none" else None, machine=_machine(problem), disk=_disk(problem),
    )  # fmt: skip


def _disk(problem: Problem) -> Disk | None:
    if not problem.limits.disk_bytes:
        return None
    return Disk(budget_bytes=problem.limits.disk_bytes, bytes_per_s=disk_rate(problem.profile))


def _machine(problem: Problem) -> Machine:
    profile = problem.profile
    assert profile.gpu is not None and profile.link is not None
    return Machine(
        op_bytes={name: problem.total_bytes(name) for name in problem.ops},
        up_bytes_per_s=profile.link.up_bytes_per_s, down_bytes_per_s=profile.link.down_bytes_per_s,
        link_drag=(1 - 1 / profile.cpu.copy_slowdown, 1 - 1 / profile.gpu.copy_slowdown), host_fixed=("lm_head",) if problem.spec.tied else (),
    )  # fmt: skip


def rounded(problem: Problem, draft: Draft, shares: Shares) -> Trial | None:
    """Whole sequences on the GPU, whole units resident; None when the rounding breaks a limit."""
    draft = replace(draft, gpu_seqs=draft.num_seqs if draft.gpu_seqs else int(draft.num_seqs * shares.gpu_kv + 1e-6))
    trial = Trial(
        draft=draft, residency=_uncrowded(problem, fill(problem, draft, shares.resident), shares),
        shares={"prefill": shares.phases[0].cpu, "decode": shares.phases[1].cpu},
    )  # fmt: skip
    return trial if problem.fits(trial.plan(problem)) else None


def _uncrowded(problem: Problem, residency: Residency, shares: Shares) -> Residency:
    """Where memory has room for more than the program wants resident, filling it would leave the CPU no rows: what a phase wants there stays out."""
    wanted = sum(shares.resident[name] * op.weight_bytes * (problem.spec.num_layers if op.layer >= 0 else 1) for name, op in problem.ops.items())
    if sum(rows * problem.ops[name].row_bytes for layer in residency for name, rows in layer.items()) <= ROOMY * wanted:
        return residency
    most = {name: unit_edge(op, op.rows * (1.0 - max(phase.cpu[name] for phase in shares.phases))) for name, op in problem.ops.items()}
    made = {id(layer): {name: min(rows, most[name]) for name, rows in layer.items()} for layer in residency}  # layers alike stay one mapping
    return tuple(made[id(layer)] for layer in residency)


def least_memory(problem: Problem) -> tuple[tuple[Draft, Place], ...]:
    """The plans that need least: KV all on the host or all on the GPU, resident first what then needs no host memory (a tied head does), the rest
    streamed; with a disk also the rest computed by the CPU."""
    wanted = {name: 0.0 if problem.spec.tied and op.layer < 0 else 1.0 for name, op in problem.ops.items()}

    def place(problem: Problem, draft: Draft, count: int) -> Plan:
        draft = sized(draft, count, count if draft.gpu_seqs else 0)
        return problem.plan(draft, fill(problem, draft, wanted), no_cpu)

    bases = [
        Draft(policy="auto", num_seqs=1, gpu_seqs=gpu_seqs, pass_tokens=1, micro_batches={"prefill": 1, "decode": 1}, uses_cpu=not gpu_seqs)
        for gpu_seqs in (0, 1)
    ]  # fmt: skip
    if problem.limits.disk_bytes:  # every instruction and every byte of a ring is a byte more on the disk: nothing streamed
        bases += [replace(base, uses_cpu=True, streams=False) for base in bases]
    return tuple((base, place) for base in bases)


def first_layers(problem: Problem, trial: Trial) -> Trial | None:
    """The trial with its resident rows gathered in the first layers; the CPU's share of all rows is then its share of the rest.

    Layers of two kinds are too much for the search's quick estimates: to be priced in full.
    """
    residency = fill(problem, trial.draft, dict.fromkeys(problem.ops, 0.0))
    rows = {name: sum(layer.get(name, 0) for layer in residency) for name in problem.ops}
    rest = {name: 1.0 - rows[name] / (op.rows * (problem.spec.num_layers if op.layer >= 0 else 1)) for name, op in problem.ops.items()}
    shares = {phase: {name: min(1.0, value / rest[name]) if rest[name] > 0 else 0.0 for name, value in share.items()} for phase, share in trial.shares.items()}
    gathered = replace(trial, residency=residency, shares=shares, draft=replace(trial.draft, share_of_rest=True))
    return gathered if problem.fits(gathered.plan(problem)) else None


# -- coordinate search -----------------------------------------------------------------------------------------------------------------------


class Search:
    """Prices trials phase by phase; a phase whose decisions did not change is not simulated again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.known: dict[tuple[object, ...], float] = {}

    def seconds(self, trial: Trial) -> float:
        waves = -(-self.problem.workload.num_requests // trial.draft.num_seqs)
        return waves * (self._phase_s(trial, "prefill") + self._phase_s(trial, "decode"))

    def _phase_s(self, trial: Trial, phase: Phase) -> float:
        p, draft = self.problem, replace(trial.draft, micro_batches={phase: trial.draft.micro_batches[phase]})
        plan = trial.plan(p)
        bucket = plan.bucket_for(phase, plan.max_num_seqs if phase == "decode" else plan.max_pass_tokens)
        key = (phase, repr(draft), id(trial.residency), tuple(bucket.splits[p.spec.num_layers // 2].items()), bucket.splits[-1]["lm_head"])
        if key not in self.known:
            self.known[key] = sum(each.seconds for each in price_phase(p.spec, p.profile, p.workload, plan, phase, quick=True))
        return self.known[key]


def improve(problem: Problem, trials: list[Trial]) -> Plan:
    """The best trial after coordinate search, its smaller buckets resolved."""
    search = Search(problem)
    best = min(trials, key=search.seconds)
    best_s = search.seconds(best)
    for phase in () if waits_for_disk(problem, best.plan(problem), best_s) else PHASES:
        for move in MOVES:
            moved = move(best, phase)
            if moved is not None and problem.fits(moved.plan(problem)) and search.seconds(moved) * GAIN < best_s:
                best, best_s = moved, search.seconds(moved)
        for factor in SCALES:
            while (scaled := _scaled(best, phase, factor)) is not None and search.seconds(scaled) * GAIN < best_s:
                best, best_s = scaled, search.seconds(scaled)
    return with_small_buckets(problem, best.plan(problem))


def waits_for_disk(problem: Problem, plan: Plan, seconds: float) -> bool:
    """Whether the workload takes hardly longer than the disk reads in all its passes: then no other decision about the same resident rows shortens it."""
    if not plan.disk_rows:
        return False
    passes = sum(count for phase in PHASES for _, _, count in phase_loads(problem.workload, plan, phase))
    disk_s = waves_of(plan, problem.workload)[0] * passes * disk_bytes(problem.spec, plan) / disk_rate(problem.profile)
    return seconds < DISK_BOUND * disk_s


def nudged(problem: Problem, trial: Trial) -> Trial:
    """A short search: the CPU's shares of each phase a little smaller or larger."""
    search = Search(problem)
    best, best_s = trial, search.seconds(trial)
    for phase in PHASES:
        for factor in SCALES[:2]:
            moved = _scaled(best, phase, factor)
            if moved is not None and search.seconds(moved) < best_s:
                best, best_s = moved, search.seconds(moved)
    return best


def _dealt(trial: Trial, phase: Phase, factor: float) -> Trial | None:
    """The trial with another number of micro-batches."""
    batches = int(trial.draft.micro_batches[phase] * factor)
    if not 1 <= batches <= min(MOST_MICRO_BATCHES, trial.draft.num_seqs):
        return None
    return replace(trial, draft=replace(trial.draft, micro_batches={**trial.draft.micro_batches, phase: batches}))


def _only(trial: Trial, phase: Phase, kept: tuple[str, ...]) -> Trial | None:
    """The trial with the CPU out of every linear but these."""
    share = {name: value if name in kept else 0.0 for name, value in trial.shares[phase].items()}
    return replace(trial, shares={**trial.shares, phase: share}) if share != trial.shares[phase] else None


def _alone(trial: Trial, phase: Phase) -> Trial | None:
    """The trial with all that is not resident on the CPU."""
    share = dict.fromkeys(trial.shares[phase], 1.0)
    return replace(trial, shares={**trial.shares, phase: share}) if share != trial.shares[phase] else None


def _scaled(trial: Trial, phase: Phase, factor: float) -> Trial | None:
    """The trial with the CPU's shares of one phase multiplied; None when that changes nothing."""
    scaled = {name: min(1.0, value * factor) for name, value in trial.shares[phase].items()}
    return replace(trial, shares={**trial.shares, phase: scaled}) if scaled != trial.shares[phase] else None


Move = Callable[[Trial, Phase], Trial | None]
MOVES: tuple[Move, ...] = (
    lambda trial, phase: _dealt(trial, phase, 2.0),
    lambda trial, phase: _dealt(trial, phase, 0.5),
    lambda trial, phase: _only(trial, phase, (*BLOCKS["mlp"], *BLOCKS["head"])),
    lambda trial, phase: _only(trial, phase, BLOCKS["mlp"]),
    lambda trial, phase: _only(trial, phase, ()),
    _alone,
)


# -- smaller buckets -------------------------------------------------------------------------------------------------------------------------


def with_small_buckets(problem: Problem, plan: Plan) -> Plan:
    """The plan with the program's shares for its own token count in every bucket but those that the workload's full passes take."""
    if not plan.ring_bytes:  # nothing can be streamed: there is no boundary to move
        return plan
    kept = {(bucket.phase, bucket.max_tokens) for bucket in (used_bucket(problem.workload, plan, phase) for phase in PHASES)}
    buckets = [bucket if (bucket.phase, bucket.max_tokens) in kept else _resolve(problem, plan, bucket) or bucket for bucket in plan.buckets]
    resolved = replace(plan, buckets=tuple(buckets))
    return resolved if problem.fits(resolved) else plan


def resolved_buckets(problem: Problem, plan: Plan) -> Plan:
    """Every bucket anew; a new one is kept where the simulator finds it faster."""
    buckets = []
    for bucket in plan.buckets:
        found = _resolve(problem, plan, bucket)
        old_s = bucket_seconds(problem.spec, problem.profile, problem.workload, plan, bucket)
        better = found is not None and bucket_seconds(problem.spec, problem.profile, problem.workload, plan, found) * GAIN < old_s
        buckets.append(found if found is not None and better else bucket)
    return replace(plan, buckets=tuple(buckets))


def _resolve(problem: Problem, plan: Plan, bucket: BucketPlan) -> BucketPlan | None:
    """The bucket with the program's CPU shares at its own token count and the plan's residency; None when there is no answer."""
    shares = solve_program(_frozen_program(problem, plan, bucket), relaxed=True)
    if shares is None:
        return None
    cpu, made = shares.phases[0].cpu, dict[int, Mapping[str, Split]]()
    for layer in bucket.splits:
        if id(layer) not in made:
            made[id(layer)] = {
                name: split_of(problem.ops[name], split.resident, cpu[name], streams=True, uses_cpu=plan.uses_cpu) for name, split in layer.items()
            }
    return replace(bucket, splits=tuple(made[id(layer)] for layer in bucket.splits))


def _frozen_program(problem: Problem, plan: Plan, bucket: BucketPlan) -> Program:
    rows = dict.fromkeys(problem.ops, 0)
    for layer in bucket.splits:
        for name, split in layer.items():
            rows[name] += split.resident
    layers = problem.spec.num_layers
    resident = {name: rows[name] / (op.rows * (layers if op.layer >= 0 else 1)) for name, op in problem.ops.items()}
    on_gpu, on_host = plan.gpu_pages, plan.host_pages
    kv = on_gpu / max(1, on_gpu + on_host)
    return Program(
        phases=(_bucket_terms(problem, bucket, host_kv=on_host > 0),), gpu_budget_bytes=0.0, host_budget_bytes=0.0, kv_capacity_bytes=1.0,
        resident=resident, gpu_kv=1.0 if not on_host else kv, machine=_machine(problem),
    )  # fmt: skip


def _bucket_terms(problem: Problem, bucket: BucketPlan, *, host_kv: bool) -> PhaseTerms:
    tokens = bucket.max_tokens
    each: MeanPass
    if bucket.phase == "decode":
        each, where = decode_pass(problem, tokens), bucket.host_attention
    else:
        each, where = prefill_pass(problem, max(1, tokens // problem.workload.input_len), tokens), bucket.host_prefill_attention
    batches = min(bucket.micro_batches, each.sequences[0].num_seqs)
    return planned_terms(problem, each, batches, where if host_kv else "none")
