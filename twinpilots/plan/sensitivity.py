"""What the linear program says about its own limits: which resource holds up each phase, and what a change of the machine would gain at first order.

Owns `Duals`: HiGHS' marginals of the program with its integer decisions fixed. Knows nothing of what the programs stand for (see `what_if.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twinpilots.plan.program import Matrix, Program, Resource, program_matrix


@dataclass(frozen=True, kw_only=True)
class Duals:
    """An optimum of a program with the marginal of every row: by how much the objective grows when the row's bound does."""

    matrix: Matrix
    point: np.ndarray
    marginals: np.ndarray

    @property
    def seconds(self) -> float:
        return float(self.matrix.cost @ self.point)

    def prices(self, phase: int) -> dict[Resource, float]:
        """Seconds that a phase gets shorter per second less work on each resource; they add up to 1. One that is not named does not hold it up."""
        named = {name[1]: float(self.marginals[row]) for row, name in enumerate(self.matrix.names) if name is not None and name[0] == phase}
        total = sum(named.values())
        return {resource: price / total for resource, price in named.items() if price > 1e-6 * total} if total > 0 else {}

    def seconds_after(self, changed: Program) -> float:
        """The objective of a program that differs in its numbers, at first order (the envelope theorem): old marginals times how far the old optimum is
        from keeping the new rows. For changed limits that is what the duals promise: never too pessimistic, since the optimum is convex in them."""
        new = program_matrix(changed)
        assert new.names == self.matrix.names and new.a.shape == self.matrix.a.shape, "programs of another structure cannot be compared"
        missing = (_bound(new, self.marginals) - new.a @ self.point) - (_bound(self.matrix, self.marginals) - self.matrix.a @ self.point)
        return float(new.cost @ self.point + self.marginals @ missing)


def _bound(matrix: Matrix, marginals: np.ndarray) -> np.ndarray:
    """The side of every row that its marginal is about; rows that do not bind have none, and 0 does for them."""
    side = np.where(marginals > 0, matrix.row_low, matrix.row_high)
    return np.where(np.isfinite(side), side, 0.0)


def duals(program: Program) -> Duals | None:
    """The optimum and its marginals; None when memory does not suffice. Integer decisions stay as they are: marginals are about small changes."""
    from scipy.optimize import linprog
    from scipy.sparse import vstack

    matrix = program_matrix(program)
    point = matrix.minimise()
    if point is None:
        return None
    fixed = matrix.binary > 0
    low, high = (np.where(fixed, np.round(point), side) for side in (matrix.low, matrix.high))
    equal = matrix.row_low == matrix.row_high
    above, below = np.isfinite(matrix.row_low) & ~equal, np.isfinite(matrix.row_high) & ~equal
    answer = linprog(
        matrix.cost, A_ub=vstack([-matrix.a[above], matrix.a[below]]), b_ub=np.concatenate([-matrix.row_low[above], matrix.row_high[below]]),
        A_eq=matrix.a[equal], b_eq=matrix.row_low[equal], bounds=np.column_stack([low, high]), method="highs",
    )  # fmt: skip
    if answer.status != 0:
        return None
    marginals = np.zeros(len(matrix.row_low))
    marginals[above] -= answer.ineqlin.marginals[: above.sum()]
    marginals[below] += answer.ineqlin.marginals[above.sum() :]
    marginals[equal] = answer.eqlin.marginals
    return Duals(matrix=matrix, point=np.asarray(answer.x), marginals=marginals)
