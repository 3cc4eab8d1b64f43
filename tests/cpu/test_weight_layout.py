"""The layout benchmark compares like with like: its contender computes the same linear, and a GPU's cost is the arithmetic it says."""

from __future__ import annotations

import os
import platform
import shutil

import numpy as np
import pytest

from benchmarks.weight_layout import RowMajor, document_text, unpack_costs
from tests.cpu.native_twin import decode, encode
from twinpilots.hardware.presets import PRESETS
from twinpilots.kernels.abi import Dtype


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None or platform.machine() != "x86_64", reason="no compiler, or another processor")
def test_the_contender_multiplies_rows_as_they_are_stored() -> None:
    rng, kernel = np.random.default_rng(0), RowMajor(sorted(os.sched_getaffinity(0))[:2])
    weights = [encode(rng.standard_normal((52, 2096)), Dtype.BF16) for _ in range(2)]  # more than a tile of inputs
    try:
        for rows in (1, 5, 8, 100):
            x, y = rng.standard_normal((rows, 2096)).astype(np.float32), np.full((rows, 52), 7, np.float32)
            kernel.run(x, weights, y)
            np.testing.assert_allclose(y, x.astype(float) @ decode(weights[1], Dtype.BF16).T, atol=1e-3)
    finally:
        kernel.close()


def test_unpacking_costs_a_reading_and_a_writing_of_what_the_link_brings() -> None:
    costs = unpack_costs()
    t4 = PRESETS["t4"]
    assert t4.gpu is not None and t4.link is not None
    assert costs["t4"] == 2 * t4.link.up_bytes_per_s / t4.gpu.read_bytes_per_s
    assert set(costs) == set(PRESETS) - {"demo"}


def test_the_table_holds_both_layouts_against_one_limit() -> None:
    row = {"tokens": 8, "bytes": 2e6, "flops": 1.6e7, "panels_s": 2e-4, "row_major_s": 4e-4, "speedup": 2.0}
    document = {
        "model": "m", "threads": 2, "rounds": 3, "limits": {"read_bytes_per_s": 2e10, "flops_per_s": 1e12}, "rows": [row], "gpu_unpack": {"t4": 0.081},
    }  # fmt: skip
    text = document_text(document)
    assert "2.00 x as fast" in text and " 25 " in text and " 50 " in text and "t4 8.1 %" in text
