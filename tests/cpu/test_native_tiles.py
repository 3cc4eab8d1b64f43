"""Linears by tiles, over the tiles' arithmetic in plain C++ (and over the instructions where they are): the documented sums to the last bit, nothing of an
activation lost, and odd values where they belong. tests/cpu/test_native_linear.py holds the same kernels to the promises of all instruction sets."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.native_twin import activate, decode, encode, native, relative_rms
from tests.cpu.test_native_linear import TILED, random_case, run_linear, run_linear_in
from twinpilots.kernels.abi import Act, Dtype, Epilogue


@pytest.fixture(params=TILED, ids=["amx", "amx-emulated"])
def tiles(request):
    if request.param not in native().isas:
        pytest.skip("this machine has no tiles")
    before = native().isa
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


def terms(x):
    """Three of 8 bits each that add up to x."""
    found, rest = [], x.astype(np.float32)
    for _ in range(3):
        top = (rest.view(np.uint32) & 0xFFFF0000).view(np.float32)
        found.append(top)
        rest = rest - top
    return found


def tile_sums(x, w):
    """x [M, K] @ w [N, K].T as TDPBF16PS adds: per 32 inputs and term the even and the odd products in two chains of fused steps, then both onto the sum.
    A step in float64 rounds once more, at 2^-53: with these inputs never differently."""
    k = -(-x.shape[1] // 32) * 32
    x, w = (np.pad(a, ((0, 0), (0, k - a.shape[1]))) for a in (x, w))
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k0 in range(0, k, 32):
        for term in terms(x):
            chains = [np.zeros_like(total), np.zeros_like(total)]
            for i in range(32):
                chains[i % 2] = (chains[i % 2] + term[:, None, k0 + i].astype(float) * w[None, :, k0 + i]).astype(np.float32)
            total = total + (chains[0] + chains[1])
    return total


@pytest.mark.parametrize("shape", [(1, 40, 20, 64), (5, 100, 70, 64), (37, 333, 130, 48), (50, 600, 96, 96), (200, 64, 33, 16)], ids=str)
def test_a_sum_is_the_documented_one_to_the_last_bit(tiles, pool, shape):
    m, k, n, unit = shape  # one block of rows and several, pairs of blocks and single ones, several tiles of k, edges of every kind
    _, x, w = random_case(1, m, k, n, Dtype.BF16)
    wanted = tile_sums(x, decode(w, Dtype.BF16))
    assert np.array_equal(run_linear(x, w, Dtype.BF16, unit, pool=pool), wanted)
    assert np.array_equal(run_linear_in(x, w, Dtype.BF16, pool=pool), wanted)


@pytest.mark.parametrize("unit", [20, 64])
def test_gate_and_up_halves_biases_and_soft_cap_follow_the_sums(tiles, unit):
    rng, x, w = random_case(4, 37, 90, 90, Dtype.BF16)
    up, bias, bias2 = encode(rng.standard_normal((90, 90)), Dtype.BF16), rng.standard_normal(90), rng.standard_normal(90)
    gate = x.astype(float) @ decode(w, Dtype.BF16).T + bias
    found = run_linear(x, w, Dtype.BF16, unit, epilogue=Epilogue.ACT_MUL, bias=bias, up=up, bias2=bias2)
    assert relative_rms(found, activate(Act.SILU, gate) * (x.astype(float) @ decode(up, Dtype.BF16).T + bias2)) < 1e-6
    assert relative_rms(run_linear(x, w, Dtype.BF16, unit, epilogue=Epilogue.SOFTCAP, bias=bias, cap=2.0), 2 * np.tanh(gate / 2)) < 1e-6


def test_nothing_of_an_activation_is_lost(tiles):
    rng = np.random.default_rng(2)
    bits = rng.integers(0x0D800000, 0x7F7FFFFF, (20, 64), dtype=np.uint32)  # from 2^-100 on: the last term is no denormal
    x = np.where(rng.random((20, 64)) < 0.5, 1, -1).astype(np.float32) * bits.view(np.float32)
    x[0, :4] = [np.finfo(np.float32).max, -np.finfo(np.float32).max, 0, 1]
    assert np.array_equal(run_linear(x, encode(np.eye(64), Dtype.BF16), Dtype.BF16, 64), x)


def test_infinity_and_nan_stay_what_they_are(tiles):
    x = np.array([[np.inf], [-np.inf], [np.nan], [2]], np.float32)
    found = run_linear(x, encode(np.array([[1.0], [-1.0]]), Dtype.BF16), Dtype.BF16, 64)
    assert np.array_equal(found, x * np.array([[1, -1]], np.float32), equal_nan=True)


def test_other_weights_do_not_go_through_tiles(tiles):
    for dtype in (Dtype.FP16, Dtype.FP32):
        _, x, w = random_case(3, 9, 100, 70, dtype)
        by_tiles = run_linear(x, w, dtype, 64), run_linear_in(x, w, dtype)
        native().set_isa(1)  # vectors of every width give these the same bits
        assert np.array_equal(run_linear(x, w, dtype, 64), by_tiles[0])
        assert np.array_equal(run_linear_in(x, w, dtype), by_tiles[1])
        native().set_isa(tiles)


def test_both_ways_of_a_linear_can_be_timed():
    weights = np.full(1 << 20, 0x3C00, np.uint16)
    for isa in native().isas:
        assert 0 < native().linear_seconds(isa, weights, 3) < 10
    assert native().linear_seconds(99, weights, 3) == 0
