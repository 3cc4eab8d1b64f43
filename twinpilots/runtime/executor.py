"""Runs passes on the devices: places programs and metadata, starts the queues, collects times.

Owns the arenas of one plan, the pass counter, the program cache and the link's head start into the next pass. The order of work and the waits come from
the schedule; this file adds only the fence between passes. Knows nothing of requests, sampling or how the plan was found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from twinpilots.device.base import GpuDevice
from twinpilots.device.cpu import CpuPilot
from twinpilots.device.memory import GpuArena, HostArena, Ledger, Tier
from twinpilots.errors import DeviceLostError
from twinpilots.kernels.abi import ENTRY, EVENT_START, Meta, Op, Space, address
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.driver import most_passes
from twinpilots.plan.expected import WorkKind, kinds_on, rate_keys_of
from twinpilots.plan.memory import check_runnable, gpu_layout_bytes, host_layout_bytes, kv_move_bytes
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expand
from twinpilots.plan.tasks import PassShape, Queue
from twinpilots.runtime.accounts import QueueAccount, busy_seconds, bytes_moved, instruction_bytes, instruction_rows, work_seconds
from twinpilots.runtime.batch import MetadataWriter, StepBatch, metadata_words
from twinpilots.runtime.chain import Chain, Int32, Rule
from twinpilots.runtime.compile import Compiler, Program
from twinpilots.runtime.interrupts import Interrupts
from twinpilots.runtime.kv_moves import KvMoves
from twinpilots.runtime.layout import Layout, lay_out, page_bytes
from twinpilots.runtime.stats import BytesMoved, PassReport, PassTimes, QueueTimes, WeightShares
from twinpilots.runtime.weights import OFFSET_MASK, Loader, TensorSource, load_weights

NUM_EVENTS = 1 << 16
PASS_TIMEOUT_S = 600.0
SPARE_BYTES = 1024  # left of the host arena: alignment, and the serial runner's scratch
# As they are submitted: the compute queue last (`GpuDevice.submit`).
GPU_QUEUES: tuple[Literal["gpu", "link_in", "link_out"], ...] = ("link_in", "link_out", "gpu")


@dataclass
class Placed:
    """A program in the host arena: where its instructions lie, and its two alternating trace areas, int64 [count][3] each."""

    program: Program
    insns: dict[Queue, int]
    traces: dict[Queue, tuple[int, int]]
    times: dict[Queue, tuple[np.ndarray, np.ndarray]]
    shares: WeightShares
    accounts: tuple[QueueAccount, ...]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What a pass leaves behind to be summed up later: `Executor.report`. ``times`` and ``meta`` are copies, for the next passes overwrite them."""

    placed: Placed
    times: dict[Queue, np.ndarray]
    meta: np.ndarray
    seconds: float
    ended_ns: int
    num_prompt_tokens: int
    num_generated: int
    moved_bytes: int  # KV that changed tiers in this pass, or alone since the pass before,
    moved_s: float  # and the link's time for it


class PassRunner(Protocol):
    """Another way to run a placed pass, for the serial reference: gets every queue's instructions in the schedule's serial order."""

    def run_pass(self, executor: Executor, placed: Placed, pass_id: int) -> None: ...

    def run_insns(self, executor: Executor, insns: np.ndarray) -> None:
        """These instructions, one after another."""
        ...


class Executor:
    """One plan, loaded: ``execute`` runs one `StepBatch` and returns its logits. Close it, or use it as a context manager.

    ``arena``: host memory to use instead of its own, large enough and with as many events; it begins anew and stays open at the end. ``load`` puts weights
    where the layouts keep them.
    """

    def __init__(
        self, spec: ModelSpec, plan: Plan, pilot: CpuPilot, gpu: GpuDevice | None, source: TensorSource, *, limits: Mapping[Tier, int] | None = None,
        poison: bool = False, runner: PassRunner | None = None, progress: Callable[[int], None] | None = None, arena: HostArena | None = None,
        load: Loader = load_weights,
    ) -> None:  # fmt: skip
        plan.check(spec)
        check_runnable(spec, plan)
        self.spec, self.plan, self.pilot, self.gpu, self.poison, self.runner = spec, plan, pilot, gpu if plan.uses_gpu else None, poison, runner
        self.ledger = Ledger(dict(limits or {}))
        meta_words = metadata_words(plan)
        shared = self.gpu is not None and self.gpu.emulated
        num_bytes = host_layout_bytes(spec, plan)
        self._owns_host = arena is None
        if arena is None:
            self.host = HostArena(num_bytes, shared=shared, num_events=NUM_EVENTS, ledger=self.ledger, nodes=pilot.nodes)
            self.host.populate()
        else:
            assert num_bytes <= arena.num_bytes and arena.num_events == NUM_EVENTS and (arena.fd >= 0 or not shared), "not an arena for this plan"
            self.host = arena
            arena.renew(self.ledger)
        self.host_layout = lay_out(spec, plan, Space.HOST, self.host.alloc)
        self.meta_offset = self.host.alloc(4 * meta_words, "programs")
        self._meta = self.host.view(self.meta_offset, np.int32, meta_words)
        self._metadata = MetadataWriter(self._meta, spec, plan)
        logits, vocab = self.host_layout.buffers["logits"]
        self._logits = self.host.view(logits & OFFSET_MASK, np.float32, (plan.max_num_seqs, vocab))
        chains = self.gpu is None and runner is None and pilot.native is not None
        self._chain = Chain(logits, vocab, plan.page_size) if chains else None
        moves_at = self.host.alloc(kv_move_bytes(spec, plan), "programs")
        self._program_bytes = (num_bytes - self.host.used) // 64 * 64 - SPARE_BYTES
        self._program_area = self.host.alloc(self._program_bytes, "programs")
        self._program_pos = 0
        self.gpu_layout = self._open_gpu() if self.gpu else None
        write = self.gpu.write if self.gpu else None
        load(spec, plan, source, self.host_layout, self.host, self.gpu_layout, write, progress)
        self._compiler = Compiler(spec, plan, self.host_layout, self.gpu_layout)
        self._moves: KvMoves | None = None
        if self.gpu_layout is not None and plan.gpu_pages and plan.host_pages:
            self._moves = KvMoves(spec, plan, self.host, moves_at, self.host_layout, self.gpu_layout)
        self._placed: dict[tuple[int, PassShape], Placed] = {}
        self._pass_id = self._stream_began = 0
        self._alone_bytes, self._alone_s = 0, 0.0  # KV moved since the last pass
        self._ahead: tuple[Placed, int] | None = None  # what link_in is already doing for the next pass: (its program, pass id)
        self._link_in: Placed | None = None  # whose weight stream the last pass had: another program's with the same stream, when link_in ran ahead
        self.interrupts = Interrupts(self.host.set_abort)
        self.last_record: PassRecord | None = None
        self.plan_changes = 0

    def _open_gpu(self) -> Layout:
        assert self.gpu is not None
        num_bytes = gpu_layout_bytes(self.spec, self.plan)
        self.gpu.open(self.host, num_bytes)
        return lay_out(self.spec, self.plan, Space.GPU, GpuArena(num_bytes, ledger=self.ledger).alloc)

    # -- one pass ------------------------------------------------------------------------------------------------------------------------

    def execute(self, batch: StepBatch, *, more: bool = True) -> np.ndarray:
        """Runs one pass. Returns the logits [num_logits, vocab] fp32, valid until the next call. ``more`` says that another pass will likely follow.

        Raises DeviceLostError when a device stops answering; the executor is then unusable and only ``close`` is allowed.
        """
        if not batch.items:
            self._move_alone(batch)
            return self.logits(0)
        placed = self._program(batch.bucket, self._shape(batch))
        self._metadata.write(batch)
        began_ns = time.perf_counter_ns()
        with self.interrupts.held():
            self._start_moves(batch)
            self._run(placed, more)
        self.last_record = self._record(placed, batch, began_ns, time.perf_counter_ns())
        return self.logits(batch.num_logits)

    def logits(self, rows: int) -> np.ndarray:
        """The first ``rows`` of the last pass's logits: a view, valid until the next pass."""
        return self._logits[:rows]

    def most_passes(self) -> int:
        """How many passes a chain may have now; 1: none."""
        return most_passes(self.last_record.seconds) if self._chain is not None and self.last_record is not None else 1

    def execute_chain(self, batch: StepBatch, rules: Sequence[Rule], uniforms: np.ndarray) -> tuple[Int32, list[PassRecord]]:
        """Runs up to ``batch.passes`` decoding passes: the tokens chosen [passes run, items], by each item's rule and ``uniforms`` [passes, items], and each
        pass's record. A token that stops its sequence ends the chain, as do time, `hurry`, and logits that are not finite, whose pass does not count.
        Raises as `execute`."""
        assert self._chain is not None, "only a CPU pilot alone chains passes"
        placed = self._program(batch.bucket, self._shape(batch))
        self._metadata.write(batch)
        first_pass, _ = self._take_stream(placed)
        chain = self._chain.begin(batch, rules, uniforms, len(placed.program.queues["cpu"]))
        meta = self._meta[: self._meta[Meta.NUM_WORDS]].copy()
        began_ns = time.perf_counter_ns()
        with self.interrupts.held():
            self.pilot.run_chain(self._entry(placed, "cpu", self._pass_id, first_pass), self._chain.record, self.host)
        done = self._chain.end(chain)
        self._pass_id += batch.passes - 1  # also those that were not run: an id whose events may be set is never used again
        records = []
        for times, ended_ns in zip(done.times, done.ended_ns.tolist(), strict=True):
            records.append(PassRecord(placed, {"cpu": times}, meta, (ended_ns - began_ns) * 1e-9, ended_ns, 0, len(batch.items), 0, 0.0))
            began_ns = ended_ns
        self.last_record = records[-1] if records else None
        return done.tokens, records

    def hurry(self) -> None:
        """From any thread: the chain that runs ends after the pass that it is in."""
        if self._chain is not None:
            self._chain.hurry()

    def _start_moves(self, batch: StepBatch) -> None:
        """KV that changes tiers is copied while the pass runs, before link_out's part of it."""
        if self._moves is None:
            assert not batch.moves
            return
        insns = self._moves.write(batch.moves)
        if len(insns):
            if self.runner:
                self.runner.run_insns(self, insns)
            elif self.gpu:
                self.gpu.submit("link_out", self._moves.entry(self._pass_id, address(Space.HOST, self.meta_offset)))

    def _move_alone(self, batch: StepBatch) -> None:
        """Nothing can run until KV has changed tiers."""
        with self.interrupts.held():
            self._start_moves(batch)
            if self.gpu and not self.runner:
                self.gpu.wait("link_out", PASS_TIMEOUT_S)
        if self._moves is not None:
            self._alone_bytes, self._alone_s = self._alone_bytes + self._moves.num_bytes, self._alone_s + self._moves.seconds

    def _run(self, placed: Placed, more: bool) -> None:
        first_pass, started = self._take_stream(placed)
        if self.runner:
            self.runner.run_pass(self, placed, self._pass_id)
            return
        self._signal_start()
        if self.gpu:
            for queue in GPU_QUEUES:
                if len(placed.program.queues[queue]) and not (queue == "link_in" and started):
                    self.gpu.submit(queue, self._entry(placed, queue, self._pass_id, first_pass))
            if more and len(placed.program.queues["link_in"]):
                self.gpu.submit("link_in", self._entry(placed, "link_in", self._pass_id + 1, first_pass))
                self._ahead = (placed, self._pass_id + 1)
        self.pilot.run(self._entry(placed, "cpu", self._pass_id, first_pass), self.host)
        if self.gpu:
            self.gpu.wait("gpu", PASS_TIMEOUT_S)
            self.gpu.wait("link_out", PASS_TIMEOUT_S)

    def _signal_start(self) -> None:
        native = self.pilot.native
        if native is None:
            self.host.events[EVENT_START] = self._pass_id
        else:
            native.event_set(self.host.base, EVENT_START, self._pass_id)

    def _take_stream(self, placed: Placed) -> tuple[int, bool]:
        """Opens the next pass. Returns (the first pass of its weight stream, whether link_in is already working for it)."""
        if self._ahead and self._ahead[0].program.stream == placed.program.stream:
            self._link_in, self._pass_id = self._ahead
            self._ahead = None
            return self._stream_began, True
        self._drop_ahead()
        self._link_in = placed
        self._pass_id += 1
        self._stream_began = self._pass_id
        return self._stream_began, False

    def _drop_ahead(self) -> None:
        """What link_in loaded for a pass that will not come is thrown away; its pass id is never used again, because its events may be set."""
        if self._ahead and self.gpu:
            self.gpu.cancel("link_in", self._ahead[1])
            self._pass_id = self._ahead[1]
            self._ahead = None

    def _entry(self, placed: Placed, queue: Queue, pass_id: int, first_pass: int) -> np.ndarray:
        entry = np.zeros((), ENTRY)
        entry["insns"], entry["meta"] = address(Space.HOST, placed.insns[queue]), address(Space.HOST, self.meta_offset)
        entry["trace"] = address(Space.HOST, placed.traces[queue][pass_id % 2])
        entry["count"], entry["pass_id"], entry["first_pass"] = len(placed.program.queues[queue]), pass_id, first_pass
        return entry

    # -- programs ------------------------------------------------------------------------------------------------------------------------

    def set_plan(self, plan: Plan) -> None:
        """Switches to another plan of the same residency and sizes; it takes effect with the next pass. ValueError when it would need another layout."""
        plan.check(self.spec)
        if _residency(plan) != _residency(self.plan):
            raise ValueError("the new plan needs another memory layout: resident rows, page counts, ring and limits must stay")
        self.plan = plan
        self._metadata = MetadataWriter(self._meta, self.spec, plan)
        self._compiler = Compiler(self.spec, plan, self.host_layout, self.gpu_layout)
        self.plan_changes += 1

    def prepare(self, budget_s: float) -> None:
        """Compiles ahead what will come most, until the time is up: each bucket, the largest first."""
        began = time.perf_counter()
        for bucket in sorted(self.plan.buckets, key=lambda bucket: -bucket.max_tokens):
            self.compile_bucket(bucket)
            if time.perf_counter() - began > budget_s:
                return

    def compile_bucket(self, bucket: BucketPlan) -> None:
        """Compiles the program of this bucket's full passes, unless that is done."""
        self._program(bucket, (self._kinds(bucket),) * bucket.micro_batches)

    def _kinds(self, bucket: BucketPlan) -> tuple[bool, bool, bool]:
        """The groups that passes of this bucket may bring: one program serves them all, whichever have tokens (an instruction without rows does nothing)."""
        attention = {bucket.host_attention, bucket.host_prefill_attention if bucket.phase == "prefill" else bucket.host_attention}
        host_kv = self.plan.host_pages > 0
        return self.plan.gpu_pages > 0, host_kv and "gpu" in attention, host_kv and "cpu" in attention

    def _shape(self, batch: StepBatch) -> PassShape:
        kinds = self._kinds(batch.bucket)
        either = tuple(any(flags) for flags in zip(kinds, *batch.shape, strict=True))
        return ((either[0], either[1], either[2]),) * len(batch.shape)

    def _program(self, bucket: BucketPlan, shape: PassShape) -> Placed:
        key = (id(bucket), shape)
        found = self._placed.get(key)
        if found is None or found.program.bucket is not bucket:
            found = self._place(self._compiler.compile(expand(self.spec, self.plan, bucket, shape, poison=self.poison), bucket))
            self._placed[key] = found
        return found

    def _place(self, program: Program) -> Placed:
        """Copies a program into the host arena. When the area is full, all programs are dropped: the queues must be idle for that, and are, between passes."""
        assert program.num_events <= NUM_EVENTS, f"{program.num_events} events do not fit {NUM_EVENTS}"
        needed = program.segments.nbytes + sum(insns.nbytes + 48 * len(insns) for insns in program.queues.values()) + 64 * 13
        if needed > self._program_bytes:
            raise DeviceLostError(f"a pass needs {needed} bytes of program, {self._program_bytes} are set aside")
        if self._program_pos + needed > self._program_bytes:
            self._drop_ahead()
            self._placed.clear()
            self._program_pos = 0
        segments = self._put(program.segments)
        insns: dict[Queue, int] = {}
        traces: dict[Queue, tuple[int, int]] = {}
        times: dict[Queue, tuple[np.ndarray, np.ndarray]] = {}
        for queue, rows in program.queues.items():
            placed = rows.copy()
            loads = placed["op"] == Op.LOAD
            placed["a"][loads, 0] = address(Space.HOST, segments) + 24 * placed["a"][loads, 0]
            insns[queue] = self._put(placed)
            first, second = traces[queue] = (self._put(np.zeros(3 * len(rows), np.int64)), self._put(np.zeros(3 * len(rows), np.int64)))
            times[queue] = self.host.view(first, np.int64, (len(rows), 3)), self.host.view(second, np.int64, (len(rows), 3))
        keys = rate_keys_of(self.spec, self.plan.unit_rows)
        accounts = tuple(
            QueueAccount.of(
                queue, rows, kinds_on(queue, program.schedule, keys),
                [index for index, task in enumerate(program.schedule.queue(queue)) if task.source == "ring"],
            )
            for queue, rows in program.queues.items() if len(rows)
        )  # fmt: skip
        return Placed(program, insns, traces, times, weight_shares(self.spec, self.plan, program.bucket), accounts)

    def _times(self, placed: Placed, queue: Queue) -> np.ndarray:
        """int64 [count][3] of the last pass: wait began, work began, work ended (ns)."""
        placed = self._link_in if queue == "link_in" and self._link_in is not None else placed
        return placed.times[queue][self._pass_id % 2]

    def _put(self, data: np.ndarray) -> int:
        offset = self._program_area + self._program_pos
        self._program_pos += -(-data.nbytes // 64) * 64
        self.host.view(offset, np.uint8, data.nbytes)[:] = data.reshape(-1).view(np.uint8)
        return offset

    # -- what a pass took ----------------------------------------------------------------------------------------------------------------

    def _record(self, placed: Placed, batch: StepBatch, began_ns: int, ended_ns: int) -> PassRecord:
        moved_bytes, moved_s = self._alone_bytes, self._alone_s
        if self._moves is not None:
            moved_bytes, moved_s = moved_bytes + self._moves.num_bytes, moved_s + self._moves.seconds
            self._alone_bytes, self._alone_s = 0, 0.0
        return PassRecord(
            placed, {account.queue: self._times(placed, account.queue).copy() for account in placed.accounts}, self._meta[: self._meta[Meta.NUM_WORDS]].copy(),
            (ended_ns - began_ns) * 1e-9, ended_ns, batch.num_prompt_tokens, batch.num_generated, moved_bytes, moved_s,
        )  # fmt: skip

    def report(self, records: Sequence[PassRecord]) -> tuple[PassReport, list[dict[WorkKind, float]]]:
        """What a pass did, or a chain's passes together, and what the work of each took by kind, waits excluded.

        Passes are best summed up some at a time: after a pass this code lies in no cache, and costs a small model's pass a tenth of its time.
        """
        first, accounts = records[0], records[0].placed.accounts
        by_class = {account.queue: account.seconds([record.times[account.queue] for record in records]) for account in accounts}
        moved = bytes_moved(accounts, first.meta, page_bytes(self.spec, self.plan), self.plan.page_size)
        assert len(records) == 1 or moved == BytesMoved(), "passes are chained where nothing crosses a link"
        busy = busy_seconds({queue: seconds.sum(axis=0) for queue, seconds in by_class.items()})
        if first.moved_bytes:
            moved, busy = replace(moved, link_kv=moved.link_kv + first.moved_bytes), replace(busy, link=busy.link + first.moved_s)
        report = PassReport(
            seconds=sum([record.seconds for record in records]), predicted_s=None, busy_s=busy, bytes=moved, weights=first.placed.shares,
            num_prompt_tokens=sum([record.num_prompt_tokens for record in records]), num_generated=sum([record.num_generated for record in records]),
            passes=len(records), weight_wait_s=sum(account.weight_wait_s(first.times[account.queue]) for account in accounts if len(account.streamed)),
        )  # fmt: skip
        return report, [work_seconds(accounts, {queue: seconds[number] for queue, seconds in by_class.items()}) for number in range(len(records))]

    def pass_times(self, record: PassRecord) -> PassTimes:
        """A pass's times and what its tasks worked on, for a trace."""
        program, meta, page = record.placed.program, record.meta, page_bytes(self.spec, self.plan)
        queues = {
            queue: QueueTimes(
                times=times, rows=instruction_rows(program.queues[queue], meta),
                num_bytes=instruction_bytes(program.queues[queue], meta, page, self.plan.page_size),
            )
            for queue, times in record.times.items()
        }  # fmt: skip
        return PassTimes(schedule=program.schedule, queues=queues)

    def close(self) -> None:
        """Stops the device's queues and returns all memory."""
        if self.gpu:
            self.gpu.close()
        self._meta = self._metadata.out = np.empty(0, np.int32)  # a view that is still held would keep the arena's file open
        self._logits = np.empty((0, 0), np.float32)
        if self._moves is not None:
            self._moves.release()
        self._placed.clear()
        self._link_in = self._ahead = self.last_record = None
        if self._owns_host:
            self.host.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def weight_shares(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> WeightShares:
    """Bytes of all linears with lm_head by where a pass of this bucket takes them from."""
    sums = {"resident": 0.0, "streamed": 0.0, "cpu": 0.0}
    for op in spec.ops(plan.unit_rows):
        split = bucket.splits[op.layer][op.name]
        for kind in sums:
            sums[kind] += getattr(split, kind) * op.row_bytes
    return WeightShares(**sums)


def _residency(plan: Plan) -> tuple[Any, ...]:
    resident = tuple(tuple(sorted((name, split.resident) for name, split in layer.items())) for layer in plan.buckets[0].splits)
    return (
        resident, plan.unit_rows, plan.ring_bytes, plan.page_size, plan.gpu_pages, plan.host_pages, plan.kv_dtype, plan.max_num_seqs, plan.max_pass_tokens,
        plan.max_model_len, plan.host_kv_layers, plan.kv_staging_pages, plan.uses_gpu, plan.uses_cpu,
    )  # fmt: skip
