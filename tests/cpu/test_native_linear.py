"""LINEAR and LINEAR_IN against float64: odd shapes, every weight type and instruction set; and the promise that a row's bits depend on nothing but itself."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.native_twin import DTYPES, Machine, activate, decode, encode, insn, relative_rms, rows_batch
from twinpilots.kernels import format as weight_format
from twinpilots.kernels.abi import NULL, Act, Dtype, Epilogue, Op
from twinpilots.kernels.native import AMX, EMULATED_TILES

TILED = (AMX, EMULATED_TILES)
SHAPES = [
    (1, 5, 3, 4), (1, 64, 64, 64), (1, 130, 200, 64), (2, 33, 70, 20), (3, 96, 128, 64), (5, 40, 36, 8), (7, 64, 192, 64),
    (8, 257, 96, 64), (11, 50, 64, 64), (13, 64, 100, 32), (40, 150, 130, 64), (200, 70, 48, 16),
    (1, 70, 970, 64), (2, 33, 700, 64), (3, 21, 520, 64), (1, 40, 1600, 128), (2, 40, 500, 128),
]  # fmt: skip


def run_linear(x, w, dtype, unit_rows, *, epilogue=Epilogue.NONE, act=Act.SILU, bias=None, up=None, bias2=None, cap=0.0, pool=0):
    """dst[M, R] of one LINEAR; ``w`` [R, K] as stored (``up`` the up half), dst wider than needed and guarded."""
    rows, machine = w.shape[0], Machine(1 << 23)
    packed = weight_format.pack_out(w, unit_rows) if up is None else weight_format.pack_gate_up(w, up, unit_rows)
    source = machine.put(np.pad(x, ((0, 0), (0, 3))).astype(np.float32))
    target = machine.put(np.full((x.shape[0], rows + 2), 777, np.float32))
    biases = [NULL if b is None else machine.put(b.astype(np.float32)) for b in (bias, bias2)]
    args = (target, rows + 2, source, x.shape[1] + 3, machine.put(packed), dtype, rows, x.shape[1], unit_rows, epilogue, act, *biases)
    assert machine.run([insn(Op.LINEAR, *args, f=(cap,))], rows_batch(x.shape[0]), pool=pool) == 0
    out = machine.view(target, np.float32, (x.shape[0], rows + 2))
    assert (out[:, rows:] == 777).all(), "wrote beyond its columns"
    return out[:, :rows].copy()


def run_linear_in(x, w, dtype, *, start=None, pool=0):
    """dst[M, N] of one LINEAR_IN; ``w`` [N, K] as stored; ``start``: accumulate onto it."""
    machine, columns = Machine(1 << 23), w.shape[0]
    first = np.full((x.shape[0], columns + 2), 777, np.float32)
    if start is not None:
        first[:, :columns] = start
    target = machine.put(first)
    args = (
        target,
        columns + 2,
        machine.put(x.astype(np.float32)),
        x.shape[1],
        machine.put(weight_format.pack_in(w)),
        dtype,
        x.shape[1],
        columns,
        int(start is not None),
    )
    assert machine.run([insn(Op.LINEAR_IN, *args)], rows_batch(x.shape[0]), pool=pool) == 0
    out = machine.view(target, np.float32, (x.shape[0], columns + 2))
    assert (out[:, columns:] == 777).all(), "wrote beyond its columns"
    return out[:, :columns].copy()


def random_case(seed, m, k, n, dtype):
    rng = np.random.default_rng(seed)
    return rng, rng.standard_normal((m, k)).astype(np.float32), encode(rng.standard_normal((n, k)) / np.sqrt(k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_matches_float64(isa_or_tiles, shape, dtype):
    m, k, n, unit = shape
    rng, x, w = random_case(1, m, k, n, dtype)
    bias = rng.standard_normal(n)
    assert relative_rms(run_linear(x, w, dtype, unit, bias=bias), x.astype(float) @ decode(w, dtype).T.astype(float) + bias) < 1e-6


@pytest.mark.parametrize("act", list(Act))
@pytest.mark.parametrize("unit", [4, 20, 64])
def test_activation_and_gate(isa, act, unit):
    rng, x, w = random_case(2, 9, 50, 90, Dtype.FP32)
    w, up, bias, bias2 = 3 * w, rng.standard_normal((90, 50)).astype(np.float32), rng.standard_normal(90), rng.standard_normal(90)
    gate = x.astype(float) @ w.T + bias
    np.testing.assert_allclose(run_linear(x, w, Dtype.FP32, unit, epilogue=Epilogue.ACT, act=act, bias=bias), activate(act, gate), rtol=2e-6, atol=2e-6)
    wanted = activate(act, gate) * (x.astype(float) @ up.T + bias2)
    found = run_linear(x, w, Dtype.FP32, unit, epilogue=Epilogue.ACT_MUL, act=act, bias=bias, up=up, bias2=bias2)
    assert relative_rms(found, wanted) < 1e-6


@pytest.mark.parametrize("act", list(Act))
def test_activations_are_accurate_over_their_whole_range(isa, act):
    x = np.concatenate([np.linspace(-30, 30, 4001), np.geomspace(1e-6, 1, 500), -np.geomspace(1e-6, 1, 500)]).astype(np.float32)[:, None]
    found = run_linear(x, np.ones((1, 1), np.float32), Dtype.FP32, 4, epilogue=Epilogue.ACT, act=act)
    wanted = activate(act, x.astype(float))
    far = (x < -4) & (act == Act.GELU)  # 1 + erf cancels there, as it does in the reference: absolute accuracy only
    assert np.abs(found - wanted)[~far].max(initial=0) < 1e-6 * 30
    relative = np.abs(found - wanted)[~far & (x > -3)] / np.maximum(np.abs(wanted[~far & (x > -3)]), 1e-30)
    assert relative.max() < (1e-6 if act != Act.GELU else 1e-4)


def test_softcap_is_accurate_for_small_and_large_logits(isa):
    x = np.concatenate([np.geomspace(1e-4, 1e4, 999), -np.geomspace(1e-4, 1e4, 999)]).astype(np.float32)[:, None]
    found = run_linear(x, np.ones((1, 1), np.float32), Dtype.FP32, 4, epilogue=Epilogue.SOFTCAP, cap=30.0)
    np.testing.assert_allclose(found, 30 * np.tanh(x.astype(float) / 30), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(m, k, n) for m, k, n, _ in SHAPES], ids=str)
def test_linear_in_matches_float64(isa_or_tiles, shape, dtype):
    rng, x, w = random_case(3, *shape, dtype)
    start = rng.standard_normal((shape[0], shape[2])).astype(np.float32)
    product = x.astype(float) @ decode(w, dtype).T.astype(float)
    assert relative_rms(run_linear_in(x, w, dtype), product) < 1e-6
    assert relative_rms(run_linear_in(x, w, dtype, start=start), product + start) < 1e-6


def test_an_accumulating_call_continues_the_chain_of_the_call_before(isa_or_tiles):
    _, x, w = random_case(4, 3, 100, 130, Dtype.BF16)
    cut = 32 if isa_or_tiles in TILED else 36  # tiles add 32 inputs at a time
    first = run_linear_in(x[:, :cut], np.ascontiguousarray(w[:, :cut]), Dtype.BF16)
    both = run_linear_in(x[:, cut:], np.ascontiguousarray(w[:, cut:]), Dtype.BF16, start=first)
    assert np.array_equal(both, run_linear_in(x, w, Dtype.BF16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [20, 64])
def test_a_rows_bits_depend_neither_on_the_batch_nor_on_the_threads(isa_or_tiles, pool, dtype, unit):
    _, x, w = random_case(5, 300, 200, 164, dtype)
    wide = run_linear(x, w, dtype, unit, pool=pool), run_linear_in(x, w, dtype, pool=pool)
    for rows in (slice(0, 1), slice(17, 18), slice(3, 10), slice(0, 8), slice(5, 45)):
        assert np.array_equal(run_linear(x[rows], w, dtype, unit), wide[0][rows])
        assert np.array_equal(run_linear_in(x[rows], w, dtype), wide[1][rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "unit"),  # with and without pairs of vectors and a single one left over, for every width of vectors; panels that are read side by side
    [(16, 16), (104, 104), (240, 240), (248, 248), (990, 64), (1600, 128)],
)
def test_up_to_four_rows_have_the_bits_that_they_have_among_many(isa_or_tiles, pool, dtype, columns, unit):
    _, x, w = random_case(8, 40, 333, columns, dtype)
    many = run_linear(x, w, dtype, unit), run_linear_in(x, w, dtype)
    for few in range(1, 5):
        assert np.array_equal(run_linear(x[7 : 7 + few], w, dtype, unit, pool=pool), many[0][7 : 7 + few])
        assert np.array_equal(run_linear_in(x[7 : 7 + few], w, dtype, pool=pool), many[1][7 : 7 + few])


def test_an_output_is_one_ascending_chain():
    """The portable kernel rounds each product: its bits are those of the plain loop."""
    from tests.cpu.native_twin import native

    before = native().isa
    native().set_isa(0)
    try:
        _, x, w = random_case(6, 9, 150, 70, Dtype.BF16)
        values, chain = decode(w, Dtype.BF16), np.zeros((9, 70), np.float32)
        for k in range(150):
            chain += x[:, k : k + 1] * values[None, :, k]
        assert np.array_equal(run_linear(x, w, Dtype.BF16, 64), chain)
        assert np.array_equal(run_linear_in(x, w, Dtype.BF16), chain)
    finally:
        native().set_isa(before)


def test_instruction_sets_agree_but_for_the_fused_rounding():
    from tests.cpu.native_twin import native

    _, x, w = random_case(7, 20, 300, 164, Dtype.FP16)
    found, before = [], native().isa
    for level in range(native().best_isa + 1):
        native().set_isa(level)
        found.append(run_linear(x, w, Dtype.FP16, 64))
    native().set_isa(before)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=2e-6)
    for other in found[2:]:
        assert np.array_equal(other, found[1])


def test_every_16_bit_pattern_is_read_exactly(isa_or_tiles):
    for dtype in (Dtype.BF16, Dtype.FP16):
        words = np.arange(1 << 16, dtype=np.uint16)
        values = decode(words, dtype)
        finite = words[np.isfinite(values)]
        found, wanted = run_linear(np.ones((1, 1), np.float32), finite[:, None], dtype, 64), values[np.isfinite(values)]
        if isa_or_tiles in TILED and dtype == Dtype.BF16:  # tiles take denormals for zeros
            wanted = np.where(np.abs(wanted) < np.finfo(np.float32).tiny, 0, wanted)
        assert np.array_equal(found[0], wanted)


@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linears_over_one_input_run_together_as_they_run_alone(isa_or_tiles, pool, dtype, tokens):
    """q, k and v are dealt to the threads at once; a linear over another input that follows is not, and neither is one after an event."""
    rng, machine, width = np.random.default_rng(5), Machine(1 << 23), 70
    x, other = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    at = machine.put(x)
    inputs, sources = (x, x, other, x), (at, at, machine.put(other), at)
    weights = [encode(rng.standard_normal((rows, width)), dtype) for rows in (300, 64, 70, 90)]
    for threads in (0, pool):
        for record in (-1, 7):
            targets = [machine.put(np.zeros((tokens, len(w)), np.float32)) for w in weights]
            program = [
                insn(Op.LINEAR, target, len(w), source, width, machine.put(weight_format.pack_out(w, 64)), dtype, len(w), width, 64, Epilogue.NONE, Act.SILU)
                for target, source, w in zip(targets, sources, weights, strict=True)
            ]
            program[0]["record"] = record
            trace = machine.put(np.zeros((len(program), 3), np.int64))
            assert machine.run(program, rows_batch(tokens), pool=threads, trace=trace) == 0
            for target, w, source in zip(targets, weights, inputs, strict=True):
                np.testing.assert_array_equal(machine.view(target, np.float32, (tokens, len(w))), run_linear(source, w, dtype, 64))
            times = machine.view(trace, np.int64, (len(program), 3))
            assert (np.diff(times.ravel()) >= 0).all() and (times[:, 2] > times[:, 1]).all(), "every linear has a time of its own, one after the other"
