"""Cuts what a pass reads from the disk, and places it in the host's staging ring.

Owns the order of reads (the order of use) and their offsets in the ring. Knows nothing of devices or waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.packets import align, homes
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import Packet, Segment

STAGING_DEPTH = 4  # reads that the staging ring holds at least: one in use, one waiting, one under way, and what their sizes leave over
TOGETHER = ("q_proj", "k_proj", "v_proj")  # linears of one phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """``packets[i]`` is read i. ``of_load``: the read that a load takes rows from, by packet; ``of_cpu``: by op the CPU's rows, (read, segment) each."""

    packets: tuple[Packet, ...] = ()
    of_load: Mapping[int, int] = field(default_factory=dict)
    of_cpu: Mapping[tuple[int, str], tuple[tuple[int, Segment], ...]] = field(default_factory=dict)


def cut_reads(spec: ModelSpec, plan: Plan, bucket: BucketPlan, packets: Sequence[Packet]) -> Reads:
    """What one pass reads, in the order of use.

    A load takes all that it needs at once, so each packet with rows from the disk has a read of its own. What the CPU needs in one phase of linears follows, in
    reads of at most a quarter of the ring: the GPU's linears of a phase come before the CPU's in the serial order (`schedule.py`).
    """
    ring, of_load, of_cpu = _Ring(plan.staging_bytes), dict[int, int](), dict[tuple[int, str], tuple[tuple[int, Segment], ...]]()
    starts: dict[tuple[int, str], list[int]] = {}
    for number, packet in enumerate(packets):
        starts.setdefault((packet.segments[0].layer, packet.segments[0].op), []).append(number)
    edges: dict[tuple[int, str], int] = {(op.layer, op.name): op.rows - plan.on_disk(op.layer, op.name) for op in spec.ops(plan.unit_rows)}
    for phase in phases(spec.ops(plan.unit_rows)):
        for number in (number for op in phase for number in starts.get((op.layer, op.name), ())):
            found = [segment for segment in packets[number].segments if segment.row0 >= edges[segment.layer, segment.op]]
            if found:
                of_load[number] = len(ring.reads)
                for segment in found:
                    ring.add(segment.layer, segment.op, segment.row0, segment.row1, segment.num_bytes)
                ring.close()
        for op in phase:
            of_cpu[op.layer, op.name] = tuple(_staged(plan, bucket, op, ring))
        ring.close()
    return Reads(packets=tuple(ring.reads), of_load=of_load, of_cpu=of_cpu)


def phases(ops: Iterable[OpSpec]) -> Iterator[tuple[OpSpec, ...]]:
    """Linears whose inputs are there at the same time: q, k and v of a layer, then each other op by itself."""
    for _, phase in groupby(ops, lambda op: (op.layer, "qkv" if op.name in TOGETHER else op.name)):
        yield tuple(phase)


def staged_rows(plan: Plan, bucket: BucketPlan, op: OpSpec) -> tuple[int, int]:
    """The rows of an op that the CPU computes and that lie on the disk: its last ones."""
    return homes(plan, op, bucket.splits[op.layer][op.name].gpu, op.rows)[1]


def _staged(plan: Plan, bucket: BucketPlan, op: OpSpec, ring: _Ring) -> Iterator[tuple[int, Segment]]:
    low, high = staged_rows(plan, bucket, op)
    most_bytes = plan.staging_bytes // STAGING_DEPTH
    step = max(1, most_bytes // (op.unit_rows * op.row_bytes)) * op.unit_rows
    for row0 in range(low, high, step):
        row1 = min(row0 + step, high)
        if ring.size and ring.size + align((row1 - row0) * op.row_bytes) > most_bytes:
            ring.close()
        yield len(ring.reads), ring.add(op.layer, op.name, row0, row1, (row1 - row0) * op.row_bytes)


class _Ring:
    """Reads one after another in a circular buffer; one that does not fit before the end starts again at 0."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.reads: list[Packet] = []
        self.segments: list[Segment] = []
        self.size = 0  # of the read that is being put together
        self._next = 0

    def add(self, layer: int, op: str, row0: int, row1: int, num_bytes: int) -> Segment:
        segment = Segment(layer, op, row0, row1, self.size, num_bytes)
        self.segments.append(segment)
        self.size += align(num_bytes)
        return segment

    def close(self) -> None:
        if not self.segments:
            return
        if self.size > self.num_bytes:
            raise ValueError(f"a read of {self.size} bytes does not fit the staging ring of {self.num_bytes} bytes")
        low = self._next if self._next + self.size <= self.num_bytes else 0
        self.reads.append(Packet(tuple(self.segments), low, self.size))
        self._next, self.segments, self.size = low + self.size, [], 0
