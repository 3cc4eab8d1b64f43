"""Small programs for device tests: loads and poisons, which need neither batch nor model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import ENTRY, INSN, NULL, Op, Space, address


def insn(op: Op, *args: int, record: int = -1, waits: tuple[int, ...] = ()) -> NDArray[Any]:
    """One instruction of all rows without rows: what LOAD and POISON need."""
    made = np.zeros((), INSN)
    made["op"], made["record"], made["num_waits"] = op, record, len(waits)
    made["a"] = NULL
    made["a"][: len(args)] = args
    made["wait_event"][: len(waits)] = waits
    return made


def load(host: HostArena, segments: list[tuple[int, int, int]], **extra: Any) -> NDArray[Any]:
    """A LOAD of (GPU offset, host offset, bytes) segments."""
    offset = host.alloc(24 * len(segments), "programs")
    host.view(offset, np.int64, (len(segments), 3))[:] = [(address(Space.GPU, dst), src, size) for dst, src, size in segments]
    return insn(Op.LOAD, offset, len(segments), sum(size for *_, size in segments), **extra)


def entry(host: HostArena, *insns: NDArray[Any], pass_id: int = 1) -> NDArray[Any]:
    """A program in the host arena, and the entry that runs it."""
    offset = host.alloc(INSN.itemsize * len(insns), "programs")
    host.view(offset, INSN, len(insns))[:] = np.stack(insns)
    made = np.zeros((), ENTRY)
    made["insns"], made["count"], made["pass_id"], made["first_pass"], made["meta"], made["trace"] = offset, len(insns), pass_id, 1, NULL, NULL
    return made


def weights(host: HostArena, num_bytes: int, seed: int = 0) -> tuple[int, NDArray[np.uint8]]:
    offset = host.alloc(num_bytes, "weights")
    data = host.view(offset, np.uint8, num_bytes)
    data[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    return offset, data
