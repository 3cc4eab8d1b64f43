"""Planning: who computes what, where it lies, in what order it moves. Pure: no torch, no clock.

`from twinpilots.plan import balance, Plan` works without loading the planner's other parts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinpilots.plan.makespan import Balance, balance, fractional_makespan
    from twinpilots.plan.plan import POLICIES, BucketPlan, Plan, Split

__all__ = ["POLICIES", "Balance", "BucketPlan", "Plan", "Split", "balance", "fractional_makespan"]
_HOMES = {
    "Balance": "makespan", "balance": "makespan", "fractional_makespan": "makespan",
    "POLICIES": "plan", "BucketPlan": "plan", "Plan": "plan", "Split": "plan",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
