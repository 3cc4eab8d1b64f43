"""The best plan of a small problem, found by looking at all of them: what `auto` is measured against.

Owns the plan space, an exact lower bound of every plan in it and the search. The space: sequences at once (every number that changes the waves), chunk,
ring (by the rule, the smallest, or none), KV of any number of sequences on the GPU, where host KV is attended in prefill and in decode, micro-batches of either
phase, and for every op the resident units of each layer (no layer more than the one before) and the units of the CPU (the same in all layers, as far as
they are not resident) in either phase. Every plan is priced by the simulator unless its bound says that it cannot beat the best one known.

The two phases share a residency and nothing else, so the best of each is looked for by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement, product

import numpy as np

from benchmarks.exhaustive_bound import PhaseBound, Rows
from twinpilots.plan.auto import MOST_MICRO_BATCHES
from twinpilots.plan.draft import TIGHT_CHUNK_TOKENS, Attention, Draft, chunk_choices, nothing_resident, residency_bytes, ring_rule, tight_ring
from twinpilots.plan.memory import plan_memory
from twinpilots.plan.plan import BucketPlan, Phase, Plan, Split
from twinpilots.plan.pricing import prefill_shape, price_phase, price_plan
from twinpilots.plan.problem import Problem, no_cpu

TOLERANCE = 2e-3  # plans that are better than the best by less than this share are not looked for
NO_RING = (0, 0)
PLACES: tuple[tuple[Attention, Attention], ...] = (("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu"))  # host KV attended in prefill, decode
Option = tuple[tuple[Split, ...], int]  # one op's splits, layer by layer, and the number of its residency


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything of a plan but its splits."""

    num_seqs: int
    gpu_seqs: int
    chunk: int
    prefill_attention: Attention
    decode_attention: Attention
    prefill_batches: int
    decode_batches: int
    ring: tuple[int, int]  # (packet bytes, depth); depth 0: no ring, nothing is streamed


@dataclass(frozen=True, kw_only=True)
class Found:
    """``seconds`` of the best plan; ``plan`` is None when no plan of the space fits or beats what the search was given."""

    seconds: float
    plan: Plan | None
    plans: int  # of both phases, that the space holds
    priced: int  # of these, by the simulator


def rings(problem: Problem) -> list[tuple[int, int]]:
    return sorted({NO_RING, ring_rule(problem.limits.gpu_bytes), tight_ring(problem.spec, problem.options.unit_rows)})


def settings(problem: Problem) -> Iterator[Setting]:
    requests, cap = problem.workload.num_requests, problem.workload.concurrency
    counts = sorted({-(-requests // waves) for waves in range(1, requests + 1)} & set(range(1, cap + 1)))
    chunks = [*chunk_choices(problem.spec, problem.workload, cap, problem.limits.gpu_bytes), *TIGHT_CHUNK_TOKENS]
    for count, chunk, ring in product(counts, chunks, rings(problem)):
        together = prefill_shape(problem.workload, count, max(count, chunk)).num_seqs
        batches = [range(1, min(MOST_MICRO_BATCHES, most) + 1) for most in (together, count)]
        for gpu_seqs, prefill_mb, decode_mb in product(range(count + 1), *batches):
            for places in PLACES if gpu_seqs < count else PLACES[:1]:
                yield Setting(
                    num_seqs=count, gpu_seqs=gpu_seqs, chunk=max(count, chunk), prefill_attention=places[0],
                    decode_attention=places[1], prefill_batches=prefill_mb, decode_batches=decode_mb, ring=ring,
                )  # fmt: skip


def draft_of(problem: Problem, setting: Setting) -> Draft:
    """The setting as a draft; staging is sized as `auto` sizes it."""
    count = setting.num_seqs
    together = prefill_shape(problem.workload, count, setting.chunk).num_seqs
    staging = max(-(-count // setting.decode_batches) if setting.decode_attention == "gpu" else 0, together + 1 if setting.prefill_attention == "gpu" else 0)
    return Draft(
        policy="auto", num_seqs=count, gpu_seqs=setting.gpu_seqs, pass_tokens=setting.chunk, uses_cpu=True,
        micro_batches={"prefill": setting.prefill_batches, "decode": setting.decode_batches},
        streams=setting.ring != NO_RING, packet_bytes=setting.ring[0], ring_depth=setting.ring[1], staging_seqs=min(count, staging),
        host_attention=setting.decode_attention, host_prefill_attention=setting.prefill_attention,
    )  # fmt: skip


class Splits:
    """All ways to split the ops. A combination is one option of every axis; residencies are numbered, and so are the combinations of each."""

    def __init__(self, problem: Problem) -> None:
        self.ops, self.layers = problem.ops, problem.spec.num_layers
        self.axes = axes_of(problem)
        self.options: list[list[Option]] = []
        self.residencies: list[list[tuple[int, ...]]] = []
        for name, *_ in self.axes:
            op = self.ops[name]
            edges = [*range(0, op.rows, op.unit_rows), op.rows]
            kept = [tuple(reversed(rows)) for rows in combinations_with_replacement(edges, self.layers if op.layer >= 0 else 1)]
            self.residencies.append(kept)
            self.options.append(list(dict.fromkeys(
                (tuple(Split(resident=rows, streamed=max(rows, edge) - rows, cpu=op.rows - max(rows, edge)) for rows in resident), number)
                for number, resident in enumerate(kept) for edge in edges
            )))  # fmt: skip
        self.shape = tuple(len(found) for found in self.options)
        self.kept_shape = tuple(len(found) for found in self.residencies)
        self.chosen = np.unravel_index(np.arange(int(np.prod(self.shape))), self.shape)  # by axis, the option of every combination
        owners = [np.array([number for _, number in found])[chosen] for found, chosen in zip(self.options, self.chosen, strict=True)]
        self.by_owner = np.argsort(np.ravel_multi_index(owners, self.kept_shape), kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(np.ravel_multi_index(owners, self.kept_shape), minlength=self.num_residencies))])

    @property
    def num_residencies(self) -> int:
        return int(np.prod(self.kept_shape))

    def members(self, residency: int) -> np.ndarray:
        return self.by_owner[self.starts[residency] : self.starts[residency + 1]]

    def rows(self) -> dict[tuple[int, str], Rows]:
        """Rows of every op in every layer (-1: lm_head), by combination."""
        found = {}
        for names, options, chosen in zip(self.axes, self.options, self.chosen, strict=True):
            for name in names:
                for layer in range(self.layers) if self.ops[name].layer >= 0 else (-1,):
                    parts = np.array([(s.resident, s.streamed, s.cpu) for s in (splits[layer] for splits, _ in options)], dtype=float)[chosen]
                    found[layer, name] = Rows(resident=parts[:, 0], streamed=parts[:, 1], cpu=parts[:, 2])
        return found

    def bytes_of(self, residency: int) -> int:
        chosen = np.unravel_index(residency, self.kept_shape)
        rows = {name: self.residencies[axis][int(chosen[axis])] for axis, names in enumerate(self.axes) for name in names}
        return sum(residency_bytes(self.ops, {name: count}) for name, layers in rows.items() for count in layers)

    def splits(self, combination: int) -> tuple[Mapping[str, Split], ...]:
        chosen = {name: self.options[axis][int(self.chosen[axis][combination])][0] for axis, names in enumerate(self.axes) for name in names}
        layers = tuple({name: chosen[name][layer] for name in self.ops if name != "lm_head"} for layer in range(self.layers))
        return (*layers, {"lm_head": chosen["lm_head"][0]})


def axes_of(problem: Problem) -> list[tuple[str, ...]]:
    """Ops that are split alike. In models of more than one layer k and v are, which have the same shape: the space would be too large otherwise."""
    if problem.spec.num_layers == 1:
        return [(name,) for name in problem.ops]
    return [("k_proj", "v_proj") if name == "k_proj" else (name,) for name in problem.ops if name != "v_proj"]


@dataclass
class _Phase:
    """The combinations of one residency in one phase of one setting, best bound first; those that were priced."""

    order: np.ndarray
    bounds: np.ndarray
    at: int = 0
    priced: dict[int, float] = field(default_factory=dict)
    best_s: float = float("inf")


class Exhaustive:
    """The search over one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.splits = problem, Splits(problem)
        self.bytes = np.array([self.splits.bytes_of(number) for number in range(self.splits.num_residencies)])
        self.rows = self.splits.rows()
        self.streaming = np.logical_or.reduce([rows.streamed > 0 for rows in self.rows.values()])
        self.sizes: dict[Setting, Plan] = {}
        self.bounds: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}
        self.phases: dict[tuple[object, ...], _Phase] = {}
        self.fixed: dict[tuple[object, ...], int] = {}
        self.priced = 0

    def run(self, known_s: float) -> Found:
        """The best plan, if it is better than ``known_s`` by more than the tolerance."""
        best_s, best = known_s, None
        for bound_s, setting, residency in self._candidates(known_s):
            if bound_s >= best_s * (1 - TOLERANCE):
                break
            found = self._best_of(setting, residency, best_s * (1 - TOLERANCE))
            if found is not None:
                best_s, best = found
        return Found(seconds=best_s, plan=best, plans=sum(len(bounds) for bounds, _ in self.bounds.values()), priced=self.priced)

    def _candidates(self, known_s: float) -> list[tuple[float, Setting, int]]:
        """Settings and residencies that fit GPU memory and whose bound is below ``known_s``, best bound first."""
        found: list[tuple[float, Setting, int]] = []
        for setting in settings(self.problem):
            room = self.problem.limits.gpu_bytes - self._fixed_bytes(setting)
            if room < 0:
                continue
            least = self._waves(setting) * (self._bounds(setting, "prefill")[1] + self._bounds(setting, "decode")[1])
            chosen = np.nonzero((self.bytes <= room) & (least < known_s * (1 - TOLERANCE)))[0]
            found += [(float(least[number]), setting, int(number)) for number in chosen]
        return sorted(found, key=lambda each: each[0])

    def _waves(self, setting: Setting) -> int:
        return -(-self.problem.workload.num_requests // setting.num_seqs)

    def _fixed_bytes(self, setting: Setting) -> int:
        """GPU bytes beside resident rows."""
        key = (setting.num_seqs, setting.gpu_seqs, setting.chunk, draft_of(self.problem, setting).staging_seqs, setting.ring)
        if key not in self.fixed:
            self.fixed[key] = plan_memory(self.problem.spec, self._sizes(setting)).gpu.total
        return self.fixed[key]

    def _sizes(self, setting: Setting) -> Plan:
        """The setting as a plan with nothing resident."""
        if setting not in self.sizes:
            self.sizes[setting] = self.problem.plan(draft_of(self.problem, setting), nothing_resident(self.problem.spec, self.problem.ops), no_cpu)
        return self.sizes[setting]

    def _key(self, setting: Setting, phase: Phase) -> tuple[object, ...]:
        """What the time of a phase depends on, splits apart."""
        common = (phase, setting.num_seqs, setting.gpu_seqs, setting.ring)
        return (*common, setting.chunk, setting.prefill_attention, setting.prefill_batches) if phase == "prefill" else (
            *common, setting.decode_attention, setting.decode_batches
        )  # fmt: skip

    def _bounds(self, setting: Setting, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
        """(the bound of every combination, the least of every residency). The larger of the rings bounds all of them."""
        ring = max(
            NO_RING, ring_rule(self.problem.limits.gpu_bytes), tight_ring(self.problem.spec, self.problem.options.unit_rows), key=lambda ring: ring[0] * ring[1]
        )
        key = self._key(replace(setting, ring=ring), phase)
        if (key, NO_RING) not in self.bounds:
            plan = self._plan(replace(setting, ring=ring), phase, 0)
            every = PhaseBound(self.problem, plan, phase, self.rows).seconds()
            for name, bound in (("", every), (NO_RING, np.where(self.streaming, np.inf, every))):
                self.bounds[key, name] = bound, np.minimum.reduceat(bound[self.splits.by_owner], self.splits.starts[:-1])
        return self.bounds[key, NO_RING if setting.ring == NO_RING else ""]

    def _plan(self, setting: Setting, phase: Phase, combination: int) -> Plan:
        """A plan of one bucket, for pricing this phase."""
        sizes = self._sizes(setting)
        bucket = replace(sizes.bucket_for(phase, 1 << 30), splits=self.splits.splits(combination), micro_batches=getattr(setting, f"{phase}_batches"))
        return replace(sizes, buckets=(bucket,))

    def _price(self, setting: Setting, phase: Phase, combination: int) -> float:
        p = self.problem
        plan = self._plan(setting, phase, combination)
        seconds = sum(each.seconds for each in price_phase(p.spec, p.profile, p.workload, plan, phase))
        self.priced += 1
        bound = self._bounds(setting, phase)[0][combination]
        assert bound <= seconds * (1 + 1e-9), f"the bound {bound} exceeds the simulated {seconds}: {setting}, {phase}, {plan.buckets[0].splits}"
        return seconds

    def _phase(self, setting: Setting, phase: Phase, residency: int) -> _Phase:
        key = (*self._key(setting, phase), residency)
        if key not in self.phases:
            members = self.splits.members(residency)
            bounds = self._bounds(setting, phase)[0][members]
            order = np.argsort(bounds, kind="stable")
            self.phases[key] = _Phase(members[order], bounds[order])
        return self.phases[key]

    def _least(self, setting: Setting, phase: Phase, residency: int, below_s: float) -> _Phase:
        """Price combinations until none that is left can be the best, or under ``below_s``."""
        found = self._phase(setting, phase, residency)
        while found.at < len(found.order) and found.bounds[found.at] < min(found.best_s * (1 - TOLERANCE), below_s):
            combination = int(found.order[found.at])
            found.priced[combination] = self._price(setting, phase, combination)
            found.best_s = min(found.best_s, found.priced[combination])
            found.at += 1
        return found

    def _best_of(self, setting: Setting, residency: int, below_s: float) -> tuple[float, Plan] | None:
        """(seconds, plan) of the best plan with this residency, if it takes less than ``below_s`` and fits."""
        waves = self._waves(setting)
        prefill_least = float(self._bounds(setting, "prefill")[1][residency])
        decode = self._least(setting, "decode", residency, below_s / waves - prefill_least)
        prefill = self._least(setting, "prefill", residency, below_s / waves - decode.best_s)
        pairs = sorted((waves * (d_s + p_s), d, p) for d, d_s in decode.priced.items() for p, p_s in prefill.priced.items() if waves * (d_s + p_s) < below_s)
        for seconds, d, p in pairs:
            plan = self._whole(setting, d, p)
            if self.problem.fits(plan):  # GPU memory does; host memory is only known for a whole plan
                return seconds, plan
        return None

    def _whole(self, setting: Setting, decode: int, prefill: int) -> Plan:
        """The complete plan, with all buckets."""
        splits = {"decode": self.splits.splits(decode), "prefill": self.splits.splits(prefill)}
        sizes = self._sizes(setting)
        buckets: list[BucketPlan] = [replace(bucket, splits=splits[bucket.phase]) for bucket in sizes.buckets]
        return replace(sizes, buckets=tuple(buckets))


def seconds_of(problem: Problem, plan: Plan) -> float:
    """Simulated seconds of the whole workload."""
    return price_plan(problem.spec, problem.profile, problem.workload, plan).seconds
