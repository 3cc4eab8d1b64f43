"""Chooses tokens from logits, and says how likely they were.

Owns what happens to logits before a token is drawn (vLLM's semantics and order) and each sequence's random generator; the draw itself is `choice.py`'s. Knows
nothing of batches, pages or text.

Order: logit masks and biases (min_tokens, logit_bias), penalties (repetition, frequency, presence), structured output, then argmax; or temperature, min_p,
top_k, top_p and one draw. Logprobs are the log-softmax of the raw logits. A sequence's draws depend on its own logits and generator only, never on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twinpilots.errors import NotFiniteError
from twinpilots.request import SamplingParams, Sequence
from twinpilots.runtime.choice import draw
from twinpilots.runtime.structured import Grammar, Grammars

MOST_PENALTY = 1e20  # of a repetition, either way: beyond, logits would leave the range of their type
Row = NDArray[np.float32]
Logits = NDArray[np.float32]  # [sequences, vocab]


@dataclass(slots=True)
class _State:
    """What sampling remembers of one sequence: its generator and, for penalties, which tokens it holds."""

    generator: np.random.Generator
    ahead: list[float] = field(default_factory=list)  # drawn for passes that may be chained, and not used yet
    seen: NDArray[np.bool_] | None = None  # [vocab] in the prompt or the output
    counts: NDArray[np.int32] | None = None  # [vocab] in the output
    num_counted: int = 0
    stop_ids: list[int] = field(default_factory=list)
    grammar: Grammar | None = None
    num_consumed: int = 0  # tokens that the grammar has seen


class Sampler:
    """``eos_token_ids`` end a sequence unless it ignores them; ``seed`` is used by sequences that bring none; ``grammars`` by those with a structure."""

    def __init__(self, vocab_size: int, *, eos_token_ids: SequenceABC[int] = (), seed: int = 0, grammars: Grammars | None = None) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.seed = seed
        self.grammars = grammars
        self._states: dict[Sequence, _State] = {}

    def sample(self, logits: Logits, sequences: SequenceABC[Sequence]) -> list[int]:
        """One token per sequence from its row of ``logits``, which is left as it is. Raises NotFiniteError when a row is not finite."""
        tokens = logits.argmax(axis=1)
        best = logits[np.arange(len(sequences)), tokens]  # argmax stops at a NaN, so the best value tells whether there is one
        if not np.isfinite(best).all():
            self._refuse(sequences[int(np.flatnonzero(~np.isfinite(best))[0])])
        chosen: list[int] = tokens.tolist()
        for index, sequence in enumerate(sequences):
            params = sequence.params
            if params.changes_logits or not params.is_greedy:
                chosen[index] = self._sample_row(logits[index], sequence)
        return chosen

    def forget(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)

    def remembered(self) -> frozenset[Sequence]:
        """The sequences whose generator or counts are kept."""
        return frozenset(self._states)

    def _refuse(self, sequence: Sequence) -> None:
        raise NotFiniteError(
            f"the model's logits for request {sequence.request_id} at position {len(sequence.tokens) - 1} are not finite numbers; "
            "the checkpoint may be damaged or overflow its 16-bit format: try dtype='fp32'",
            request_id=sequence.request_id,
        )

    def _sample_row(self, row: Row, sequence: Sequence) -> int:
        params, state = sequence.params, self._state(sequence)
        if params.changes_logits:
            row = self._adjusted(row.copy(), sequence, state)
        if params.is_greedy:
            return int(row.argmax())
        return draw(row, params, state.ahead.pop(0) if state.ahead else state.generator.random())

    def uniforms(self, sequence: Sequence, count: int) -> list[float]:
        """What its next ``count`` draws will be made with; `used` says how many of them were. Greedy sequences need none."""
        if sequence.params.is_greedy:
            return [0.0] * count
        state = self._state(sequence)
        state.ahead += state.generator.random(max(0, count - len(state.ahead))).tolist()
        return state.ahead[:count]

    def used(self, sequence: Sequence, count: int) -> None:
        if not sequence.params.is_greedy:
            del self._state(sequence).ahead[:count]

    def _state(self, sequence: Sequence) -> _State:
        state = self._states.get(sequence)
        if state is None:
            stop_ids = set(sequence.params.stop_token_ids or ()).union(() if sequence.params.ignore_eos else self.eos_token_ids)
            state = _State(generator_for(sequence, self.seed), stop_ids=[token for token in stop_ids if token < self.vocab_size])
            if sequence.params.structured_outputs is not None:
                assert self.grammars is not None
                state.grammar, state.num_consumed = self.grammars.start(sequence.params.structured_outputs), sequence.num_prompt_tokens
            self._states[sequence] = state
        return state

    def _adjusted(self, row: Row, sequence: Sequence, state: _State) -> Row:
        params = sequence.params
        raw = row.copy() if state.grammar is not None else row
        if sequence.num_output_tokens < params.min_tokens:
            row[state.stop_ids] = -np.inf
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        if params.has_penalties:
            self._count(sequence, state)
            assert state.seen is not None and state.counts is not None
            penalise(row, params, state.seen, state.counts)
        allowed = None if state.grammar is None else state.grammar.allowed()
        return row if allowed is None else _restricted(row, raw, allowed)

    def has_ended(self, sequence: Sequence) -> bool:
        """Whether the sequence's structure is complete and nothing may follow."""
        state = self._state(sequence)
        if state.grammar is None:
            return False
        state.grammar.consume(sequence.tokens[state.num_consumed :])
        state.num_consumed = len(sequence.tokens)
        return state.grammar.has_ended

    def _count(self, sequence: Sequence, state: _State) -> None:
        """Bring the token counts up to the sequence's tokens."""
        if state.seen is None or state.counts is None:
            state.seen = np.zeros(self.vocab_size, np.bool_)
            state.seen[sequence.tokens[: sequence.num_prompt_tokens]] = True
            state.counts = np.zeros(self.vocab_size, np.int32)
            state.num_counted = sequence.num_prompt_tokens
        new = sequence.tokens[state.num_counted :]
        np.add.at(state.counts, new, 1)
        state.seen[new] = True
        state.num_counted = len(sequence.tokens)


def _restricted(row: Row, raw: Row, allowed: NDArray[np.bool_]) -> Row:
    """The row with -inf for what is not allowed. Where biases forbid all that is allowed, the structure wins over them: the raw logits count."""
    kept = np.where(allowed, row, np.float32(-np.inf))
    return kept if np.isfinite(kept.max()) or not allowed.any() else np.where(allowed, raw, np.float32(-np.inf))


def generator_for(sequence: Sequence, engine_seed: int) -> np.random.Generator:
    """The sequence's own generator: from (its seed, its index), else from (the engine's seed, its arrival)."""
    seed = sequence.params.seed
    own = seed is not None and seed != -1
    entropy = (0, int(seed or 0) % 2**64, sequence.index) if own else (1, engine_seed % 2**64, sequence.arrival)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def penalise(row: Row, params: SamplingParams, seen: NDArray[np.bool_], counts: NDArray[np.int32]) -> None:
    """In place: repetition over prompt and output (divide positive logits, multiply negative ones), then frequency and presence over the output."""
    if params.repetition_penalty != 1.0:
        touched, penalty = row[seen], min(max(params.repetition_penalty, 1 / MOST_PENALTY), MOST_PENALTY)
        row[seen] = np.where(touched > 0, touched / penalty, touched * penalty)
    if params.frequency_penalty != 0.0:
        row -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    if params.presence_penalty != 0.0:
        row -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)


def log_sum_exp(row: Row) -> float:
    """log(sum(exp(row))): a token's logprob is its logit minus this. Terms in float32, their sum in float64."""
    best = row.max()
    return float(best) + float(np.log(np.exp(row - best).sum(dtype=np.float64)))


def token_logprobs(row: Row, token: int, count: int) -> dict[int, tuple[float, int]]:
    """token id -> (logprob, rank) of ``token`` and of the ``count`` best (-1: all), best first after ``token``. Rank 1 is the best; equals share a rank."""
    wanted = len(row) if count == -1 else min(count, len(row))
    best = np.empty(0, np.intp)
    if wanted:
        best = np.argpartition(row, len(row) - wanted)[len(row) - wanted :]
        best = best[np.lexsort((best, -row[best]))]
    chosen = [token, *[other for other in best.tolist() if other != token]]
    logs = row[chosen].astype(np.float64) - log_sum_exp(row)
    # Among the best, the rank is one more than how many of them are better; the chosen token may lie anywhere.
    ranks = 1 + np.searchsorted(-row[best], -row[chosen], side="left")
    ranks[0] = 1 + np.count_nonzero(row > row[token])
    return dict(zip(chosen, zip(logs.tolist(), ranks.tolist(), strict=True), strict=True))
