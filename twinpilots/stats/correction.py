"""A profile with every rate as passes have seen it.

Owns how measured / expected times change a profile (`corrected`), and `Medians`: those of measurements made for the purpose. Pure: no clock, no torch. Knows
nothing of passes or of how factors are learned while a model runs (`tracker`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol

from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile, LinkProfile
from twinpilots.plan.expected import ATTENTION, COPIES, DOWN, SMALL, UP, Resource

NEARLY = 0.05
Kind = tuple[Resource, str]  # as in WorkKind, heads together with other linears: they differ in size alone


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkTime:
    """One kind of work took ``seconds`` in one pass (waits excluded) where the offline profile says ``expected_s``. ``size``: tokens, or context."""

    resource: Resource
    key: str
    size: float
    expected_s: float
    seconds: float


class Factors(Protocol):
    """Measured / expected by kind of work and size; 1 where nothing was seen."""

    def factor(self, resource: Resource, key: str, size: float) -> float: ...

    def sizes(self, resource: Resource, key: str) -> Sequence[float]:
        """Those that were seen."""
        ...

    def latest(self, resource: Resource, key: str) -> float:
        """Of a kind whose profile has one rate for all sizes."""
        ...


def corrected(offline: HardwareProfile, factors: Factors) -> HardwareProfile:
    """``offline`` with every observed rate corrected; token counts that were observed become points of the linears' curves."""
    gpu = None if offline.gpu is None else _processor("gpu", offline.gpu, factors)
    link = None if offline.link is None else _link(offline.link, factors)
    return replace(offline, cpu=_processor("cpu", offline.cpu, factors), gpu=gpu, link=link)


def _processor(resource: Resource, processor: ComputeProfile, factors: Factors) -> ComputeProfile:
    linear = dict(processor.linear)
    for key, curve in processor.linear.items():
        sizes = factors.sizes(resource, key)
        if sizes:
            # Two points that are nearly one would make a slope of nothing but noise.
            points = sorted({*curve.x, *(size for size in sizes if all(abs(size - x) > NEARLY * x for x in curve.x))})
            linear[key] = Curve(x=tuple(points), y=tuple(curve(x) * factors.factor(resource, key, x) for x in points))
    attention, small = factors.latest(resource, ATTENTION), factors.latest(resource, SMALL)
    found = processor.with_attention(1 / attention, 1 / attention)
    return replace(found, linear=linear, elementwise_bytes_per_s=processor.elementwise_bytes_per_s / small)


def _link(link: LinkProfile, factors: Factors) -> LinkProfile:
    up, down = factors.latest("link", UP), factors.latest("link", DOWN)
    return replace(
        link, up_bytes_per_s=link.up_bytes_per_s / up, down_bytes_per_s=link.down_bytes_per_s / down, load_kv_s=link.load_kv_s * up,
        store_kv_s=link.store_kv_s * down, kv_copy_token_s=link.kv_copy_token_s * up, copy_s=link.copy_s * factors.latest("link", COPIES),
    )  # fmt: skip


class Medians:
    """The middle of many records of each kind and size; between two sizes what lies on the line through both (in logarithms), beyond them the nearest."""

    def __init__(self, records: Iterable[WorkTime]) -> None:
        ratios: dict[Kind, dict[float, list[float]]] = {}
        for record in records:
            if min(record.seconds, record.expected_s) > 0:
                ratios.setdefault((record.resource, record.key), {}).setdefault(max(record.size, 1.0), []).append(record.seconds / record.expected_s)
        self._all = {kind: median(each for found in sizes.values() for each in found) for kind, sizes in ratios.items()}
        self._found = {kind: [(math.log(size), math.log(median(found))) for size, found in sorted(sizes.items())] for kind, sizes in ratios.items()}
        self._sizes = {kind: sorted(sizes) for kind, sizes in ratios.items()}

    def factor(self, resource: Resource, key: str, size: float) -> float:
        points = self._found.get((resource, key))
        if not points:
            return 1.0
        x = math.log(max(size, 1.0))
        after = bisect_left(points, (x, -math.inf))
        if after in (0, len(points)):
            return math.exp(points[min(after, len(points) - 1)][1])
        (x0, y0), (x1, y1) = points[after - 1 : after + 1]
        return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))

    def sizes(self, resource: Resource, key: str) -> Sequence[float]:
        return self._sizes.get((resource, key), [])

    def latest(self, resource: Resource, key: str) -> float:
        return self._all.get((resource, key), 1.0)
