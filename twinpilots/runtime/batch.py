"""One pass's batch: which tokens of which sequences, in which micro-batch and group, and the metadata words that the kernels read.

Owns `BatchItem`, `StepBatch` and the layout of the metadata (`kernels/abi.py` names its words, docs/execution.md their meaning). Knows nothing
of why these sequences were chosen (scheduler) or of how the pass runs (executor).

The row order of a pass is the order of `StepBatch.items`: by micro-batch, inside one by group, a sequence's tokens ascending in position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels.abi import MAX_MICRO_BATCHES, Meta
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.memory import listed_pages
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import NUM_GROUPS, STREAMED_KV, PassShape
from twinpilots.request import Sequence
from twinpilots.runtime.kv_cache import KvMove

Int32 = NDArray[np.int32]


class BatchItem(NamedTuple):
    """Positions [start, start + num_tokens) of one sequence; logits are wanted for the last ``num_logits`` of them.

    ``pages`` hold the sequence's first start + num_tokens tokens in its home tier, and one more for each pass that is chained to this one; ``is_chunk``:
    prompt tokens, as opposed to decoding.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits: int
    is_chunk: bool
    pages: Int32

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether the pass reaches the sequence's newest token, whose logits give the next one."""
        return self.start + self.num_tokens == len(self.sequence.tokens)


MicroBatch = tuple[tuple[BatchItem, ...], tuple[BatchItem, ...], tuple[BatchItem, ...]]  # by group


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One pass. Logit rows follow the row order: ``items[i]`` has ``items[i].num_logits`` of them. ``moves``: KV that changes tiers meanwhile, of sequences
    that sit this pass out; a pass of nothing else has no items. ``passes`` > 1: a chain of so many at most, in each of which every item decodes one token
    more."""

    bucket: BucketPlan
    micro_batches: tuple[MicroBatch, ...]
    moves: tuple[KvMove, ...] = ()
    passes: int = 1

    @cached_property
    def items(self) -> tuple[BatchItem, ...]:
        return tuple(item for groups in self.micro_batches for group in groups for item in group)

    @cached_property
    def num_tokens(self) -> int:
        return sum([item.num_tokens for item in self.items])

    @cached_property
    def num_logits(self) -> int:
        return sum([item.num_logits for item in self.items])

    @cached_property
    def shape(self) -> PassShape:
        return tuple((bool(groups[0]), bool(groups[1]), bool(groups[2])) for groups in self.micro_batches)

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens that the model sees for the first time (recomputing after a preemption does not count again)."""
        return sum([max(0, min(i.start + i.num_tokens, i.sequence.num_prompt_tokens) - max(i.start, i.sequence.num_seen)) for i in self.items])

    @cached_property
    def num_generated(self) -> int:
        """Tokens that will be sampled from this pass's logits."""
        return sum([item.is_last for item in self.items])


def metadata_words(plan: Plan) -> int:
    """int32 words that hold the metadata of any pass of ``plan``."""
    home = listed_pages(plan)
    staging = min(home, plan.kv_staging_pages)
    return Meta.HEADER + 4 * plan.max_pass_tokens + plan.max_num_seqs + 5 * plan.max_num_seqs + home + staging


def write_metadata(batch: StepBatch, out: Int32, spec: ModelSpec, plan: Plan) -> None:
    """Fill ``out`` (int32, at least `metadata_words` long) with the pass's metadata. Raises ValueError when it does not fit."""
    items = batch.items
    lens = np.array([item.num_tokens for item in items], np.int32)
    starts = np.array([item.start for item in items], np.int32)
    seq_row = _exclusive_sum(lens)
    num_pages = np.array([len(item.pages) for item in items], np.int32)
    home = _exclusive_sum(num_pages)
    attended, staging = _staged_pages(batch, home, num_pages)
    page = np.concatenate([*[item.pages for item in items], staging])

    num_tokens = batch.num_tokens
    within = np.arange(num_tokens, dtype=np.int32) - np.repeat(seq_row, lens)
    position = np.repeat(starts, lens) + within
    slot = page[np.repeat(attended, lens) + position // plan.page_size] * plan.page_size + position % plan.page_size
    arrays = (
        (Meta.OFF_TOKEN, _tokens(items)),
        (Meta.OFF_POSITION, position),
        (Meta.OFF_ROPE_ROW, position + np.repeat(_rope_offsets(items, spec, plan), lens)),
        (Meta.OFF_SLOT, slot),
        (Meta.OFF_LOGIT_ROW, _logit_rows(items, seq_row + lens)),
        (Meta.OFF_SEQ_ROW, seq_row),
        (Meta.OFF_SEQ_LEN, lens),
        (Meta.OFF_SEQ_KV, starts + lens),
        (Meta.OFF_SEQ_PAGES, attended),
        (Meta.OFF_SEQ_HOME, home),
        (Meta.OFF_PAGE, page),
    )
    _write_header(batch, out)
    cursor = int(Meta.HEADER)
    for word, values in arrays:
        if cursor + len(values) > len(out):
            raise ValueError(f"metadata of {num_tokens} tokens and {len(items)} sequences needs more than the {len(out)} words it was given")
        out[word] = cursor
        out[cursor : cursor + len(values)] = values
        cursor += len(values)
    out[Meta.NUM_WORDS] = cursor


class MetadataWriter:
    """Writes pass after pass into ``out``. Where the same sequences decode on, only what grew is touched. Chained passes have advanced positions in ``out``
    themselves."""

    def __init__(self, out: Int32, spec: ModelSpec, plan: Plan) -> None:
        self.out, self._spec, self._plan = out, spec, plan
        self._may_grow = not any(rope.long_inv_freq for rope in spec.ropes)  # a sequence that outgrows longrope's table changes more than its lengths
        self._seen: list[int] | None = None  # the sequences of the last pass, when all decoded,
        self._num_pages: list[int] = []  # how many pages each was given,
        self._groups: list[list[int]] = []  # and their groups by micro-batch

    def write(self, batch: StepBatch) -> None:
        """Fill ``out``. Raises ValueError when the pass does not fit."""
        items = batch.items
        groups = [[len(group) for group in groups] for groups in batch.micro_batches]
        decoding = self._may_grow and all(item.num_tokens == 1 == item.num_logits for item in items)
        seen, num_pages = [id(item.sequence) for item in items], [len(item.pages) for item in items]
        if not (decoding and seen == self._seen and groups == self._groups and self._grow(items, num_pages)):
            self._seen = None
            write_metadata(batch, self.out, self._spec, self._plan)
        if decoding:
            self._seen, self._num_pages, self._groups = seen, num_pages, groups

    def _grow(self, items: tuple[BatchItem, ...], num_pages: list[int]) -> bool:
        """False, changing nothing, when somebody has not gone on, or where staging pages move."""
        out, size = self.out, self._plan.page_size
        starts = np.array([item.start for item in items], np.int32)
        position = self._array(Meta.OFF_POSITION, items)
        moves = num_pages != self._num_pages or bool((starts // size != position // size).any())
        if (starts <= position).any() or (moves and not self._list_pages(items, num_pages)):
            return False
        grown = starts - position
        for word in (Meta.OFF_POSITION, Meta.OFF_ROPE_ROW, Meta.OFF_SLOT, Meta.OFF_SEQ_KV):
            self._array(word, items)[:] += grown
        if moves:
            page = out[out[Meta.OFF_PAGE] + self._array(Meta.OFF_SEQ_PAGES, items) + starts // size]
            self._array(Meta.OFF_SLOT, items)[:] = page * size + starts % size
        self._array(Meta.OFF_TOKEN, items)[:] = [item.sequence.tokens[item.start] for item in items]
        return True

    def _list_pages(self, items: tuple[BatchItem, ...], num_pages: list[int]) -> bool:
        """The page tables anew; False where staging pages follow them, or there is no room."""
        out, first, total = self.out, int(self.out[Meta.OFF_PAGE]), sum(num_pages)
        if any(groups[STREAMED_KV] for groups in self._groups) or first + total > len(out):
            return False
        self._array(Meta.OFF_SEQ_PAGES, items)[:] = self._array(Meta.OFF_SEQ_HOME, items)[:] = [0, *accumulate(num_pages[:-1])]
        np.concatenate([item.pages for item in items], out=out[first : first + total])
        out[Meta.NUM_WORDS] = first + total
        return True

    def _array(self, word: Meta, items: tuple[BatchItem, ...]) -> Int32:
        """The numbers of decoding sequences: one each."""
        return self.out[self.out[word] : self.out[word] + len(items)]


def _exclusive_sum(values: Int32) -> Int32:
    return (np.cumsum(values, dtype=np.int32) - values).astype(np.int32)


def _tokens(items: tuple[BatchItem, ...]) -> Int32:
    tokens: list[int] = []
    for item in items:
        if item.num_tokens == 1:
            tokens.append(item.sequence.tokens[item.start])
        else:
            tokens += item.sequence.tokens[item.start : item.end]
    return np.array(tokens, np.int32)


def _rope_offsets(items: tuple[BatchItem, ...], spec: ModelSpec, plan: Plan) -> Int32:
    """Per sequence: 0, or the first row of the long table for a sequence whose known tokens exceed the original length (longrope)."""
    rope = spec.ropes[0] if spec.ropes else None
    if rope is None or rope.long_inv_freq is None or rope.original_max_position is None:
        return np.zeros(len(items), np.int32)
    limit = rope.original_max_position
    return np.array([plan.max_model_len if len(item.sequence.tokens) > limit else 0 for item in items], np.int32)


def _logit_rows(items: tuple[BatchItem, ...], ends: Int32) -> Int32:
    """Token rows of the wanted logits: the last ``num_logits`` rows of each sequence."""
    counts = np.array([item.num_logits for item in items], np.int32)
    total = int(counts.sum())
    return (np.repeat(ends - counts - _exclusive_sum(counts), counts) + np.arange(total)).astype(np.int32)


def _staged_pages(batch: StepBatch, home: Int32, num_pages: Int32) -> tuple[Int32, Int32]:
    """Where each sequence's attended pages lie in PAGE, and the staging page numbers 0, 1, ... that follow the home pages there.

    Group 1's pages of one micro-batch lie one after another from staging page 0, in sequence order; all micro-batches read the same numbers.
    """
    attended, most = home.copy(), 0
    index, total = 0, int(num_pages.sum())
    for groups in batch.micro_batches:
        index += len(groups[0])
        staged = num_pages[index : index + len(groups[STREAMED_KV])]
        attended[index : index + len(staged)] = total + _exclusive_sum(staged)
        most = max(most, int(staged.sum()))
        index += len(staged) + len(groups[2])
    return attended, np.arange(most, dtype=np.int32)


def _write_header(batch: StepBatch, out: Int32) -> None:
    out[Meta.NUM_TOKENS] = batch.num_tokens
    out[Meta.NUM_SEQS] = len(batch.items)
    out[Meta.NUM_MICRO_BATCHES] = len(batch.micro_batches)
    out[Meta.NUM_LOGITS] = batch.num_logits
    row = seq = 0
    width = NUM_GROUPS + 1
    rows, seqs = [], []
    for groups in batch.micro_batches:
        for group in groups:
            rows.append(row)
            seqs.append(seq)
            row += sum([item.num_tokens for item in group])
            seq += len(group)
        rows.append(row)
        seqs.append(seq)
    padding = width * MAX_MICRO_BATCHES - len(rows)  # micro-batches that are not there are empty
    out[Meta.ROWS : Meta.ROWS + width * MAX_MICRO_BATCHES] = rows + [row] * padding
    out[Meta.SEQS : Meta.SEQS + width * MAX_MICRO_BATCHES] = seqs + [seq] * padding
