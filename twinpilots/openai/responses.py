"""Response bodies: finished outputs in OpenAI's words, logprobs in both of its formats.

Owns the shapes. Knows nothing of HTTP or of streaming; what a stream's chunks have in common with whole answers takes slices of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twinpilots.errors import RequestError, UserError
from twinpilots.openai.requests import ApiRequest
from twinpilots.request import CompletionOutput, Logprob, RequestOutput, TokenLogprobs

LEAST_LOGPROB = -9999.0  # what stands for "impossible" where JSON has no infinity


def response_body(
    request: ApiRequest, outputs: Sequence[RequestOutput], *, response_id: str, created: int, model: str, details: bool = False
) -> dict[str, Any]:  # fmt: skip
    """The whole answer: ``outputs`` are those of the request's prompts, in order. ``created``: seconds since 1970. ``details``: as in `usage`."""
    choices = [
        (_chat_choice(request, output, index) if request.is_chat else _completion_choice(request, whole, output, index))
        | ({"prompt_token_ids": list(whole.prompt_token_ids), "token_ids": list(output.token_ids)} if request.return_token_ids else {})
        for index, (whole, output) in enumerate((whole, output) for whole in outputs for output in whole.outputs)
    ]
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {"id": response_id, "object": kind, "created": created, "model": model, "choices": choices, "usage": usage(outputs, details=details)}


def usage(outputs: Sequence[RequestOutput], *, details: bool) -> dict[str, Any]:
    """Tokens read and written. ``details``: also how many of the prompts' were found in the prefix cache, which depends on what ran before."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    found = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    cached = sum(output.num_cached_tokens for output in outputs)
    return {**found, "prompt_tokens_details": {"cached_tokens": cached}} if details else found


def error_body(message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: Exception) -> dict[str, Any]:
    """The error object of a request that was refused."""
    if isinstance(error, RequestError):
        return error_body(str(error), param=error.param, code=error.code)
    return error_body(str(error), kind="invalid_request_error" if isinstance(error, UserError | ValueError) else "server_error")


def _completion_choice(request: ApiRequest, whole: RequestOutput, output: CompletionOutput, index: int) -> dict[str, Any]:
    text, tokens, steps = output.text, list(output.token_ids), output.logprobs
    entries: list[TokenLogprobs | None] | None = None if steps is None else list(steps)
    first_text = ""
    if request.echo:
        text = (whole.prompt or "") + text
        tokens = [*whole.prompt_token_ids, *tokens]
        entries = None if entries is None else [*(whole.prompt_logprobs or ()), *entries]
        first_text = "" if entries is None else first_prompt_text(whole)
    logprobs = None if entries is None else completion_logprobs(tokens, entries, request.params.logprobs or 0, first_text=first_text)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


def _chat_choice(request: ApiRequest, output: CompletionOutput, index: int) -> dict[str, Any]:
    logprobs = None if output.logprobs is None else chat_logprobs(output.token_ids, output.logprobs, request.params.logprobs or 0)
    message = {"role": "assistant", "content": output.text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": output.finish_reason, "stop_reason": output.stop_reason}


def completion_logprobs(
    tokens: Sequence[int], steps: Sequence[TokenLogprobs | None], count: int, *, offset: int = 0, first_text: str = ""
) -> dict[str, Any]:  # fmt: skip
    """The older format: four parallel lists. A step of None is a prompt's first token, ``first_text``. ``offset``: characters before it."""
    names: list[str] = []
    values: list[float | None] = []
    best: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, step in zip(tokens, steps, strict=True):
        name = first_text if step is None else _name(token, step[token])
        names.append(name)
        offsets.append(offset)
        offset += len(name)
        values.append(None if step is None else _value(step[token]))
        best.append(None if step is None else _best_by_name(step, count, token))
    return {"tokens": names, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


def chat_logprobs(tokens: Sequence[int], steps: Sequence[TokenLogprobs], count: int) -> dict[str, Any]:
    """The newer format: an object per token."""
    content = []
    for token, step in zip(tokens, steps, strict=True):
        alternatives = [_chat_entry(other, entry) for other, entry in _best(step, count)]
        content.append({**_chat_entry(token, step[token]), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _chat_entry(token: int, entry: Logprob) -> dict[str, Any]:
    name = _name(token, entry)
    return {"token": name, "logprob": _value(entry), "bytes": list(name.encode("utf-8", "replace"))}


def _best(step: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` best of a step that may hold one more, the chosen token."""
    return sorted(step.items(), key=lambda item: item[1].rank)[:count]


def _best_by_name(step: Mapping[int, Logprob], count: int, token: int) -> dict[str, float]:
    """As OpenAI does it, the chosen token is always among them. Of tokens with one name the best counts."""
    found: dict[str, float] = {}
    for other, entry in [*_best(step, count), (token, step[token])]:
        found.setdefault(_name(other, entry), _value(entry))
    return found


def _name(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def first_prompt_text(whole: RequestOutput) -> str:
    """What the prompt's text has before the texts of its later tokens; "" for a first token that the text does not show."""
    rest = "".join(_name(token, step[token]) for token, step in zip(whole.prompt_token_ids, whole.prompt_logprobs or (), strict=False) if step is not None)
    prompt = whole.prompt or ""
    return prompt[: len(prompt) - len(rest)] if prompt.endswith(rest) else ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LEAST_LOGPROB)
