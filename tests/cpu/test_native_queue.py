"""Queues: waits, records, mailboxes, cancel, abort, time-outs, traces, adversarial mode, between threads and between processes; the pool."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.cpu.native_twin import Machine, insn, mailbox_offset, native, rows_batch
from twinpilots.kernels.abi import CHAIN, CHOICE, CONTROL, ENTRY, EVENTS_OFFSET, INSN, MAILBOX, MAILBOX_ENTRIES, NULL, Op, address
from twinpilots.kernels.native import ABORTED, BAD_INSTRUCTION, CANCELLED, ISA_NAMES, NO_MAILBOX, QUEUE_FULL, TIMED_OUT, LinkParams, Native

BOX = mailbox_offset("gpu")
QUIT = 1


@contextmanager
def running(work: Callable[[], int]) -> Iterator[list[int]]:
    """``work`` on another thread; joined at the end, its result in the list."""
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    yield result
    thread.join(20)
    assert not thread.is_alive()


def serve(machine: Machine, mailbox: int = BOX, **options: object) -> Callable[[], int]:
    return lambda: native().queue_loop(machine.host_base, machine.gpu_base, mailbox, **options)


def submit(machine: Machine, record: np.ndarray, mailbox: int = BOX) -> int:
    return native().submit(machine.host_base, mailbox, record)


def idle(machine: Machine, timeout_s: float = 20, mailbox: int = BOX) -> int:
    return native().wait_idle(machine.host_base, mailbox, timeout_s)


def fill(machine: Machine, target: int, **options: object) -> np.ndarray:
    return insn(Op.POISON, target, 4, **options)


def test_records_lie_as_compiled():
    def at(dtype: np.dtype, name: str) -> int:
        assert dtype.fields is not None
        return int(dtype.fields[name][1])

    python = (
        INSN.itemsize,
        ENTRY.itemsize,
        MAILBOX.itemsize,
        CONTROL.itemsize,
        EVENTS_OFFSET,
        at(INSN, "wait_event"),
        at(INSN, "a"),
        at(INSN, "f"),
        at(ENTRY, "count"),
    )
    queues = tuple(at(CONTROL, queue) for queue in ("gpu", "link_in", "link_out"))
    assert native().abi_layout() == (*python, *queues, CHAIN.itemsize, at(CHAIN, "hurry"), CHOICE.itemsize)


def test_an_instruction_waits_for_its_event_and_records_its_own():
    machine = Machine()
    where = machine.put(np.zeros(1, np.uint32))
    with running(lambda: machine.run([fill(machine, where, waits=[(3, 0)], record=4)], rows_batch(0), pass_id=7)) as result:
        for value in (5, 6):  # earlier passes' values do not do
            native().event_set(machine.host_base, 3, value)
            time.sleep(0.06)  # long enough to sleep on the futex
            assert machine.events[4] == 0
            assert machine.view(where, np.uint32, (1,))[0] == 0
        native().event_set(machine.host_base, 3, 7)
        assert native().event_wait(machine.host_base, 4, 7, 5) == 0
    assert result == [0]
    assert machine.view(where, np.uint32, (1,))[0] == 0xFFFFFFFF
    assert machine.control["waiters"] == 0


def test_waits_for_the_previous_pass_are_skipped_in_the_first_pass_only():
    machine, where = Machine(), 0
    where = machine.put(np.zeros(1, np.uint32))
    program = [fill(machine, where, waits=[(3, -1)])]
    assert machine.run(program, rows_batch(0), pass_id=9, first_pass=9) == 0
    native().event_set(machine.host_base, 3, 9)
    assert machine.run(program, rows_batch(0), pass_id=10, first_pass=9) == 0
    native().set_timeout(0.05)
    try:
        assert machine.run(program, rows_batch(0), pass_id=11, first_pass=9) == TIMED_OUT
    finally:
        native().set_timeout(120)


def test_event_values_wrap_around():
    machine = Machine()
    machine.events[3] = 2**31 - 1
    assert native().event_wait(machine.host_base, 3, 2**31 - 2, 0.01) == 0
    machine.events[3] = 2**31 + 5  # past the largest int32: still later than 2**31 - 1
    assert native().event_wait(machine.host_base, 3, 2**31 - 1, 0.01) == 0
    assert native().event_wait(machine.host_base, 3, -(2**31) + 6, 0.01) == TIMED_OUT


BAD = {"group": insn(Op.POISON, NULL, 0, ghi=4), "op": insn(99), "unit": insn(Op.LINEAR, f=(0.0,)), "kind": insn(Op.NORM, NULL, 0, NULL, 0, NULL, NULL, 4, 9)}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_instruction_fails_its_entry(bad):
    assert Machine().run([bad], rows_batch(1)) == BAD_INSTRUCTION


def test_abort_ends_a_wait():
    machine = Machine()
    with running(lambda: machine.run([fill(machine, 0, waits=[(3, 0)])], rows_batch(0))) as result:
        time.sleep(0.02)
        machine.control["abort"] = 1
    assert result == [ABORTED]


def test_cancel_ends_a_wait_and_drops_the_rest_but_not_later_passes():
    machine = Machine()
    where = machine.put(np.zeros(2, np.uint32))
    with running(serve(machine)) as result:
        submit(machine, machine.entry([fill(machine, where, waits=[(3, 0)], record=5)], pass_id=1))
        submit(machine, machine.entry([fill(machine, where, record=5)], pass_id=2))
        time.sleep(0.02)
        machine.control["gpu"]["cancel_pass"] = 2
        assert idle(machine) == 0
        assert machine.view(where, np.uint32, (2,)).tolist() == [0, 0]
        assert machine.events[5] == 0
        submit(machine, machine.entry([fill(machine, where + 4, record=5)], pass_id=3))
        assert idle(machine) == 0
        assert machine.view(where, np.uint32, (2,)).tolist() == [0, 0xFFFFFFFF]
        submit(machine, machine.entry([], pass_id=4, flags=QUIT))
    assert result == [0]


def test_run_honours_cancel_of_the_mailbox_it_is_given():
    machine = Machine()
    machine.control["gpu"]["cancel_pass"] = 1
    where = machine.put(np.zeros(1, np.uint32))
    assert machine.run([fill(machine, where)], rows_batch(0), mailbox=BOX) == CANCELLED
    assert machine.run([fill(machine, where)], rows_batch(0), mailbox=NO_MAILBOX) == 0


def test_a_full_mailbox_refuses_and_loses_nothing():
    machine = Machine()
    counted = [machine.entry([insn(Op.POISON, machine.put(np.zeros(1, np.uint32)), 4)], pass_id=i + 1) for i in range(MAILBOX_ENTRIES)]
    assert [submit(machine, record) for record in counted] == [0] * MAILBOX_ENTRIES
    assert submit(machine, counted[0]) == QUEUE_FULL
    assert idle(machine, 0.01) == TIMED_OUT
    with running(serve(machine)):
        assert idle(machine) == 0
        assert submit(machine, machine.entry([], pass_id=99, flags=QUIT)) == 0
    assert machine.control["gpu"]["head"] == machine.control["gpu"]["tail"] == MAILBOX_ENTRIES + 1


def test_sleepers_are_woken_at_once():
    """A sleep ends by itself only after 50 ms: most of eight round trips to a sleeping queue, whose sleeping waiter it wakes in turn, would take that."""
    machine = Machine()
    with running(serve(machine)):
        taken = []
        for i in range(8):
            time.sleep(0.01)
            began = time.perf_counter()
            submit(machine, machine.entry([fill(machine, machine.put(np.zeros(1, np.uint32)), waits=[(3, 0)] if i % 2 else [])], pass_id=i + 1))
            if i % 2:
                time.sleep(0.005)
                native().event_set(machine.host_base, 3, i + 1)
            assert idle(machine) == 0
            taken.append(time.perf_counter() - began)
        submit(machine, machine.entry([], pass_id=99, flags=QUIT))
    assert np.median(taken) < 0.035


def test_the_mailbox_counters_wrap_around():
    machine = Machine()
    machine.control["gpu"]["head"] = machine.control["gpu"]["tail"] = 2**32 - 2
    with running(serve(machine)) as result:
        for i in range(5):
            assert submit(machine, machine.entry([], pass_id=i + 1, flags=QUIT if i == 4 else 0)) == 0
        assert idle(machine) == 0
    assert result == [0]
    assert machine.control["gpu"]["head"] == 3


def test_status_keeps_the_first_failure_and_the_queue_goes_on():
    machine = Machine()
    where = machine.put(np.zeros(1, np.uint32))
    with running(serve(machine)):
        submit(machine, machine.entry([insn(99)], pass_id=1))
        submit(machine, machine.entry([fill(machine, where)], pass_id=2, flags=QUIT))
    assert idle(machine) == BAD_INSTRUCTION
    assert machine.view(where, np.uint32, (1,))[0] == 0xFFFFFFFF


def test_abort_ends_an_idle_queue_and_who_waits_for_a_busy_one():
    machine = Machine()
    submit(machine, machine.entry([fill(machine, 0, waits=[(3, 0)])]))
    with running(serve(machine)) as queue, running(lambda: idle(machine)) as waiter, running(serve(machine, mailbox_offset("link_in"))) as idle_queue:
        time.sleep(0.08)
        machine.control["abort"] = 1
    assert queue == waiter == idle_queue == [ABORTED]


def test_trace_holds_three_ascending_times_of_this_clock():
    machine = Machine()
    where, trace = machine.put(np.zeros(1, np.uint32)), machine.put(np.zeros((2, 3), np.int64))
    program = [fill(machine, where, waits=[(3, 0)]), fill(machine, where)]
    began = time.monotonic_ns()
    with running(lambda: machine.run(program, rows_batch(0), trace=trace)):
        time.sleep(0.03)
        native().event_set(machine.host_base, 3, 1)
    times = machine.view(trace, np.int64, (2, 3))
    assert (np.diff(np.concatenate([[began], times.ravel(), [time.monotonic_ns()]])) >= 0).all()
    assert times[0, 1] - times[0, 0] > 10_000_000, "the wait is not part of the work"


def test_two_queues_play_ping_pong_in_adversarial_mode():
    """Each queue adds one to a counter in turn; a wait that did not hold would break the alternation."""
    machine, turns = Machine(1 << 23), 40
    total, one = machine.put(np.zeros(1, np.float32)), machine.put(np.ones(1, np.float32))
    ping, pong = [], []
    for i in range(turns):
        step = (total, 1, total, 1, one, 0, NULL, NULL, NULL, 0, 1)
        ping.append(insn(Op.ADD, *step, waits=[(100 + i, 0)] if i else [], record=10 + i))
        pong.append(insn(Op.ADD, *step, waits=[(10 + i, 0)], record=101 + i))
    link = LinkParams(adversarial_seed=5)
    with running(lambda: machine.run(pong, rows_batch(1), link=link)) as other:
        assert machine.run(ping, rows_batch(1), link=LinkParams(adversarial_seed=6)) == 0
    assert other == [0]
    assert machine.view(total, np.float32, (1,))[0] == 2.0 ** (2 * turns)


def test_a_child_process_serves_a_mailbox_over_a_shared_memory_file():
    num_bytes = 1 << 20
    fd = os.memfd_create("twinpilots-test")
    os.ftruncate(fd, num_bytes)
    machine = Machine(num_bytes, host=np.frombuffer(mmap.mmap(fd, num_bytes), np.uint8))
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.cpu.native_child", str(fd), str(num_bytes), str(BOX)]
    child = subprocess.Popen(command, pass_fds=[fd], cwd=root)
    try:
        where = machine.put(np.zeros(3, np.uint32))
        for i in range(3):
            submit(machine, machine.entry([fill(machine, where + 4 * i, waits=[(3, 0)], record=4)], pass_id=i + 1))
        for i in range(3):
            time.sleep(0.07)  # both sides asleep on their futexes
            native().event_set(machine.host_base, 3, i + 1)
            assert native().event_wait(machine.host_base, 4, i + 1, 20) == 0
            assert machine.view(where, np.uint32, (3,)).tolist() == [0xFFFFFFFF] * (i + 1) + [0] * (2 - i)
        submit(machine, machine.entry([], pass_id=9, flags=QUIT))
        assert idle(machine) == 0
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        os.close(fd)


def test_addresses_name_their_space():
    assert address(1, 0) == 1 << 56
    machine = Machine()
    machine.gpu[64:68] = 0
    assert machine.run([insn(Op.POISON, (1 << 56) | 64, 4)], rows_batch(0)) == 0
    assert (machine.gpu[64:68] == 255).all()
    assert (machine.gpu[68:80] == 0).all()


# ---- the pool and the machine's rates


def test_many_small_parallel_calls_and_a_late_worker(pool):
    machine = Machine(1 << 22)
    x, gain = machine.put(np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)), machine.put(np.ones(1024, np.float32))
    out = machine.put(np.zeros((64, 1024), np.float32))
    program = [insn(Op.NORM, out, 1024, x, 1024, gain, NULL, 1024, 0, f=(1e-5,))] * 300
    record = machine.entry(program, rows_batch(64))
    for _ in range(5):
        assert native().run(machine.host_base, machine.gpu_base, record, pool=pool) == 0
        time.sleep(0.002)  # the workers fall asleep in between
    found = machine.view(out, np.float32, (64, 1024))
    np.testing.assert_allclose((found.astype(float) ** 2).mean(-1), 1, rtol=1e-4)


def test_pools_on_disjoint_cores_run_side_by_side():
    """Each pool's worker keeps to its own core, and two queues with a pool each do not disturb each other's results."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    tasks_before = set(os.listdir("/proc/self/task"))
    pools = [native().pool_create(2, [core, core]) for core in cores]
    workers = set(os.listdir("/proc/self/task")) - tasks_before
    try:
        assert sorted(tuple(os.sched_getaffinity(int(task))) for task in workers) == [(core,) for core in cores]
        rng, results = np.random.default_rng(3), []
        for _ in pools:
            machine = Machine(1 << 22)
            x = rng.standard_normal((40, 512)).astype(np.float32)
            w = rng.standard_normal(512 * 320).astype(np.float32)
            out = machine.put(np.zeros((40, 320), np.float32))
            program = [insn(Op.LINEAR_IN, out, 320, machine.put(x), 512, machine.put(w), 0, 512, 320, 0)] * 30
            results.append((machine, machine.entry(program, rows_batch(40)), machine.view(out, np.float32, (40, 320)), x.astype(float) @ w.reshape(512, 320)))
        (m0, e0, _, _), (m1, e1, _, _) = results
        with running(lambda: native().run(m0.host_base, m0.gpu_base, e0, pool=pools[0])) as other:
            assert native().run(m1.host_base, m1.gpu_base, e1, pool=pools[1]) == 0
        assert other == [0]
        for _, _, found, wanted in results:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    finally:
        for pool in pools:
            native().pool_destroy(pool)


def test_a_pool_refuses_cores_that_it_may_not_use():
    with pytest.raises(ValueError, match="1023"):
        native().pool_create(2, [0, 1023])
    with pytest.raises(ValueError, match="2 threads"):
        native().pool_create(2, [0])
    with pytest.raises(ValueError, match="1023"):
        native().pin_thread(1023)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="not available"):
        native().set_isa(7)


def test_rates_are_positive_and_a_missing_library_is_no_library(pool, tmp_path):
    data = np.ones(1 << 20, np.float32)
    assert native().read_rate(data, pool=pool, duration_ms=5) > 1e8
    assert native().fma_rate(pool=pool, duration_ms=5) > 1e8
    assert native().copy_rate(np.empty_like(data), data, duration_ms=5) > 1e8
    assert native().isa_name in ISA_NAMES
    with pytest.raises(OSError):
        Native(tmp_path / "none.so")
