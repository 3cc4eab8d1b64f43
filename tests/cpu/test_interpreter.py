"""The torch interpreter against the native one: the same instructions on the same bytes leave the same memory, whatever the shapes.

Every case is an instruction (or a short program) drawn at random; both interpreters run it on their own copy of both arenas, and the arenas are compared.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cpu.native_twin import KV_DTYPES, Batch, KvLayout, Machine, Seq, insn, mailbox_offset, native
from tests.programs import (
    ARENA,
    PAGE,
    Program,
    add,
    attention,
    copy,
    embed,
    floats,
    half_precision_attention,
    int8_attention,
    linear,
    linear_in,
    norm,
    packets,
    random_batch,
    streamed_kv,
)  # fmt: skip
from twinpilots.device.cpu import CpuPilot
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError
from twinpilots.kernels.abi import ENTRY, EVENTS_OFFSET, INSN, MAILBOX, MAILBOX_ENTRIES, NULL, Act, Dtype, Op, Space, address
from twinpilots.kernels.native import ABORTED, BAD_INSTRUCTION, CANCELLED
from twinpilots.runtime.interpreter import HostSync, LinkRates, SerialRunner, has_reached, queue_loop, run_program
from twinpilots.runtime.torch_ops import FP16_SAFE


def agree(program: Program, seed: int) -> None:
    """Run one random program on both; every fp32 buffer must agree to rounding, every other byte exactly (tests give 16-bit KV values exactly)."""
    mine, theirs = (Machine(ARENA) for _ in range(2))
    insns, batch = program(np.random.default_rng(seed), mine)
    program(np.random.default_rng(seed), theirs)
    assert run_program(mine.entry(insns, batch), mine.host, torch.from_numpy(mine.gpu)) == 0
    assert theirs.run(insns, batch) == 0
    for ours, native_bytes in ((mine.host, theirs.host), (mine.gpu, theirs.gpu)):
        found, wanted = ours.view(np.float32), native_bytes.view(np.float32)
        same = ours.view(np.uint32) == native_bytes.view(np.uint32)
        tolerance = 2e-4 if program is int8_attention else 3e-5  # the native kernel rounds queries and probabilities to 16 bits
        np.testing.assert_allclose(found[~same], wanted[~same], rtol=tolerance, atol=tolerance)


CASES = (embed, norm, linear, linear_in, attention, half_precision_attention, int8_attention, add, copy, packets, streamed_kv)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("program", CASES, ids=lambda case: case.__name__)
def test_both_interpreters_leave_the_same_memory(program: Program, seed: int) -> None:
    native()
    agree(program, seed)


class Copies(TorchDispatchMode):
    """Counts torch's copies."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, dim, stores", [(Dtype.FP32, 5, 2), (Dtype.INT8, 4, 3), (Dtype.INT8, 5, 2 * 5)])
def test_streamed_pages_that_follow_each_other_cross_at_one_stroke(dtype: Dtype, dim: int, stores: int) -> None:
    """A prompt of five pages, of which four are all its own: two copies per page where int8's pages are padded. Each copy costs a launch thread 10 us."""
    seq = Seq(18, context=6, group=1, pages=(0, 1, 2, 3, 4, 5), home=(10, 11, 12, 13, 14, 15))
    mine, theirs = (Machine(ARENA) for _ in range(2))
    counts = []
    for machine in (mine, theirs):
        rng, stride = np.random.default_rng(3), KvLayout(1, PAGE, dim, dtype).page_bytes
        home, staging = (machine.put(rng.integers(0, 256, 20 * stride, dtype=np.uint8), space) for space in (Space.HOST, Space.GPU))
        for op in (Op.LOAD_KV, Op.STORE_KV):
            insns = [insn(op, staging, home, stride, PAGE, 1, dim, dtype, glo=1, ghi=2)]
            if machine is theirs:
                assert machine.run(insns, Batch([seq], page_size=PAGE)) == 0
                continue
            with Copies() as copies:
                assert run_program(machine.entry(insns, Batch([seq], page_size=PAGE)), machine.host, torch.from_numpy(machine.gpu)) == 0
            counts.append(copies.count)
    assert counts == [1, stores]
    assert np.array_equal(mine.host, theirs.host) and np.array_equal(mine.gpu, theirs.gpu)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_appended_kv_has_the_same_bits(seed: int, dtype: Dtype) -> None:
    native()
    mine, theirs = (Machine(ARENA) for _ in range(2))
    for machine in (mine, theirs):
        insns, batch = attention(np.random.default_rng(seed), machine, dtype)
        insns[0]["a"][2:6] = NULL  # neither norm nor rotary: only the store's own rounding is left
        run = machine.run(insns[:1], batch) if machine is theirs else run_program(machine.entry(insns[:1], batch), machine.host, None)
        assert run == 0
    assert np.array_equal(mine.host, theirs.host)


def test_a_whole_program_in_serial_order_is_the_same_with_both() -> None:
    lib = native()
    results = []
    for chosen in (None, lib):
        arena = HostArena(1 << 20, shared=False, num_events=8)
        runner = SerialRunner(arena, 1 << 16, chosen)
        rng = np.random.default_rng(5)
        batch = random_batch(rng, groups=(0,))
        meta, x, w = arena.alloc(batch.words.nbytes, "programs"), arena.alloc(4 * 8 * 64, "workspace"), arena.alloc(4 * 64, "weights")
        arena.view(meta, np.int32, batch.words.shape)[:] = batch.words
        arena.view(x, np.float32, (64, 8))[:] = floats(rng, 64, 8)
        arena.view(w, np.float32, (8, 8))[:] = floats(rng, 8, 8)
        gpu_x, gpu_y = address(Space.GPU, 0), address(Space.GPU, 8192)
        waiting = {"waits": ((5, 0),), "record": 6}  # serial order makes waits moot
        program = [insn(Op.COPY, gpu_x, 8, x, 8, 8, 0, **waiting), insn(Op.LOAD, x, 0, 0), insn(Op.NORM, gpu_y, 8, gpu_x, 8, NULL, NULL, 8, 0, f=(1e-6,)),
                   insn(Op.COPY, x, 8, gpu_y, 8, 8, 1), insn(Op.LINEAR_IN, x, 8, x, 8, w, 0, 8, 8, 1)]  # fmt: skip
        runner.run(np.stack(program), meta)
        results.append(arena.view(x, np.float32, (64, 8)).copy())
        assert not arena.events.any()
        bad = insn(99)
        with pytest.raises(ValueError, match=r"instruction 0 .op 99. ended with status -3"):
            runner.run(np.stack([bad]), meta)
        arena.close()
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)


# ---- waits, mailboxes, aborts: the twin of tp_queue_loop


def poison_entry(machine: Machine, where: int, *, pass_id: int = 1, flags: int = 0, **extra: object) -> np.ndarray:
    return machine.entry([insn(Op.POISON, where, 8, **extra)], pass_id=pass_id, flags=flags)  # type: ignore[arg-type]


class Served:
    """A torch queue loop on a thread, and its mailbox."""

    def __init__(self, machine: Machine, link: LinkRates | None = None) -> None:
        self.machine, self.status = machine, 99
        self.box = machine.host[mailbox_offset("gpu") :][: MAILBOX.itemsize].view(MAILBOX)
        self.thread = threading.Thread(target=self._serve, args=(link,))
        self.thread.start()

    def _serve(self, link: LinkRates | None) -> None:
        self.status = queue_loop(mailbox_offset("gpu"), self.machine.host, torch.from_numpy(self.machine.gpu), link=link)

    def submit(self, entry: np.ndarray) -> None:
        tail = int(self.box["tail"][0])
        self.box["entries"][0][tail % MAILBOX_ENTRIES] = entry
        self.box["tail"][0] = tail + 1

    def settle(self, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.box["head"][0] != self.box["tail"][0]:
            assert time.monotonic() < deadline
            time.sleep(1e-3)


def test_a_queue_waits_records_cancels_and_quits() -> None:
    machine = Machine(ARENA)
    served, place = Served(machine), machine.put(np.zeros(8, np.uint8))
    served.submit(poison_entry(machine, place, waits=((3, 0),), record=4))
    time.sleep(0.02)
    assert machine.events[4] == 0 and not machine.view(place, np.uint8, (8,)).any()
    machine.events[3] = 1
    served.settle()
    assert machine.events[4] == 1 and (machine.view(place, np.uint8, (8,)) == 0xFF).all()
    served.submit(poison_entry(machine, place, pass_id=2, waits=((9, 0),), record=5))
    served.box["cancel_pass"][0] = 2
    served.settle()
    assert machine.events[5] == 0 and served.box["status"][0] == 0
    served.submit(poison_entry(machine, place, pass_id=3, waits=((9, -1),), record=6, flags=1))
    machine.events[9] = 2
    served.thread.join(5)
    assert machine.events[6] == 3 and served.status == 0


def test_an_abort_ends_waits_and_the_loop() -> None:
    machine = Machine(ARENA)
    served = Served(machine)
    served.submit(poison_entry(machine, machine.put(np.zeros(8, np.uint8)), waits=((3, 0),)))
    machine.control["abort"] = 1
    served.thread.join(5)
    assert served.status == ABORTED


def test_a_failed_entry_is_told_in_the_mailbox() -> None:
    machine = Machine(ARENA)
    served = Served(machine)
    served.submit(machine.entry([insn(77)], flags=1))
    served.thread.join(5)
    assert served.box["status"][0] == BAD_INSTRUCTION and served.box["head"][0] == 1


def test_a_wait_for_the_previous_pass_is_skipped_in_the_first() -> None:
    machine = Machine(ARENA)
    entry = poison_entry(machine, machine.put(np.zeros(8, np.uint8)), pass_id=7, waits=((3, -1),), record=4)
    entry["first_pass"] = 7
    assert run_program(entry, machine.host, None) == 0 and machine.events[4] == 7


def test_the_trace_tells_waiting_from_working() -> None:
    machine = Machine(ARENA)
    trace = machine.put(np.zeros((1, 3), np.int64))
    threading.Timer(0.05, lambda: machine.events.__setitem__(3, 1)).start()
    before = time.monotonic_ns()
    assert run_program(machine.entry([insn(Op.POISON, machine.put(np.zeros(8, np.uint8)), 8, waits=((3, 0),))], trace=trace), machine.host, None) == 0
    wait, work, end = machine.view(trace, np.int64, (3,)).tolist()
    assert before <= wait < work <= end <= time.monotonic_ns() and work - wait > 30e6


def test_the_link_takes_its_time() -> None:
    machine = Machine(ARENA)
    served, source = Served(machine, LinkRates(up_bytes_per_s=1e6, latency_s=0.01)), machine.put(np.ones(40_000, np.uint8))
    segments = machine.put(np.array([(machine.put(np.zeros(40_000, np.uint8), Space.GPU), source, 40_000)], np.int64))
    began = time.monotonic()
    served.submit(machine.entry([insn(Op.LOAD, segments, 1, 40_000)], flags=1))
    served.thread.join(5)
    assert 0.05 <= time.monotonic() - began < 5 and served.status == 0


def test_event_words_wrap_around() -> None:
    assert has_reached(5, 5) and has_reached(6, 5) and not has_reached(4, 5)
    assert has_reached(3, 2**32 - 4) and not has_reached(2**32 - 4, 3)


def test_a_stopped_wait_gives_the_reason() -> None:
    host = np.zeros(EVENTS_OFFSET + 64, np.uint8)
    assert HostSync(host).wait(0, 1, lambda: CANCELLED) == CANCELLED


def test_the_pilot_runs_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpilots.device.cpu.native_module.load", lambda: None)
    before = torch.get_num_threads()
    pilot, arena = CpuPilot(threads=1), HostArena(1 << 18, num_events=8)
    place, program = arena.alloc(64, "workspace"), arena.alloc(INSN.itemsize, "programs")
    arena.view(program, INSN, (1,))[0] = insn(Op.POISON, place, 64, record=1)
    entry = np.zeros((), ENTRY)
    entry["insns"], entry["count"], entry["pass_id"], entry["meta"], entry["trace"] = program, 1, 4, NULL, NULL
    pilot.run(entry, arena)
    assert (arena.view(place, np.uint8, 64) == 0xFF).all() and arena.events[1] == 4
    arena.view(program, INSN, (1,))["op"] = 55
    with pytest.raises(DeviceLostError, match="the CPU pilot stopped in pass 4: a program holds an instruction"):
        pilot.run(entry, arena)
    assert arena.aborted
    pilot.close()
    arena.close()
    torch.set_num_threads(before)


@pytest.mark.parametrize("act", list(Act))
def test_activations_are_the_documented_ones(act: Act) -> None:
    from tests.cpu.native_twin import activate
    from twinpilots.runtime.torch_ops import ACTIVATIONS

    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[act](torch.from_numpy(x)).numpy(), activate(act, x), atol=1e-12)
    assert FP16_SAFE < 65504
