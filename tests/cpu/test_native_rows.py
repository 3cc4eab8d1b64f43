"""EMBED, NORM, ADD and ROPE_APPEND against float64 numpy, on odd shapes and every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.native_twin import (
    DTYPES,
    KV_DTYPES,
    Batch,
    KvLayout,
    Machine,
    Seq,
    decode,
    encode,
    insn,
    layer_norm,
    quantize_row,
    rms_norm,
    rotate_half,
    rows_batch,
)
from twinpilots.kernels import format as weight_format
from twinpilots.kernels.abi import NULL, Dtype, NormKind, Op

WIDTHS = [1, 7, 40, 576]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [0, 8, 20])
def test_embed_gathers_rows_of_either_layout_and_adds_positions(isa, dtype, unit):
    rng, width, vocab = np.random.default_rng(0), 37, 50
    table, positions = encode(rng.standard_normal((vocab, width)), dtype), encode(rng.standard_normal((30, width)), Dtype.FP16)
    machine, batch = Machine(), Batch([Seq(4, context=3), Seq(2)], tokens=[0, 49, 40, 39, 7, 48])
    stored = machine.put(weight_format.pack_out(table, unit) if unit else table)
    dst = machine.put(np.full((6, width + 1), 5, np.float32))
    args = (dst, width + 1, stored, int(unit > 0), dtype, width, unit, vocab)
    wanted = decode(table, dtype)[[0, 49, 40, 39, 7, 48]].astype(float) * 1.5
    assert machine.run([insn(Op.EMBED, *args, NULL, 0, 0, f=(1.5,))], batch) == 0
    np.testing.assert_allclose(machine.view(dst, np.float32, (6, width + 1))[:, :width], wanted, rtol=1e-7)
    assert machine.run([insn(Op.EMBED, *args, machine.put(positions), 2, Dtype.FP16, f=(1.5,))], batch) == 0
    found = machine.view(dst, np.float32, (6, width + 1))
    np.testing.assert_allclose(found[:, :width], wanted + decode(positions, Dtype.FP16)[[5, 6, 7, 8, 2, 3]], rtol=1e-6, atol=1e-6)
    assert (found[:, width] == 5).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_norms(isa, width):
    rng = np.random.default_rng(1)
    x, gain, bias = rng.standard_normal((5, width)) * 3 + 1, rng.standard_normal(width), rng.standard_normal(width)
    machine = Machine()
    src, dst, stored_gain, stored_bias = (machine.put(v.astype(np.float32)) for v in (x, x, gain, bias))
    assert machine.run([insn(Op.NORM, dst, width, src, width, stored_gain, NULL, width, NormKind.RMS, f=(1e-5,))], rows_batch(5)) == 0
    np.testing.assert_allclose(machine.view(dst, np.float32, (5, width)), rms_norm(x, gain, 1e-5), rtol=1e-6, atol=1e-6)
    assert machine.run([insn(Op.NORM, dst, width, src, width, stored_gain, stored_bias, width, NormKind.LAYER, f=(1e-5,))], rows_batch(5)) == 0
    np.testing.assert_allclose(machine.view(dst, np.float32, (5, width)), layer_norm(x, gain, bias, 1e-5), rtol=1e-6, atol=2e-6)


def test_norm_of_logit_rows_gathers_them(isa):
    x, machine = np.random.default_rng(2).standard_normal((6, 16)).astype(np.float32), Machine()
    src, dst, gain = machine.put(x), machine.put(np.zeros((2, 16), np.float32)), machine.put(np.ones(16, np.float32))
    assert machine.run([insn(Op.NORM, dst, 16, src, 16, gain, NULL, 16, NormKind.RMS, f=(1e-6,), row_kind=1)], rows_batch(6, logit_rows=[1, 5])) == 0
    np.testing.assert_allclose(machine.view(dst, np.float32, (2, 16)), rms_norm(x[[1, 5]].astype(float), np.ones(16), 1e-6), rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("present", range(8), ids=lambda bits: f"p{bits & 1}q{bits >> 1 & 1}b{bits >> 2}")
def test_add_of_the_terms_that_are_there(isa, width, present):
    rng, machine = np.random.default_rng(3), Machine()
    x, p, q = (rng.standard_normal((4, width)).astype(np.float32) for _ in range(3))
    bias, gain = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    terms = [term for bit, term in enumerate((p, q, bias)) if present >> bit & 1]
    where = [machine.put(term) if present >> bit & 1 else NULL for bit, term in enumerate((p, q, bias))]
    stored, total = machine.put(x), sum((term.astype(float) for term in terms), np.zeros((4, width)))
    args = (stored, width, where[0], width, where[1], width, where[2])
    assert machine.run([insn(Op.ADD, *args, NULL, NULL, 0, width, f=(1e-6,))], rows_batch(4)) == 0
    np.testing.assert_allclose(machine.view(stored, np.float32, (4, width)), x + total, rtol=1e-6, atol=1e-6)
    if present & 3:  # a norm of nothing but the bias is not asked for
        machine.view(stored, np.float32, (4, width))[:] = x
        assert machine.run([insn(Op.ADD, *args, machine.put(gain), NULL, NormKind.RMS, width, f=(1e-6,))], rows_batch(4)) == 0
        np.testing.assert_allclose(machine.view(stored, np.float32, (4, width)), x + rms_norm(total, gain, 1e-6), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim, rotary", [(4, 2, 16, 16), (3, 3, 10, 6), (6, 1, 5, 0), (2, 1, 64, 64)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_append(isa, dtype, heads, kv_heads, dim, rotary, norms):
    rng, machine = np.random.default_rng(4), Machine()
    batch = Batch([Seq(3, context=6, pages=(2, 0)), Seq(2, pages=(3,))], page_size=8, rope_offset=1)
    ld, tokens = (heads + 2 * kv_heads) * dim + 1, 5
    qkv = rng.standard_normal((tokens, ld)).astype(np.float32)
    angles = rng.standard_normal((20, rotary // 2)).astype(np.float32)
    cos, sin, gains = np.cos(angles), np.sin(angles), rng.standard_normal((2, dim)).astype(np.float32)
    layout = KvLayout(kv_heads, 8, dim, dtype)
    page_bytes = layout.page_bytes
    where, pages = machine.put(qkv), machine.put(np.zeros(5 * (page_bytes + 64), np.uint8))
    gain_at = [machine.put(g) if norms else NULL for g in gains]
    tables = [machine.put(t) if rotary else NULL for t in (cos, sin)]
    args = (where, ld, *gain_at, *tables, rotary, heads, kv_heads, dim, pages, page_bytes + 64, 8, dtype)
    assert machine.run([insn(Op.ROPE_APPEND, *args, f=(1e-5,))], batch) == 0

    positions = np.array([6, 7, 8, 0, 1])
    parts = np.split(qkv[:, : ld - 1].reshape(tokens, -1, dim).astype(float), [heads, heads + kv_heads], axis=1)
    for which in (0, 1):
        if norms:
            parts[which] = rms_norm(parts[which], gains[which], 1e-5)
        if rotary:
            parts[which] = rotate_half(parts[which], cos[positions + 1][:, None], sin[positions + 1][:, None])
    out = machine.view(where, np.float32, (tokens, ld))
    np.testing.assert_allclose(out[:, : heads * dim].reshape(parts[0].shape), parts[0], rtol=1e-5, atol=2e-6)
    assert np.array_equal(out[:, heads * dim :], qkv[:, heads * dim :]), "k and v columns are read only"
    rtol, atol = {Dtype.FP32: (1e-6, 2e-6), Dtype.BF16: (2**-8, 2e-6), Dtype.FP16: (2**-11, 2e-6), Dtype.INT8: (0, 0.5 / 127 * 1.01)}[dtype]
    for row, slot in enumerate([2 * 8 + 6, 2 * 8 + 7, 0, 3 * 8, 3 * 8 + 1]):
        page = machine.view(pages + slot // 8 * (page_bytes + 64), np.uint8, (page_bytes,))
        for which, wanted in enumerate(parts[1:]):
            unit = np.abs(wanted[row]).max() if dtype == Dtype.INT8 else 1.0  # half a step of the row's scale
            np.testing.assert_allclose(layout.read(page, which, slot % 8), wanted[row], rtol=rtol, atol=atol * unit)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.FP16])
def test_kv_is_rounded_to_nearest_even_with_subnormals_and_overflow(isa, dtype):
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 20000, dtype=np.uint64).astype(np.uint32)
    edges = np.array([65504, 65519.9, 65520, -65536, 6e-8, 2.98e-8, 0, -0.0], np.float32)
    v = np.concatenate([bits.view(np.float32), (rng.standard_normal(20000) * 1e-6).astype(np.float32), edges])
    v = v[np.isfinite(v)]
    machine, n = Machine(), len(v)
    where, page = machine.put(np.concatenate([np.zeros(2 * n, np.float32), v])), machine.put(np.zeros(2 * n, np.uint16))
    program = [insn(Op.ROPE_APPEND, where, 3 * n, NULL, NULL, NULL, NULL, 0, 1, 1, n, page, 4 * n, 1, dtype, f=(1e-5,))]
    assert machine.run(program, Batch([Seq(1, pages=(0,))], page_size=1)) == 0
    with np.errstate(over="ignore"):
        assert np.array_equal(machine.view(page, np.uint16, (2, n))[1], encode(v, dtype))


def appended_int8(v):
    """(codes, scale) of one head's values."""
    machine, n = Machine(), len(v)
    layout = KvLayout(1, 1, n, Dtype.INT8)
    where, pages = machine.put(np.concatenate([np.zeros(2 * n, np.float32), v])), machine.put(np.zeros(layout.page_bytes, np.uint8))
    program = [insn(Op.ROPE_APPEND, where, 3 * n, NULL, NULL, NULL, NULL, 0, 1, 1, n, pages, layout.page_bytes, 1, Dtype.INT8, f=(1e-5,))]
    assert machine.run(program, Batch([Seq(1, pages=(0,))], page_size=1)) == 0
    page = machine.view(pages, np.uint8, (layout.page_bytes,))
    return layout.values(page)[1, 0, 0].copy(), layout.scales(page)[1, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-44, 0.0])
def test_int8_kv_is_rounded_to_nearest_even_of_its_largest(isa, scale):
    v = (np.random.default_rng(7).standard_normal(1001) * np.float32(scale)).astype(np.float32)
    if scale == 1.0:
        v = np.concatenate([[127.0], np.arange(-126.5, 127)]).astype(np.float32)  # ties
    codes, found = appended_int8(v)
    wanted, wanted_scale = quantize_row(v)
    assert found == wanted_scale
    assert np.array_equal(codes, np.clip(wanted, -127, 127))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_kv_of_what_is_not_finite_is_not_a_number(isa, bad):
    for at in (0, 3, 8):
        v = np.arange(1, 10, dtype=np.float32)
        v[at] = bad
        assert np.isnan(appended_int8(v)[1])


def test_rows_are_the_same_on_two_threads(isa, pool):
    rng, width = np.random.default_rng(6), 300
    x, machine = rng.standard_normal((200, width)).astype(np.float32), Machine(1 << 23)
    src, one, two, gain = machine.put(x), machine.put(x), machine.put(x), machine.put(np.ones(width, np.float32))
    for dst, threads in ((one, 0), (two, pool)):
        assert machine.run([insn(Op.NORM, dst, width, src, width, gain, NULL, width, NormKind.RMS, f=(1e-5,))], rows_batch(200), pool=threads) == 0
    assert np.array_equal(machine.view(one, np.float32, x.shape), machine.view(two, np.float32, x.shape))
