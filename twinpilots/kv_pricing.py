"""Whether a running sequence should change tiers: the scheduler's question, asked of the plan's prices.

Owns what of the running sequences the prices go by, and when prices are taken anew. Knows nothing of pages or copies.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.migration import MovePrices
from twinpilots.plan.plan import Plan
from twinpilots.request import Sequence, Tier
from twinpilots.runtime.scheduler import GROWTH_TOKENS

DRIFT_PASSES = 512  # questions after which a profile that has drifted is taken anew


class KvPricing:
    """`runtime.migration.Pricing`. ``plan`` and ``profile`` give those in force."""

    def __init__(self, spec: ModelSpec, plan: Callable[[], Plan], profile: Callable[[], HardwareProfile]) -> None:
        self._spec, self._plan, self._profile = spec, plan, profile
        self._prices = MovePrices(spec, plan(), profile())
        self._asked = 0

    def pays(self, sequence: Sequence, to: Tier, running: SequenceABC[Sequence]) -> bool:
        """As `Pricing.pays`. A sequence's end is not known: it is expected to go on for as long as pages are kept for its growth."""
        prices = self._current()
        decoding = [other for other in running if not other.is_catching_up or other is sequence]
        num_gpu = sum(other.tier == "gpu" for other in decoding)
        context = sum(len(other.tokens) for other in decoding) // len(decoding)
        passes = min(sequence.max_len - len(sequence.tokens), GROWTH_TOKENS)
        ask = prices.pays_to_gpu if to == "gpu" else prices.pays_to_host
        return ask(max(1, sequence.num_computed), passes, num_gpu=num_gpu, num_host=len(decoding) - num_gpu, context=context)

    def _current(self) -> MovePrices:
        self._asked += 1
        plan, profile = self._plan(), self._profile()
        if self._prices.plan is not plan or (self._asked >= DRIFT_PASSES and self._prices.profile is not profile):
            self._prices, self._asked = MovePrices(self._spec, plan, profile), 0
        return self._prices
