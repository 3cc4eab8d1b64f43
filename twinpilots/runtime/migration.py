"""Which sequences change tiers during the next pass.

Owns the moves of one pass: who leaves GPU memory when its pages run out, who comes to it when there is room, and who sits out for it. Whether a move pays
is asked of `Pricing`, which the planner's half answers. Knows nothing of how pages are copied.

A sequence that moves sits out one pass, during which its pages are copied; so does one that needs the pages which become free by that.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import Protocol

from twinpilots.plan.memory import KV_MOVES_PER_PASS, kv_move_pages
from twinpilots.plan.plan import Plan
from twinpilots.request import Sequence, Tier
from twinpilots.runtime.kv_cache import KvCache, KvMove


class Pricing(Protocol):
    """What a move is worth."""

    def pays(self, sequence: Sequence, to: Tier, running: SequenceABC[Sequence]) -> bool:
        """Whether to move ``sequence``, one of ``running``. To the GPU: instead of leaving it where it is. To the host: instead of computing it anew
        when there is room again."""
        ...


class Migration:
    """The moves of the pass that is being drawn up. ``pricing`` None: sequences stay where they began."""

    def __init__(self, plan: Plan, kv: KvCache, pricing: Pricing | None) -> None:
        self.kv, self.pricing = kv, pricing if plan.gpu_pages and plan.host_pages else None
        self.most_pages = kv_move_pages(plan)
        self.moves: dict[Sequence, KvMove] = {}
        self._num_pages = 0  # copied by them
        self._freed = 0  # GPU pages that they leave and nobody has been promised

    def begin(self) -> None:
        """A new pass. Where the one before failed, those who were to move have stayed."""
        for move in self.moves.values():
            self.kv.cancel_move(move)
        self.moves.clear()
        self._num_pages = self._freed = 0

    def start(self, sequence: Sequence, running: SequenceABC[Sequence]) -> bool:
        """Move the sequence to the other tier, where it fits; False when that cannot be or does not pay."""
        to: Tier = "host" if sequence.tier == "gpu" else "gpu"
        if self.pricing is None or len(self.moves) == KV_MOVES_PER_PASS or self._num_pages + self.kv.pages_for(sequence.num_computed) > self.most_pages:
            return False
        if not self.pricing.pays(sequence, to, running):
            return False
        freed = self.kv.num_exclusive(sequence)
        move = self.kv.start_move(sequence)
        if move is None:
            return False
        self.moves[sequence] = move
        self._num_pages += len(move.source)
        self._freed += freed if to == "host" else 0
        return True

    def covers(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the pages that a GPU sequence lacks for ``num_tokens`` tokens are being left by others: they are promised to it, after this pass."""
        missing = self.kv.pages_for(num_tokens) - self.kv.num_held(sequence) - self.kv.pools["gpu"].num_free
        if sequence.tier != "gpu" or missing > self._freed:
            return False
        self._freed -= missing
        return True
