"""The task list's vocabulary: what one task does, reads, writes and waits for. Plain data between schedule, simulator and executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

RunQueue = Literal["cpu", "gpu", "link_in", "link_out"]  # what machines have today; plans that use the disk are predicted only
Queue = Literal[RunQueue, "disk", "disk_out"]
Device = Literal["gpu", "cpu"]
Kind = Literal[
    "embed", "norm", "linear", "linear_in", "rope_append", "attend", "add", "send", "recv", "load", "load_kv", "store_kv", "read", "read_kv", "write_kv",
    "poison",
]  # fmt: skip
Source = Literal["resident", "ring", "host", "staged"]
QUEUES: tuple[Queue, ...] = ("cpu", "gpu", "link_in", "link_out", "disk", "disk_out")
RINGS = ("gpu.ring", "host.staging")  # buffers that packets arrive in
AHEAD: tuple[Kind, ...] = ("load", "read")  # what may run one pass ahead of the driver's fence: it touches nothing but rings
ALL_MICRO_BATCHES = -1
NUM_GROUPS = 3
GPU_KV, STREAMED_KV, HOST_KV = 0, 1, 2


class Access(NamedTuple):  # a plan's task lists hold so many that what one costs to make counts
    """A region of a buffer: token rows of groups [glo, ghi) of micro-batch mb (-1: all rows), columns [lo, hi) (bytes for the ring, layers for KV)."""

    buffer: str
    lo: int
    hi: int
    mb: int = ALL_MICRO_BATCHES
    glo: int = 0
    ghi: int = NUM_GROUPS

    def overlaps(self, other: Access) -> bool:
        if self.buffer != other.buffer or self.lo >= other.hi or other.lo >= self.hi:
            return False
        return ALL_MICRO_BATCHES in (self.mb, other.mb) or (self.mb == other.mb and self.glo < other.ghi and other.glo < self.ghi)

    def covers(self, other: Access) -> bool:
        if self.buffer != other.buffer or self.lo > other.lo or self.hi < other.hi:
            return False
        return self.mb == ALL_MICRO_BATCHES or (self.mb == other.mb and self.glo <= other.glo and self.ghi >= other.ghi)


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for task ``task`` of this pass, or of the previous pass (``previous``), because of ``hazard`` ("RAW gpu.ring")."""

    task: int
    hazard: str
    previous: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work on one queue. ``index`` is its place in the serial order; unused fields keep their defaults.

    ``row0:row1`` are op rows (the split dimension); ``src``/``dst`` buffers start at columns ``src_col``/``dst_col``; ``columns`` is a copy's width.
    ``ring_lo`` is a byte offset in the ring (of a read and of "staged" rows: in the host's staging ring); a read's ``packet`` counts reads.
    ``logit_rows`` selects the rows whose logits are wanted instead of token rows.
    ``terms`` (add) names the partial sums to add, GPU's first. ``slot`` is a KV staging slot.
    """

    index: int
    queue: Queue
    kind: Kind
    layer: int
    mb: int
    glo: int = 0
    ghi: int = NUM_GROUPS
    logit_rows: bool = False
    op: str = ""
    row0: int = 0
    row1: int = 0
    source: Source = "resident"
    src: str = ""
    src_col: int = 0
    dst: str = ""
    dst_col: int = 0
    columns: int = 0
    accumulate: bool = False
    ring_lo: int = 0
    packet: int = -1
    slot: int = -1
    terms: tuple[str, ...] = ()
    norm: str = ""  # which norm's gain: attn_norm, mlp_norm, attn_post_norm, mlp_post_norm, final_norm
    bias: str = ""  # add: which bias joins the sum
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    waits: tuple[Wait, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [row0, row1) of one op in a packet, ``offset`` bytes into the packet."""

    layer: int
    op: str
    row0: int
    row1: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Packet:
    """What one load moves into the ring at byte ``ring_lo``, or one read into the staging ring."""

    segments: tuple[Segment, ...]
    ring_lo: int
    num_bytes: int


PassShape = tuple[tuple[bool, bool, bool], ...]  # per micro-batch: which groups have tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """All tasks of one pass in serial order, the weight packets that its link_in queue loads, and what its disk queue reads."""

    tasks: tuple[Task, ...]
    packets: tuple[Packet, ...]
    shape: PassShape
    reads: tuple[Packet, ...] = ()

    def queue(self, queue: Queue) -> Sequence[Task]:
        return [task for task in self.tasks if task.queue == queue]
