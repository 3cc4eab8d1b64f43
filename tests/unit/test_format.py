"""Weight formats: what lies where, inverses, row ranges, given buffers, bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpilots.kernels import format as weight_format

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 24), st.sampled_from([np.float32, np.uint16]))


def matrix(rows, width, dtype, start=0):
    return (np.arange(rows * width) + start).astype(dtype).reshape(rows, width)


def test_a_panel_is_input_major_and_the_last_one_is_narrow():
    packed = weight_format.pack_out(matrix(5, 2, np.float32), 3)
    assert packed.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 7, 9]


def test_a_gate_up_panel_holds_gate_columns_then_up_columns():
    packed = weight_format.pack_gate_up(matrix(3, 2, np.uint16), matrix(3, 2, np.uint16, 100), 2)
    assert packed.tolist() == [0, 2, 100, 102, 1, 3, 101, 103, 4, 104, 5, 105]


def test_an_input_split_weight_is_transposed():
    assert weight_format.pack_in(matrix(2, 3, np.float32)).tolist() == [0, 3, 1, 4, 2, 5]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_unpacking_gives_back_the_weights(sizes):
    rows, width, unit, dtype = sizes
    a, b = matrix(rows, width, dtype), matrix(rows, width, dtype, 1000)
    assert np.array_equal(weight_format.unpack_out(weight_format.pack_out(a, unit), rows, width, unit), a)
    gate, up = weight_format.unpack_gate_up(weight_format.pack_gate_up(a, b, unit), rows, width, unit)
    assert np.array_equal(gate, a)
    assert np.array_equal(up, b)
    assert np.array_equal(weight_format.unpack_in(weight_format.pack_in(a), width, rows), a)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.data())
def test_a_row_range_is_the_same_bytes_as_in_the_whole(sizes, data):
    rows, width, unit, dtype = sizes
    a, b = matrix(rows, width, dtype), matrix(rows, width, dtype, 1000)
    edges = sorted(data.draw(st.lists(st.sampled_from([*range(0, rows, unit), rows]), min_size=2, max_size=2)))
    cut = slice(edges[0] * width, edges[1] * width)
    assert np.array_equal(weight_format.pack_out(a, unit, row0=edges[0], row1=edges[1]), weight_format.pack_out(a, unit)[cut])
    pair = slice(2 * cut.start, 2 * cut.stop)
    assert np.array_equal(weight_format.pack_gate_up(a, b, unit, row0=edges[0], row1=edges[1]), weight_format.pack_gate_up(a, b, unit)[pair])
    k0, k1 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2)))
    assert np.array_equal(weight_format.pack_in(a, row0=k0, row1=k1), weight_format.pack_in(a)[k0 * rows : k1 * rows])


def test_a_given_buffer_is_filled_in_place_and_must_fit():
    out = np.zeros(10, np.float32)
    assert weight_format.pack_out(matrix(5, 2, np.float32), 3, out=out) is out
    assert out[1] == 2
    for wrong in (np.zeros(9, np.float32), np.zeros(10, np.uint16), np.zeros(20, np.float32)[::2]):
        with pytest.raises(ValueError, match="contiguous"):
            weight_format.pack_out(matrix(5, 2, np.float32), 3, out=wrong)


def test_rows_off_a_unit_boundary_are_refused():
    weights = matrix(10, 2, np.float32)
    for row0, row1 in ((1, 10), (0, 5), (4, 2), (-4, 8), (0, 12)):
        with pytest.raises(ValueError, match="boundaries"):
            weight_format.pack_out(weights, 4, row0=row0, row1=row1)
    with pytest.raises(ValueError, match="must agree"):
        weight_format.pack_gate_up(weights, weights[:5], 4)
    with pytest.raises(ValueError, match="bytes per element"):
        weight_format.pack_in(weights.astype(np.float64))
