"""What rounds of measurements say: medians, ratios of paired rounds, and how sure we may be of them.

Pure arithmetic; knows nothing of what was measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much faster one contender was than another, over rounds run in turn. ``lower_bound`` holds with 95 % confidence (one-sided)."""

    median: float
    lower_bound: float
    rounds: tuple[float, ...]


def compare(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Ratio:
    """The ratio ours / theirs of throughputs, round by round: rounds of the same number ran one after the other, so a slow minute hits both.

    Raises ValueError for no rounds, unequal numbers of them, or a throughput that is not positive.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"ratios need as many rounds on both sides, got {len(ours)} and {len(theirs)}")
    if min(*ours, *theirs) <= 0:
        raise ValueError("throughputs must be positive")
    ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
    return Ratio(median=median(ratios), lower_bound=bootstrap_lower_bound(ratios, seed=seed), rounds=ratios)


def bootstrap_lower_bound(values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The one-sided lower confidence bound of the median, by resampling the rounds with replacement (percentile bootstrap, Efron 1979)."""
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int((1 - confidence) * resamples)]


def best_other(medians: Mapping[str, float], reference: str) -> str | None:
    """The fastest contender but ``reference``; None when it ran alone."""
    others = {name: value for name, value in medians.items() if name != reference}
    return max(others, key=lambda name: others[name]) if others else None
