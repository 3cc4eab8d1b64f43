"""History of measured op times against the profile, and the profile as history corrects it.

Owns `OpTime` (one record: what some tasks of one kind took in one pass) and `Tracker`, which keeps, per device and kind of op, a decaying mean of
measured / profiled time by token count. The paper's estimator keeps raw records for ever; here old ones fade and neighbouring token counts lend each
other evidence. Pure: no clock, no torch. Knows nothing of passes or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile

DECAY = 0.9  # weight of a record after one newer record of its kind: about ten passes of memory
PRIOR_WEIGHT = 0.5  # how much the profile itself counts against history, in records
REACH = 1.5  # how far evidence reaches, in doublings of the token count: the weight falls by e at this distance


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """``num_tasks`` tasks of linears over ``elements`` weights in all, at ``tokens`` tokens each, took ``seconds`` of work (waits excluded)."""

    device: Literal["cpu", "gpu"]
    key: str  # as in ComputeProfile.linear: "fp16/out"
    tokens: int
    elements: float
    num_tasks: int
    seconds: float


@dataclass
class _Evidence:
    """Decayed weight and weighted sum of log(measured / profiled) at one token count."""

    weight: float = 0.0
    log_ratio_sum: float = 0.0

    def add(self, ratio: float) -> None:
        self.weight = self.weight * DECAY + 1.0
        self.log_ratio_sum = self.log_ratio_sum * DECAY + math.log(ratio)


@dataclass
class Tracker:
    """Corrects ``offline`` by what is observed. `profile` is the offline profile until something was."""

    offline: HardwareProfile
    _evidence: dict[tuple[str, str], dict[int, _Evidence]] = field(default_factory=dict)

    def observe(self, records: Iterable[OpTime]) -> None:
        """Take in the records of a pass. Records of nothing (no work, no time) are passed over."""
        for record in records:
            processor = self.offline.cpu if record.device == "cpu" else self.offline.gpu
            if processor is None or min(record.tokens, record.seconds, record.elements) <= 0 or record.key not in processor.linear:
                continue
            expected_s = record.elements * processor.linear[record.key](record.tokens) + record.num_tasks * processor.task_s
            bins = self._evidence.setdefault((record.device, record.key), {})
            bins.setdefault(record.tokens, _Evidence()).add(record.seconds / expected_s)

    def factor(self, device: str, key: str, tokens: float) -> float:
        """Measured / profiled time at ``tokens`` tokens, by the evidence around it; 1 where there is none."""
        weight, total = PRIOR_WEIGHT, 0.0
        for seen, evidence in self._evidence.get((device, key), {}).items():
            nearness = math.exp(-abs(math.log2(max(tokens, 1.0) / seen)) / REACH)
            weight += nearness * evidence.weight
            total += nearness * evidence.log_ratio_sum
        return math.exp(total / weight)

    def profile(self) -> HardwareProfile:
        """The offline profile with every linear's curve corrected; token counts that were observed become points of the curve."""
        gpu = None if self.offline.gpu is None else self._corrected("gpu", self.offline.gpu)
        return replace(self.offline, cpu=self._corrected("cpu", self.offline.cpu), gpu=gpu)

    def _corrected(self, device: str, processor: ComputeProfile) -> ComputeProfile:
        linear = {}
        for key, curve in processor.linear.items():
            points = sorted({*curve.x, *(float(tokens) for tokens in self._evidence.get((device, key), {}))})
            linear[key] = Curve(x=tuple(points), y=tuple(curve(x) * self.factor(device, key, x) for x in points))
        return replace(processor, linear=linear)
