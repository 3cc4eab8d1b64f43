"""Expands a plan's bucket into the task list of one pass, in the serial order that defines its meaning.

Owns which device does what in which order, and which activations cross the link. The waits between queues are derived from the tasks' accesses
(`hazards.py`); running all tasks one after another in list order is the reference. Knows nothing of addresses, times or threads.

The residual stream is replicated: a device that needs it keeps its own copy, partial sums cross and each copy adds both (tensor parallelism without
a serial norm between the hand-offs). ``valid`` tracks which devices hold the current residual of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.hazards import Accessing, derive_waits
from twinpilots.plan.packets import cut_packets
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.reads import Reads, cut_reads
from twinpilots.plan.tasks import ALL_MICRO_BATCHES, HOST_KV, NUM_GROUPS, STREAMED_KV, Access, Device, Packet, PassShape, Schedule, Segment, Source, Task

HOST_OF: dict[Device, str] = {"gpu": "gpu", "cpu": "host"}
DEVICES: tuple[Device, ...] = ("gpu", "cpu")
OTHER: dict[Device, Device] = {"gpu": "cpu", "cpu": "gpu"}


def expand(spec: ModelSpec, plan: Plan, bucket: BucketPlan, shape: PassShape, *, poison: bool = False) -> Schedule:
    """The tasks of one pass of ``bucket`` whose micro-batches have tokens in the groups of ``shape``, with their waits.

    ``poison`` overwrites every released ring and staging slot with NaN before it is released (adversarial tests).
    """
    made = expanded(spec, plan, bucket, shape, poison=poison)
    waits = derive_waits(made.accesses)
    tasks = tuple(Task(index=index, waits=before, **fields) for index, (fields, before) in enumerate(zip(made.tasks, waits, strict=True)))
    return Schedule(tasks, made.packets, shape, made.reads.packets)


def expanded(spec: ModelSpec, plan: Plan, bucket: BucketPlan, shape: PassShape, *, poison: bool = False) -> Expansion:
    """`expand` before its waits are derived and its tasks are made, which takes most of its time and not everybody needs."""
    made = Expansion(spec, plan, bucket, shape, poison)
    made.run()
    return made


@dataclass(frozen=True)
class _Job:
    """One op on one device: from the columns of ``src`` to those of ``dst`` (from ``dst_col`` on)."""

    device: Device
    op: OpSpec
    src: str
    dst: str
    dst_col: int


@dataclass(frozen=True)
class _Piece:
    """Rows of an op that lie together: resident, in a packet of the ring (its number, and where the rows begin), on the host, or in a read of the
    staging ring."""

    source: Source
    row0: int
    row1: int
    packet: int = -1
    ring_lo: int = 0
    read: int = -1


_Step = Callable[[int], None]  # something to do for one micro-batch


def _nothing(_mb: int) -> None:
    return None


@dataclass
class Expansion:
    """``tasks``: the fields of every `Task`, in serial order, but its index and waits."""

    spec: ModelSpec
    plan: Plan
    bucket: BucketPlan
    shape: PassShape
    poison: bool
    tasks: list[dict[str, Any]] = field(default_factory=list)
    valid: dict[int, set[Device]] = field(default_factory=dict)

    def run(self) -> None:
        self.packets = cut_packets(self.spec, self.plan, self.bucket)
        self.mbs = [mb for mb, groups in enumerate(self.shape) if any(groups)]
        self.ops: dict[tuple[int, str], OpSpec] = {(op.layer, op.name): op for op in self.spec.ops(self.plan.unit_rows)}
        self.segments: dict[tuple[int, str], list[tuple[int, Segment]]] = {}
        for number, packet in enumerate(self.packets):
            for segment in packet.segments:
                self.segments.setdefault((segment.layer, segment.op), []).append((number, segment))
        self.reads = cut_reads(self.spec, self.plan, self.bucket, self.packets) if self.plan.disk_rows else Reads()
        self.loaded = self.read = 0
        self._embed()
        for layer in range(self.spec.num_layers):
            self._attention(layer)
            self._mlp(layer)
        self._head()

    @property
    def accesses(self) -> list[Accessing]:
        """What `hazards` asks about every task."""
        return [(fields["queue"], fields.get("reads", ()), fields.get("writes", ())) for fields in self.tasks]

    # -- building blocks ---------------------------------------------------------------------------------------------------------------

    def _emit(self, **fields: Any) -> None:
        self.tasks.append(fields)

    def _split(self, layer: int, op: str) -> Split:
        return self.bucket.splits[layer][op]

    def _rows(self, layer: int, op: str, device: Device) -> tuple[int, int]:
        split = self._split(layer, op)
        return (0, split.gpu) if device == "gpu" else (split.gpu, split.rows)

    def _computes(self, layer: int, ops: tuple[str, ...], device: Device) -> bool:
        return any(lo < hi for lo, hi in (self._rows(layer, op, device) for op in ops))

    def _needs_x(self, block: str, layer: int) -> set[Device]:
        """Devices that norm the residual in this block. The head takes its few rows after the norm, so it asks for none."""
        ops = {"attention": ("q_proj", "k_proj", "v_proj"), "mlp": (self._mlp_names()[0],), "head": ()}[block]
        return {device for device in DEVICES if self._computes(layer, ops, device)}

    def _mlp_names(self) -> tuple[str, str]:
        return ("gate_up_proj", "down_proj") if self.spec.gated_mlp else ("fc1", "fc2")

    def _attends(self, layer: int, group: int) -> Device:
        """Where this group's attention runs. Layer-split keeps the KV of its CPU layers in host memory for every sequence."""
        return "cpu" if group == HOST_KV or layer in self.plan.host_kv_layers else "gpu"

    def _attended_on(self, device: Device, layer: int, mb: int) -> tuple[int, int] | None:
        """The range of groups with tokens in this micro-batch that ``device`` attends in this layer, or None."""
        found = [group for group in range(NUM_GROUPS) if self.shape[mb][group] and self._attends(layer, group) == device]
        return (found[0], found[-1] + 1) if found else None

    def _copy(
        self, src: Device, buffer: str, mb: int, lo: int, hi: int, *, to: str = "", groups: tuple[int, int] = (0, NUM_GROUPS), logits: bool = False, layer: int
    ) -> None:
        """Rows of ``buffer`` from one device to the other, columns [lo, hi); into ``to`` when the name differs there."""
        if lo >= hi:
            return
        source, target = f"{HOST_OF[src]}.{buffer}", f"{HOST_OF[OTHER[src]]}.{to or buffer}"
        self._emit(
            queue="gpu", kind="send" if src == "gpu" else "recv", layer=layer, mb=mb, glo=groups[0], ghi=groups[1], logit_rows=logits,
            src=source, src_col=lo, dst=target, dst_col=lo, columns=hi - lo,
            reads=(Access(source, lo, hi, mb, *groups),), writes=(Access(target, lo, hi, mb, *groups),),
        )  # fmt: skip

    def _norm(self, device: Device, mb: int, layer: int, name: str) -> None:
        space, hidden = HOST_OF[device], self.spec.hidden_size
        final = name == "final_norm"
        target = f"{space}.head" if final else f"{space}.h"
        self._emit(
            queue=device, kind="norm", layer=layer, mb=mb, logit_rows=final, src=f"{space}.x", dst=target, norm=name,
            reads=(Access(f"{space}.x", 0, hidden, mb),), writes=(Access(target, 0, hidden, mb),),
        )  # fmt: skip

    def _make_valid(self, device: Device, mb: int, layer: int) -> None:
        if device not in self.valid[mb]:
            self._copy(OTHER[device], "x", mb, 0, self.spec.hidden_size, layer=layer)
            self.valid[mb].add(device)

    def _load_until(self, packet: int) -> None:
        while self.loaded <= packet:
            spot, read = self.packets[self.loaded], self.reads.of_load.get(self.loaded, -1)
            self._read_until(read)
            self._emit(
                queue="link_in", kind="load", layer=spot.segments[0].layer, mb=ALL_MICRO_BATCHES, packet=self.loaded, ring_lo=spot.ring_lo,
                columns=spot.num_bytes, reads=(self._staged(read),) if read >= 0 else (),
                writes=(Access("gpu.ring", spot.ring_lo, spot.ring_lo + spot.num_bytes),),
            )  # fmt: skip
            self.loaded += 1

    def _read_until(self, read: int) -> None:
        while self.read <= read:
            spot = self.reads.packets[self.read]
            self._emit(
                queue="disk", kind="read", layer=spot.segments[0].layer, mb=ALL_MICRO_BATCHES, packet=self.read, ring_lo=spot.ring_lo,
                columns=spot.num_bytes, writes=(self._staged(self.read),),
            )  # fmt: skip
            self.read += 1

    def _staged(self, read: int) -> Access:
        spot = self.reads.packets[read]
        return Access("host.staging", spot.ring_lo, spot.ring_lo + spot.num_bytes)

    def _pieces(self, job: _Job) -> list[_Piece]:
        """This device's rows of one op: the host part and then what is read from the disk, or the resident part and then each streamed segment."""
        split = self._split(job.op.layer, job.op.name)
        if job.device == "cpu":
            staged = self.reads.of_cpu.get((job.op.layer, job.op.name), ())
            pieces = [_Piece("host", split.gpu, staged[0][1].row0 if staged else split.rows)]
            for number, segment in staged:
                ring_lo = self.reads.packets[number].ring_lo + segment.offset
                pieces.append(_Piece("staged", segment.row0, segment.row1, ring_lo=ring_lo, read=number))
        else:
            pieces = [_Piece("resident", 0, split.resident)]
            for number, segment in self.segments.get((job.op.layer, job.op.name), []):
                pieces.append(_Piece("ring", segment.row0, segment.row1, number, self.packets[number].ring_lo + segment.offset))
        return [piece for piece in pieces if piece.row0 < piece.row1]

    def _linears(self, jobs: list[_Job], mbs: list[int], *, before: _Step = _nothing, after: _Step = _nothing) -> None:
        """One phase of linears for all micro-batches. Micro-batch by micro-batch, so that the first one's hand-offs overlap the second one's work;
        but where a ring cannot hold all that the phase takes from it at once, packet by packet: a packet is reused by every micro-batch before the next
        one overwrites it."""
        pieces = [(job, self._pieces(job)) for job in jobs]
        packets = sorted({piece.packet for _, found in pieces for piece in found if piece.packet >= 0})
        staged = sorted({piece.read for _, found in pieces for piece in found if piece.read >= 0})
        if len(mbs) == 1 or (_all_live(self.packets, packets) and _all_live(self.reads.packets, staged)):
            for mb in mbs:
                before(mb)
                for job, found in pieces:
                    for i, piece in enumerate(found):
                        self._linear(job, piece, mb, accumulate=i > 0)
                        if mb == mbs[-1]:
                            self._release(job, piece)
                after(mb)
            return
        for mb in mbs:
            before(mb)
        for job, found in pieces:
            for i, piece in enumerate(found):
                for mb in mbs:
                    self._linear(job, piece, mb, accumulate=i > 0)
                self._release(job, piece)
        for mb in mbs:
            after(mb)

    def _linear(self, job: _Job, piece: _Piece, mb: int, *, accumulate: bool) -> None:
        space, op = HOST_OF[job.device], job.op
        inward = op.split_dim == "in"
        src_lo, src_hi = (piece.row0, piece.row1) if inward else (0, op.width)
        dst_lo, dst_hi = (0, op.width) if inward else (job.dst_col + piece.row0, job.dst_col + piece.row1)
        reads: tuple[Access, ...] = (Access(f"{space}.{job.src}", src_lo, src_hi, mb),)
        if piece.packet >= 0:
            self._load_until(piece.packet)
            reads += (Access("gpu.ring", piece.ring_lo, piece.ring_lo + (piece.row1 - piece.row0) * op.row_bytes),)
        elif piece.read >= 0:
            self._read_until(piece.read)
            reads += (Access("host.staging", piece.ring_lo, piece.ring_lo + (piece.row1 - piece.row0) * op.row_bytes),)
        self._emit(
            queue=job.device, kind="linear_in" if inward else "linear", layer=op.layer, mb=mb, logit_rows=op.layer < 0, op=op.name, row0=piece.row0,
            row1=piece.row1, source=piece.source, src=f"{space}.{job.src}", src_col=src_lo, dst=f"{space}.{job.dst}", dst_col=dst_lo,
            accumulate=inward and accumulate, ring_lo=piece.ring_lo, packet=piece.packet, reads=reads,
            writes=(Access(f"{space}.{job.dst}", dst_lo, dst_hi, mb),),
        )  # fmt: skip

    def _release(self, job: _Job, piece: _Piece) -> None:
        """After the last use of a packet's last segment, in poison mode: overwrite its slot."""
        if not self.poison or piece.packet < 0:
            return
        packet = self.packets[piece.packet]
        last = packet.segments[-1]
        if (last.layer, last.op, last.row0) == (job.op.layer, job.op.name, piece.row0):
            region = Access("gpu.ring", packet.ring_lo, packet.ring_lo + packet.num_bytes)
            self._emit(
                queue="gpu", kind="poison", layer=job.op.layer, mb=ALL_MICRO_BATCHES, packet=piece.packet, ring_lo=packet.ring_lo, columns=packet.num_bytes,
                writes=(region,),
            )  # fmt: skip

    def _jobs(self, layer: int, columns: dict[str, int], src: str, dst: str) -> list[_Job]:
        """The linears of one phase, the GPU's first: its rows come before the CPU's in each op."""
        return [
            _Job(device, self.ops[layer, name], src, dst, column)
            for device in DEVICES
            for name, column in columns.items()
            if self._computes(layer, (name,), device)
        ]

    # -- the blocks --------------------------------------------------------------------------------------------------------------------

    def _embed(self) -> None:
        for mb in self.mbs:
            self._emit(queue="cpu", kind="embed", layer=0, mb=mb, dst="host.x", writes=(Access("host.x", 0, self.spec.hidden_size, mb),))
            self.valid[mb] = {"cpu"}

    def _attention(self, layer: int) -> None:
        columns = {"q_proj": 0, "k_proj": self.spec.q_size, "v_proj": self.spec.q_size + self.spec.kv_size}
        jobs = self._jobs(layer, columns, "h", "qkv")
        self._linears(jobs, self.mbs, before=lambda mb: self._norm_inputs("attention", layer, mb), after=lambda mb: self._exchange_qkv(layer, mb, columns))
        for mb in self.mbs:
            self._attend(layer, mb)
        self._linears(self._jobs(layer, {"o_proj": 0}, "attn", "part"), self.mbs)
        for mb in self.mbs:
            self._join(layer, mb, "o_proj", "attn_post_norm", self._needs_x("mlp", layer))

    def _norm_inputs(self, block: Literal["attention", "mlp"], layer: int, mb: int) -> None:
        for device in sorted(self._needs_x(block, layer), reverse=True):  # the GPU first: its copies start the CPU
            self._make_valid(device, mb, layer)
            self._norm(device, mb, layer, "attn_norm" if block == "attention" else "mlp_norm")

    def _exchange_qkv(self, layer: int, mb: int, columns: dict[str, int]) -> None:
        """Each device gets the other's rows of q, k and v for the tokens that it attends."""
        for source in DEVICES:
            rows = self._attended_on(OTHER[source], layer, mb)
            if rows:
                for lo, hi in _joined([(column, *self._rows(layer, name, source)) for name, column in columns.items()]):
                    self._copy(source, "qkv", mb, lo, hi, groups=rows, layer=layer)

    def _attend(self, layer: int, mb: int) -> None:
        for group in range(NUM_GROUPS):
            if not self.shape[mb][group]:
                continue
            slot = (layer * len(self.mbs) + self.mbs.index(mb)) % 2
            self._attend_group(layer, mb, group, slot if group == STREAMED_KV else -1)
        split = self._split(layer, "o_proj")
        on_gpu, on_cpu = self._attended_on("gpu", layer, mb), self._attended_on("cpu", layer, mb)
        if on_gpu:
            self._copy("gpu", "attn", mb, split.gpu, split.rows, groups=on_gpu, layer=layer)
        if on_cpu:
            self._copy("cpu", "attn", mb, 0, split.gpu, groups=on_cpu, layer=layer)

    def _attend_group(self, layer: int, mb: int, group: int, slot: int) -> None:
        spec, device = self.spec, self._attends(layer, group)
        space, rows = HOST_OF[device], (mb, group, group + 1)
        kv = f"gpu.staging{slot}" if slot >= 0 else f"{space}.kv"
        where: dict[str, Any] = {"layer": layer, "mb": mb, "glo": group, "ghi": group + 1, "slot": slot}
        qkv = Access(f"{space}.qkv", 0, spec.q_size + 2 * spec.kv_size, *rows)
        # A staging slot belongs to whichever micro-batch loaded it last, so its accesses are not told apart by rows.
        pages = Access(kv, 0, 1) if slot >= 0 else Access(kv, layer, layer + 1, *rows)
        home = Access("host.kv", layer, layer + 1, *rows)
        if slot >= 0 and self.plan.kv_on_disk:
            home, on_disk = Access(f"host.staging{slot}", 0, 1), Access("disk.kv", layer, layer + 1, *rows)
            self._emit(queue="disk", kind="read_kv", reads=(on_disk,), writes=(home,), **where)
        if slot >= 0:
            self._emit(queue="link_in", kind="load_kv", reads=(home,), writes=(pages,), **where)
        self._emit(queue=device, kind="rope_append", src=f"{space}.qkv", dst=kv, reads=(qkv,), writes=(qkv, pages), **where)
        self._emit(
            queue=device, kind="attend", src=kv, dst=f"{space}.attn", reads=(qkv, pages), writes=(Access(f"{space}.attn", 0, spec.q_size, *rows),), **where
        )
        if slot >= 0:
            self._emit(queue="link_out", kind="store_kv", reads=(pages,), writes=(home,), **where)
        if slot >= 0 and self.plan.kv_on_disk:
            self._emit(queue="disk_out", kind="write_kv", reads=(home,), writes=(on_disk,), **where)

    def _join(self, layer: int, mb: int, op: str, post_norm: str, needed_next: set[Device]) -> None:
        """Exchange partial sums and add them to each residual copy that lives on."""
        spec, hidden = self.spec, self.spec.hidden_size
        contributors = [device for device in DEVICES if self._computes(layer, (op,), device)]
        keepers = [device for device in DEVICES if device in needed_next and device in self.valid[mb]]
        keepers = keepers or [device for device in (*contributors, *DEVICES) if device in self.valid[mb]][:1]
        for device in contributors:
            if OTHER[device] in keepers:
                self._copy(device, "part", mb, 0, hidden, to="peer", layer=layer)
        for device in keepers:
            space = HOST_OF[device]
            terms = tuple(f"{space}.part" if device == source else f"{space}.peer" for source in contributors)
            bias = {"o_proj": spec.o_bias}.get(op, spec.mlp_bias)
            self._emit(
                queue=device, kind="add", layer=layer, mb=mb, dst=f"{space}.x", terms=terms, norm=post_norm if spec.post_norms else "", bias=op if bias else "",
                reads=(Access(f"{space}.x", 0, hidden, mb), *(Access(term, 0, hidden, mb) for term in terms)), writes=(Access(f"{space}.x", 0, hidden, mb),),
            )  # fmt: skip
        self.valid[mb] = set(keepers)

    def _mlp(self, layer: int) -> None:
        first, second = self._mlp_names()
        jobs = self._jobs(layer, {first: 0}, "h", "act")
        self._linears(jobs, self.mbs, before=lambda mb: self._norm_inputs("mlp", layer, mb), after=lambda mb: self._exchange_act(layer, mb))
        self._linears(self._jobs(layer, {second: 0}, "act", "part"), self.mbs)
        block: Literal["attention", "head"] = "attention" if layer + 1 < self.spec.num_layers else "head"
        for mb in self.mbs:
            self._join(layer, mb, second, "mlp_post_norm", self._needs_x(block, layer + 1 if block == "attention" else -1))

    def _exchange_act(self, layer: int, mb: int) -> None:
        """Where the two halves of the MLP are split at different rows, the rows between change sides."""
        first, second = self._mlp_names()
        up, down = self._split(layer, first), self._split(layer, second)
        self._copy("gpu", "act", mb, down.gpu, up.gpu, layer=layer)
        self._copy("cpu", "act", mb, up.gpu, down.gpu, layer=layer)

    def _head(self) -> None:
        split, hidden = self._split(-1, "lm_head"), self.spec.hidden_size
        heads: list[Device] = [device for device in DEVICES if self._computes(-1, ("lm_head",), device)]
        everywhere: set[Device] = set(DEVICES).intersection(*(self.valid[mb] for mb in self.mbs))
        if not everywhere:  # micro-batches ended on different devices: bring them together where most of the head is
            for mb in self.mbs:
                self._make_valid(heads[0], mb, -1)
            everywhere = {heads[0]}
        normed = [device for device in heads if device in everywhere] or [next(iter(everywhere))]
        for device in normed:
            self._norm(device, ALL_MICRO_BATCHES, -1, "final_norm")
        for device in heads:
            if device not in normed:
                self._copy(OTHER[device], "head", ALL_MICRO_BATCHES, 0, hidden, logits=True, layer=-1)
        self._linears(self._jobs(-1, {"lm_head": 0}, "head", "logits"), [ALL_MICRO_BATCHES])
        self._copy("gpu", "logits", ALL_MICRO_BATCHES, 0, split.gpu, logits=True, layer=-1)


def _all_live(packets: Sequence[Packet], wanted: Sequence[int]) -> bool:
    """Whether the ring holds all of these at the same time."""
    spans = sorted((packets[i].ring_lo, packets[i].ring_lo + packets[i].num_bytes) for i in wanted)
    return all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


def _joined(parts: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The columns of (first column, rows from, to) parts, empty ones dropped and those that touch made one: every copy has a fixed cost."""
    found: list[tuple[int, int]] = []
    for column, lo, hi in parts:
        if lo < hi:
            begin = found.pop()[0] if found and found[-1][1] == column + lo else column + lo
            found.append((begin, column + hi))
    return found


def without_wait(schedule: Schedule, task: int, wait: int) -> Schedule:
    """The schedule with one wait removed: what a test of the hazard checker breaks."""
    tasks = list(schedule.tasks)
    tasks[task] = replace(tasks[task], waits=tuple(w for i, w in enumerate(tasks[task].waits) if i != wait))
    return replace(schedule, tasks=tuple(tasks))
