"""What passes say of a profile's fixed costs: of a small task, of a sequence in attention, of an activation copy.

The time of such work is a cost for each piece and a part in proportion to tokens. One factor on their sum, taken where pieces are small, would be wrong where
they are large; passes of different sizes tell the two apart. Owns those fits. Knows nothing of how passes are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from twinpilots.hardware.profile import ComputeProfile, HardwareProfile
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.expected import ATTENTION, COPIES, SMALL, Resource, WorkKind

LEAST_FACTOR, MOST_FACTOR = 0.2, 5.0  # on the part in proportion to tokens: more is no rate, but a disturbance


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Passes alike, the middle of them: ``count`` pieces and ``rest_s`` seconds beside them were expected of a kind of work that took ``seconds`` of
    ``pass_s``."""

    count: float
    rest_s: float
    seconds: float
    pass_s: float


def piece_s(points: Sequence[Point]) -> float | None:
    """What a piece costs where the rest is as expected; passes are told wrong by as little as can be. None without pieces."""
    weight = sum((each.count / each.pass_s) ** 2 for each in points)
    if not weight:
        return None
    return max(0.0, sum(each.count * (each.seconds - each.rest_s) / each.pass_s**2 for each in points) / weight)


def piece_and_rest(points: Sequence[Point]) -> tuple[float, float] | None:
    """What a piece costs, and a factor on the rest. None where all passes are alike, so that the two cannot be told apart."""
    rows = [(each.count / each.pass_s, each.rest_s / each.pass_s, each.seconds / each.pass_s) for each in points]
    nn, nr, rr, ny, ry = (sum(values) for values in zip(*[(n * n, n * r, r * r, n * y, r * y) for n, r, y in rows], strict=True)) if rows else (0.0,) * 5
    determinant = nn * rr - nr * nr
    if determinant <= 1e-3 * nn * rr:
        return None
    factor = (nn * ry - nr * ny) / determinant
    factor = min(max(factor, LEAST_FACTOR), MOST_FACTOR)
    return max(0.0, (ny - factor * nr) / nn), factor


class Fits:
    """Fits of one profile against passes."""

    def __init__(self, offline: OnlinePlanner, passes: Sequence[PassDone]) -> None:
        self._offline, self._passes = offline, passes

    def corrected(self) -> HardwareProfile:
        """The profile with the fixed costs that its passes had."""
        profile = self._offline.profile
        gpu = None if profile.gpu is None else self._processor("gpu", profile.gpu)
        return replace(profile, cpu=self._processor("cpu", profile.cpu), gpu=gpu)

    def _processor(self, resource: Resource, processor: ComputeProfile) -> ComputeProfile:
        found = piece_and_rest(self._points(WorkKind(resource, SMALL), lambda cost_s: _with(self._offline.profile, resource, task_s=cost_s)))
        if found is None:
            return processor
        return replace(processor, task_s=found[0], elementwise_bytes_per_s=processor.elementwise_bytes_per_s / found[1])

    def sequence_s(self, resource: Resource) -> float | None:
        """Of one sequence in one layer's attention, by decoding passes: short contexts say nothing of what long ones are read at."""
        return piece_s(self._points(WorkKind(resource, ATTENTION), lambda cost_s: _with(self._offline.profile, resource, attention_seq_s=cost_s), "decode"))

    def copy_s(self) -> float | None:
        """Of one activation copy."""
        profile = self._offline.profile
        if profile.link is None:
            return None
        link = profile.link
        return piece_s(self._points(WorkKind("link", COPIES), lambda cost_s: replace(profile, link=replace(link, copy_s=cost_s))))

    def _points(self, kind: WorkKind, at: Callable[[float], HardwareProfile], phase: str = "") -> list[Point]:
        """``at``: the profile with a piece's cost. Seconds count as if nobody slowed the work down."""
        free, dear = at(0.0), at(1.0)
        alike: dict[tuple[object, ...], list[Point]] = {}
        for done in self._passes:
            if phase in ("", done.bucket.phase) and done.work_s.get(kind):
                work = self._offline.work_of(done)
                rest_s, most_s = (sum(each.seconds for each in work.expected(profile, done.load) if each.kind == kind) for profile in (free, dear))
                point = Point(count=most_s - rest_s, rest_s=rest_s, seconds=done.work_s[kind] / self._offline.slowed(done, kind), pass_s=done.seconds)
                alike.setdefault((id(done.bucket), done.load.num_seqs, done.load.tokens()), []).append(point)
        return [Point(**{name: median(getattr(each, name) for each in found) for name in ("count", "rest_s", "seconds", "pass_s")}) for found in alike.values()]


def _with(profile: HardwareProfile, resource: Resource, **changes: float) -> HardwareProfile:
    """With another cost of a processor's."""
    if resource == "gpu" and profile.gpu is not None:
        gpu = replace(profile.gpu, **changes, kv_attention={}) if "attention_seq_s" in changes else replace(profile.gpu, **changes)  # type: ignore[arg-type]
        return replace(profile, gpu=gpu)
    cpu = replace(profile.cpu, **changes, kv_attention={}) if "attention_seq_s" in changes else replace(profile.cpu, **changes)  # type: ignore[arg-type]
    return replace(profile, cpu=cpu)
