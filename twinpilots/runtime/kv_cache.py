"""KV pages: which page of which tier holds which tokens of which sequences.

Owns `PagePool` (the pages of one tier, and what full ones still hold when nobody uses them) and `KvCache` (page tables, prefix cache). Knows nothing of the
bytes in a page, of queues or of models.

A full page's content depends on nothing but the tokens up to its end, so it is known by their digest (each page's digest covers the one before). Sequences
that begin alike share such pages; nobody writes to a shared page, as a sequence's next token always goes to a page of its own. What the last sequence
gives back stays known until the page is needed: longest unused first, and of one sequence the end before the beginning.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twinpilots.plan.plan import Plan
from twinpilots.request import Sequence, Tier
from twinpilots.runtime.stats import PrefixCounts

TIERS: tuple[Tier, ...] = ("gpu", "host")
DIGEST_BYTES = 16  # no two beginnings ever share a digest: a hit is never somebody else's text
Pages = NDArray[np.int32]
Digest = bytes


class PagePool:
    """The pages [0, num_pages) of one tier. A page is blank, in use by one or more sequences, or idle: unused, its content still known.

    Blank pages are taken first, the last one given back before all others: it is the one still in the processor's cache.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._blank = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._digests: dict[int, Digest] = {}  # of pages whose content is known
        self._known: dict[Digest, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def num_free(self) -> int:
        """Pages that `take` can give: blank or idle."""
        return len(self._blank) + len(self._idle)

    @property
    def free_pages(self) -> tuple[int, ...]:
        return (*self._blank, *self._idle)

    def users(self, page: int) -> int:
        """How many sequences use a page."""
        return self._users[page]

    def take(self, count: int) -> list[int]:
        """``count`` pages for one user, lowest first from a fresh pool; what idle ones held is forgotten. The caller has checked `num_free`."""
        assert 0 < count <= self.num_free, f"{count} pages taken, {self.num_free} free"
        taken = self._blank[: -count - 1 : -1]
        del self._blank[-count:]
        while len(taken) < count:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._digests.pop(page)]
            taken.append(page)
        for page in taken:
            self._users[page] = 1
        return taken

    def give(self, pages: list[int]) -> None:
        """One user of each page less. Pages come in a sequence's order: its end is forgotten before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digests:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def share(self, digest: Digest) -> int | None:
        """The page that holds this beginning, with one user more; None when there is none."""
        page = self._known.get(digest)
        if page is not None:
            self._users[page] += 1
            self._idle.pop(page, None)
        return page

    def learn(self, page: int, digest: Digest) -> None:
        """A page in use is full now. Where another page holds the same, this one stays nameless."""
        if digest not in self._known and page not in self._digests:
            self._known[digest] = page
            self._digests[page] = digest

    def check_integrity(self, tier: Tier, held: SequenceABC[int]) -> None:
        """``held``: the pages in all tables, shared ones as often as they are in one. AssertionError states both sides."""
        counted = Counter(held)
        if self.num_free + len(counted) != self.num_pages:
            total = self.num_free + len(counted)
            raise AssertionError(f"{tier} pages: {self.num_free} free + {len(counted)} held = {total}, the pool has {self.num_pages}")
        distinct = set(counted).union(self.free_pages)
        if distinct != set(range(self.num_pages)):
            raise AssertionError(f"{tier} pages: {len(distinct)} distinct pages are free or held, the pool has {self.num_pages}")
        wrong = next((page for page in range(self.num_pages) if self._users[page] != counted[page]), None)
        if wrong is not None:
            raise AssertionError(f"{tier} page {wrong} is in {counted[wrong]} tables, its count of users says {self._users[wrong]}")
        if {digest: page for page, digest in self._digests.items()} != self._known or not set(self._idle) <= set(self._digests):
            raise AssertionError(f"{tier} pages: {len(self._digests)} have digests, {len(self._known)} are known by one, {len(self._idle)} are idle")


@dataclass(slots=True)
class _Table:
    """The pages of one sequence: the first ``count`` entries of an array that doubles as it grows, so that views of it stay valid.

    ``digests``: of the full pages whose tokens have been computed, as far as they were looked at.
    """

    tier: Tier
    pages: Pages
    count: int = 0
    digests: list[Digest] = field(default_factory=list)

    def append(self, new: list[int]) -> None:
        end = self.count + len(new)
        if end > len(self.pages):
            grown = np.empty(max(2 * len(self.pages), end), np.int32)
            grown[: self.count] = self.pages[: self.count]
            self.pages = grown
        self.pages[self.count : end] = new
        self.count = end


@dataclass(frozen=True, kw_only=True, eq=False)
class KvMove:
    """A sequence's KV on its way to another tier: what page ``source[i]`` holds is copied to page ``target[i]`` of tier ``to``. ``pages``: all that it will
    have there; those that are not copied hold the same tokens already."""

    sequence: Sequence
    to: Tier
    source: tuple[int, ...]
    target: tuple[int, ...]
    pages: tuple[int, ...]


class KvCache:
    """Page tables of all sequences that hold pages, over one pool per tier. ``share_prefixes``: sequences that begin alike share pages."""

    def __init__(self, plan: Plan, *, share_prefixes: bool = True, counts: PrefixCounts | None = None) -> None:
        self.page_size = plan.page_size
        self.share_prefixes = share_prefixes
        self.counts = counts or PrefixCounts()
        self.pools: dict[Tier, PagePool] = {"gpu": PagePool(plan.gpu_pages, plan.page_size), "host": PagePool(plan.host_pages, plan.page_size)}
        self._tables: dict[Sequence, _Table] = {}
        self._moves: dict[Sequence, KvMove] = {}

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def num_held(self, sequence: Sequence) -> int:
        table = self._tables.get(sequence)
        return 0 if table is None else table.count

    def open(self, sequence: Sequence, tier: Tier) -> int:
        """A page table on ``tier``; all of the sequence's pages come from there until `free`. Returns how many of its first tokens are there already.

        At least one token is left to compute, and all of them where the logits of earlier ones are wanted.
        """
        assert sequence not in self._tables, f"sequence {sequence.request_id}/{sequence.index} already has pages"
        table = self._tables[sequence] = _Table(tier, np.empty(8, np.int32))
        if not self.share_prefixes or sequence.logits_from is not None:
            return 0
        found: list[int] = []
        while (len(found) + 1) * self.page_size < len(sequence.tokens):
            digest = self._digest(sequence, table)
            page = self.pools[tier].share(digest)
            if page is None:
                break
            table.digests.append(digest)
            found.append(page)
        table.append(found)
        self.counts.queried_tokens += len(sequence.tokens)
        self.counts.hit_tokens += len(found) * self.page_size
        return len(found) * self.page_size

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """The sequence's first ``num_tokens`` tokens are in its pages now: others that begin like them may share the full ones."""
        table = self._tables[sequence]
        while self.share_prefixes and (len(table.digests) + 1) * self.page_size <= num_tokens:
            digest = self._digest(sequence, table)
            self.pools[table.tier].learn(int(table.pages[len(table.digests)]), digest)
            table.digests.append(digest)

    def _digest(self, sequence: Sequence, table: _Table) -> Digest:
        """Of the first page that the table has no digest of."""
        start = len(table.digests) * self.page_size
        tokens = np.array(sequence.tokens[start : start + self.page_size], np.int32).tobytes()
        return hashlib.blake2b(tokens, digest_size=DIGEST_BYTES, key=table.digests[-1] if table.digests else b"").digest()

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

    def extend_all(self, ends: SequenceABC[tuple[Sequence, int]]) -> bool:
        """`extend` for several sequences of one tier at once: for all of them, or for none."""
        missing = [(self._tables[sequence], self.pages_for(num_tokens) - self._tables[sequence].count) for sequence, num_tokens in ends]
        wanted = sum([max(0, count) for _, count in missing])
        pool = self.pools[missing[0][0].tier]
        assert all(self.pools[table.tier] is pool for table, _ in missing), "pages of one tier at a time"
        if wanted > pool.num_free:
            return False
        for table, count in missing:
            if count > 0:
                table.append(pool.take(count))
        return True

    def pages(self, sequence: Sequence, num_tokens: int) -> Pages:
        """The pages of the first ``num_tokens`` tokens, in order (a view)."""
        table = self._tables[sequence]
        count = -(-num_tokens // self.page_size)
        assert count <= table.count, f"{num_tokens} tokens need {count} pages, {table.count} held"
        return table.pages[:count]

    def free(self, sequence: Sequence) -> None:
        """Give back all pages of the sequence; nothing to do when it has none."""
        if sequence in self._moves:
            self.cancel_move(self._moves[sequence])
        table = self._tables.pop(sequence, None)
        if table is not None:
            self.pools[table.tier].give(table.pages[: table.count].tolist())

    # -- from tier to tier ---------------------------------------------------------------------------------------------------------------

    def start_move(self, sequence: Sequence) -> KvMove | None:
        """Pages on the other tier for all that the sequence has computed; None, changing nothing, when that tier lacks them. Until `end_move` the sequence
        keeps its pages here and must not run. A page that others share is copied, too, and stays theirs; what the other tier knows already is shared there."""
        table = self._tables[sequence]
        to: Tier = "host" if table.tier == "gpu" else "gpu"
        pool, needed = self.pools[to], self.pages_for(sequence.num_computed)
        shared: list[int] = []
        for digest in table.digests[:needed]:
            page = pool.share(digest)
            if page is None:
                break
            shared.append(page)
        if needed - len(shared) > pool.num_free:
            pool.give(shared)
            return None
        taken = pool.take(needed - len(shared)) if needed > len(shared) else []
        source = tuple(table.pages[len(shared) : needed].tolist())
        move = self._moves[sequence] = KvMove(sequence=sequence, to=to, source=source, target=tuple(taken), pages=(*shared, *taken))
        return move

    def end_move(self, move: KvMove) -> None:
        """The copy has been made: the sequence's pages are those on the other tier."""
        del self._moves[move.sequence]
        table = self._tables[move.sequence]
        self.pools[table.tier].give(table.pages[: table.count].tolist())
        table.tier, table.pages, table.count = move.to, np.empty(8, np.int32), 0
        table.append(list(move.pages))
        for page, digest in zip(move.pages, table.digests, strict=False):
            self.pools[move.to].learn(page, digest)

    def cancel_move(self, move: KvMove) -> None:
        """The sequence stays where it is."""
        if self._moves.pop(move.sequence, None) is not None:
            self.pools[move.to].give(list(move.pages))

    def num_exclusive(self, sequence: Sequence) -> int:
        """Pages that are free when the sequence leaves its tier."""
        table = self._tables[sequence]
        return sum(self.pools[table.tier].users(page) == 1 for page in table.pages[: table.count].tolist())

    def holders(self) -> tuple[Sequence, ...]:
        return tuple(self._tables)

    def check_integrity(self) -> None:
        """Every page is free or held, shared pages as often as their count says, and every table covers what its sequence has computed.

        AssertionError states both sides.
        """
        for tier, pool in self.pools.items():
            held = [page for table in self._tables.values() if table.tier == tier for page in table.pages[: table.count].tolist()]
            pool.check_integrity(tier, held + [page for move in self._moves.values() if move.to == tier for page in move.pages])
        for sequence, table in self._tables.items():
            needed = self.pages_for(sequence.num_computed)
            if table.count < needed or sequence.tier != table.tier:
                raise AssertionError(
                    f"sequence {sequence.request_id}/{sequence.index}: {sequence.num_computed} computed tokens on {sequence.tier} "
                    f"need {needed} pages, its table holds {table.count} on {table.tier}"
                )
            shared = sum(self.pools[table.tier].users(page) > 1 for page in table.pages[: table.count].tolist())
            if shared * self.page_size > sequence.num_computed:
                raise AssertionError(
                    f"sequence {sequence.request_id}/{sequence.index} shares {shared} pages of {self.page_size} tokens, it has computed {sequence.num_computed}"
                )
