"""Whether this machine's kernels use AMX tiles: measured once, where there are tiles at all.

Owns the experiment, the rule and the note of its outcome in the user's cache: tiles and vectors add in different orders, so a machine must not change its
mind from one start to the next. Knows nothing of kernels but their two times.
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twinpilots.hardware.store import isa_path
from twinpilots.kernels.native import AMX, AVX512_VNNI, ISA_NAMES

# Tiles are taken when they more than repay prompts what they may cost decoding. Far from 1 on purpose: tiles do five times the multiply-adds of vectors, and a
# row alone waits for memory with either, so that noise does not decide.
MOST_AT_1_ROW, MOST_AT_512_ROWS = 1.15, 0.7  # of the time that vectors take
ROWS = (1, 512)
RUNS = 3
WEIGHT_BYTES = {1: 64 << 20, 512: 1 << 20}  # a row alone reads from memory
BF16_BITS = 0x3C00  # an ordinary number: denormals and NaN are slower than the truth
_LOG = logging.getLogger(__name__)


class TimedKernels(Protocol):
    """What of `Native` is needed here."""

    isa_was_set: bool

    @property
    def best_isa(self) -> int: ...
    def set_isa(self, level: int) -> None: ...
    def linear_seconds(self, isa: int, weights: NDArray[np.uint16], rows: int) -> float: ...


def settle_isa(native: TimedKernels) -> None:
    """Set the instruction set that this machine's kernels use, unless somebody did already or there is nothing to choose. Takes a fraction of a second
    the first time on a machine with AMX, then reads what was noted."""
    if native.isa_was_set or native.best_isa < AMX:
        return
    noted = _read(isa_path())
    if noted is None:
        seconds = measure(native)
        noted = choose(seconds)
        _write(isa_path(), noted, seconds)
    native.set_isa(noted)


def choose(seconds: dict[int, dict[int, float]]) -> int:
    """AMX or AVX-512 by seconds[instruction set][rows]."""
    at_1, at_512 = (seconds[AMX][rows] / seconds[AVX512_VNNI][rows] for rows in ROWS)
    return AMX if at_1 <= MOST_AT_1_ROW and at_512 <= MOST_AT_512_ROWS else AVX512_VNNI


def measure(native: TimedKernels) -> dict[int, dict[int, float]]:
    """seconds[instruction set][rows] of one linear on this thread, the best of three, by turns."""
    weights = np.full(max(WEIGHT_BYTES.values()) // 2, BF16_BITS, np.uint16)
    best = {isa: dict.fromkeys(ROWS, np.inf) for isa in (AMX, AVX512_VNNI)}
    for _ in range(RUNS):
        for rows in ROWS:
            for isa in best:
                best[isa][rows] = min(best[isa][rows], native.linear_seconds(isa, weights[: WEIGHT_BYTES[rows] // 2], rows))
    return best


def _read(path: Path) -> int | None:
    """The noted instruction set; None when there is no note, or a damaged one."""
    try:
        level = ISA_NAMES.index(json.loads(path.read_text())["isa"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return level if level in (AMX, AVX512_VNNI) else None


def _write(path: Path, isa: int, seconds: dict[int, dict[int, float]]) -> None:
    note = {"isa": ISA_NAMES[isa], "seconds": {ISA_NAMES[level]: times for level, times in seconds.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(json.dumps(note))
        Path(file.name).replace(path)
    except OSError as error:
        _LOG.warning("the choice of instruction set could not be noted (%s); it will be measured again next time", error)
