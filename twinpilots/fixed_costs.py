"""What passes say of a profile's fixed costs: of a small task, of a sequence in attention, of an activation copy.

The time of such work is a cost for each piece and a part in proportion to tokens. One factor on their sum, taken where pieces are small, would be wrong where
they are large; passes of different sizes tell the two apart. Owns those fits. Knows nothing of how passes are run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.expected import ATTENTION, COPIES, SMALL, Resource, WorkKind
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import Phase

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


Points = Mapping[tuple[WorkKind, Phase], Sequence[Point]]


def with_small_tasks(offline: OnlinePlanner, passes: Sequence[PassDone]) -> HardwareProfile:
    """The planner's profile with what a task costs, and what small tasks take for each byte, as these passes had it."""
    points = _points(offline, passes, lambda processor, cost_s: replace(processor, task_s=cost_s), lambda link, _: link)

    def fitted(resource: Resource, processor: ComputeProfile) -> ComputeProfile:
        found = piece_and_rest([point for (kind, _), each in points.items() if kind == WorkKind(resource, SMALL) for point in each])
        return processor if found is None else replace(processor, task_s=found[0], elementwise_bytes_per_s=processor.elementwise_bytes_per_s / found[1])

    return _changed(offline.profile, fitted, lambda link: link)


def with_pieces(offline: OnlinePlanner, passes: Sequence[PassDone], profile: HardwareProfile) -> HardwareProfile:
    """``profile`` with what a sequence costs in attention, and an activation copy. Of a sequence decoding alone tells: these contexts are short, what they take
    beyond the expected says nothing of what long ones are read at."""
    points = _points(
        offline,
        passes,
        lambda processor, cost_s: replace(processor, attention_seq_s=cost_s, kv_attention={}),
        lambda link, cost_s: replace(link, copy_s=cost_s),
    )

    def fitted(resource: Resource, processor: ComputeProfile) -> ComputeProfile:
        found = piece_s(points.get((WorkKind(resource, ATTENTION), "decode"), ()))
        return processor if found is None else replace(processor, attention_seq_s=found)

    found = piece_s([point for (kind, _), each in points.items() if kind == WorkKind("link", COPIES) for point in each])
    return _changed(profile, fitted, lambda link: link if found is None else replace(link, copy_s=found))


def _points(
    offline: OnlinePlanner, passes: Sequence[PassDone], processor_at: Callable[[ComputeProfile, float], ComputeProfile],
    link_at: Callable[[LinkProfile, float], LinkProfile],
) -> Points:  # fmt: skip
    """By kind of work and phase. ``processor_at`` and ``link_at``: with such a cost of a piece. Seconds count as if nobody slowed the work down."""

    def at(cost_s: float) -> HardwareProfile:
        return _changed(offline.profile, lambda _, processor: processor_at(processor, cost_s), lambda link: link_at(link, cost_s))

    free, dear = at(0.0), at(1.0)
    alike: dict[tuple[int, PassLoad], list[PassDone]] = {}
    for done in passes:
        alike.setdefault((id(done.bucket), done.load), []).append(done)
    found: dict[tuple[WorkKind, Phase], list[Point]] = {}
    for each in alike.values():
        work = offline.work_of(each[0])
        rest_s, most_s = ({part.kind: part.seconds for part in work.expected(profile, each[0].load)} for profile in (free, dear))
        pass_s = median(done.seconds for done in each)
        for kind, seconds in most_s.items():
            took_s = median(done.work_s.get(kind, 0.0) for done in each) / offline.slowed(each[0], kind)
            rest = rest_s.get(kind, 0.0)
            if took_s > 0 and seconds > rest:
                found.setdefault((kind, each[0].bucket.phase), []).append(Point(count=seconds - rest, rest_s=rest, seconds=took_s, pass_s=pass_s))
    return found


def _changed(
    profile: HardwareProfile, processor: Callable[[Resource, ComputeProfile], ComputeProfile], link: Callable[[LinkProfile], LinkProfile]
) -> HardwareProfile:
    return replace(
        profile, cpu=processor("cpu", profile.cpu), gpu=None if profile.gpu is None else processor("gpu", profile.gpu),
        link=None if profile.link is None else link(profile.link),
    )  # fmt: skip
