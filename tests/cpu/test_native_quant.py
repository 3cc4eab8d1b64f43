"""LINEAR, LINEAR_IN and EMBED with quantised weights against float64: every format, both ways to round activations, odd shapes; and bits that depend on nothing
but the row: not on the instruction set, the batch, the threads, nor on how the inputs are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cpu.native_twin import Machine, activate, insn, native, relative_rms, rows_batch
from tests.programs import random_blocks
from tests.unit.test_quant_format import QUANTIZED
from twinpilots.kernels import native as native_module
from twinpilots.kernels import quant_format
from twinpilots.kernels.abi import DTYPE_CODES, NULL, Act, Activations, Dtype, Epilogue, Op
from twinpilots.kernels.native import BAD_INSTRUCTION
from twinpilots.model.weight_format import FORMATS

FORMAT = pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
MODE = pytest.mark.parametrize("mode", list(Activations), ids=lambda mode: mode.name)
EXACT_ERROR = 4e-5  # of an output, relative RMS, against unrounded activations
FAST_ERROR = 1.2e-2
ROUNDING = 1e-6  # of an output against the rounded activations: fp32 noise


def rounded(x, mode):
    """The activations that the kernels multiply with, in float64: codes per group of 32 times their scale."""
    limit = np.float32(127 if mode == Activations.FAST else 32767)
    groups = np.asarray(x, np.float32).reshape(len(x), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(limit, top, out=np.zeros_like(top), where=top >= 1e-30)
    return (np.rint(groups * inverse).astype(float) * (top / limit).astype(float)).reshape(x.shape)


def run_linear(x, blocks, fmt, unit_rows, mode, *, epilogue=Epilogue.NONE, act=Act.SILU, bias=None, up=None, bias2=None, cap=0.0, pool=0):
    """dst[M, R] of one LINEAR, dst wider than needed and guarded."""
    rows, machine = len(blocks), Machine(1 << 23)
    packed = quant_format.pack_out(blocks, fmt, unit_rows) if up is None else quant_format.pack_gate_up(blocks, up, fmt, unit_rows)
    source = machine.put(np.pad(x, ((0, 0), (0, 3))).astype(np.float32))
    target = machine.put(np.full((x.shape[0], rows + 2), 777, np.float32))
    biases = [NULL if b is None else machine.put(b.astype(np.float32)) for b in (bias, bias2)]
    weights = machine.put(packed)
    args = (target, rows + 2, source, x.shape[1] + 3, weights, DTYPE_CODES[fmt.name], rows, x.shape[1], unit_rows, epilogue, act, *biases, mode)
    assert machine.run([insn(Op.LINEAR, *args, f=(cap,))], rows_batch(x.shape[0]), pool=pool) == 0
    out = machine.view(target, np.float32, (x.shape[0], rows + 2))
    assert (out[:, rows:] == 777).all(), "wrote beyond its columns"
    return out[:, :rows].copy()


def run_linear_in(x, blocks, fmt, mode, *, start=None, pool=0):
    """dst[M, N] of one LINEAR_IN; ``start``: accumulate onto it."""
    machine, columns = Machine(1 << 23), len(blocks)
    first = np.full((x.shape[0], columns + 2), 777, np.float32)
    if start is not None:
        first[:, :columns] = start
    target, source, weights = machine.put(first), machine.put(x.astype(np.float32)), machine.put(quant_format.pack_in(blocks, fmt))
    args = (target, columns + 2, source, x.shape[1], weights, DTYPE_CODES[fmt.name], x.shape[1], columns, int(start is not None), mode)
    assert machine.run([insn(Op.LINEAR_IN, *args)], rows_batch(x.shape[0]), pool=pool) == 0
    out = machine.view(target, np.float32, (x.shape[0], columns + 2))
    assert (out[:, columns:] == 777).all(), "wrote beyond its columns"
    return out[:, :columns].copy()


def random_case(seed, m, blocks, n, fmt):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, blocks * fmt.block)).astype(np.float32) * rng.uniform(0.1, 10, (m, 1)).astype(np.float32)
    weights = random_blocks(fmt, n, blocks, seed)
    return rng, x, weights, quant_format.dequantize(weights, fmt).astype(float)


SHAPES = [(1, 64, 64), (1, 130, 64), (2, 33, 20), (3, 128, 64), (5, 7, 8), (6, 192, 64), (9, 61, 48), (40, 70, 64)]


@FORMAT
@MODE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linears_match_float64(isa, shape, fmt, mode):
    m, n, unit = shape
    rng, x, blocks, w = random_case(1, m, 3, n, fmt)
    bias, start = rng.standard_normal(n), rng.standard_normal((m, n)).astype(np.float32)
    wanted, exact = rounded(x, mode) @ w.T, x.astype(float) @ w.T
    found = run_linear(x, blocks, fmt, unit, mode, bias=bias)
    assert relative_rms(found, wanted + bias) < ROUNDING
    assert relative_rms(found, exact + bias) < (FAST_ERROR if mode == Activations.FAST else EXACT_ERROR)
    assert relative_rms(run_linear_in(x, blocks, fmt, mode), wanted) < ROUNDING
    assert relative_rms(run_linear_in(x, blocks, fmt, mode, start=start), wanted + start) < ROUNDING


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(QUANTIZED), st.sampled_from(list(Activations)), st.integers(1, 17), st.integers(1, 3), st.integers(1, 150), st.integers(1, 64))
def test_odd_shapes(fmt, mode, m, blocks, n, unit):
    _, x, weights, w = random_case(2, m, blocks, n, fmt)
    used = rounded(x, mode)
    wanted, most = used @ w.T, 2 * ROUNDING * (np.abs(used) @ np.abs(w).T)  # where products cancel, a sum is as exact as its terms, not as its value
    assert (np.abs(run_linear(x, weights, fmt, unit, mode) - wanted) <= most).all()
    assert (np.abs(run_linear_in(x, weights, fmt, mode) - wanted) <= most).all()


@FORMAT
@pytest.mark.parametrize("unit", [4, 20, 64])
def test_activation_gate_and_softcap(isa, fmt, unit):
    rng, x, blocks, w = random_case(3, 7, 2, 90, fmt)
    x = x / np.float32(100)
    other, bias, bias2 = random_blocks(fmt, 90, 2, 9), rng.standard_normal(90), rng.standard_normal(90)
    gate = rounded(x, Activations.EXACT) @ w.T + bias
    up = rounded(x, Activations.EXACT) @ quant_format.dequantize(other, fmt).astype(float).T + bias2
    for act in (Act.SILU, Act.GELU_TANH):
        options = {"act": act, "bias": bias}
        assert relative_rms(run_linear(x, blocks, fmt, unit, 0, epilogue=Epilogue.ACT, **options), activate(act, gate)) < 2 * ROUNDING
        found = run_linear(x, blocks, fmt, unit, NULL, epilogue=Epilogue.ACT_MUL, up=other, bias2=bias2, **options)
        assert relative_rms(found, activate(act, gate) * up) < 2 * ROUNDING
    capped = run_linear(x, blocks, fmt, unit, 0, epilogue=Epilogue.SOFTCAP, bias=bias, cap=5.0)
    assert relative_rms(capped, 5 * np.tanh(gate / 5)) < 2 * ROUNDING


@FORMAT
@MODE
def test_every_instruction_set_gives_the_same_bits(fmt, mode):
    rng, x, blocks, _ = random_case(4, 14, 3, 150, fmt)
    start, found, before = rng.standard_normal((14, 150)).astype(np.float32), [], native().isa
    try:
        for level in range(native().best_isa + 1):
            native().set_isa(level)
            found.append((run_linear(x, blocks, fmt, 64, mode), run_linear_in(x, blocks, fmt, mode, start=start)))
    finally:
        native().set_isa(before)
    for linear, linear_in in found[1:]:
        assert np.array_equal(linear, found[0][0])
        assert np.array_equal(linear_in, found[0][1])


@FORMAT
@MODE
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_the_threads_nor_on_the_units(isa, pool, fmt, mode):
    _, x, blocks, _ = random_case(5, 220, 3, 164, fmt)
    wide = run_linear(x, blocks, fmt, 64, mode, pool=pool)
    assert np.array_equal(wide, run_linear_in(x, blocks, fmt, mode, pool=pool))
    assert np.array_equal(wide[:9], run_linear(x[:9], blocks, fmt, 20, mode))
    for rows in (slice(0, 1), slice(17, 19), slice(3, 10), slice(5, 45)):
        assert np.array_equal(run_linear(x[rows], blocks, fmt, 64, mode), wide[rows])
        assert np.array_equal(run_linear_in(x[rows], blocks, fmt, mode), wide[rows])


@FORMAT
@MODE
def test_a_wide_matrix_gives_the_bits_of_its_narrow_panels(isa, fmt, mode):
    """Columns that lie kilobytes apart are read in another order, and of some formats unpacked in another place."""
    _, x, blocks, _ = random_case(8, 8, 512 // fmt.block, 600, fmt)
    for rows in (1, 3, 8):
        assert np.array_equal(run_linear_in(x[:rows], blocks, fmt, mode), run_linear(x[:rows], blocks, fmt, 64, mode))


@FORMAT
@MODE
def test_an_accumulating_call_continues_the_chain_of_the_call_before(isa, fmt, mode):
    _, x, blocks, _ = random_case(6, 3, 5, 70, fmt)
    cut = 2 * fmt.block
    first = run_linear_in(x[:, :cut], blocks[:, :2], fmt, mode)
    assert np.array_equal(run_linear_in(x[:, cut:], blocks[:, 2:], fmt, mode, start=first), run_linear_in(x, blocks, fmt, mode))


@FORMAT
@MODE
def test_extreme_codes_and_activations_do_not_overflow(isa, fmt, mode):
    blocks = random_blocks(fmt, 40, 3)
    scale_bytes = {"q8_0": slice(0, 2), "q4_0": slice(0, 2), "q5_0": slice(0, 2), "q6_k": slice(208, 210)}.get(fmt.name, slice(0, 4))
    kept = blocks[:, :, scale_bytes].copy()
    for byte in (0xFF, 0x00, 0x80, 0x7F):
        blocks[:] = byte
        blocks[:, :, scale_bytes] = kept
        x = np.where(np.arange(3 * fmt.block) % 3 == 0, -1, 1).astype(np.float32)[None] * np.array([[1.0], [-3e4]], np.float32)
        x = np.concatenate([x, np.abs(x)])
        w = quant_format.dequantize(blocks, fmt).astype(float)
        np.testing.assert_allclose(run_linear(x, blocks, fmt, 64, mode), x @ w.T, rtol=1e-5, atol=1e-5 * np.abs(x @ np.abs(w).T).max())


@MODE
def test_what_is_not_a_number_is_passed_on_and_what_is_zero_stays_zero(isa, mode):
    fmt = next(f for f in QUANTIZED if f.name == "q4_1")
    _, x, blocks, _ = random_case(7, 5, 3, 64, fmt)
    x[0, 40], x[1, 3], x[2], x[3] = np.nan, -np.inf, 0, 1e-38
    found = run_linear(x, blocks, fmt, 64, mode)
    assert not np.isfinite(found[:2]).any()
    assert (found[2:4] == 0).all()
    assert np.isfinite(found[4]).all()


@FORMAT
@pytest.mark.parametrize("unit", [1, 20, 64])
def test_embedding_reads_a_column_of_a_panel(isa, fmt, unit):
    machine, blocks = Machine(), random_blocks(fmt, 50, 2)
    table, target = machine.put(quant_format.pack_out(blocks, fmt, unit)), machine.put(np.zeros((4, 2 * fmt.block), np.float32))
    args = (target, 2 * fmt.block, table, 1, DTYPE_CODES[fmt.name], 2 * fmt.block, unit, 50, NULL, 0, 0)
    batch = rows_batch(4, tokens=[0, 49, 20, 7])
    assert machine.run([insn(Op.EMBED, *args, f=(2.0,))], batch) == 0
    wanted = 2 * quant_format.dequantize(blocks, fmt)[[0, 49, 20, 7]]
    assert np.array_equal(machine.view(target, np.float32, (4, 2 * fmt.block)), wanted)


def test_malformed_instructions_are_refused():
    machine = Machine()
    target, width = machine.put(np.zeros((1, 64), np.float32)), 32
    for dtype, inputs, mode in ((Dtype.INT8, 32, 0), (DTYPE_CODES["q4_1"], 40, 0), (DTYPE_CODES["q4_k"], 128, 0), (DTYPE_CODES["q8_0"], 32, 2)):
        assert (
            machine.run([insn(Op.LINEAR, target, 64, target, 64, target, dtype, width, inputs, 64, 0, 0, NULL, NULL, mode)], rows_batch(1)) == BAD_INSTRUCTION
        )
        assert machine.run([insn(Op.LINEAR_IN, target, 64, target, 64, target, dtype, inputs, width, 0, mode)], rows_batch(1)) == BAD_INSTRUCTION
    for layout, dtype in ((0, DTYPE_CODES["q8_0"]), (1, Dtype.INT8)):
        assert machine.run([insn(Op.EMBED, target, 64, target, layout, dtype, 32, 64, 1, NULL, 0, 0)], rows_batch(1)) == BAD_INSTRUCTION


@FORMAT
def test_the_library_quantises_and_packs_on_a_pool(pool, fmt):
    blocks = random_blocks(fmt, 21, 3)
    panel = np.full((3, 30 * fmt.block_bytes), 7, np.uint8)
    for column, part in ((0, blocks[:9]), (9, blocks[::-1])):
        native().pack_columns(np.ascontiguousarray(part), DTYPE_CODES[fmt.name], panel, 30, column, pool=pool)
    wanted = quant_format.dequantize(np.concatenate([blocks[:9], blocks[::-1]]), fmt)
    assert np.array_equal(quant_format.unpack_in(panel.reshape(-1), fmt, 3 * fmt.block, 30), wanted)
    if fmt.name in ("q8_0", "q4_1"):
        weights, made = np.ascontiguousarray(wanted), np.zeros((30, 3, fmt.block_bytes), np.uint8)
        native().quantize(weights, DTYPE_CODES[fmt.name], made, pool=pool)
        np.testing.assert_allclose(quant_format.dequantize(made, fmt), weights, atol=0 if fmt.name == "q4_1" else 0.6)


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_every_instruction_set_quantises_to_the_twins_bytes(isa, name, monkeypatch):
    fmt, rng = FORMATS[name], np.random.default_rng(7)
    weights = rng.standard_normal((90, 256)).astype(np.float32) * np.exp(rng.uniform(-12, 8, (90, 1))).astype(np.float32)
    weights[:30] = rng.integers(0, np.arange(2, 32)[:, None], (30, 256)) * rng.uniform(0.01, 1, (30, 1))  # grids of 1 to 30 steps
    weights[30, :64], weights[31, 5], weights[32], weights[33, ::2] = 0, 1e5, -0.0, 3.25
    found = quant_format.quantize(weights, fmt)
    monkeypatch.setattr(native_module, "load", lambda: None)
    assert np.array_equal(found, quant_format.quantize(weights, fmt))
