"""ATTEND against float64: ragged batches over scattered pages, grouped heads, windows, soft-capping, every KV type and instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.native_twin import KV_DTYPES, Batch, KvLayout, Machine, Seq, attention, insn, native, relative_rms
from twinpilots.kernels.abi import Dtype, Op

TOLERANCE = dict.fromkeys(KV_DTYPES, 2e-6) | {Dtype.INT8: 1e-4}  # with int8 KV queries and probabilities are rounded to 16 bits


class Cache:
    """Random KV of some sequences in scattered pages; slots that hold no token are NaN (int8: their scales)."""

    def __init__(self, lengths, *, kv_heads, dim, page_size, dtype, seed=0):
        rng = np.random.default_rng(seed)
        counts = [-(-n // page_size) for n in lengths]
        order = rng.permutation(sum(counts) + 2)
        self.lists = [tuple(int(p) for p in order[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]
        self.layout = KvLayout(kv_heads, page_size, dim, dtype)
        self.pages = np.full((len(order), self.layout.page_bytes), 0xFF, np.uint8)
        self.k, self.v = [], []
        for pages, length in zip(self.lists, lengths, strict=True):
            for which, kept in ((0, self.k), (1, self.v)):
                values = rng.standard_normal((length, kv_heads, dim))
                places = [(self.pages[pages[t // page_size]], which, t % page_size) for t in range(length)]
                for place, row in zip(places, values, strict=True):
                    self.layout.write(*place, row)
                kept.append(np.array([self.layout.read(*place) for place in places], float).reshape(values.shape))


def run_attend(cache, seqs, q, *, dtype, window=0, scale=0.3, softcap=0.0, pool=0, group=0):
    """q [tokens, heads, dim] -> [tokens, heads, dim]."""
    machine, (tokens, heads, dim) = Machine(1 << 22), q.shape
    kv_heads, page_size = cache.layout.kv_heads, cache.layout.page_size
    ld = (heads + 2 * kv_heads) * dim
    qkv = np.full((tokens, ld), np.nan, np.float32)
    qkv[:, : heads * dim] = q.reshape(tokens, -1)
    dst, stored = machine.put(np.full((tokens, heads * dim + 1), 9, np.float32)), machine.put(cache.pages)
    stride = cache.pages[0].nbytes
    args = (dst, heads * dim + 1, machine.put(qkv), ld, heads, kv_heads, dim, stored, stride, page_size, dtype, window)
    assert machine.run([insn(Op.ATTEND, *args, f=(scale, softcap), glo=group, ghi=group + 1)], Batch(seqs, page_size=page_size), pool=pool) == 0
    out = machine.view(dst, np.float32, (tokens, heads * dim + 1))
    assert (out[:, -1] == 9).all()
    return out[:, :-1].reshape(q.shape).copy()


def wanted(cache, seqs, q, **options):
    rows, out = np.cumsum([0] + [s.query for s in seqs]), []
    for i, seq in enumerate(seqs):
        end = seq.context + seq.query
        out.append(attention(q[rows[i] : rows[i + 1]].astype(float), cache.k[i][:end], cache.v[i][:end], seq.context, **options))
    return np.concatenate(out)


def case(parts, *, heads, kv_heads, dim, page_size=16, dtype=Dtype.FP32, seed=0):
    """(query, context) per sequence -> cache, sequences, queries."""
    cache = Cache([q + c for q, c in parts], kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype, seed=seed)
    seqs = [Seq(q, context=c, pages=pages) for (q, c), pages in zip(parts, cache.lists, strict=True)]
    return cache, seqs, np.random.default_rng(seed + 99).standard_normal((sum(q for q, _ in parts), heads, dim)).astype(np.float32)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim, page_size", [(4, 2, 16, 16), (3, 1, 64, 16), (7, 1, 96, 32), (2, 2, 10, 4), (5, 1, 7, 3), (8, 1, 33, 100)])
def test_ragged_batch(isa, dtype, heads, kv_heads, dim, page_size):
    cache, seqs, q = case([(1, 0), (1, 149), (40, 0), (3, 64), (1, 63), (17, 5)], heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    assert relative_rms(run_attend(cache, seqs, q, dtype=dtype), wanted(cache, seqs, q, scale=0.3)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.INT8])
@pytest.mark.parametrize("window", [1, 5, 16, 64, 70])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_window_and_softcap(isa, window, softcap, dtype):
    cache, seqs, q = case([(90, 0), (1, 130), (20, 100)], heads=2, kv_heads=1, dim=8, dtype=dtype)
    found = run_attend(cache, seqs, q, dtype=dtype, window=window, softcap=softcap, scale=1.0)
    assert relative_rms(found, wanted(cache, seqs, q, window=window, softcap=softcap, scale=1.0)) < TOLERANCE[dtype]


def test_large_scores_do_not_overflow(isa):
    cache, seqs, q = case([(30, 40)], heads=2, kv_heads=2, dim=16)
    assert relative_rms(run_attend(cache, seqs, 50 * q, dtype=Dtype.FP32, scale=1.0), wanted(cache, seqs, 50 * q, scale=1.0)) < 1e-4


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.INT8])
def test_tokens_that_no_row_sees_are_never_read(isa, dtype):
    """Pages outside the window may have been given away, and poisoned."""
    cache, seqs, q = case([(2, 150)], heads=2, kv_heads=1, dim=16, dtype=dtype)
    clean = run_attend(cache, seqs, q, dtype=dtype, window=20)
    assert np.isfinite(clean).all()
    for page in seqs[0].pages[: (150 - 20) // 16]:
        cache.pages[page] = 0xFF
    assert np.array_equal(run_attend(cache, seqs, q, dtype=dtype, window=20), clean)


@pytest.mark.parametrize("poisoned", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.INT8])
def test_poison_in_a_token_that_is_seen_comes_out(isa, poisoned, dtype):
    cache, seqs, q = case([(1, 50)], heads=1, kv_heads=1, dim=16, dtype=dtype)
    page = cache.pages[seqs[0].pages[1]]
    (cache.layout.values if dtype == Dtype.FP32 else cache.layout.scales)(page)[poisoned, 0, 3] = np.nan
    assert np.isnan(run_attend(cache, seqs, q, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("dim", [20, 64], ids=["copied", "in place"])
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_chunks_or_threads(isa, pool, dtype, window, dim):
    cache, seqs, q = case([(1, 200), (75, 0), (5, 90)], heads=6, kv_heads=2, dim=dim, dtype=dtype)
    together = run_attend(cache, seqs, q, dtype=dtype, window=window, pool=pool)
    alone = run_attend(cache, seqs[:1], q[:1], dtype=dtype, window=window)
    assert np.array_equal(alone, together[:1])
    rows, context = 1, 0
    for chunk in (1, 30, 44):
        part = Seq(chunk, context=context, pages=seqs[1].pages)
        assert np.array_equal(run_attend(cache, [part], q[rows : rows + chunk], dtype=dtype, window=window), together[rows : rows + chunk])
        rows, context = rows + chunk, context + chunk


def test_only_the_asked_groups_are_attended(isa):
    cache, seqs, q = case([(2, 10), (3, 5)], heads=2, kv_heads=1, dim=8)
    seqs[1].group = 2
    out = run_attend(cache, seqs, q, dtype=Dtype.FP32, group=2)
    assert (out[:2] == 9).all()
    assert relative_rms(out[2:], wanted(cache, seqs, q, scale=0.3)[2:]) < 2e-6


@pytest.mark.parametrize("dim, page_size", [(64, 16), (20, 5)], ids=["in place", "copied"])
def test_int8_rows_have_the_same_bits_on_every_instruction_set(dim, page_size):
    cache, seqs, q = case([(1, 200), (75, 0), (5, 90)], heads=6, kv_heads=2, dim=dim, page_size=page_size, dtype=Dtype.INT8)
    found = []
    for level in range(1, native().best_isa + 1):
        native().set_isa(level)
        found.append(run_attend(cache, seqs, q, dtype=Dtype.INT8, window=120, softcap=2.0))
    native().set_isa(native().best_isa)
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_int8_scores_of_large_heads_do_not_overflow(isa):
    """A query like its key, both at the ends of their ranges: the largest whole number that a score can be."""
    cache = Cache([64], kv_heads=1, dim=1024, page_size=16, dtype=Dtype.INT8)
    place = cache.pages[cache.lists[0][2]], 0, 7
    cache.layout.write(*place, np.ones((1, 1024)))
    cache.k[0][39] = cache.layout.read(*place)
    seqs, q = [Seq(1, context=63, pages=cache.lists[0])], np.full((1, 1, 1024), 0.01, np.float32)
    assert relative_rms(run_attend(cache, seqs, q, dtype=Dtype.INT8), wanted(cache, seqs, q, scale=0.3)) < TOLERANCE[Dtype.INT8]


@pytest.mark.parametrize("dim, page_size", [(64, 16), (20, 5)], ids=["in place", "copied"])
@pytest.mark.parametrize("kv_heads", [8, 5])
@pytest.mark.parametrize("window", [0, 100])
def test_heads_that_are_attended_together_have_the_bits_of_heads_alone(isa, pool, dim, page_size, kv_heads, window):
    """Decoding sequences of int8 KV: four heads at a time in a batch, one or two of a sequence alone."""
    lengths = [(1, 200), (1, 63), (1, 64), (1, 0), (1, 130), (2, 97), (1, 255), (1, 10)]
    cache, seqs, q = case(lengths, heads=2 * kv_heads, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=Dtype.INT8)
    together = run_attend(cache, seqs, q, dtype=Dtype.INT8, window=window, pool=pool)
    assert relative_rms(together, wanted(cache, seqs, q, scale=0.3, window=window)) < TOLERANCE[Dtype.INT8]
    row = 0
    for seq in seqs:
        assert np.array_equal(run_attend(cache, [seq], q[row : row + seq.query], dtype=Dtype.INT8, window=window), together[row : row + seq.query])
        row += seq.query
