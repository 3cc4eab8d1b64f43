"""Which rows lie on the disk: those for which host memory has no room, the same part of every op and layer.

Owns the rule by which every policy that knows the disk spills, and the size of the staging ring. A pass reads all that lies there, so what limits it is how
much, not which; evenly spread, the disk works all the time with a small ring. Pure. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.memory import Templates, control_bytes, counted_splits, host_memory
from twinpilots.plan.packets import align, smallest_ring
from twinpilots.plan.plan import Plan, Split
from twinpilots.plan.workload import Limits

MAX_READ_BYTES = 32 << 20  # beyond which a disk is not quicker
READS_STAGED = 8  # of that size, where memory has room: what the disk may be ahead of the pilots
STAGING_SHARE = 32  # at most this fraction of host memory goes to the ring, but for
LEAST_READS = 2  # reads of the largest piece: one in use, one under way


def spilled(spec: ModelSpec, plan: Plan, limits: Limits, templates: Templates) -> Plan:
    """The plan with as many rows on the disk as host memory lacks room for: all that are not resident, at most. As it is, where everything has room."""
    if host_memory(spec, plan).total <= limits.host_bytes:
        return plan
    everywhere = replace(plan, disk_rows=_rows(spec, plan, templates, 1.0), staging_bytes=staging_rule(spec, plan, limits.host_bytes))
    counted = counted_splits(spec, plan, plan.buckets[0], templates)
    need = host_memory(spec, everywhere).total + _saved(spec, counted, 1.0) - limits.host_bytes
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if _saved(spec, counted, middle) >= need else (middle, high)
    return replace(everywhere, disk_rows=_rows(spec, plan, templates, high))


def with_share(spec: ModelSpec, plan: Plan, share: float, staging_bytes: int, templates: Templates) -> Plan:
    """The plan with this share of every op's rows that are not resident on the disk, whatever memory has room for."""
    return replace(plan, disk_rows=_rows(spec, plan, templates, share), staging_bytes=staging_bytes)


def staging_rule(spec: ModelSpec, plan: Plan, host_bytes: int) -> int:
    """Bytes of the staging ring."""
    piece = smallest_ring(spec.one_layer_per_class, plan.unit_rows, plan.packet_bytes, 1)
    return align(max(LEAST_READS * piece, min(READS_STAGED * MAX_READ_BYTES, host_bytes // STAGING_SHARE)))


def set_aside_bytes(spec: ModelSpec, plan: Plan, limits: Limits, templates: Templates) -> int:
    """Host bytes that using the disk takes at most, beside the rows that it saves: the ring, and the instructions of reads."""
    everywhere = replace(plan, disk_rows=_rows(spec, plan, templates, 1.0), staging_bytes=staging_rule(spec, plan, limits.host_bytes))
    return everywhere.staging_bytes + control_bytes(spec, everywhere) - control_bytes(spec, plan)


def most_on_disk(spec: ModelSpec) -> int:
    """Bytes of the linears that may lie on the disk at all: a tied head is the embedding table, which stays in host memory."""
    return spec.linear_bytes - (spec.ops(64)[-1].weight_bytes if spec.tied else 0)


def _edge(op: OpSpec, resident: int, frac: float) -> int:
    """The first row on the disk: at least ``frac`` of the rows that are not resident lie there, in whole units."""
    edge = op.rows - frac * (op.rows - resident)
    return op.rows if edge >= op.rows else max(resident, int(edge // op.unit_rows) * op.unit_rows)


def _rows(spec: ModelSpec, plan: Plan, templates: Templates, frac: float) -> tuple[Mapping[str, int], ...]:
    """`Plan.disk_rows` with this fraction of every op; layers whose splits are one mapping share one here, too."""
    made: dict[int, Mapping[str, int]] = {}
    for layer in plan.buckets[0].splits:
        if id(layer) not in made:  # rows and units are the same in all formats
            ops = {name: templates[0][name] for name in layer}
            made[id(layer)] = {
                name: op.rows - _edge(op, layer[name].resident, frac) if op.layer >= 0 or not spec.tied else 0 for name, op in ops.items()
            }  # fmt: skip
    return tuple(made[id(layer)] for layer in plan.buckets[0].splits)


def _saved(spec: ModelSpec, counted: Sequence[tuple[OpSpec, Split, int]], frac: float) -> int:
    """Host bytes that this fraction on the disk saves."""
    saved = 0
    for op, split, count in counted:
        if op.layer >= 0 or not spec.tied:
            rows, left = op.rows - split.resident, _edge(op, split.resident, frac) - split.resident
            saved += count * (align(rows * op.row_bytes) - align(left * op.row_bytes))
    return saved
