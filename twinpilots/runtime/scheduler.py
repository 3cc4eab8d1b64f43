"""Which tokens of which sequences go into the next pass.

Owns the running queue, admission (length and memory limits, tier), the token and logit budgets of a pass, and preemption. The one rule:
a sequence's computed tokens catch up with its tokens. Dealing the chosen items into micro-batches is `deal.py`'s. Knows nothing of logits, text
or time.

Decoding sequences come first, then prompt chunks; clients that compete share fairly (`fairness.py`), a single one is served first come, first served. A
sequence that needs a page when none is left takes it from the newest on its tier, so the oldest always gets on: the newest moves to the host where that pays
(`migration.py`), else it is computed anew later.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import replace

import numpy as np

from twinpilots.errors import LimitError
from twinpilots.plan.plan import BucketPlan, Phase, Plan
from twinpilots.request import Sequence, Status, Tier
from twinpilots.runtime.batch import BatchItem, StepBatch
from twinpilots.runtime.deal import bucket_of, deal
from twinpilots.runtime.fairness import PROMPT_TOKEN, FairQueue
from twinpilots.runtime.kv_cache import TIERS, KvCache
from twinpilots.runtime.migration import Migration, Pricing

# Tokens that a running sequence is expected to grow beyond what is known; admission keeps pages for them. Longer outputs may end in a preemption.
GROWTH_TOKENS = 256
_NO_PAGES = np.empty(0, np.int32)
_FIXED_BY_LIVE_SEQUENCES = (
    "page_size", "gpu_pages", "host_pages", "max_num_seqs", "max_pass_tokens", "max_model_len", "kv_staging_pages", "host_kv_layers", "uses_cpu", "uses_gpu",
)  # fmt: skip


class Scheduler:
    """Queues and budgets. ``recompute_beyond``: a sequence that grows past this many tokens is computed anew (longrope changes its rotary table there).
    ``pricing``: whether a sequence should change tiers; None: never."""

    def __init__(
        self, plan: Plan, kv: KvCache, *, growth_tokens: int = GROWTH_TOKENS, recompute_beyond: int | None = None, pricing: Pricing | None = None
    ) -> None:
        assert recompute_beyond is None or not kv.share_prefixes, "what is computed anew in place must not be shared"
        self.plan = plan
        self.kv = kv
        self.growth_tokens = growth_tokens
        self.recompute_beyond = recompute_beyond
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # by arrival
        self.migration = Migration(plan, kv, pricing)
        self.num_preemptions = 0
        self._is_short = False  # somebody has lost their pages for the pass that was scheduled last
        self.num_moves: Counter[Tier] = Counter()  # sequences whose KV has changed tiers, by where it went
        self.prompt_budget: int | None = None  # prompt tokens of a pass in which others decode; None: as many as it holds

    def set_plan(self, plan: Plan) -> None:
        """Take a new plan from the next pass on. Raises ValueError when it changes what live sequences rely on."""
        for name in _FIXED_BY_LIVE_SEQUENCES:
            if getattr(plan, name) != getattr(self.plan, name):
                raise ValueError(f"a running engine cannot change {name} from {getattr(self.plan, name)} to {getattr(plan, name)}")
        self.plan = plan

    # -- admission -----------------------------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises LimitError, before any work, when it can never run within the length and memory limits."""
        sequence.max_len = self.length_limit(len(sequence.tokens), sequence.params.max_tokens)
        self.waiting.add(sequence)

    def length_limit(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Tokens, prompt included, at which such a sequence ends. Raises LimitError when it can never run."""
        longest = self.plan.max_model_len
        if num_prompt_tokens >= longest:
            raise LimitError(f"the prompt has {num_prompt_tokens} tokens, max_model_len={longest} leaves room for {longest - 1} and one new token; shorten it")
        capacity = max(self.capacity_tokens(tier) for tier in TIERS)
        wanted = longest if max_tokens is None else min(longest, num_prompt_tokens + max_tokens)
        # The last token is never computed, so it needs no page.
        limit = min(wanted, capacity + 1) if max_tokens is None else wanted
        if limit - 1 > capacity or limit <= num_prompt_tokens:
            raise LimitError(
                f"prompt and output need KV pages for {max(limit - 1, num_prompt_tokens)} tokens, the largest tier holds {capacity}; "
                "lower max_tokens, shorten the prompt, or raise gpu_memory or host_memory"
            )
        return limit

    def capacity_tokens(self, tier: Tier) -> int:
        """The longest sequence that ``tier`` can hold, and, where the CPU does not attend, that fits a staging slot."""
        pages = self.kv.pools[tier].num_pages
        if tier == "host" and not self.plan.uses_cpu:
            pages = min(pages, self.plan.kv_staging_pages)
        return pages * self.plan.page_size

    def _expected_pages(self, sequence: Sequence) -> int:
        """Pages it will hold soon: everything known and some growth, never more than its end needs."""
        return self.kv.pages_for(min(sequence.max_len - 1, len(sequence.tokens) + self.growth_tokens))

    def _tier_for(self, sequence: Sequence, expected: dict[Tier, int]) -> Tier | None:
        """GPU pages while they last, then host pages; None: wait. An empty tier takes any sequence that fits at all."""
        for tier in TIERS:
            if self.capacity_tokens(tier) < sequence.max_len - 1:
                continue
            if expected[tier] == 0 or expected[tier] + self._expected_pages(sequence) <= self.kv.pools[tier].num_pages:
                return tier
        return None

    def _expected_by_tier(self, running: list[Sequence]) -> dict[Tier, int]:
        expected: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        for sequence in running:
            assert sequence.tier is not None
            expected[sequence.tier] += self._expected_pages(sequence)
        return expected

    def skip_prompts(self) -> int:
        """Let in who finds room, with all tokens but the last counted as computed, whatever their pages hold: to measure passes at long contexts without
        computing the prompts. Returns how many came in; the others wait."""
        started = 0
        while self.waiting and len(self.running) < self.plan.max_num_seqs:
            sequence = self.waiting.first(Counter())
            tier = self._tier_for(sequence, self._expected_by_tier(self.running))
            if tier is None:
                break
            self._start(sequence, tier)
            sequence.num_computed = sequence.num_seen = len(sequence.tokens) - 1
            assert self.kv.extend(sequence, sequence.num_computed), "a tier with room has the pages"
            started += 1
        return started

    # -- one pass --------------------------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepBatch | None:
        """The next pass; None when there is nothing to do. Pages are reserved here; `commit` counts the tokens as computed."""
        draft = _Draft(self.plan.max_pass_tokens, self.plan.max_num_seqs)
        newcomers = _Newcomers(self, draft)
        num_preemptions = self.num_preemptions
        self.migration.begin()
        for sequence in tuple(self.running):
            if not sequence.is_catching_up and sequence.status is Status.RUNNING:
                self._bring(sequence, draft)
        if draft.items and self.prompt_budget is not None:
            draft.prompt_left = self.prompt_budget
        for sequence in self.waiting.by_turn([sequence for sequence in self.running if sequence.is_catching_up]):
            newcomers.admit(before=sequence)
            if sequence.status is Status.RUNNING:
                self._bring(sequence, draft)
        newcomers.admit()
        self._is_short = self.num_preemptions != num_preemptions
        if self.migration.pricing is not None and not self.migration.moves and not self._is_short:
            self._bring_home(draft)
        moves = tuple(self.migration.moves.values())
        assert draft.items or moves or not self.has_unfinished(), f"nothing can run, yet {len(self.running)} sequences run, {len(self.waiting)} wait"
        if not draft.items:
            return StepBatch(bucket=bucket_of(self.plan, ()), micro_batches=(), moves=moves) if moves else None
        return replace(deal(self.plan, list(draft.items.values())), moves=moves)

    def chained(self, batch: StepBatch, most: int) -> StepBatch:
        """The batch as a chain of at most ``most`` passes, where nothing can change between them: all that run decode, nobody's length limit ends it,
        and the pages are there without taking anybody's. Else as it is.

        Who waits could not come in now, so not before somebody ends, which ends a chain. A first token is not kept waiting for others.
        """
        items, end = batch.items, 0
        if most < 2 or self._is_short or batch.moves or self.recompute_beyond is not None or len(items) != len(self.running):
            return batch
        passes = most
        for sequence, start, num_tokens, num_logits, _, _ in items:
            end = len(sequence.tokens)
            if not num_tokens == 1 == num_logits or start + 1 != end or end == sequence.num_prompt_tokens:
                return batch
            passes = min(passes, sequence.max_len - end)
        while passes > 1 and not self.kv.extend_all([(item.sequence, item.start + passes) for item in items]):
            passes //= 2
        if passes < 2:
            return batch
        kv, micro_batches = self.kv, []
        for groups in batch.micro_batches:
            first, second, third = (tuple([item._replace(pages=kv.pages(item.sequence, item.start + passes)) for item in group]) for group in groups)
            micro_batches.append((first, second, third))
        return replace(batch, micro_batches=tuple(micro_batches), passes=passes)

    def _bring_home(self, draft: _Draft) -> None:
        """GPU pages that nobody else will want go to the decoding host sequence that has most left to do, if that pays."""
        if self.waiting and len(self.running) < self.plan.max_num_seqs:
            return  # they are the next one's
        expected = self._expected_by_tier(self.running)
        room, capacity = self.kv.pools["gpu"].num_pages - expected["gpu"], self.capacity_tokens("gpu")
        able = [
            sequence for sequence in self.running
            if sequence.tier == "host" and not sequence.is_catching_up and sequence.max_len - 1 <= capacity and self._expected_pages(sequence) <= room
        ]  # fmt: skip
        if able:
            sequence = max(able, key=lambda sequence: min(sequence.max_len - len(sequence.tokens), self.growth_tokens))
            if self.migration.start(sequence, self.running):
                draft.drop(sequence)

    def _send_off(self, sequence: Sequence) -> bool:
        """Whether the sequence leaves GPU memory for the host, instead of being computed anew."""
        if sequence.tier != "gpu" or self.migration.pricing is None or self.capacity_tokens("host") < sequence.max_len - 1:
            return False
        coming = sum(self._expected_pages(other) for other in self.migration.moves)
        has_room = self._expected_by_tier(self.running)["host"] + coming + self._expected_pages(sequence) <= self.kv.pools["host"].num_pages
        return has_room and self.migration.start(sequence, self.running)

    def _start(self, sequence: Sequence, tier: Tier) -> None:
        self.waiting.take(sequence)
        sequence.tier, sequence.status = tier, Status.RUNNING
        sequence.num_computed = sequence.num_cached = self.kv.open(sequence, tier)
        insort(self.running, sequence, key=lambda s: s.arrival)

    def _bring(self, sequence: Sequence, draft: _Draft) -> bool:
        """Put as many of its pending tokens into the pass as the budgets allow; False when none."""
        num_tokens, num_logits = draft.room_for(sequence)
        if num_tokens == 0 or sequence in self.migration.moves:
            return False
        end = sequence.num_computed + num_tokens
        while not self.kv.extend(sequence, end):
            if self.migration.covers(sequence, end):
                return False
            victim = next(other for other in reversed(self.running) if other.tier == sequence.tier and other not in self.migration.moves)
            draft.drop(victim)
            if not self._send_off(victim):
                self._preempt(victim)
            if victim is sequence:
                return False
        draft.add(BatchItem(sequence, sequence.num_computed, num_tokens, num_logits, sequence.is_catching_up, self.kv.pages(sequence, end)))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take the newest sequence's pages; it comes back before all that never ran and is computed anew."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self.kv.free(sequence)
        sequence.restart()
        sequence.tier, sequence.status = None, Status.WAITING
        self.waiting.put_back(sequence)

    # -- after a pass ------------------------------------------------------------------------------------------------------------------------

    def commit(self, batch: StepBatch) -> None:
        """The pass has run: its tokens are computed, and what moved has arrived."""
        for move in batch.moves:
            self.kv.end_move(move)
            move.sequence.tier = move.to
            self.num_moves[move.to] += 1
        for item in batch.items:
            self._computed(item.sequence, item.start, item.start + item.num_tokens, int(item.is_last))

    def commit_chain(self, batch: StepBatch, tokens: list[list[int]]) -> None:
        """The batch's passes have run, as many as each item got tokens."""
        for item, new in zip(batch.items, tokens, strict=True):
            item.sequence.tokens += new
            self._computed(item.sequence, item.start, item.start + len(new), len(new))

    def _computed(self, sequence: Sequence, start: int, end: int, num_generated: int) -> None:
        sequence.num_computed = end
        self.waiting.charge(sequence.client, max(0, end - max(start, sequence.num_seen)), num_generated)
        if end > sequence.num_seen:
            sequence.num_seen = end
        self.kv.computed(sequence, end)

    def append(self, sequence: Sequence, token: int) -> None:
        """A new token of a running sequence."""
        sequence.tokens.append(token)
        if self.recompute_beyond is not None and len(sequence.tokens) == self.recompute_beyond + 1:
            sequence.restart()  # its pages stay: the same positions are written again

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended or was aborted, at any point: its pages are free again."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        self.waiting.leave(sequence, waits=sequence.status is Status.WAITING)
        self.kv.free(sequence)
        sequence.status, sequence.tier = Status.FINISHED, None

    def passes_left(self, phase: Phase) -> int:
        """Passes of this phase that are still to come, about: as long as the longest sequence lasts, or until all prompts are read."""
        live = [*self.running, *self.waiting]
        if phase == "decode":
            return max((sequence.max_len - len(sequence.tokens) for sequence in live), default=0)
        return sum(max(0, sequence.num_pending - 1) for sequence in live) // self.plan.max_pass_tokens

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def predict_next(self, batch: StepBatch) -> BucketPlan | None:
        """A guess at the bucket of the pass after ``batch``, good enough to prefetch for: nobody stops early or is preempted. None: no more work."""
        draft = _Draft(self.plan.max_pass_tokens, self.plan.max_num_seqs)
        ends = {item.sequence: item.start + item.num_tokens for item in batch.items}
        later: list[tuple[bool, Sequence, int, int]] = []
        for sequence in self.running:
            computed, length = ends.get(sequence, sequence.num_computed), len(sequence.tokens)
            length += computed == length  # a token will have been sampled
            if length < sequence.max_len:
                is_chunk = computed < sequence.catch_up and length - computed > 1
                later.append((is_chunk, sequence, computed, length - computed))
        later += self._next_admitted([entry[1] for entry in later])
        for is_chunk, sequence, computed, pending in sorted(later, key=lambda entry: entry[0]):
            if draft.tokens_left > 0 and draft.logits_left > 0:
                draft.add(BatchItem(sequence, computed, min(pending, draft.tokens_left), 1, is_chunk, _NO_PAGES))
        return bucket_of(self.plan, draft.items.values()) if draft.items else None

    def _next_admitted(self, running: list[Sequence]) -> list[tuple[bool, Sequence, int, int]]:
        """The waiting sequences that would be admitted beside ``running``: (is_chunk, sequence, 0, pending tokens)."""
        if not self.waiting:
            return []
        expected: dict[Tier, int] = self._expected_by_tier(running)
        admitted: list[tuple[bool, Sequence, int, int]] = []
        for sequence in self.waiting:
            tier = self._tier_for(sequence, expected)
            if tier is None or len(running) + len(admitted) >= self.plan.max_num_seqs:
                break
            expected[tier] += self._expected_pages(sequence)
            admitted.append((len(sequence.tokens) > 1, sequence, 0, len(sequence.tokens)))
        return admitted

    def check_integrity(self) -> None:
        """Queues, states and page tables agree. AssertionError states both sides of what does not."""
        self.kv.check_integrity()
        holders, running = set(self.kv.holders()), set(self.running)
        if holders != running:
            raise AssertionError(f"{len(holders)} sequences hold pages, {len(running)} are running; {len(holders ^ running)} are only one of the two")
        if len(self.running) > self.plan.max_num_seqs:
            raise AssertionError(f"{len(self.running)} sequences are running, max_num_seqs is {self.plan.max_num_seqs}")
        self.waiting.check_integrity(len(self.running))
        arrivals = [sequence.arrival for sequence in self.running]
        if arrivals != sorted(arrivals):
            raise AssertionError(f"running sequences stand in the order {arrivals}, not {sorted(arrivals)}")
        for queue, status in ((self.running, Status.RUNNING), (self.waiting, Status.WAITING)):
            for sequence in queue:
                if sequence.status is not status:
                    raise AssertionError(f"sequence {sequence.request_id}/{sequence.index} is {sequence.status.value} in the {status.value} queue")
                if not 0 <= sequence.num_computed < len(sequence.tokens):
                    name = f"{sequence.request_id}/{sequence.index}"
                    raise AssertionError(f"sequence {name} has computed {sequence.num_computed} of its {len(sequence.tokens)} tokens; one must be pending")


class _Newcomers:
    """The waiting sequences as one pass lets them in: in turn, while there are places, pages and budget. The first that finds no room keeps out the others."""

    def __init__(self, scheduler: Scheduler, draft: _Draft) -> None:
        self._scheduler, self._draft = scheduler, draft
        self._num_preemptions = scheduler.num_preemptions
        self._closed = not scheduler.waiting
        if not self._closed:
            self._expected = scheduler._expected_by_tier(scheduler.running)
            self._promised = Counter({sequence.client: 0 for sequence in scheduler.running})
            for sequence in scheduler.running:
                self._promised[sequence.client] += _prompt_charge(sequence)

    def admit(self, before: Sequence | None = None) -> None:
        """Let in who may come; with ``before``, only those whose turn is before that running sequence's."""
        scheduler, waiting = self._scheduler, self._scheduler.waiting
        while not self._closed and waiting and self._has_place() and not self._is_short():
            sequence = waiting.first(self._promised)
            if before is not None and not waiting.overtakes(sequence, before):
                return
            tier = scheduler._tier_for(sequence, self._expected)
            if tier is None:
                self._closed = True
                return
            scheduler._start(sequence, tier)
            self._expected[tier] += scheduler._expected_pages(sequence)
            self._promised[sequence.client] += _prompt_charge(sequence)
            self._closed = not scheduler._bring(sequence, self._draft)

    def _is_short(self) -> bool:
        """Whether somebody has lost their place in this pass: they would come back at once."""
        return self._scheduler.num_preemptions != self._num_preemptions or bool(self._scheduler.migration.moves)

    def _has_place(self) -> bool:
        draft = self._draft
        return len(self._scheduler.running) < self._scheduler.plan.max_num_seqs and min(draft.prompt_left, draft.tokens_left, draft.logits_left) > 0


def _prompt_charge(sequence: Sequence) -> int:
    """What its client will be charged for tokens that are known and have never been computed."""
    return PROMPT_TOKEN * (len(sequence.tokens) - max(sequence.num_seen, sequence.num_computed)) if sequence.is_catching_up else 0


class _Draft:
    """The items chosen for a pass so far, and what is left of its budgets."""

    def __init__(self, max_tokens: int, max_logits: int) -> None:
        self.tokens_left = max_tokens
        self.logits_left = max_logits
        self.prompt_left = max_tokens
        self.items: dict[Sequence, BatchItem] = {}

    def room_for(self, sequence: Sequence) -> tuple[int, int]:
        """(tokens, logit rows) of the sequence's next item. Tokens before its first wanted logits cost no logit row."""
        before = sequence.first_logit - sequence.num_computed
        num_tokens = min(sequence.num_pending, self.tokens_left, before + self.logits_left)
        if sequence.is_catching_up:
            num_tokens = min(num_tokens, self.prompt_left)
        return num_tokens, max(0, num_tokens - before)

    def add(self, item: BatchItem) -> None:
        self.items[item.sequence] = item
        self.tokens_left -= item.num_tokens
        self.prompt_left -= item.num_tokens if item.is_chunk else 0
        self.logits_left -= item.num_logits

    def drop(self, sequence: Sequence) -> None:
        item = self.items.pop(sequence, None)
        if item is not None:
            self.tokens_left += item.num_tokens
            self.prompt_left += item.num_tokens if item.is_chunk else 0
            self.logits_left += item.num_logits
