"""The last step behind policy ``auto``: a local search over whole plans, priced by the simulator, in steps of one unit, one sequence or one buffer.

The linear program knows neither units nor order, and no named policy looks at its neighbours; on small models that costs some percent, on large ones next
to nothing. Owns `polish` with its moves and `refilled`. The search ends when no move helps, or when its budget of simulated layers is spent: pure, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from twinpilots.plan.draft import TIGHT_CHUNK_TOKENS, Draft, Residency, chunk_choices, pages_of, residency_bytes, ring_rule, tight_ring
from twinpilots.plan.estimate import EXACT_LAYERS
from twinpilots.plan.memory import plan_memory, streamed_bytes
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Phase, Plan
from twinpilots.plan.pricing import QUICK_SAMPLES, coarse_packet_bytes, price_phase, prompts_at_once, used_bucket
from twinpilots.plan.problem import Problem, fill

MOST_MICRO_BATCHES = 4
PHASES: tuple[Phase, ...] = ("decode", "prefill")
GAIN = 1.0005  # an improvement worth a step
BUDGET = 6_000  # simulated tasks that the search may spend on a deep model,
SMALL_BUDGET = 48_000  # and from each start on one that is simulated whole
MOST_TRIED = 1_500  # points that it may look at from one start; most of those that are not priced break a limit
TASKS_PER_LAYER = 25  # and micro-batch, about; packets come on top
SMALL_STARTS = 3  # plans that the search of a small model begins at
GROUPS: tuple[tuple[str, ...], ...] = (("gate_up_proj", "down_proj"), ("fc1", "fc2"), ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"))
Move = Callable[["Problem", "Point"], Iterator["Point"]]
Edges = Mapping[str, int]  # by op: the row from which the CPU computes, where it is not resident


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan as the search sees it: buffers and sequences, resident rows, and one boundary between GPU and CPU per op and phase."""

    draft: Draft
    residency: Residency
    edges: Mapping[Phase, Edges]

    def plan(self, problem: Problem) -> Plan:
        ops = problem.ops
        shares = {phase: {name: 1.0 - edge / ops[name].rows for name, edge in edges.items()} for phase, edges in self.edges.items()}
        return problem.plan(self.draft, self.residency, lambda phase, _tokens: shares[phase])


def point_of(problem: Problem, plan: Plan) -> Point | None:
    """The plan as a point; None for a plan that no point stands for: without a GPU, with KV apart by layers or on the disk."""
    if not plan.uses_gpu or plan.host_kv_layers or plan.kv_on_disk:
        return None
    per_seq, spec = pages_of(problem.workload.seq_len), problem.spec
    buckets = {phase: used_bucket(problem.workload, plan, phase) for phase in PHASES}
    one_packet = smallest_ring(spec.one_layer_per_class, plan.unit_rows, plan.packet_bytes, 1)
    draft = Draft(
        policy="auto", num_seqs=plan.max_num_seqs, gpu_seqs=min(plan.max_num_seqs, plan.gpu_pages // per_seq), pass_tokens=plan.max_pass_tokens,
        micro_batches={phase: bucket.micro_batches for phase, bucket in buckets.items()}, uses_cpu=True, streams=plan.ring_bytes > 0,
        ring_depth=plan.ring_bytes // one_packet, packet_bytes=plan.packet_bytes, staging_seqs=plan.kv_staging_pages // per_seq,
        host_attention=buckets["decode"].host_attention, host_prefill_attention=buckets["prefill"].host_prefill_attention,
    )  # fmt: skip
    residency = tuple({name: split.resident for name, split in layer.items()} for layer in plan.buckets[0].splits)
    edges = {phase: {name: _edge(bucket, name) for name in problem.ops} for phase, bucket in buckets.items()}
    return Point(draft=draft, residency=_shared(residency), edges=edges)


def _edge(bucket: BucketPlan, name: str) -> int:
    """The boundary of the op where the fewest rows are resident: elsewhere it may have had to give way."""
    layers = [layer[name] for layer in bucket.splits if name in layer]
    return min(layers, key=lambda split: (split.resident, split.gpu)).gpu


def _shared(residency: Residency) -> Residency:
    """Layers that are alike become one mapping: plans and their memory are made by mapping, not by layer."""
    seen: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}
    return tuple(seen.setdefault(tuple(layer.items()), layer) for layer in residency)


# -- the search --------------------------------------------------------------------------------------------------------------------------------


class _Prices:
    """Seconds of points, phase by phase; what was priced before costs nothing. ``spent`` counts simulated tasks, about."""

    def __init__(self, problem: Problem, most_tasks: int | None, starts: int) -> None:
        self.problem, self.spent, self.tried = problem, 0, 0
        self.deep = problem.spec.num_layers > EXACT_LAYERS
        self.budget = BUDGET if self.deep else SMALL_BUDGET
        self.starts = 1 if self.deep else starts
        if most_tasks is not None:
            self.budget = min(self.budget, most_tasks // self.starts)
        self.known: dict[tuple[object, ...], float] = {}

    @property
    def over(self) -> bool:
        return self.spent >= self.budget or self.tried >= MOST_TRIED

    def cost(self, plan: Plan, phase: Phase) -> int:
        """About how many tasks pricing a phase simulates."""
        spec, bucket = self.problem.spec, used_bucket(self.problem.workload, plan, phase)
        packet_bytes = coarse_packet_bytes(spec, plan, bucket)
        packets = streamed_bytes(spec, plan, bucket, self.problem.templates) // (packet_bytes * spec.num_layers) if packet_bytes else 0
        layers = sum(QUICK_SAMPLES) if self.deep else spec.num_layers
        return layers * (TASKS_PER_LAYER * bucket.micro_batches + packets * (1 + bucket.micro_batches))

    def seconds(self, point: Point, plan: Plan) -> float:
        waves = -(-self.problem.workload.num_requests // point.draft.num_seqs)
        return waves * sum(self._phase_s(plan, phase) for phase in PHASES)

    def _phase_s(self, plan: Plan, phase: Phase) -> float:
        p = self.problem
        bucket = used_bucket(p.workload, plan, phase)
        layers = tuple(tuple(layer.values()) for layer in bucket.splits)
        key = (
            phase, bucket.micro_batches, bucket.host_attention, bucket.host_prefill_attention, layers, plan.ring_bytes, plan.packet_bytes, plan.gpu_pages,
            plan.max_num_seqs, plan.max_pass_tokens if phase == "prefill" else 0,
        )  # fmt: skip
        if key not in self.known:
            self.spent += self.cost(plan, phase)
            self.known[key] = sum(each.seconds for each in price_phase(p.spec, p.profile, p.workload, plan, phase, quick=self.deep))
        return self.known[key]


def polish(problem: Problem, plans: Iterable[Plan], most_tasks: int | None = None, starts: int = SMALL_STARTS) -> list[Plan]:
    """The plans that steps from the first of ``plans`` lead to; as many starts as the model's depth allows. Limits are kept.

    ``most_tasks``: how many tasks may be simulated, if less than usual.
    """
    prices = _Prices(problem, most_tasks, starts)
    if prices.over:
        return []
    found: list[Point] = []
    for plan in plans:
        point = point_of(problem, plan)
        if point is None or len(found) >= prices.starts or not problem.fits(made := point.plan(problem)):
            continue
        if sum(prices.cost(made, phase) for phase in PHASES) < BUDGET // 6:  # else a step or two would take all of it
            found.append(point)
    polished = []
    for point in found:
        prices.spent = prices.tried = 0
        polished.append(_climbed(problem, point, prices))
    return polished


def refilled(problem: Problem, plan: Plan) -> list[Plan]:
    """``plan`` with the GPU memory of ``problem``, which may be more than it was made for, filled anew beside the same buffers. Limits are kept."""
    point = point_of(problem, plan)
    plans = [] if point is None else [each.plan(problem) for each in _refilled(problem, point)]
    return [each for each in plans if problem.fits(each)]


def _climbed(problem: Problem, start: Point, prices: _Prices) -> Plan:
    """Step by step, each the first that helps, until no move does or the budget is spent."""
    best, found = start, start.plan(problem)
    best_s = prices.seconds(best, found)
    moves = DEEP_MOVES if prices.deep else MOVES
    without, at = 0, 0
    while without < len(moves) and not prices.over:
        step = _step(problem, moves[at], best, best_s, prices)
        if step is None:
            without, at = without + 1, (at + 1) % len(moves)
        else:
            best, found, best_s = step
            without = 0
    return found


def _step(problem: Problem, move: Move, best: Point, best_s: float, prices: _Prices) -> tuple[Point, Plan, float] | None:
    for point in move(problem, best):
        if prices.over:
            return None
        prices.tried += 1
        plan = point.plan(problem)
        if problem.fits(plan) and (seconds := prices.seconds(point, plan)) * GAIN < best_s:
            return point, plan, seconds
    return None


# -- moves -------------------------------------------------------------------------------------------------------------------------------------


def _with_edges(point: Point, phase: Phase, edges: Edges) -> Point:
    return replace(point, edges={**point.edges, phase: {**point.edges[phase], **edges}})


def _boundaries(problem: Problem, point: Point) -> Iterator[Point]:
    """The boundary of one op in one phase anywhere near, then of several ops together."""
    ops = problem.ops
    for phase in PHASES:
        edges = point.edges[phase]
        for name, op in ops.items():
            nearby = {0, op.rows, *(max(0, min(op.rows, _unit(op.rows, op.unit_rows, edges[name], step))) for step in (-2, -1, 1, 2))}
            yield from (_with_edges(point, phase, {name: edge}) for edge in sorted(nearby) if edge != edges[name])
        for group in [tuple(name for name in names if name in ops) for names in (*GROUPS, tuple(ops))]:
            if len(group) > 1:
                yield _with_edges(point, phase, dict.fromkeys(group, 0))
                yield _with_edges(point, phase, {name: ops[name].rows for name in group})
                for step in (-1, 1):
                    moved = {name: _unit(ops[name].rows, ops[name].unit_rows, edges[name], step) for name in group}
                    yield _with_edges(point, phase, {name: max(0, min(ops[name].rows, edge)) for name, edge in moved.items()})


def _unit(rows: int, unit: int, edge: int, step: int) -> int:
    """The boundary ``step`` units from ``edge``; the end counts as one."""
    at = -(-edge // unit) + step
    return min(rows, max(0, at * unit))


def _scaled_boundaries(problem: Problem, point: Point) -> Iterator[Point]:
    """All of the CPU's shares of a phase a little smaller or larger; or none of a block."""
    ops = problem.ops
    for phase in PHASES:
        edges = point.edges[phase]
        for factor in (0.85, 1.15, 0.94, 1.06):
            yield _with_edges(point, phase, {name: op.rows - op.round_rows(factor * (op.rows - edges[name])) for name, op in ops.items()})
        for group in (GROUPS[3], GROUPS[0], GROUPS[1], ("lm_head",), tuple(ops)):
            kept = {name: ops[name].rows for name in group if name in ops}
            if any(edges[name] < rows for name, rows in kept.items()):
                yield _with_edges(point, phase, kept)


def _batches(problem: Problem, point: Point) -> Iterator[Point]:
    """One micro-batch more or less in one phase, and twice as many or half."""
    draft = point.draft
    for phase in PHASES:
        now = draft.micro_batches[phase]
        for count in sorted({now - 1, now + 1, now // 2, 2 * now} - {now}):
            if 1 <= count <= min(MOST_MICRO_BATCHES, draft.num_seqs):
                yield _staged(problem, replace(point, draft=replace(draft, micro_batches={**draft.micro_batches, phase: count})))


def _staged(problem: Problem, point: Point) -> Point:
    """The point with staging for what its host KV needs."""
    draft, work = point.draft, problem.workload
    decode = -(-draft.num_seqs // draft.micro_batches["decode"]) if draft.host_attention == "gpu" else 0
    prefill = prompts_at_once(work, draft.num_seqs, draft.pass_tokens) if draft.host_prefill_attention == "gpu" else 0
    staging = min(draft.num_seqs, max(decode, prefill)) if draft.gpu_seqs < draft.num_seqs else 0
    return replace(point, draft=replace(draft, staging_seqs=staging))


def _refilled(problem: Problem, point: Point) -> Iterator[Point]:
    """The point's buffers with memory filled anew: as it was, evenly, and with each op first."""
    targets: list[Mapping[str, float] | None] = [_fractions(problem, point.residency), None]
    if problem.spec.num_layers <= EXACT_LAYERS:
        targets += [{name: 1.0} for name in problem.ops]
    for target in targets:
        yield replace(point, residency=fill(problem, point.draft, target))


def _fractions(problem: Problem, residency: Residency) -> dict[str, float]:
    layers = problem.spec.num_layers
    rows = {name: sum(layer.get(name, 0) for layer in residency) for name in problem.ops}
    most = max((rows[name] / (op.rows * (layers if op.layer >= 0 else 1)) for name, op in problem.ops.items()), default=0.0) or 1.0
    return {name: rows[name] / (op.rows * (layers if op.layer >= 0 else 1)) / most for name, op in problem.ops.items()}


def _kv(problem: Problem, point: Point) -> Iterator[Point]:
    """KV of more or fewer sequences on the GPU, and where the rest is attended; memory filled anew."""
    draft = point.draft
    for gpu_seqs in sorted({0, draft.gpu_seqs - 1, draft.gpu_seqs, draft.gpu_seqs + 1, draft.num_seqs} & set(range(draft.num_seqs + 1))):
        for decode, prefill in product(("cpu", "gpu"), repeat=2) if gpu_seqs < draft.num_seqs else [("cpu", "cpu")]:
            moved = replace(draft, gpu_seqs=gpu_seqs, host_attention=decode, host_prefill_attention=prefill)  # type: ignore[arg-type]
            if moved != draft:
                yield from _refilled(problem, _staged(problem, replace(point, draft=moved)))


def _buffers(problem: Problem, point: Point) -> Iterator[Point]:
    """Another chunk or ring, or other numbers of sequences at once (those that change the waves); memory filled anew."""
    draft, work, limits = point.draft, problem.workload, problem.limits
    requests = work.num_requests
    counts = sorted({-(-requests // waves) for waves in range(1, min(requests, 8) + 1)} & set(range(1, work.concurrency + 1)))
    chunks = [*chunk_choices(problem.spec, work, work.concurrency, limits.gpu_bytes), *TIGHT_CHUNK_TOKENS]
    rings = [ring_rule(limits.gpu_bytes), tight_ring(problem.spec, problem.options.unit_rows), (0, 0)]
    for count, chunk, (packet_bytes, depth) in product(counts, chunks, rings):
        moved = replace(
            draft, num_seqs=count, gpu_seqs=count if draft.gpu_seqs == draft.num_seqs else min(count, draft.gpu_seqs), pass_tokens=max(count, chunk),
            packet_bytes=packet_bytes, ring_depth=depth, streams=depth > 0,
        )  # fmt: skip
        if moved != draft:
            yield from _refilled(problem, _staged(problem, replace(point, draft=moved)))


def _swaps(problem: Problem, point: Point) -> Iterator[Point]:
    """One unit more of an op in one layer, at the cost of units of another op where memory is full; or one unit less."""
    empty = [dict.fromkeys(layer, 0) for layer in point.residency]
    room = problem.limits.gpu_bytes - plan_memory(problem.spec, replace(point, residency=tuple(empty)).plan(problem)).gpu.total
    for name in problem.ops:
        grown = _stepped(problem, point.residency, name, 1)
        if grown is not None and _bytes(problem, grown) <= room:
            yield replace(point, residency=grown)
            continue
        for other in problem.ops if grown is not None else ():
            shrunk: Residency | None = grown
            while other != name and shrunk is not None and _bytes(problem, shrunk) > room:
                shrunk = _stepped(problem, shrunk, other, -1)
            if other != name and shrunk is not None:
                yield replace(point, residency=shrunk)
    for name in problem.ops:
        less = _stepped(problem, point.residency, name, -1)
        if less is not None:
            yield replace(point, residency=less)


def _bytes(problem: Problem, residency: Residency) -> int:
    return sum(residency_bytes(problem.templates[number], layer) for number, layer in zip((*problem.spec.format_classes, 0), residency, strict=True))


def _stepped(problem: Problem, residency: Residency, name: str, step: int) -> Residency | None:
    """One unit of an op more in the first layer that has room, or less in the last one that has some; None when there is no such layer."""
    op = problem.ops[name]
    layers = [i for i, layer in enumerate(residency) if name in layer and (layer[name] < op.rows if step > 0 else layer[name] > 0)]
    if not layers:
        return None
    at = min(layers, key=lambda i: residency[i][name]) if step > 0 else max(layers, key=lambda i: (residency[i][name], i))
    changed = {**residency[at], name: _unit(op.rows, op.unit_rows, residency[at][name], step)}
    return (*residency[:at], changed, *residency[at + 1 :])


MOVES: tuple[Move, ...] = (_boundaries, _swaps, _batches, _refilled, _kv, _buffers)
DEEP_MOVES: tuple[Move, ...] = (_batches, _scaled_boundaries)
