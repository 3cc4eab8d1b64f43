"""About how long a phase takes, for many ways to split the ops at once: what the simulator would say, but for what only it can tell.

Owns `phase_about`: passes played back to back on two compute queues (`lower_bound.Pass`) and a link that loads ahead as far as the ring lets it
(`played_link.PlayedLink`). Knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twinpilots.plan.grid import Floats, Grid, Rows
from twinpilots.plan.lower_bound import Pass
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.played_link import PlayedLink
from twinpilots.plan.pricing import phase_loads
from twinpilots.plan.problem import Problem

PASSES, SLOWED_PASSES = 2, 3  # the last one counts; where devices slow each other down, each pass knows better by how much


def phase_about(problem: Problem, plan: Plan, phase: Phase, grid: Grid, rings: Sequence[tuple[int, int]]) -> list[Floats]:
    """Seconds of the phase in one wave, about, by ring (bytes of it, of a packet) and combination (of a grid of one dimension)."""
    grid = Grid(
        shape=(len(rings) * grid.shape[0],), axis_of=grid.axis_of, parents={}, rows={key: _repeated(rows, len(rings)) for key, rows in grid.rows.items()}
    )
    ring_bytes, packet_bytes = (np.repeat(np.array(sizes, dtype=float), grid.shape[0] // len(rings)) for sizes in zip(*rings, strict=True))
    total = np.zeros(grid.shape)
    for _, load, count in phase_loads(problem.workload, plan, phase):
        driver_s, interleaved = problem.profile.step_s(load.num_seqs), len(load.micro_batches) > 1
        link, seconds = PlayedLink(problem.profile, ring_bytes, packet_bytes, driver_s=driver_s, interleaved=interleaved), np.zeros(grid.shape)
        for _ in range(PASSES if link.copy_slowdown == {"cpu": 1.0, "gpu": 1.0} else SLOWED_PASSES):
            made = Pass(problem, plan, grid, load, link)
            seconds = made.run()
            link.end_pass(seconds, made.busy_s)
        total += count * seconds
    return np.split(total, len(rings))


def _repeated(rows: Rows, times: int) -> Rows:
    return rows.each(lambda part: np.tile(part, times))
