"""Structured output: which tokens may come next so that the text stays within a JSON schema, a regex, a choice or a grammar.

Owns compiled grammars and their place in each sequence's text; llguidance does the work (extra ``structured``), imported when the first such request
comes. Knows nothing of logits, batches or sampling.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence as SequenceABC
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.errors import UserError
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.request import StructuredOutputsParams

logger = logging.getLogger(__name__)
MOST_COMPILED = 64  # grammars that are kept ready: compiling a large schema takes longer than a pass
# JSON without free white space: small models otherwise lose themselves in it, and nobody pays for blanks.
JSON_OPTIONS = {"whitespace_flexible": False}


class Grammar:
    """One sequence's way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[np.bool_] | None:
        """[vocab] the tokens that may come next; None, after a warning, when the grammar has become too complex to say: the sequence has then ended."""
        if self._matcher.is_error():
            return None
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            logger.warning(f"structured output cannot go on: {' '.join(self._matcher.get_error().split())[:200]}")
            return None
        found = np.unpackbits(np.frombuffer(bits, np.uint8), count=None, bitorder="little")[: self._vocab_size].astype(np.bool_)
        return np.pad(found, (0, self._vocab_size - len(found)))

    def consume(self, tokens: SequenceABC[int]) -> None:
        """These tokens have come."""
        for token in tokens:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes `Grammar`s for one model's vocabulary. ``eos_token_ids`` may come wherever a text may end."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: SequenceABC[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def start(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar at its beginning. ValueError when it is malformed or there is no tokenizer, UserError without llguidance."""
        key = repr(params)
        matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._compiled[key] = self._compile(params)
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Grammar(matcher.deep_copy(), self._vocab_size)

    def _compile(self, params: StructuredOutputsParams) -> Any:
        if self._tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and the model has none; leave them out")
        try:
            import llguidance
        except ImportError:
            raise UserError("structured_outputs need the package llguidance; install twinpilots[structured], or leave them out") from None
        if self._vocabulary is None:
            self._vocabulary = llguidance.LLTokenizer(
                self._tokenizer.backend.to_str(), n_vocab=max(self._vocab_size, self._tokenizer.vocab_size), eos_token=self._eos_token_ids or None
            )
        matcher = llguidance.LLMatcher(self._vocabulary, _source(params, llguidance.LLMatcher), log_level=0)
        if matcher.is_error():
            raise ValueError(f"structured_outputs are malformed: {' '.join(matcher.get_error().split())[:300]}")
        return matcher


def _source(params: StructuredOutputsParams, make: Any) -> str:
    """The grammar in llguidance's own form."""
    if params.regex is not None:
        return str(make.grammar_from_regex(params.regex))
    if params.choice is not None:
        return str(make.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)))
    if params.grammar is not None:
        return str(make.grammar_from_lark(params.grammar))
    schema = {"type": "object"} if params.json is None else params.json
    text = schema if isinstance(schema, str) else json.dumps(dict(schema))
    return str(make.grammar_from_json_schema(text, overrides=JSON_OPTIONS))
