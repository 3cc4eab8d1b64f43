"""Fixtures of the CPU tests: each instruction set that this machine has, tiles in plain C++, and a pool of two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cpu.native_twin import native
from twinpilots.kernels.native import EMULATED_TILES, ISA_NAMES


@pytest.fixture(params=range(len(ISA_NAMES)), ids=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test on one instruction set; skipped where the machine lacks it."""
    yield from _isa_for_a_while(request.param)


@pytest.fixture(params=[*range(len(ISA_NAMES)), EMULATED_TILES], ids=[*ISA_NAMES, "amx-emulated"])
def isa_or_tiles(request: pytest.FixtureRequest) -> Iterator[int]:
    """As `isa`, and once more on tiles in plain C++: for what bf16 linears promise."""
    yield from _isa_for_a_while(request.param)


def _isa_for_a_while(level: int) -> Iterator[int]:
    if level not in native().isas:
        pytest.skip("this machine lacks the instruction set")
    before = native().isa
    native().set_isa(level)
    yield level
    native().set_isa(before)


@pytest.fixture
def pool() -> Iterator[int]:
    handle = native().pool_create(2)
    yield handle
    native().pool_destroy(handle)
