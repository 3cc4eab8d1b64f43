"""A growing answer as OpenAI's stream chunks: what is new since the last one, choice by choice.

Owns the chunks' shapes and what has been sent. Knows nothing of sockets; the events' bytes are `event`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twinpilots.openai.fields import to_json
from twinpilots.openai.requests import ApiRequest
from twinpilots.openai.responses import chat_logprobs, completion_logprobs, first_prompt_text, usage
from twinpilots.request import CompletionOutput, RequestOutput, TokenLogprobs

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


@dataclass(slots=True)
class _Sent:
    """How far one choice has been sent: characters, tokens, and where the next token's text begins."""

    chars: int = 0
    tokens: int = 0
    offset: int = 0
    opened: bool = False
    closed: bool = False


class Chunks:
    """``request_ids``: the engine's name of each prompt, in order. One per stream."""

    def __init__(self, request: ApiRequest, request_ids: Sequence[str], *, response_id: str, created: int, model: str) -> None:
        self._request = request
        self._order = {request_id: number for number, request_id in enumerate(request_ids)}
        kind = "chat.completion.chunk" if request.is_chat else "text_completion"
        self._head = {"id": response_id, "object": kind, "created": created, "model": model}
        self._sent: dict[int, _Sent] = {}
        self._newest: dict[str, RequestOutput] = {}

    def of(self, output: RequestOutput) -> list[dict[str, Any]]:
        """A chunk for every choice that has something new."""
        self._newest[output.request_id] = output
        first = self._order[output.request_id] * self._request.params.n
        found = []
        for one in output.outputs:
            index = first + one.index
            sent = self._sent.setdefault(index, _Sent())
            if not sent.closed and self._is_news(one, sent):
                found.append(self._chunk([self._choice(output, one, index, sent)]))
        return found

    def closing(self) -> list[dict[str, Any]]:
        """What follows the last choice: the usage, when it was asked for."""
        if not self._request.include_usage:
            return []
        return [{**self._head, "choices": [], "usage": usage(list(self._newest.values()), details=True)}]

    @staticmethod
    def _is_news(one: CompletionOutput, sent: _Sent) -> bool:
        """Tokens without text (half a character, a held-back stop string) wait for it, so that only a first or a last chunk is ever empty."""
        return len(one.text) > sent.chars or one.finish_reason is not None or (not sent.opened and bool(one.token_ids))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **({"usage": None} if self._request.include_usage else {})}

    def _choice(self, output: RequestOutput, one: CompletionOutput, index: int, sent: _Sent) -> dict[str, Any]:
        text = one.text[sent.chars :]
        logprobs = self._logprobs(output, one, sent)
        if self._request.echo and not sent.opened:
            text = (output.prompt or "") + text
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": one.finish_reason}
        if self._request.is_chat:
            choice["delta"] = {**({} if sent.opened else {"role": "assistant"}), **({"content": text} if text or not sent.opened else {})}
        else:
            choice["text"] = text
        if one.finish_reason is not None:
            choice["stop_reason"] = one.stop_reason
        sent.chars, sent.tokens, sent.opened, sent.closed = len(one.text), len(one.token_ids), True, one.finish_reason is not None
        return choice

    def _logprobs(self, output: RequestOutput, one: CompletionOutput, sent: _Sent) -> dict[str, Any] | None:
        """Those of the tokens that are new. The engine may be appending to the list at this moment: it is cut to the tokens of this output."""
        if one.logprobs is None:
            return None
        tokens, steps = one.token_ids[sent.tokens :], one.logprobs[sent.tokens : len(one.token_ids)]
        count = self._request.params.logprobs or 0
        if self._request.is_chat:
            return chat_logprobs(tokens, steps, count)
        entries: list[TokenLogprobs | None] = list(steps)
        first_text = ""
        if self._request.echo and not sent.opened:
            tokens, entries = (*output.prompt_token_ids, *tokens), [*(output.prompt_logprobs or ()), *entries]
            first_text = first_prompt_text(output)
        found = completion_logprobs(tokens, entries, count, offset=sent.offset, first_text=first_text)
        if found["tokens"]:
            sent.offset = found["text_offset"][-1] + len(found["tokens"][-1])
        return found
