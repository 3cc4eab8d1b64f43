"""Chained passes: decoding passes that follow each other in one native call, the next tokens chosen in between (docs/execution.md, "Chained passes").

Owns which sequences may be chained, how long a chain may be, and the record of one. Knows nothing of queues, pages or programs.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels.abi import CHAIN
from twinpilots.request import SamplingParams
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.choice import choice_of

MOST_PASSES = 16
BUDGET_S = 0.1  # of a chain: what waits for it, a reader or Ctrl-C, does not notice; 16 sequences of a small model take 15 to 30 ms a pass
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How a sequence's tokens are chosen, a CHOICE record, and which of them end it."""

    choice: NDArray[np.void]
    stops: Int32


def rule_of(params: SamplingParams, eos_token_ids: frozenset[int]) -> Rule | None:
    """None for a sequence that must not be chained, because choosing its tokens takes more than its logits, or ending it more than a token."""
    if params.changes_logits or params.logprobs is not None or params.prompt_logprobs is not None or params.stop_strings:
        return None
    return Rule(choice_of(params), np.array(sorted({*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)}), np.int32))


def most_passes(pass_s: float) -> int:
    """How many passes like one that took ``pass_s`` a chain may have."""
    return max(1, min(MOST_PASSES, int(BUDGET_S / pass_s))) if pass_s > 0 else 1


@dataclass(frozen=True, slots=True)
class ChainDone:
    """What a chain leaves behind. ``tokens``: int32 [passes][sequences] in the order of the batch's items; ``times``: int64 [passes][instructions][3];
    ``ended_ns``: int64 [passes]."""

    tokens: Int32
    times: NDArray[np.int64]
    ended_ns: NDArray[np.int64]


class Chain:
    """The one record of an executor. ``logits``: their address, ``width`` of them in a row."""

    def __init__(self, logits: int, width: int, page_size: int) -> None:
        self.record = np.zeros((), CHAIN)
        self.record["logits"], self.record["width"], self.record["page_size"] = logits, width, page_size
        self.record["budget_ns"] = round(BUDGET_S * 1e9)
        self._hurry = self.record["hurry"]
        self._rules: SequenceABC[Rule] = ()

    def hurry(self) -> None:
        """From any thread: the pass that runs, or the next one to begin, is its chain's last."""
        self._hurry[...] = 1

    def begin(self, batch: StepBatch, rules: SequenceABC[Rule], uniforms: NDArray[np.float64], num_insns: int) -> ChainDone:
        """The record for this batch, with fresh memory for what it brings. ``uniforms`` [passes, items] must live until `end`."""
        done = ChainDone(
            np.empty((batch.passes, len(rules)), np.int32), np.empty((batch.passes, num_insns, 3), np.int64), np.empty(batch.passes, np.int64)
        )  # fmt: skip
        record = self.record
        if len(rules) != len(self._rules) or any(new is not old for new, old in zip(rules, self._rules, strict=True)):
            self._rules, stops = rules, [rule.stops for rule in rules]
            self._ids, self._ends = np.concatenate(stops, dtype=np.int32), np.cumsum([len(ids) for ids in stops], dtype=np.int32)
            self._choices = np.stack([rule.choice for rule in rules])
            record["stop_ids"], record["stop_ends"], record["choices"] = self._ids.ctypes.data, self._ends.ctypes.data, self._choices.ctypes.data
        record["passes"], record["uniforms"] = batch.passes, uniforms.ctypes.data
        record["tokens"], record["times"], record["ended_ns"] = done.tokens.ctypes.data, done.times.ctypes.data, done.ended_ns.ctypes.data
        return done

    def end(self, done: ChainDone) -> ChainDone:
        """What of it has been run. Who is in a hurry has waited until now, and is looked after before the next chain."""
        self._hurry[...] = 0
        passes = int(self.record["done"])
        return ChainDone(done.tokens[:passes], done.times[:passes], done.ended_ns[:passes])
