"""What a plan makes of a machine: whether the CPU computes alone, whose passes are chained then (docs/execution.md, "Chained passes").

Owns how long a chain may be and the driver's part of a pass's time. Knows nothing of how passes are driven or measured.
"""

from __future__ import annotations

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import Plan

MOST_PASSES = 16
BUDGET_S = 0.1  # of a chain: what waits for it, a reader or Ctrl-C, does not notice; 16 sequences of a small model take 15 to 30 ms a pass


def most_passes(pass_s: float) -> int:
    """How many passes like one that took ``pass_s`` a chain may have."""
    return max(1, min(MOST_PASSES, int(BUDGET_S / pass_s))) if pass_s > 0 else 1


def as_used(profile: HardwareProfile, plan: Plan) -> HardwareProfile:
    """The machine as this plan uses it."""
    return profile if plan.uses_gpu or profile.gpu is None else profile.cpu_alone


def between_s(profile: HardwareProfile, plan: Plan, load: PassLoad, work_s: float) -> float:
    """The driver's part of a pass whose work takes ``work_s``: decoding passes of the CPU alone are chained."""
    if plan.uses_gpu or profile.alone is None:
        return profile.step_s(load.num_seqs)
    decodes = load.tokens() == load.num_seqs
    return profile.alone.step_s(load.num_seqs, most_passes(work_s) if decodes else 1)


def least_between_s(profile: HardwareProfile, num_seqs: int) -> float:
    """Of all passes that use this machine's GPU, or, where it has none, of all passes."""
    alone = profile.alone
    return profile.step_s(num_seqs) if alone is None or profile.gpu is not None else alone.step_s(num_seqs, MOST_PASSES)
