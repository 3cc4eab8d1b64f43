"""Work that comes again and again: how often each workload came under the loaded plan, and what whole rounds of it took under which plan.

Owns the counts that decide when another plan is asked for, and the measured seconds that count for more than any prediction. Knows nothing of how plans are
found or loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from twinpilots.plan.plan import Plan
from twinpilots.plan.workload import Workload


class Rounds:
    """Counts begin anew with every plan that is loaded; what rounds took is kept."""

    def __init__(self) -> None:
        self._loaded: Plan | None = None
        self._came: Counter[Workload] = Counter()
        self._ask_at: dict[Workload, int] = {}
        self._took_s: dict[Workload, list[tuple[Plan, float]]] = {}

    def loaded(self, plan: Plan) -> None:
        """``plan`` was loaded, and is changed from now on in ways only that need no loading."""
        self._loaded = plan
        self._came.clear()
        self._ask_at.clear()

    def come(self, workload: Workload) -> int:
        """Note a round; how many there were under this plan, this one included."""
        self._came[workload] += 1
        return self._came[workload]

    def is_due(self, workload: Workload) -> bool:
        """Whether another plan may be asked for: at some round, then at twice as many, and so on. To ask takes longer than a small round."""
        came = self._came[workload]
        if came < self._ask_at.get(workload, 1):
            return False
        self._ask_at[workload] = 2 * came
        return True

    def took(self, workload: Workload, seconds: float) -> None:
        """A whole round under the loaded plan. The quickest counts: neighbours only ever take time."""
        assert self._loaded is not None
        known = self._took_s.setdefault(workload, [])
        best_s = min([seconds, *(each_s for plan, each_s in known if plan is self._loaded)])
        known[:] = [*((plan, each_s) for plan, each_s in known if plan is not self._loaded), (self._loaded, best_s)]

    def seen_s(self, workload: Workload) -> float | None:
        """What a round takes under the loaded plan, if one was seen."""
        return next((seconds for plan, seconds in self._took_s.get(workload, ()) if plan is self._loaded), None)

    def others(self, workload: Workload, found: Plan) -> Iterator[tuple[Plan, float | None]]:
        """Plans but the loaded one: those that were seen with this workload, with their seconds, and ``found``."""
        seen = [each for each in self._took_s.get(workload, ()) if each[0] is not self._loaded]
        yield from seen
        if found is not self._loaded and all(plan is not found for plan, _ in seen):
            yield found, None
