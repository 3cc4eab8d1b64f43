"""One decaying estimate of measured / expected time, learned at some sizes and lent to the sizes around them.

Owns `Evidence` (one kind of work): how records fade, how a lasting jump is told from a stray, and how sure the estimate is. Pure: no clock, no torch.
Knows nothing of what the records are of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DECAY = 0.9  # weight of a record after one newer record of its size: about ten passes of memory
FADE = 0.98  # and after one pass without any: what is no longer seen is believed for some hundred passes
PRIOR_WEIGHT = 0.2  # how much the profile itself counts against history, in records
REACH = 1.5  # how far evidence reaches, in doublings of the size: the weight falls by e at this distance
JUMP_RECORDS = 3  # so many records in a row far off to one side: the rate itself has changed
JUMP_LOG = 0.12  # far off: at least this much (in log ratio), and beyond the usual noise
JUMP_NOISES = 3.0
JUMP_WEIGHT = 6.0  # records that these count as
AFTER_JUMP = 0.02  # what older evidence counts after a jump
STRAY_LOG = 1.6  # a record that says more than five times slower or faster counts as this much: a pause is not a rate
NOISE_DECAY = 0.9
MOST_RECALLED_LOG = 0.4  # what a file may say at most: what a run ended in may have been a passing load
LEAST_WEIGHT = 0.02  # evidence below this is forgotten


@dataclass(slots=True)
class _Bin:
    """What was seen at one size: ``log_sum`` over ``weight`` records as they counted in pass ``at``."""

    log2_size: float
    weight: float = 0.0
    log_sum: float = 0.0
    at: int = 0


@dataclass(slots=True)
class Evidence:
    """Measured / expected of one kind of work. Sizes are tokens or context lengths; passes are numbered by the caller, ascending."""

    bins: dict[int, _Bin] = field(default_factory=dict)
    noise_log: float = 0.0  # mean distance of records from the estimate, in log ratio
    num_records: int = 0
    num_jumps: int = 0
    last_size: float = 1.0
    last_at: int = 0  # the pass of the newest record
    _off: list[float] = field(default_factory=list)  # the last log ratios, while they lie far off on one side

    def add(self, ratio: float, size: float, at: int) -> None:
        log_ratio = math.log(ratio)
        estimate = self.log_factor(size, at)
        residual = max(-STRAY_LOG, min(STRAY_LOG, log_ratio - estimate))
        if self.num_records >= JUMP_RECORDS and self._has_jumped(estimate, residual):
            log_ratio = sum(self._off) / len(self._off)
            for found in self.bins.values():
                found.weight *= AFTER_JUMP
                found.log_sum *= AFTER_JUMP
            self._put(log_ratio, size, at, JUMP_WEIGHT)
            self._off = []
            self.num_jumps += 1
        else:
            self._put(self._damped(estimate, residual), size, at, 1.0)
            self.noise_log = NOISE_DECAY * self.noise_log + (1 - NOISE_DECAY) * abs(residual) if self.num_records else 0.0
        self.num_records += 1
        self.last_size, self.last_at = size, at

    def _has_jumped(self, estimate: float, residual: float) -> bool:
        """Whether the last records lie far off the estimate, all on one side."""
        if abs(residual) < max(JUMP_LOG, JUMP_NOISES * self.noise_log):
            self._off = []
            return False
        if self._off and (self._off[-1] > estimate) != (residual > 0):
            self._off = []
        self._off.append(estimate + residual)
        return len(self._off) >= JUMP_RECORDS

    @property
    def is_settled(self) -> bool:
        """Whether the last record was near the estimate."""
        return not self._off

    def _damped(self, estimate: float, residual: float) -> float:
        """While it may be a stray, a record far off counts as one at the edge of the far."""
        if not self._off or self.num_records < JUMP_RECORDS:
            return estimate + residual
        edge = max(JUMP_LOG, JUMP_NOISES * self.noise_log)
        return estimate + max(-edge, min(edge, residual))

    def _put(self, log_ratio: float, size: float, at: int, count: float) -> None:
        key = _key(size)
        found = self.bins.setdefault(key, _Bin(_log2(size), at=at))
        kept = DECAY**count * FADE ** max(0, at - found.at - 1)
        found.weight, found.log_sum, found.at = found.weight * kept + count, found.log_sum * kept + count * log_ratio, at
        if len(self.bins) > 8:
            self.bins = {key: each for key, each in self.bins.items() if each.weight * FADE ** (at - each.at) > LEAST_WEIGHT}

    def _sums(self, size: float, at: int) -> tuple[float, float]:
        """(weight, weighted log ratio) at ``size``, the prior's weight included."""
        weight, total, place = PRIOR_WEIGHT, 0.0, _log2(size)
        for found in self.bins.values():
            near = math.exp(-abs(place - found.log2_size) / REACH)
            if at > found.at + 1:
                near *= FADE ** (at - found.at - 1)
            weight += near * found.weight
            total += near * found.log_sum
        return weight, total

    def log_factor(self, size: float, at: int) -> float:
        """log(measured / expected) at ``size``, by the evidence around it; 0 where there is none."""
        weight, total = self._sums(size, at)
        return total / weight

    def error_log(self, size: float, at: int) -> float:
        """How far the estimate may well be off, in log ratio: the noise of a record over the root of how many count."""
        return self.noise_log / math.sqrt(self._sums(size, at)[0])

    def sizes(self) -> list[float]:
        return [2.0**found.log2_size for found in self.bins.values()]

    def as_dict(self, at: int, most_weight: float) -> dict[str, Any]:
        """For a file: what counts now, by size, no size with more than ``most_weight`` records."""
        kept = []
        for found in self.bins.values():
            weight = found.weight * FADE ** max(0, at - found.at - 1)
            if weight > LEAST_WEIGHT:
                scale = min(weight, most_weight) / found.weight
                kept.append([2.0**found.log2_size, found.weight * scale, found.log_sum * scale])
        return {"noise": self.noise_log, "sizes": kept}

    @staticmethod
    def from_dict(data: Mapping[str, Any], weight_factor: float) -> Evidence:
        """What `as_dict` gave, aged by ``weight_factor``. ValueError or TypeError for anything else."""
        found = Evidence(noise_log=_finite(data["noise"]))
        for size, weight, log_sum in data["sizes"]:
            if not (_finite(size) > 0 and _finite(weight) > 0):
                raise ValueError(f"no evidence: size {size!r}, weight {weight!r}")
            log_mean = max(-MOST_RECALLED_LOG, min(MOST_RECALLED_LOG, _finite(log_sum) / weight))
            found.bins[_key(size)] = _Bin(_log2(size), weight * weight_factor, log_mean * weight * weight_factor)
            found.last_size = size
        return found


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"not a finite number: {value!r}")
    return float(value)


def _log2(size: float) -> float:
    return math.log2(max(size, 1.0))


def _key(size: float) -> int:
    """Sizes up to 16 are told apart, larger ones to an eighth of a doubling."""
    return int(size) if size <= 16 else round(8 * _log2(size)) - 16
