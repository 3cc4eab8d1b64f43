"""Prometheus' text format, as much of it as a server needs: counters, gauges, infos and histograms.

Owns the exposition syntax and `Histogram`. Knows nothing of what is counted. Not thread-safe: one thread observes and renders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = Mapping[str, str]


class Histogram:
    """Observations by bucket. ``bounds`` are upper limits, ascending; what is above the last one is counted in +Inf alone."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None


class Page:
    """The lines of one scrape. ``labels`` go with every sample."""

    def __init__(self, labels: Labels) -> None:
        self._labels = dict(labels)
        self._lines: list[str] = []

    def value(self, kind: str, name: str, text: str, value: float) -> None:
        """One counter or gauge without labels of its own."""
        self.values(kind, name, text, [({}, value)])

    def values(self, kind: str, name: str, text: str, samples: Iterable[tuple[Labels, float | None]]) -> None:
        """A counter or gauge with labels; samples that are None are left out, the name is announced all the same."""
        self._announce(kind, name, text)
        self._lines += [self._sample(name, labels, value) for labels, value in samples if value is not None]

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        self._announce("histogram", name, text)
        total = 0
        for bound, count in zip((*map(_number, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            total += count
            self._lines.append(self._sample(f"{name}_bucket", {"le": bound}, total))
        self._lines.append(self._sample(f"{name}_sum", {}, histogram.sum))
        self._lines.append(self._sample(f"{name}_count", {}, total))

    def render(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _announce(self, kind: str, name: str, text: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def _sample(self, name: str, labels: Labels, value: float) -> str:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**self._labels, **labels}.items())
        return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
