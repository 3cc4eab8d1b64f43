"""The smallest limit that a refusal names, on plans made of three numbers: it does, a step less does not, and few sizes are tried."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.limits import named_limits
from twinpilots.plan.draft import limit_step, shortage
from twinpilots.plan.workload import Limits

MIB = 1 << 20
SIZES = st.integers(0, 40 * MIB) | st.integers(0, 1 << 38)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Of plans: what they always take of both tiers, and weights of which whole units lie in GPU memory, as many as it holds, and the rest on the host."""

    gpu_bytes: int
    host_bytes: int
    weight_bytes: int
    unit_bytes: int

    def made_for(self, limits: Limits) -> Limits:
        room = max(0, limits.gpu_bytes - self.gpu_bytes)
        resident = min(self.weight_bytes, room // self.unit_bytes * self.unit_bytes)
        return Limits(gpu_bytes=self.gpu_bytes + resident, host_bytes=self.host_bytes + self.weight_bytes - resident)


KINDS = st.lists(st.builds(Kind, gpu_bytes=SIZES, host_bytes=SIZES, weight_bytes=SIZES, unit_bytes=st.integers(1, 1 << 22)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(kinds=KINDS, limits=st.builds(Limits, gpu_bytes=SIZES, host_bytes=SIZES))
def test_the_limits_named_do_and_nothing_smaller_does(kinds: list[Kind], limits: Limits) -> None:
    tried: list[Limits] = []

    def needs(given: Limits) -> list[Limits]:
        tried.append(given)
        return [kind.made_for(given) for kind in kinds]

    def do(given: Limits) -> bool:
        return any(kind.made_for(given).beyond(given) == 0 for kind in kinds)

    assume(not do(limits))
    asked = named_limits(str(shortage(needs, limits, "auto")))
    enough = replace(limits, **asked)
    assert asked and do(enough)
    for tier, size in asked.items():
        assert not do(replace(enough, **{tier: size - limit_step(size)}))
    assert len(tried) <= 60 * len(asked)


def test_a_plan_that_was_too_large_says_how_large_memory_must_be() -> None:
    """Two sizes to know that there is one, the one that it points to, and a step less."""
    tried: list[int] = []
    kind = Kind(gpu_bytes=(7 << 30) - 5, host_bytes=0, weight_bytes=0, unit_bytes=1)

    def needs(given: Limits) -> list[Limits]:
        tried.append(given.gpu_bytes)
        return [kind.made_for(given)]

    assert named_limits(str(shortage(needs, Limits(gpu_bytes=1 << 30, host_bytes=1 << 40), "auto"))) == {"gpu_bytes": 7 << 30}
    assert len(tried) == 4
