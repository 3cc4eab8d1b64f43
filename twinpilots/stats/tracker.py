"""History of measured work against the profile, and the profile as history corrects it.

Owns `Tracker`, which keeps, per kind of work, a decaying estimate of measured / expected time by size. The paper's estimator keeps raw records for ever;
here old ones fade, neighbouring sizes lend each other evidence, and a jump is followed at once. Pure: no clock, no torch. Knows nothing of passes or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.plan.expected import Resource
from twinpilots.stats.correction import Kind, WorkTime, corrected
from twinpilots.stats.evidence import Evidence

MOST_STORED_WEIGHT = 3.0  # records of a size that a file keeps: a new run's own records soon outweigh them
UNSEEN_SHARE = 0.25  # of a pass: what work counts that is not done now, but would be if its rate came back
UNSEEN_PASSES = 8
SMALL_SHARE = 0.05  # of a pass: work that is less is not waited for
Snapshot = Mapping[Kind, float]


@dataclass
class Tracker:
    """Corrects ``offline`` by what is observed. `profile` is the offline profile until something was."""

    offline: HardwareProfile
    evidence: dict[Kind, Evidence] = field(default_factory=dict)
    num_passes: int = 0
    _shares: dict[Kind, float] = field(default_factory=dict)  # of a pass's time, lately

    def observe(self, records: Iterable[WorkTime], pass_s: float) -> None:
        """Take in the records of a pass of ``pass_s`` seconds. Records of nothing (no work, no time) are passed over."""
        self.num_passes += 1
        shares = dict.fromkeys(self._shares, 0.0)
        for record in records:
            if min(record.seconds, record.expected_s) <= 0:
                continue
            kind = record.resource, record.key
            if kind not in self.evidence:
                self.evidence[kind] = Evidence()
            self.evidence[kind].add(record.seconds / record.expected_s, record.size, self.num_passes)
            shares[kind] = shares.get(kind, 0.0) + record.seconds / pass_s
        for kind, share in shares.items():
            self._shares[kind] = 0.8 * self._shares.get(kind, share) + 0.2 * share

    def pass_over(self) -> None:
        """A pass that is not looked at."""
        self.num_passes += 1

    def factor(self, resource: Resource, key: str, size: float) -> float:
        """Measured / expected at this size; 1 where nothing was seen."""
        found = self.evidence.get((resource, key))
        return 1.0 if found is None else math.exp(found.log_factor(size, self.num_passes))

    def error_frac(self, resource: Resource, key: str, size: float) -> float:
        """How far `factor` may well be off, as a fraction of it."""
        found = self.evidence.get((resource, key))
        return 0.0 if found is None else math.expm1(found.error_log(size, self.num_passes))

    @property
    def num_jumps(self) -> int:
        return sum(found.num_jumps for found in self.evidence.values())

    @property
    def is_settled(self) -> bool:
        """Whether no work that matters was far off its estimate just now: what may become a jump in the next passes."""
        return all(found.is_settled or self._shares.get(kind, 0.0) < SMALL_SHARE for kind, found in self.evidence.items())

    # -- drift -----------------------------------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The log factors as they are now, each at the size seen last."""
        return {kind: found.log_factor(found.last_size, self.num_passes) for kind, found in self.evidence.items()}

    def drift(self, since: Snapshot) -> tuple[float, str]:
        """How much of a pass's time has changed since a snapshot, as a fraction, by the kind of work for which that is most; changes within the noise do
        not count. And that change in words."""
        most, words = 0.0, "nothing"
        for kind, found in self.evidence.items():
            change = found.log_factor(found.last_size, self.num_passes) - since.get(kind, 0.0)
            unseen = self.num_passes - found.last_at > UNSEEN_PASSES
            effect = abs(math.expm1(change)) * (UNSEEN_SHARE if unseen else self._shares.get(kind, 0.0))
            if effect > most and abs(change) > 2 * found.error_log(found.last_size, self.num_passes):
                most, words = effect, f"{kind[1]} {'of' if kind[0] == 'link' else 'on'} the {kind[0]} takes {math.exp(change):.2f} of the time it did"
        return most, words

    # -- the corrected profile ---------------------------------------------------------------------------------------------------------------

    def profile(self) -> HardwareProfile:
        """The offline profile with every observed rate corrected."""
        return corrected(self.offline, self)

    def sizes(self, resource: Resource, key: str) -> list[float]:
        """Those that were observed."""
        found = self.evidence.get((resource, key))
        return [] if found is None else found.sizes()

    def latest(self, resource: Resource, key: str) -> float:
        """The factor at the size seen last: attention's profile has one rate, good for contexts like these."""
        found = self.evidence.get((resource, key))
        return 1.0 if found is None else self.factor(resource, key, found.last_size)

    # -- files -------------------------------------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """What was learned, for a file."""
        return {f"{resource} {key}": found.as_dict(self.num_passes, MOST_STORED_WEIGHT) for (resource, key), found in self.evidence.items()}

    def recall(self, data: Mapping[str, Any], weight_factor: float = 1.0) -> None:
        """Start from what `as_dict` gave, aged by ``weight_factor``. ValueError when it is something else; nothing is taken over then."""
        try:
            found = {}
            for name, each in data.items():
                resource, _, key = name.partition(" ")
                if resource not in ("cpu", "gpu", "link"):
                    raise ValueError(f"unknown resource {resource!r}")
                found[resource, key] = Evidence.from_dict(each, weight_factor)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a history: {error!r}") from error
        self.evidence |= found  # type: ignore[arg-type]
