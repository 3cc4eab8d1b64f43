"""How much time experiments may take: the full profile's and the quick one's.

Owns `Effort` and its two values. Knows nothing of the experiments.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """``grid``: tokens at which linears are timed. A linear's run takes about ``run_s`` at most; after ``least_runs`` of everything there are more while
    ``rounds_s`` for each kind of linears and processor lasts. ``slowdown_runs``: of each experiment with the link or two devices, after about ``alone_s`` of
    one alone. ``peak_runs``: of the peaks'. ``region_frac``: of the memory that no cache holds any of, what experiments cycle through: on a virtual machine,
    to touch memory takes its time, too."""

    grid: tuple[int, ...]
    run_s: float
    least_runs: int
    rounds_s: float
    slowdown_runs: int
    alone_s: float
    peak_runs: int
    region_frac: float = 1.0


FULL = Effort(grid=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), run_s=0.13, least_runs=3, rounds_s=4.0, slowdown_runs=7, alone_s=0.05, peak_runs=12)
# Kernels walk few tokens in steps: what lies between two points there is no straight line. Real passes follow, and correct all rates that they see.
QUICK = Effort(grid=(1, 2, 4, 8, 16, 64, 256), run_s=0.008, least_runs=1, rounds_s=0.3, slowdown_runs=3, alone_s=0.01, peak_runs=3, region_frac=0.5)
