"""Fixtures of the CPU tests: each instruction set that this machine has, tiles in plain C++, and a pool of two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu.native_twin import native
from twinpilots.kernels.native import EMULATED_TILES, ISA_NAMES


@pytest.fixture(params=[*range(len(ISA_NAMES)), EMULATED_TILES], ids=[*ISA_NAMES, "amx-emulated"])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test on one instruction set; skipped where the machine lacks it."""
    if request.param not in native().isas:
        pytest.skip("this machine lacks the instruction set")
    before = native().isa
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


@pytest.fixture
def pool() -> Iterator[int]:
    handle = native().pool_create(2)
    yield handle
    native().pool_destroy(handle)
