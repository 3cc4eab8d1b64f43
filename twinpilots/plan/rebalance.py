"""Re-solves one bucket for the load that it has now, with everything that lies in memory left where it is.

Owns `Option` (another way to run the same passes) and `options`: new boundaries between streamed and CPU rows, micro-batches and the side that attends
host KV, found by the linear program at the actual load and priced by the simulator; and the two plans that use one pilot for all that can move. Pure.
Knows nothing of when to ask, of measured passes or of switching.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.draft import Attention, PlanOptions, split_of
from twinpilots.plan.load import PassLoad, SeqClass, pass_load
from twinpilots.plan.memory import tasks_allowance
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.priced import Layout
from twinpilots.plan.pricing import QUICK_SAMPLES, SAMPLES
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import BLOCKS, Machine, PhaseShares, Program, solve_program
from twinpilots.plan.tasks import GPU_KV, NUM_GROUPS
from twinpilots.plan.terms import MeanPass, planned_terms
from twinpilots.plan.workload import Limits, Workload

Pilots = Literal["both", "cpu", "stream"]  # who computes the rows that are not resident
MICRO_BATCHES = (1, 2, 4)
PROGRAMS_PRICED = 2  # answers of the linear program that the simulator prices
SCALES = (0.75, 1.33, 0.9, 1.11)  # factors tried on the CPU's shares of the MLP, coarse then fine
STARTS = (0.1, 0.25)  # parts of the MLP for the CPU that are tried where it has less
HOPELESS = 1.3  # an option that is so much slower than the best at first sight is not looked at again
GAIN = 1.002  # an improvement worth keeping


@dataclass(frozen=True, kw_only=True)
class Option:
    """A bucket's plan and the simulated seconds of one of its passes under the load in question."""

    bucket: BucketPlan
    seconds: float
    pilots: Pilots


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What a pass brings, whichever way it is dealt: sequences by where their KV lies, and rows for the head."""

    gpu: tuple[SeqClass, ...]
    host: tuple[SeqClass, ...]
    logit_rows: int

    @staticmethod
    def of(load: PassLoad) -> Sequences:
        """Classes alike in all micro-batches are counted together."""
        found: tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]] = (Counter(), Counter())
        for groups in load.micro_batches:
            for group in range(NUM_GROUPS):
                for c in groups[group].classes:
                    found[group != GPU_KV][c.query_tokens, c.kv_len] += c.num_seqs
        on_gpu, on_host = (tuple(SeqClass(count, query, kv_len) for (query, kv_len), count in each.items()) for each in found)
        return Sequences(gpu=on_gpu, host=on_host, logit_rows=load.logit_rows)

    @property
    def num_seqs(self) -> int:
        return sum(c.num_seqs for c in (*self.gpu, *self.host))

    @property
    def tokens(self) -> int:
        return sum(c.tokens for c in (*self.gpu, *self.host))

    @property
    def kv_tokens(self) -> int:
        return sum(c.num_seqs * c.kv_len for c in (*self.gpu, *self.host))

    def pages(self, page_size: int) -> int:
        """KV pages of the host's sequences."""
        return sum(c.num_seqs * -(-c.kv_len // page_size) for c in self.host)

    def load(self, bucket: BucketPlan) -> PassLoad:
        """The pass dealt the way of this bucket."""
        return pass_load(bucket, self.gpu, self.host, prompt=bucket.phase == "prefill", logit_rows=self.logit_rows)


def options(
    spec: ModelSpec, profile: HardwareProfile, plan: Plan, bucket: BucketPlan, load: PassLoad, *, surprise: float = 1.0, layout: Layout | None = None
) -> tuple[Option, ...]:  # fmt: skip
    """Ways to run passes like ``load`` over the memory that ``plan`` has laid out: the bucket as it is first, then others of promise in no order.

    ``surprise``: measured / predicted of the bucket as it is. What two pilots lose by waiting for each other is in no rate, so the more they have lost, the
    slower a plan for one may look and still be of promise.
    Only the bucket as it is where nothing can move: without two pilots, or without a ring to stream through. ``layout`` keeps what is priced for `glance`.
    """
    search = Search(spec, profile, plan, bucket, Sequences.of(load), layout)
    now = search.priced(bucket)
    if not can_move(plan) or profile.gpu is None or profile.link is None:
        return (now,)
    found = [option for option in (*search.single(), search.shared()) if option is not None and option.bucket != bucket]
    in_sight = HOPELESS * max(1.0, surprise) * min([now.seconds, *(option.seconds for option in found)])
    return (now, *(search.priced(option.bucket) for option in found if option.seconds <= in_sight))


def can_move(plan: Plan) -> bool:
    """Whether there are two pilots, and a ring to stream through, and all that is not resident lies in host memory."""
    return plan.uses_gpu and plan.uses_cpu and plan.ring_bytes > 0 and not plan.host_kv_layers and not plan.uses_disk


def option_of(spec: ModelSpec, profile: HardwareProfile, plan: Plan, bucket: BucketPlan, load: PassLoad) -> Option:
    """A given bucket, priced."""
    return Search(spec, profile, plan, bucket, Sequences.of(load)).priced(bucket)


def pilots_of(bucket: BucketPlan) -> Pilots:
    """Who computes the rows that are not resident. A bucket with all rows resident counts as streamed: nothing is the CPU's."""
    on_cpu, streamed = shares_of(bucket)
    return "stream" if on_cpu == 0 else "cpu" if streamed == 0 else "both"


def shares_of(bucket: BucketPlan) -> tuple[float, float]:
    """(rows on the CPU, rows streamed) as fractions of all rows."""
    splits = [split for layer in bucket.splits for split in layer.values()]
    total = sum(split.rows for split in splits)
    return sum(split.cpu for split in splits) / total, sum(split.streamed for split in splits) / total


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """``share``: the CPU's, of all rows of every op."""

    seconds: float
    bucket: BucketPlan
    share: Mapping[str, float]
    side: Attention


class Search:
    """Prices buckets under one load and tries others. ``layout``: remembers what was priced, and by what the program's answers were bettered."""

    def __init__(
        self, spec: ModelSpec, profile: HardwareProfile, plan: Plan, bucket: BucketPlan, sequences: Sequences, layout: Layout | None = None
    ) -> None:  # fmt: skip
        self.spec, self.profile, self.plan, self.bucket, self.sequences = spec, profile, plan, bucket, sequences
        workload = Workload(num_requests=1, input_len=1, output_len=1, max_num_seqs=1)  # the passes are given here, not derived
        options = PlanOptions(unit_rows=plan.unit_rows, kv_dtype=plan.kv_dtype, max_model_len=plan.max_model_len)
        self.problem = Problem.of(spec, profile, workload, Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes), options)
        self.layout = layout or Layout(spec, plan)
        self._answers: dict[tuple[int, Attention], PhaseShares | None] = {}
        self.tried: list[BucketPlan] = []
        self.room = sum(tasks_allowance(spec, plan, each, self.problem.templates) for each in plan.buckets)

    def seconds(self, bucket: BucketPlan, samples: tuple[int, int] = QUICK_SAMPLES) -> float:
        return self.layout.seconds(self.profile, bucket, self.sequences.load(bucket), samples)

    def priced(self, bucket: BucketPlan) -> Option:
        """The bucket at the price that decides: two layers tell trials of one kind apart, but not what crosses from one pass into the next."""
        return Option(bucket=bucket, seconds=self.seconds(bucket, SAMPLES), pilots=pilots_of(bucket))

    def single(self) -> Iterator[Option]:
        """All rows that are not resident computed by the CPU, or all streamed."""
        for pilots, cpu in (("cpu", 1.0), ("stream", 0.0)):
            for side in self.sides():
                bucket = self.made(dict.fromkeys(self.problem.ops, cpu), 1, side)
                yield Option(bucket=bucket, seconds=self.seconds(bucket), pilots=pilots)  # type: ignore[arg-type]

    def shared(self) -> Option | None:
        """The best of the linear program's answers and of the bucket as it is, then nudged step by step: the program ignores order, units and the ring."""
        best: _Trial | None = None
        for share, batches, side in [*self._programmed(), (self.shares_of(self.bucket), self.bucket.micro_batches, self.side_now)]:
            best = self._better(best, share, batches, side)
        if best is None:
            return None
        if self._mlp_part(best) < STARTS[0]:  # nothing cannot be scaled, and the program may see too little in it
            for part in STARTS:
                best = self._better(best, self._set(best.share, BLOCKS["mlp"], part), best.bucket.micro_batches, best.side) or best
        best = self._scaled(best, SCALES[:2])
        for block in ("attention", "head"):  # little work, but each with a hand-off of its own: all of it, none, or as much as of the MLP
            for part in (0.0, self._mlp_part(best), 1.0):
                best = self._better(best, self._set(best.share, BLOCKS[block], part), best.bucket.micro_batches, best.side) or best
        best = self._scaled(best, SCALES[2:])
        answer = self.answer(best.bucket.micro_batches, best.side)
        if answer is not None:
            self.layout.bettered(best.bucket, answer, best.share)
        return Option(bucket=best.bucket, seconds=best.seconds, pilots=pilots_of(best.bucket))

    def _scaled(self, best: _Trial, factors: tuple[float, ...]) -> _Trial:
        """The MLP's shares multiplied by each factor for as long as that helps."""
        for factor in factors:
            while True:
                share = scaled_mlp(best.share, factor)
                moved = self._better(best, share, best.bucket.micro_batches, best.side) or best
                if moved is best:
                    break
                best = moved
        return best

    def _mlp_part(self, trial: _Trial) -> float:
        """The CPU's part of the MLP's rows that are not resident."""
        names = [name for name in BLOCKS["mlp"] if name in trial.share]
        left = sum(1.0 - self.resident[name] for name in names)
        return min(1.0, sum(trial.share[name] for name in names) / left) if left > 0 else 0.0

    def _set(self, share: Mapping[str, float], names: tuple[str, ...], part: float) -> dict[str, float]:
        """The shares with this part of these ops' rows that are not resident."""
        return {name: part * (1.0 - self.resident[name]) if name in names else value for name, value in share.items()}

    def answer(self, batches: int, side: Attention) -> Mapping[str, float] | None:
        """The program's CPU shares of all rows, for so many micro-batches and this side of attention."""
        solved = self._solved(batches, side)
        return None if solved is None else solved.cpu

    def _solved(self, batches: int, side: Attention) -> PhaseShares | None:
        if (batches, side) not in self._answers:
            shares = solve_program(self._program(min(batches, self.sequences.num_seqs), side), relaxed=True)
            self._answers[batches, side] = None if shares is None else shares.phases[0]
        return self._answers[batches, side]

    def _programmed(self) -> list[tuple[Mapping[str, float], int, Attention]]:
        """The program's best CPU shares, with their micro-batches and side of attention."""
        answers: list[tuple[float, int, Mapping[str, float], int, Attention]] = []
        for batches in self._batches():
            for side in self.sides():
                solved = self._solved(batches, side)
                if solved is not None:
                    answers.append((solved.seconds, len(answers), solved.cpu, batches, side))
        ranked = sorted(answers, key=lambda answer: answer[:2])
        # The program sees little of what micro-batches are for, so the best answer of every number of them is priced.
        chosen = [next(answer for answer in ranked if answer[3] == batches) for batches in sorted({answer[3] for answer in ranked})]
        chosen += [answer for answer in ranked[:PROGRAMS_PRICED] if answer not in chosen]
        return [(share, batches, side) for _, _, share, batches, side in chosen]

    def shares_of(self, bucket: BucketPlan) -> Mapping[str, float]:
        """The CPU's mean share of every op."""
        rows, cpu = dict.fromkeys(self.problem.ops, 0), dict.fromkeys(self.problem.ops, 0)
        for layer in bucket.splits:
            for name, split in layer.items():
                rows[name] += split.rows
                cpu[name] += split.cpu
        return {name: cpu[name] / rows[name] for name in rows}

    def _better(self, best: _Trial | None, share: Mapping[str, float], batches: int, side: Attention) -> _Trial | None:
        """A trial of these shares where it is possible and better than the best so far, else the best so far."""
        bucket = self.made(share, batches, side)
        if bucket in self.tried or not self.has_room(bucket):
            return best
        self.tried.append(bucket)
        seconds = self.seconds(bucket)
        return _Trial(seconds=seconds, bucket=bucket, share=share, side=side) if best is None or seconds * GAIN < best.seconds else best

    def has_room(self, bucket: BucketPlan) -> bool:
        """Whether its program fits where the layout's programs are."""
        return tasks_allowance(self.spec, self.plan, bucket, self.problem.templates) <= self.room

    @property
    def side_now(self) -> Attention:
        return side_of(self.bucket)

    def _batches(self) -> list[int]:
        most = min(self.sequences.num_seqs, self.bucket.max_tokens)
        return sorted({1, min(self.bucket.micro_batches, most), *(count for count in MICRO_BATCHES if count <= most)})

    def sides(self) -> list[Attention]:
        """Who may attend host KV in such passes. The GPU only where the staging area holds what would be streamed."""
        now = self.side_now
        if not self.sequences.host:
            return [now]
        fits = self.sequences.pages(self.plan.page_size) <= self.plan.kv_staging_pages
        return ["cpu", "gpu"] if fits else ["cpu"] if now == "cpu" else [now]

    def made(self, cpu: Mapping[str, float], batches: int, side: Attention) -> BucketPlan:
        """The bucket with these CPU shares of all rows, as far as they are not resident."""
        made: dict[int, Mapping[str, Split]] = {}
        for layer in self.bucket.splits:
            if id(layer) not in made:
                made[id(layer)] = {
                    name: split_of(self.problem.ops[name], split.resident, cpu[name], streams=True, uses_cpu=True) for name, split in layer.items()
                }
        splits = tuple(made[id(layer)] for layer in self.bucket.splits)
        if self.bucket.phase == "decode":
            return replace(self.bucket, splits=splits, micro_batches=batches, host_attention=side)
        return replace(self.bucket, splits=splits, micro_batches=batches, host_prefill_attention=side)

    # -- the program -----------------------------------------------------------------------------------------------------------------------

    def _program(self, batches: int, side: Attention) -> Program:
        problem, sequences = self.problem, self.sequences
        on_host = sum(c.num_seqs * c.kv_len for c in sequences.host) / max(1, sequences.kv_tokens)
        count = sequences.num_seqs
        mean = SeqClass(count, max(1, round(sequences.tokens / count)), max(1, round(sequences.kv_tokens / count)))
        each = MeanPass(passes=1.0, tokens=sequences.tokens, logit_rows=sequences.logit_rows, sequences=(mean,))
        return Program(
            phases=(planned_terms(problem, each, batches, side if on_host else "none"),), gpu_budget_bytes=0.0, host_budget_bytes=0.0, kv_capacity_bytes=1.0,
            resident=self.resident, gpu_kv=1.0 - on_host, machine=self._machine(),
        )  # fmt: skip

    @cached_property
    def resident(self) -> dict[str, float]:
        """The resident part of every op's rows."""
        rows = dict.fromkeys(self.problem.ops, 0)
        for layer in self.bucket.splits:
            for name, split in layer.items():
                rows[name] += split.resident
        return {name: rows[name] / (op.rows * (self.spec.num_layers if op.layer >= 0 else 1)) for name, op in self.problem.ops.items()}

    def _machine(self) -> Machine:
        profile = self.profile
        assert profile.gpu is not None and profile.link is not None
        return Machine(
            op_bytes={name: self.problem.total_bytes(name) for name in self.problem.ops},
            up_bytes_per_s=profile.link.up_bytes_per_s, down_bytes_per_s=profile.link.down_bytes_per_s,
            link_drag=(1 - 1 / profile.cpu.copy_slowdown, 1 - 1 / profile.gpu.copy_slowdown), host_fixed=("lm_head",) if self.spec.tied else (),
        )  # fmt: skip


def scaled_mlp(share: Mapping[str, float], factor: float) -> dict[str, float]:
    """The CPU's shares with the MLP's multiplied."""
    return {name: min(1.0, value * factor) if name in BLOCKS["mlp"] else value for name, value in share.items()}


def side_of(bucket: BucketPlan) -> Attention:
    return bucket.host_attention if bucket.phase == "decode" else bucket.host_prefill_attention


def with_bucket(plan: Plan, old: BucketPlan, new: BucketPlan) -> Plan:
    """``plan`` with ``new`` in the place of ``old`` (the very object)."""
    return replace(plan, buckets=tuple(new if bucket is old else bucket for bucket in plan.buckets))


def in_the_manner_of(bucket: BucketPlan, like: BucketPlan) -> BucketPlan:
    """``bucket``'s passes computed as those of another bucket of the same plan, in micro-batches of no fewer tokens: each of them reads all weights."""
    micro_batches = max(1, min(like.micro_batches, like.micro_batches * bucket.max_tokens // like.max_tokens))
    return replace(
        bucket, splits=like.splits, micro_batches=micro_batches, host_attention=like.host_attention,
        host_prefill_attention=like.host_prefill_attention,
    )  # fmt: skip


def alone(bucket: BucketPlan, pilots: Literal["cpu", "stream"]) -> BucketPlan:
    """The bucket with all rows that are not resident the CPU's, or streamed, in one micro-batch."""
    made: dict[int, Mapping[str, Split]] = {}
    for layer in bucket.splits:
        if id(layer) not in made:
            left = {name: split.rows - split.resident for name, split in layer.items()}
            made[id(layer)] = {
                name: Split(resident=split.resident, streamed=0 if pilots == "cpu" else left[name], cpu=left[name] if pilots == "cpu" else 0)
                for name, split in layer.items()
            }
    return replace(bucket, splits=tuple(made[id(layer)] for layer in bucket.splits), micro_batches=1)
