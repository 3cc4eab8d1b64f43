"""KV pages: which page of which tier holds which tokens of which sequence.

Owns `PagePool` (the free pages of one tier) and `KvCache` (page tables). A page belongs to at most one sequence. Knows nothing of the bytes in a
page, of queues or of models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinpilots.plan.plan import Plan
from twinpilots.request import Sequence, Tier

TIERS: tuple[Tier, ...] = ("gpu", "host")
Pages = NDArray[np.int32]


class PagePool:
    """The pages [0, num_pages) of one tier. Freed pages are reused first: they are the ones still in cache."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_pages(self) -> tuple[int, ...]:
        return tuple(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` pages, lowest first from a fresh pool. The caller has checked `num_free`."""
        assert 0 < count <= len(self._free), f"{count} pages taken, {len(self._free)} free"
        taken = self._free[: -count - 1 : -1]
        del self._free[-count:]
        return taken

    def give(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))


@dataclass(slots=True)
class _Table:
    """The pages of one sequence: the first ``count`` entries of an array that doubles as it grows, so that views of it stay valid."""

    tier: Tier
    pages: Pages
    count: int = 0

    def append(self, new: list[int]) -> None:
        end = self.count + len(new)
        if end > len(self.pages):
            grown = np.empty(max(2 * len(self.pages), end), np.int32)
            grown[: self.count] = self.pages[: self.count]
            self.pages = grown
        self.pages[self.count : end] = new
        self.count = end


class KvCache:
    """Page tables of all sequences that hold pages, over one pool per tier."""

    def __init__(self, plan: Plan) -> None:
        self.page_size = plan.page_size
        self.pools: dict[Tier, PagePool] = {"gpu": PagePool(plan.gpu_pages, plan.page_size), "host": PagePool(plan.host_pages, plan.page_size)}
        self._tables: dict[Sequence, _Table] = {}

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def num_held(self, sequence: Sequence) -> int:
        table = self._tables.get(sequence)
        return 0 if table is None else table.count

    def open(self, sequence: Sequence, tier: Tier) -> None:
        """An empty page table on ``tier``; all of the sequence's pages come from there until `free`."""
        assert sequence not in self._tables, f"sequence {sequence.request_id}/{sequence.index} already has pages"
        self._tables[sequence] = _Table(tier, np.empty(8, np.int32))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the sequence's first ``num_tokens`` tokens; False, changing nothing, when its tier lacks the pages."""
        table = self._tables[sequence]
        missing = -(-num_tokens // self.page_size) - table.count
        if missing <= 0:
            return True
        pool = self.pools[table.tier]
        if missing > pool.num_free:
            return False
        table.append(pool.take(missing))
        return True

    def pages(self, sequence: Sequence, num_tokens: int) -> Pages:
        """The pages of the first ``num_tokens`` tokens, in order (a view)."""
        table = self._tables[sequence]
        count = -(-num_tokens // self.page_size)
        assert count <= table.count, f"{num_tokens} tokens need {count} pages, {table.count} held"
        return table.pages[:count]

    def free(self, sequence: Sequence) -> None:
        """Return all pages of the sequence; nothing to do when it has none."""
        table = self._tables.pop(sequence, None)
        if table is not None:
            self.pools[table.tier].give(table.pages[: table.count].tolist())

    def holders(self) -> tuple[Sequence, ...]:
        return tuple(self._tables)

    def check_integrity(self) -> None:
        """Every page is free or held exactly once, and every table covers what its sequence has computed. AssertionError states both sides."""
        for tier, pool in self.pools.items():
            held = [page for table in self._tables.values() if table.tier == tier for page in table.pages[: table.count].tolist()]
            if pool.num_free + len(held) != pool.num_pages:
                raise AssertionError(f"{tier} pages: {pool.num_free} free + {len(held)} held = {pool.num_free + len(held)}, the pool has {pool.num_pages}")
            distinct = set(held).union(pool.free_pages)
            if distinct != set(range(pool.num_pages)):
                raise AssertionError(f"{tier} pages: {len(distinct)} distinct pages are free or held, the pool has {pool.num_pages}")
        for sequence, table in self._tables.items():
            needed = self.pages_for(sequence.num_computed)
            if table.count < needed or sequence.tier != table.tier:
                raise AssertionError(
                    f"sequence {sequence.request_id}/{sequence.index}: {sequence.num_computed} computed tokens on {sequence.tier} "
                    f"need {needed} pages, its table holds {table.count} on {table.tier}"
                )
