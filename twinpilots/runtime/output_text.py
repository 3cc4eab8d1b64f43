"""The growing text of one sequence, and the stop strings in it.

Owns incremental text and the search for stop strings, also those that span tokens. Knows nothing of logits, queues or why else a sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

from twinpilots.model.tokenizer import Detokenizer, Tokenizer
from twinpilots.request import SamplingParams


class OutputText:
    """Text so far. While the sequence runs, the tail that may be the beginning of a stop string is not shown.

    Without stop strings nobody needs a token's text before somebody looks: tokens wait until then, and are decoded together.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: SequenceABC[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        self._stops = params.stop_strings
        self._min_tokens = params.min_tokens
        self._longest_stop = max((len(stop) for stop in self._stops), default=0)
        self._text = ""
        self._waiting: list[int] = []
        self._searchable_from = 0  # text made before min_tokens were reached does not stop the sequence

    def add(self, token: int, num_output_tokens: int) -> str | None:
        """Append the token's text. Returns the stop string found, if any; the text then ends before it."""
        if not self._stops:
            self._waiting.append(token)
            return None
        return self._append(self._detokenizer.add((token,)), num_output_tokens <= self._min_tokens)

    def add_all(self, tokens: SequenceABC[int]) -> None:
        """Append tokens of a sequence without stop strings."""
        assert not self._stops, "a stop string is looked for after every token"
        self._waiting += tokens

    def close(self) -> str | None:
        """Append what the detokenizer held back; the stop string found in it, if any."""
        self._catch_up()
        return self._append(self._detokenizer.flush(), protected=False)

    def _append(self, piece: str, protected: bool) -> str | None:
        start = max(self._searchable_from, len(self._text) - self._longest_stop + 1)
        self._text += piece
        if not piece or not self._stops:
            return None
        if protected:
            self._searchable_from = len(self._text)
            return None
        found = [(position, stop) for stop in self._stops if (position := self._text.find(stop, start)) >= 0]
        if not found:
            return None
        position, stop = min(found, key=lambda hit: hit[0])
        self._text = self._text[:position]
        return stop

    def _catch_up(self) -> None:
        if self._waiting:
            self._text += self._detokenizer.add(self._waiting)
            self._waiting = []

    def visible(self, finished: bool) -> str:
        self._catch_up()
        if finished or self._longest_stop <= 1:
            return self._text
        return self._text[: -(self._longest_stop - 1)]
