"""Fixtures of the CPU tests: each instruction set that this machine has, and a pool of two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu.native_twin import native
from twinpilots.kernels.native import ISA_NAMES


@pytest.fixture(params=range(len(ISA_NAMES)), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test on one instruction set; skipped where the machine lacks it."""
    if request.param > native().best_isa:
        pytest.skip("this machine lacks the instruction set")
    native().set_isa(request.param)
    yield request.param
    native().set_isa(native().best_isa)


@pytest.fixture
def pool() -> Iterator[int]:
    handle = native().pool_create(2)
    yield handle
    native().pool_destroy(handle)
