"""From a request to token ids: texts through the tokenizer, conversations through the chat template.

Owns that one step; it is safe in any thread. Knows nothing of engines.
"""

from __future__ import annotations

from typing import NamedTuple

from twinpilots.errors import RequestError, UserError
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.openai.requests import ApiRequest, Prompt


class EncodedPrompt(NamedTuple):
    """``text``: what `RequestOutput.prompt` shall be; None where nobody will ask for it."""

    ids: list[int]
    text: str | None


def encode_request(request: ApiRequest, tokenizer: Tokenizer | None) -> list[EncodedPrompt]:
    """The request's prompts, in order. RequestError when the model has no tokenizer or no template for them, or the template refuses."""
    if not request.is_chat:
        return [_encoded(prompt, tokenizer, echo=request.echo) for prompt in request.prompts]
    if tokenizer is None or not tokenizer.has_chat_template:
        raise RequestError("the model has no chat template; use /v1/completions with plain prompts", param="messages")
    if request.tools and not tokenizer.supports_tools:
        raise RequestError("the model's chat template knows no tools; leave them out", param="tools", code="unsupported_parameter")
    try:
        return [EncodedPrompt(tokenizer.encode_chat(request.messages, tools=request.tools or None, options=request.template_options), None)]
    except UserError as error:
        raise RequestError(str(error), param="messages") from error


def _encoded(prompt: Prompt, tokenizer: Tokenizer | None, *, echo: bool) -> EncodedPrompt:
    if not isinstance(prompt, str):
        text = tokenizer.decode(prompt, skip_special_tokens=False) if echo and tokenizer is not None else None
        return EncodedPrompt(list(prompt), text)
    if tokenizer is None:
        raise RequestError("the model has no tokenizer; give token ids instead of text", param="prompt")
    return EncodedPrompt(tokenizer.encode(prompt), prompt)
