"""The plan space of a small model, as a product: everything of a plan but its splits (`Setting`) times all ways to split its ops (`Space`).

Owns which plans there are, their sizes and how one is made. Knows nothing of time (`lower_bound.py`) or of how the best is looked for (`enumeration.py`,
and with proof `benchmarks/exhaustive.py`).

A setting: sequences at once (every number that changes the waves), chunk, ring (by the rule, the smallest, or none), KV of any number of sequences on the GPU,
where host KV is attended in either phase, micro-batches of either phase. A split: for every op the resident units of each layer (no layer more than the one
before) and the units of the CPU (the same in all layers, as far as they are not resident).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain, combinations_with_replacement, product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

from twinpilots.model.spec import OpSpec
from twinpilots.plan.draft import TIGHT_CHUNK_TOKENS, Attention, Draft, chunk_choices, nothing_resident, ring_rule, tight_ring, unit_edge
from twinpilots.plan.grid import HEAD_LAYER, Axis, whole_grid
from twinpilots.plan.memory import gpu_memory, host_memory
from twinpilots.plan.packets import align
from twinpilots.plan.plan import Phase, Plan, Split
from twinpilots.plan.pricing import prefill_shape
from twinpilots.plan.problem import Problem, no_cpu

MOST_MICRO_BATCHES = 4
NO_RING = (0, 0)
PLACES: tuple[tuple[Attention, Attention], ...] = (("cpu", "cpu"), ("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu"))  # host KV attended in prefill, decode
Groups = Sequence[tuple[str, ...]]  # ops that are split alike


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

    def key(self, phase: Phase) -> tuple[object, ...]:
        """What the time of a phase depends on, splits apart."""
        common = (phase, self.num_seqs, self.gpu_seqs, self.ring)
        own = (self.chunk, self.prefill_attention, self.prefill_batches) if phase == "prefill" else (self.decode_attention, self.decode_batches)
        return common + own


def rings(problem: Problem) -> list[tuple[int, int]]:
    return sorted({NO_RING, ring_rule(problem.limits.gpu_bytes), tight_ring(problem.spec, problem.options.unit_rows)})


def largest_ring(problem: Problem) -> tuple[int, int]:
    return max(rings(problem), key=lambda ring: ring[0] * ring[1])


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
    """The setting as a draft; staging is sized as everywhere."""
    count = setting.num_seqs
    together = prefill_shape(problem.workload, count, setting.chunk).num_seqs
    staging = max(-(-count // setting.decode_batches) if setting.decode_attention == "gpu" else 0, together + 1 if setting.prefill_attention == "gpu" else 0)
    return Draft(
        policy="auto", num_seqs=count, gpu_seqs=setting.gpu_seqs, pass_tokens=setting.chunk, uses_cpu=True,
        micro_batches={"prefill": setting.prefill_batches, "decode": setting.decode_batches},
        streams=setting.ring != NO_RING, packet_bytes=setting.ring[0], ring_depth=setting.ring[1], staging_seqs=min(count, staging),
        host_attention=setting.decode_attention, host_prefill_attention=setting.prefill_attention,
    )  # fmt: skip


# -- splits ------------------------------------------------------------------------------------------------------------------------------------


def op_groups(problem: Problem) -> Groups:
    """Every op by itself; in models of more than one layer k and v, which have the same shape, together: the space would be too large otherwise."""
    if problem.spec.num_layers == 1:
        return [(name,) for name in problem.ops]
    return [("k_proj", "v_proj") if name == "k_proj" else (name,) for name in problem.ops if name != "v_proj"]


def small_groups(problem: Problem, most: int) -> Groups | None:
    """The finest way to group the ops whose space has at most ``most`` combinations; None: there is none."""
    first, second = ("gate_up_proj", "down_proj") if "gate_up_proj" in problem.ops else ("fc1", "fc2")
    mlp: Groups = [(first,), (second,)]
    ways: list[Groups] = [
        op_groups(problem),
        [("q_proj",), ("k_proj", "v_proj"), ("o_proj",), *mlp, ("lm_head",)],
        [("q_proj", "k_proj", "v_proj"), ("o_proj",), *mlp, ("lm_head",)],
        [("q_proj", "k_proj", "v_proj", "o_proj"), *mlp, ("lm_head",)],
        [("q_proj", "k_proj", "v_proj", "o_proj"), (first, second), ("lm_head",)],
    ]
    return next((groups for groups in ways if num_combinations(problem, groups) <= most), None)


def num_combinations(problem: Problem, groups: Groups) -> int:
    """How many the space has, before it is made (at most, where ops of different units are split together)."""

    def options(names: tuple[str, ...]) -> int:
        """Of an op's ``comb(units + layers, layers)`` residencies, a boundary tells those apart in which some layer has no more resident rows."""
        units = max(problem.ops[name].num_units for name in names)
        layers = problem.spec.num_layers if problem.ops[names[0]].layer >= 0 else 1
        return sum(comb(units + layers, layers) - comb(units - edge - 1 + layers, layers) for edge in range(units + 1))

    return prod(options(names) for names in groups)


class Space:
    """All ways to split the ops. A combination is one option of every axis; residencies are numbered, and so are the combinations of each."""

    def __init__(self, problem: Problem, groups: Groups) -> None:
        self.problem, self.layers = problem, problem.spec.num_layers
        self.residencies: list[list[tuple[tuple[int, ...], ...]]] = []  # by axis, layer and op
        axes, owners = [], []
        for names in groups:
            kept, options = self._options(names)
            axes.append(Axis(names=names, options=tuple(options)))
            owners.append(np.array(list(options.values())))
            self.residencies.append(kept)
        self.axes: tuple[Axis, ...] = tuple(axes)
        self.grid = whole_grid(self.axes)
        kept_shape = tuple(len(kept) for kept in self.residencies)
        self.owner = np.ravel_multi_index(np.ix_(*owners), kept_shape).ravel()  # of every combination, its residency
        self.by_owner = np.argsort(self.owner, kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(self.owner, minlength=prod(kept_shape)))])

    def _options(self, names: tuple[str, ...]) -> tuple[list[tuple[tuple[int, ...], ...]], dict[tuple[tuple[Split, ...], ...], int]]:
        """(residencies, the number of its residency by option) of ops that are split together: at the boundaries of the one with the most units."""
        ops = [self.problem.ops[name] for name in names]
        finest = max(ops, key=lambda op: op.num_units)
        edges = [tuple(unit_edge(op, op.rows * (edge / finest.rows)) for op in ops) for edge in (*range(0, finest.rows, finest.unit_rows), finest.rows)]
        kept = [tuple(reversed(rows)) for rows in combinations_with_replacement(edges, self.layers if ops[0].layer >= 0 else 1)]
        options: dict[tuple[tuple[Split, ...], ...], int] = {}
        for number, resident in enumerate(kept):
            for boundary in edges:
                options.setdefault(tuple(tuple(map(_split, ops, rows, boundary)) for rows in resident), number)
        return kept, options

    @cached_property
    def bytes(self) -> NDArray[np.int64]:
        """GPU bytes of every residency."""
        return self._bytes(lambda _op, resident: resident)

    @cached_property
    def host_bytes(self) -> NDArray[np.int64]:
        """Host bytes of the linears of every residency. A tied head stays there as a whole."""
        tied = self.problem.spec.tied
        return self._bytes(lambda op, resident: op.rows if tied and op.layer < 0 else op.rows - resident)

    def _bytes(self, rows_of: Callable[[OpSpec, int], int]) -> NDArray[np.int64]:
        classes, templates = self.problem.spec.format_classes, self.problem.templates
        by_axis: list[NDArray[np.int64]] = []
        for axis, residencies in zip(self.axes, self.residencies, strict=True):
            ops = [templates[classes[layer] if layer >= 0 else 0][name] for depth in range(axis.depth) for layer, name in axis.keys(depth)]
            in_order = [
                sum(align(rows_of(op, rows) * op.row_bytes) for op, rows in zip(ops, chain.from_iterable(kept), strict=True))
                for kept in residencies
            ]  # fmt: skip
            by_axis.append(np.array(in_order))
        return reduce(lambda one, two: np.add.outer(one, two).ravel(), by_axis)

    @cached_property
    def streaming(self) -> NDArray[np.bool_]:
        """Which combinations stream anything."""
        found = reduce(np.logical_or, (rows.streamed > 0 for (layer, name), rows in self.grid.rows.items() if layer in (-1, self.layers - 1)))
        return np.broadcast_to(found, self.grid.shape).ravel()

    def members(self, residency: int) -> NDArray[np.intp]:
        return self.by_owner[self.starts[residency] : self.starts[residency + 1]]

    def least(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """The least of every residency."""
        return np.asarray(np.minimum.reduceat(seconds[self.by_owner], self.starts[:-1]))

    def splits(self, combination: int) -> tuple[Mapping[str, Split], ...]:
        places = np.unravel_index(combination, self.grid.shape)
        chosen = {
            key: split
            for axis, place in zip(self.axes, places, strict=True)
            for layer, of_layer in enumerate(axis.options[int(place)])
            for key, split in zip(axis.keys(layer), of_layer, strict=True)
        }
        layers = [{name: chosen[layer, name] for name in self.problem.ops if name != "lm_head"} for layer in range(self.layers)]
        shared: dict[tuple[Split, ...], Mapping[str, Split]] = {}  # layers alike are one mapping
        return (*(shared.setdefault(tuple(layer.values()), layer) for layer in layers), {"lm_head": chosen[HEAD_LAYER, "lm_head"]})


def _split(op: OpSpec, resident: int, boundary: int) -> Split:
    edge = max(resident, boundary)
    return Split(resident=resident, streamed=edge - resident, cpu=op.rows - edge)


class Sizes:
    """The settings as plans, and what they take of GPU memory beside resident rows."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._plans: dict[Setting, Plan] = {}
        self._fixed: dict[tuple[object, ...], int] = {}

    def plan(self, setting: Setting) -> Plan:
        """With nothing resident."""
        if setting not in self._plans:
            self._plans[setting] = self.problem.plan(draft_of(self.problem, setting), nothing_resident(self.problem.spec, self.problem.ops), no_cpu)
        return self._plans[setting]

    def fixed_bytes(self, setting: Setting) -> int:
        draft = draft_of(self.problem, setting)
        key = (setting.num_seqs, setting.gpu_seqs, setting.chunk, draft.staging_seqs, setting.ring)
        if key not in self._fixed:
            self._fixed[key] = gpu_memory(self.problem.spec, self.plan(setting)).total
        return self._fixed[key]

    def fits(self, setting: Setting, space: Space) -> NDArray[np.bool_]:
        """Which residencies keep both limits, as far as is known before the splits are: packets take a little more of the host's."""
        limits, sizes = self.problem.limits, self.plan(setting)
        host = host_memory(self.problem.spec, replace(sizes, packet_bytes=0)).total - int(space.host_bytes[0])  # of all residencies, nothing comes first
        found: NDArray[np.bool_] = (self.fixed_bytes(setting) + space.bytes <= limits.gpu_bytes) & (host + space.host_bytes <= limits.host_bytes)
        return found

    def waves(self, setting: Setting) -> int:
        return -(-self.problem.workload.num_requests // setting.num_seqs)

    def of_phase(self, setting: Setting, phase: Phase, splits: tuple[Mapping[str, Split], ...]) -> Plan:
        """A plan of one bucket, for pricing this phase."""
        sizes = self.plan(setting)
        bucket = replace(sizes.bucket_for(phase, 1 << 30), splits=splits, micro_batches=getattr(setting, f"{phase}_batches"))
        return replace(sizes, buckets=(bucket,))

    def whole(self, setting: Setting, splits: Mapping[Phase, tuple[Mapping[str, Split], ...]]) -> Plan:
        """The complete plan, with all buckets."""
        sizes = self.plan(setting)
        return replace(sizes, buckets=tuple(replace(bucket, splits=splits[bucket.phase]) for bucket in sizes.buckets))
