"""Quantised weight formats: ggml's bytes as gguf reads them, panels byte by byte, inverses, row ranges, and quantisers that lose no more than they must."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.programs import random_blocks
from twinpilots.kernels import native, quant_format
from twinpilots.model.weight_format import FORMATS

QUANTIZED = [fmt for fmt in FORMATS.values() if fmt.is_quantized]
GGML = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("q8_0", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k")}
any_format = st.sampled_from(QUANTIZED)


@pytest.fixture(autouse=True, params=["numpy", "native"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every promise is kept with the native library and without it."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("the native library is not built (python -m twinpilots.kernels.build)")
    return str(request.param)


@pytest.mark.parametrize("name", GGML)
def test_row_blocks_are_ggmls_bytes(name):
    blocks = random_blocks(FORMATS[name], 7, 3)
    assert np.array_equal(quant_format.dequantize(blocks, FORMATS[name]), gguf.quants.dequantize(blocks.reshape(7, -1), GGML[name]))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_our_own_blocks_hold_scale_zero_and_two_halves_of_nibbles(group):
    codes = np.arange(group, dtype=np.uint8) % 16
    block = np.concatenate([np.array([0.5, 7], np.float16).view(np.uint8), codes[: group // 2] | codes[group // 2 :] << 4])
    assert np.array_equal(quant_format.dequantize(block[None, None], FORMATS[f"q4_z{group}"])[0], 0.5 * (codes - 7.0))


def test_a_panel_of_bytes_holds_four_inputs_of_a_column_in_a_lane():
    fmt = FORMATS["q8_0"]
    blocks = np.zeros((3, 2, 34), np.uint8)
    blocks[:, :, 0] = [[1, 2], [3, 4], [5, 6]]  # the scales' low bytes
    blocks[:, :, 2:] = np.arange(3 * 2 * 32).reshape(3, 2, 32)
    panel = quant_format.pack_in(blocks, fmt).reshape(2, -1)
    assert panel[:, :6].tolist() == [[1, 0, 3, 0, 5, 0], [2, 0, 4, 0, 6, 0]]
    assert panel[1, 6:].reshape(8, 3, 4)[5, 2].tolist() == [2 * 64 + 32 + 4 * 5 + j for j in range(4)]


def test_a_panel_of_nibbles_pairs_an_input_with_the_one_four_further_on():
    fmt = FORMATS["q4_1"]
    codes = np.arange(32, dtype=np.uint8) // 2
    block = np.concatenate([np.zeros(4, np.uint8), codes[:16] | codes[16:] << 4])[None, None]
    lanes = quant_format.pack_out(block, fmt, 1)[4:].reshape(4, 4)
    assert lanes.tolist() == [[int(codes[8 * i + j]) | int(codes[8 * i + 4 + j]) << 4 for j in range(4)] for i in range(4)]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_format, st.integers(1, 70), st.integers(1, 3), st.integers(1, 64))
def test_unpacking_gives_the_dequantised_weights(fmt, rows, blocks, unit):
    a, b = random_blocks(fmt, rows, blocks), random_blocks(fmt, rows, blocks, 1)
    wanted, other = quant_format.dequantize(a, fmt), quant_format.dequantize(b, fmt)
    width = blocks * fmt.block
    assert np.array_equal(quant_format.unpack_out(quant_format.pack_out(a, fmt, unit), fmt, rows, width, unit), wanted)
    gate, up = quant_format.unpack_gate_up(quant_format.pack_gate_up(a, b, fmt, unit), fmt, rows, width, unit)
    assert np.array_equal(gate, wanted)
    assert np.array_equal(up, other)
    assert np.array_equal(quant_format.unpack_in(quant_format.pack_in(a, fmt), fmt, width, rows), wanted)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_format, st.integers(1, 40), st.integers(1, 4), st.integers(1, 16), st.data())
def test_a_row_range_is_the_same_bytes_as_in_the_whole(fmt, rows, blocks, unit, data):
    a, b = random_blocks(fmt, rows, blocks), random_blocks(fmt, rows, blocks, 1)
    row_bytes = blocks * fmt.block_bytes
    assert row_bytes == fmt.row_bytes(blocks * fmt.block, "out")
    row0, row1 = sorted(data.draw(st.lists(st.sampled_from([*range(0, rows, unit), rows]), min_size=2, max_size=2)))
    part = quant_format.pack_out(a, fmt, unit, row0=row0, row1=row1)
    assert np.array_equal(part, quant_format.pack_out(a, fmt, unit)[row0 * row_bytes : row1 * row_bytes])
    pair = quant_format.pack_gate_up(a, b, fmt, unit, row0=row0, row1=row1)
    assert np.array_equal(pair, quant_format.pack_gate_up(a, b, fmt, unit)[2 * row0 * row_bytes : 2 * row1 * row_bytes])
    k0, k1 = sorted(data.draw(st.lists(st.integers(0, blocks), min_size=2, max_size=2)))
    cut = quant_format.pack_in(a, fmt, row0=k0 * fmt.block, row1=k1 * fmt.block)
    assert np.array_equal(cut, quant_format.pack_in(a, fmt)[k0 * rows * fmt.block_bytes : k1 * rows * fmt.block_bytes])


def test_a_given_buffer_is_filled_in_place_and_must_fit():
    fmt, blocks = FORMATS["q4_1"], random_blocks(FORMATS["q4_1"], 5, 2)
    out = np.zeros(200, np.uint8)
    assert quant_format.pack_out(blocks, fmt, 3, out=out) is out
    assert np.array_equal(out, quant_format.pack_out(blocks, fmt, 3))
    for wrong in (np.zeros(199, np.uint8), np.zeros(200, np.int8), np.zeros(400, np.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            quant_format.pack_out(blocks, fmt, 3, out=wrong)


def test_bad_arguments_are_refused():
    fmt, blocks = FORMATS["q8_0"], random_blocks(FORMATS["q8_0"], 10, 2)
    for row0, row1 in ((1, 10), (0, 5), (4, 2), (-4, 8), (0, 12)):
        with pytest.raises(ValueError, match="boundaries"):
            quant_format.pack_out(blocks, fmt, 4, row0=row0, row1=row1)
    with pytest.raises(ValueError, match="boundaries"):
        quant_format.pack_in(blocks, fmt, row0=16)
    with pytest.raises(ValueError, match="must agree"):
        quant_format.pack_gate_up(blocks, blocks[:5], fmt, 4)
    with pytest.raises(ValueError, match="row blocks of q4_1"):
        quant_format.pack_out(blocks, FORMATS["q4_1"], 4)
    with pytest.raises(ValueError, match="no quantised format"):
        quant_format.pack_out(blocks, FORMATS["bf16"], 4)
    with pytest.raises(ValueError, match="blocks of 32"):
        quant_format.quantize(np.zeros((2, 40), np.float32), fmt)
    with pytest.raises(ValueError, match="not to q4_k"):
        quant_format.quantize(np.zeros((2, 256), np.float32), FORMATS["q4_k"])


# ---- quantisers


@pytest.mark.parametrize("name, best_known", [("q8_0", 1.0), ("q4_1", 0.93)])
def test_quantising_loses_less_than_ggml_does(name, best_known):
    weights = np.random.default_rng(3).standard_normal((50, 256)).astype(np.float32)

    def error(values):
        return float(np.sqrt(np.mean((values - weights) ** 2)))

    theirs = error(gguf.quants.dequantize(gguf.quants.quantize(weights, GGML[name]), GGML[name]))
    assert error(quant_format.dequantize(quant_format.quantize(weights, FORMATS[name]), FORMATS[name])) < best_known * theirs


@pytest.mark.parametrize("levels", [16, 9, 2, 1])
def test_weights_on_a_grid_come_back_exactly(levels):
    fmt = FORMATS["q4_1"]
    blocks = random_blocks(fmt, 40, 4)
    first = np.arange(40)[:, None, None] % (17 - levels)
    codes = np.random.default_rng(1).integers(0, levels, (40, 4, 32)) + first
    blocks[:, :, 4:] = codes[:, :, :16] | codes[:, :, 16:] << 4
    values = quant_format.dequantize(blocks, fmt)
    found = quant_format.dequantize(quant_format.quantize(values, fmt), fmt)
    if levels > 1:
        assert np.array_equal(found, values)
    else:  # one value and no step: any f16 is a grid
        np.testing.assert_allclose(found, values, rtol=5e-4)
    again = quant_format.quantize(found, fmt)
    assert np.array_equal(quant_format.dequantize(again, fmt), found), "quantising what was quantised changes nothing"


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_degenerate_blocks_are_quantised(name):
    fmt, weights = FORMATS[name], np.zeros((5, 32), np.float32)
    weights[1], weights[2, 7], weights[3] = 3.0, -1e-12, 1e-7
    weights[4, ::2] = 60000.0
    found = quant_format.dequantize(quant_format.quantize(weights, fmt), fmt)
    np.testing.assert_allclose(found, weights, rtol=4e-3, atol=1e-6)


def test_q8_0_uses_its_whole_range():
    codes = quant_format.quantize(np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32), FORMATS["q8_0"])[:, :, 2:].view(np.int8)
    assert codes.min() == -127
    assert codes.max() == 127


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_both_quantisers_write_the_same_bytes(name, monkeypatch):
    fmt, rng = FORMATS[name], np.random.default_rng(5)
    weights = rng.standard_normal((60, 256)).astype(np.float32) * np.exp(rng.uniform(-12, 8, (60, 1))).astype(np.float32)
    weights[:20] = quant_format.dequantize(random_blocks(fmt, 20, 8), fmt)
    weights[20:30] = np.round(weights[20:30])
    weights[30, :64], weights[31, 5] = 0, 1e5
    found = quant_format.quantize(weights, fmt)
    monkeypatch.setattr(native, "load", lambda: None)
    assert np.array_equal(found, quant_format.quantize(weights, fmt))


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
def test_both_packers_write_the_same_bytes(fmt, monkeypatch):
    blocks = random_blocks(fmt, 37, 3)
    found = quant_format.pack_out(blocks, fmt, 20), quant_format.pack_gate_up(blocks, blocks[::-1], fmt, 20), quant_format.pack_in(blocks[:, ::-1], fmt)
    monkeypatch.setattr(native, "load", lambda: None)
    wanted = quant_format.pack_out(blocks, fmt, 20), quant_format.pack_gate_up(blocks, blocks[::-1], fmt, 20), quant_format.pack_in(blocks[:, ::-1], fmt)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
