"""Cuts the streamed rows of a bucket into packets and places them in the circular weight buffer.

Owns the packet order (the order of use) and ring offsets. Knows nothing of devices or waits.
"""

from __future__ import annotations

from collections.abc import Iterator

from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import Packet, Segment

ALIGN_BYTES = 64


def align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def cut_packets(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> tuple[Packet, ...]:
    """Packets of at most ``plan.packet_bytes`` (at least one unit), placed one after another; a packet that does not fit before the end starts again at 0."""
    packets: list[Packet] = []
    ring_pos = 0
    segments: list[Segment] = []
    size = 0

    def close() -> None:
        nonlocal ring_pos, segments, size
        if not segments:
            return
        if size > plan.ring_bytes:
            raise ValueError(f"packet of {size} bytes does not fit the ring of {plan.ring_bytes} bytes")
        lo = ring_pos if ring_pos + size <= plan.ring_bytes else 0
        packets.append(Packet(tuple(segments), lo, size))
        ring_pos, segments, size = lo + size, [], 0

    for op, row0, row1 in _streamed_pieces(spec, plan, bucket):
        num_bytes = (row1 - row0) * op.row_bytes
        if size and size + align(num_bytes) > plan.packet_bytes:
            close()
        segments.append(Segment(op.layer, op.name, row0, row1, size, num_bytes))
        size += align(num_bytes)
    close()
    return tuple(packets)


def _streamed_pieces(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> Iterator[tuple[OpSpec, int, int]]:
    for op in spec.ops(plan.unit_rows):
        split = bucket.splits[op.layer][op.name]
        unit_bytes = op.unit_rows * op.row_bytes
        step = max(1, plan.packet_bytes // unit_bytes) * op.unit_rows
        for low, high in homes(plan, op, split.resident, split.gpu) if plan.disk_rows else ((split.resident, split.gpu),):
            for row0 in range(low, high, step):
                yield op, row0, min(row0 + step, high)


def homes(plan: Plan, op: OpSpec, low: int, high: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows [low, high) of an op by their home: in host memory, on the disk."""
    edge = max(low, min(high, op.rows - plan.on_disk(op.layer, op.name)))
    return (low, edge), (edge, high)


def smallest_ring(spec: ModelSpec, unit_rows: int, packet_bytes: int, depth: int) -> int:
    """Bytes of a ring that holds ``depth`` packets of any bucket."""
    largest_unit = max(min(op.unit_rows, op.rows) * op.row_bytes for op in spec.ops(unit_rows))
    return depth * align(max(packet_bytes, align(largest_unit)))
