"""COPY, LOAD, LOAD_KV, STORE_KV, POISON: they move exactly what they should, and take the time that the emulated link would."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.cpu.native_twin import Batch, KvLayout, Machine, Seq, insn, rows_batch
from twinpilots.kernels.abi import Dtype, Op, Space
from twinpilots.kernels.native import LinkParams

PAGE, HEADS, DIM = 4, 2, 6
PAGE_BYTES = 2 * HEADS * PAGE * DIM * 4


def test_copy_moves_the_asked_columns_of_the_asked_rows():
    machine, x = Machine(), np.arange(60, dtype=np.float32).reshape(5, 12)
    src, dst = machine.put(x), machine.put(np.zeros((5, 9), np.float32), Space.GPU)
    batch = Batch([Seq(2), Seq(1, group=1), Seq(2, group=2)])
    assert machine.run([insn(Op.COPY, dst, 9, src, 12, 7, 0, glo=1, ghi=3)], batch) == 0
    wanted = np.zeros((5, 9), np.float32)
    wanted[2:, :7] = x[2:, :7]
    assert np.array_equal(machine.view(dst, np.float32, (5, 9)), wanted)


def test_load_copies_every_segment():
    machine, rng = Machine(), np.random.default_rng(0)
    pieces = [rng.integers(0, 255, n, dtype=np.uint8) for n in (1, 700_000, 33)]
    at = [(machine.put(np.zeros_like(p), Space.GPU), machine.put(p), len(p)) for p in pieces]
    segments = machine.put(np.array(at, np.int64))
    assert machine.run([insn(Op.LOAD, segments, 3, 700_034)], rows_batch(0)) == 0
    for (dst, _, n), piece in zip(at, pieces, strict=True):
        assert np.array_equal(machine.view(dst, np.uint8, (n,)), piece)


def kv_case(machine):
    """Two sequences of group 1 (one of group 2 beside them), host pages 0.., staging pages 0.. in GPU memory, one stride."""
    seqs = [
        Seq(3, context=6, group=1, pages=(0, 1, 2), home=(5, 3, 7)),
        Seq(1, context=0, group=1, pages=(4,), home=(1,)),
        Seq(1, context=5, group=2, pages=(8, 9)),
    ]
    home, staging = np.random.default_rng(1).standard_normal((2, 10, 2, HEADS, PAGE, DIM)).astype(np.float32)
    return Batch(seqs, page_size=PAGE), home, staging, machine.put(home), machine.put(staging, Space.GPU)


def test_load_kv_brings_the_pages_that_hold_earlier_tokens():
    machine = Machine()
    batch, home, staging, at_home, at_staging = kv_case(machine)
    assert machine.run([insn(Op.LOAD_KV, at_staging, at_home, PAGE_BYTES, PAGE, HEADS, DIM, Dtype.FP32, glo=1, ghi=2)], batch) == 0
    found = machine.view(at_staging, np.float32, staging.shape)
    assert np.array_equal(found[[0, 1]], home[[5, 3]])  # six earlier tokens: two pages
    assert np.array_equal(found[2:], staging[2:])


def test_store_kv_writes_this_passs_tokens_and_nothing_else():
    machine = Machine()
    batch, home, staging, at_home, at_staging = kv_case(machine)
    assert machine.run([insn(Op.STORE_KV, at_staging, at_home, PAGE_BYTES, PAGE, HEADS, DIM, Dtype.FP32, glo=1, ghi=2)], batch) == 0
    home[3, :, :, 2:] = staging[1, :, :, 2:]  # tokens 6, 7
    home[7, :, :, :1] = staging[2, :, :, :1]  # token 8
    home[1, :, :, :1] = staging[4, :, :, :1]
    assert np.array_equal(machine.view(at_home, np.float32, home.shape), home)


@pytest.mark.parametrize("page_size, dim", [(PAGE, DIM), (3, 7)])
def test_streamed_int8_kv_takes_its_scales_along(page_size, dim):
    machine, layout = Machine(), KvLayout(HEADS, page_size, dim, Dtype.INT8)
    batch = Batch([Seq(3, context=2 * page_size - 1, group=1, pages=(0, 1, 2), home=(5, 3, 7))], page_size=page_size)
    home, staging = np.random.default_rng(2).integers(0, 256, (2, 10, layout.page_bytes), dtype=np.uint8)
    at_home, at_staging = machine.put(home), machine.put(staging, Space.GPU)
    args = (at_staging, at_home, layout.page_bytes, page_size, HEADS, dim, Dtype.INT8)
    assert machine.run([insn(Op.STORE_KV, *args, glo=1, ghi=2)], batch) == 0
    stored = machine.view(at_home, np.uint8, home.shape)
    for token in range(2 * page_size - 1, 2 * page_size + 2):  # the pass's own
        to, fro, offset = (5, 3, 7)[token // page_size], token // page_size, token % page_size
        for part in (layout.values, layout.scales):
            part(home[to])[:, :, offset] = part(staging[fro])[:, :, offset]
    assert np.array_equal(stored, home)
    assert machine.run([insn(Op.LOAD_KV, *args, glo=1, ghi=2)], batch) == 0
    loaded = machine.view(at_staging, np.uint8, staging.shape)
    assert np.array_equal(loaded[[0, 1]], home[[5, 3]]) and np.array_equal(loaded[2:], staging[2:]), "two pages hold earlier tokens"


def test_poison_is_nan_in_every_float_format():
    machine = Machine()
    where = machine.put(np.zeros(8, np.float32))
    assert machine.run([insn(Op.POISON, where, 16)], rows_batch(0)) == 0
    assert np.isnan(machine.view(where, np.float32, (8,))).tolist() == [True] * 4 + [False] * 4
    assert np.isnan(machine.view(where, np.float16, (8,))).all()


def elapsed(machine, insns, batch, link):
    began = time.perf_counter()
    assert machine.run(insns, batch, link=link) == 0
    return time.perf_counter() - began


def test_a_busy_link_keeps_its_rate_and_never_exceeds_it():
    machine, count, size = Machine(1 << 21), 100, 20_000
    segments = machine.put(np.array([(machine.put(np.zeros(size, np.uint8), Space.GPU), machine.put(np.zeros(size, np.uint8)), size)], np.int64))
    link = LinkParams(up_bytes_per_s=1e8, latency_s=1e-6)
    due = count * (size / 1e8 + 1e-6)  # 0.2 ms each: a sleep overshoots by a good part of that, which may not add up
    taken = min(elapsed(machine, [insn(Op.LOAD, segments, 1, size)] * count, rows_batch(0), link) for _ in range(12))
    assert due <= taken < 1.2 * due


@pytest.mark.parametrize("direction, rate", [(0, 2e8), (1, 5e7)])
def test_copies_take_the_time_of_their_direction(direction, rate):
    machine, rows = Machine(1 << 21), 50
    where = machine.put(np.zeros((rows, 1000), np.float32), Space.GPU), machine.put(np.zeros((rows, 1000), np.float32))
    dst, src = where if direction == 0 else where[::-1]
    due = 1e-3 + rows * 4000 / rate
    link = LinkParams(up_bytes_per_s=2e8, down_bytes_per_s=5e7, latency_s=1e-3)
    program = [insn(Op.COPY, dst, 1000, src, 1000, 1000, direction)]
    taken = min(elapsed(machine, program, rows_batch(rows), link) for _ in range(12))
    assert due <= taken < 1.5 * due
