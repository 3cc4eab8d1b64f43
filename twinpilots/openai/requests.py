"""Request bodies: what a completion or a chat completion asks for, checked to OpenAI's ranges.

Owns which fields there are: those that we serve, those that change nothing, those that would change the output and are refused by name. Knows nothing of
tokens, engines or HTTP; an endpoint's streaming is only read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from twinpilots.errors import RequestError
from twinpilots.openai.fields import Fields, shown
from twinpilots.openai.messages import Message, read_messages, read_tools
from twinpilots.request import SamplingParams, StructuredOutputsParams

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
ENDPOINTS: tuple[Endpoint, ...] = ("/v1/completions", "/v1/chat/completions")
Prompt = str | tuple[int, ...]
MAX_CHOICES, MAX_PROMPTS, MAX_STOPS = 128, 2048, 64
MAX_LOGPROBS = {"/v1/completions": 5, "/v1/chat/completions": 20}
_SEEDS = (-(2**63), 2**63 - 1)
_PRIORITIES = (-(2**31), 2**31 - 1)

# They say who asks, how it is kept or billed, or how fast it should come: the tokens stay the same.
HARMLESS = frozenset({
    "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prediction", "request_id",
})  # fmt: skip
# Fields that would change the output and that we do not serve, with the values that mean "as it is anyway".
REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",), "functions": ([],), "function_call": ("none",), "parallel_tool_calls": (True,), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "moderation": (), "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "allowed_token_ids": ([],), "bad_words": ([],), "logits_processors": ([],), "truncate_prompt_tokens": (-1,), "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,), "prompt_embeds": (), "documents": ([],), "chat_template": (), "continue_final_message": (False,),
    "add_generation_prompt": (True,), "add_special_tokens": (), "return_tokens_as_token_ids": (False,), "prompt_logprobs": (), "thinking_token_budget": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "mm_processor_kwargs": ({},), "repetition_detection": (),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One body. ``prompts`` are a completion's, ``messages`` (and ``tools``) a chat's. ``warnings`` names the fields that nobody knows.

    ``echo``: the prompt, and its logprobs when asked for, come before the output. ``template_options``: variables for the chat template.
    ``return_token_ids``: choices also give their token ids, and their prompt's. ``user``: who asks, and ``priority``: which of a client's requests goes first
    (lower), are a server's concern; a batch file is answered in its own order.
    """

    endpoint: Endpoint
    model: str | None
    params: SamplingParams
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    user: str | None = None
    priority: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return self.endpoint == "/v1/chat/completions"

    @property
    def num_choices(self) -> int:
        return self.params.n * (1 if self.is_chat else len(self.prompts))


def read_request(endpoint: str, body: Any, defaults: SamplingParams) -> ApiRequest:
    """The request in a body. ``defaults``: the model's own sampling defaults, used where the body says nothing. RequestError names the field at fault."""
    if endpoint not in ENDPOINTS:
        raise RequestError(f"there is no endpoint {endpoint!r}; use {' or '.join(ENDPOINTS)}", param="url")
    fields = Fields(body)
    chat = endpoint == "/v1/chat/completions"
    for field, harmless in REFUSED.items():
        value = fields.take(field)
        if value is not None and value not in harmless:
            raise RequestError(f"{field} is not supported ({shown(value)}); leave it out", param=field, code="unsupported_parameter")
    for field in HARMLESS:
        fields.take(field)
    params, echo = _sampling(fields, defaults, chat=chat)
    tools = read_tools(fields.take("tools")) if chat and fields.take("tools") is not None else ()
    choice = fields.take("tool_choice") if chat else None
    if choice not in (None, "auto", "none"):
        raise fields.error("tool_choice", "must be 'auto' or 'none': tool calls cannot be forced", choice)
    options = fields.take("chat_template_kwargs") if chat else None
    if options is not None and not isinstance(options, dict):
        raise fields.error("chat_template_kwargs", "must be a JSON object", options)
    stream, include_usage = _streaming(fields)
    return ApiRequest(
        endpoint=endpoint, model=fields.text("model"), params=params, prompts=() if chat else read_prompts(fields.take("prompt")),
        messages=read_messages(fields.take("messages")) if chat else (), tools=() if choice == "none" else tools, template_options=options, echo=echo,
        stream=stream, include_usage=include_usage, return_token_ids=bool(fields.flag("return_token_ids")),
        user=_user(fields), priority=fields.whole("priority", *_PRIORITIES) or 0, warnings=fields.unknown(),
    )  # fmt: skip


def _user(fields: Fields) -> str | None:
    """OpenAI's older name for it, or the newer one."""
    older, newer = fields.text("user"), fields.text("safety_identifier")
    return older or newer


def read_prompts(value: Any) -> tuple[Prompt, ...]:
    """A completion's prompts: a text, several texts, token ids, or several lists of them."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and len(value) <= MAX_PROMPTS:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and _are_token_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    if isinstance(value, list) and _are_token_ids(value):
        return (tuple(value),)
    rule = f"must be a string, a list of token ids (whole numbers of at least 0), or a list of at most {MAX_PROMPTS} of either"
    raise RequestError(f"prompt {rule}, got {shown(value)}", param="prompt")


def _are_token_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value)


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream, options = bool(fields.flag("stream")), fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    inner = Fields(options, "stream_options.")
    inner.flag("include_obfuscation")
    inner.flag("continuous_usage_stats")
    return stream, bool(inner.flag("include_usage"))


def _sampling(fields: Fields, defaults: SamplingParams, *, chat: bool) -> tuple[SamplingParams, bool]:
    """(sampling parameters, echo)."""
    n = fields.whole("n", 1, MAX_CHOICES) or 1
    best_of = fields.whole("best_of", 1, MAX_CHOICES)
    if best_of is not None and best_of != n:
        raise RequestError(f"best_of={best_of} is not supported; leave it out, or give n={n}", param="best_of", code="unsupported_parameter")
    echo = bool(fields.flag("echo"))
    if echo and chat:
        raise RequestError("echo is not supported in a chat; leave it out", param="echo", code="unsupported_parameter")
    logprobs = _chat_logprobs(fields) if chat else fields.whole("logprobs", 0, MAX_LOGPROBS["/v1/completions"])
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2), "top_p": _top_p(fields), "top_k": fields.whole("top_k", -1), "min_p": fields.number("min_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2), "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", 0, float("inf")), "seed": fields.whole("seed", *_SEEDS), "stop": _stop(fields),
        "stop_token_ids": _stop_token_ids(fields), "ignore_eos": fields.flag("ignore_eos"), "min_tokens": fields.whole("min_tokens", 0),
        "skip_special_tokens": fields.flag("skip_special_tokens"), "logit_bias": _logit_bias(fields), "structured_outputs": _structured(fields, chat=chat),
    }  # fmt: skip
    values = {name: value for name, value in given.items() if value is not None}
    try:
        params = replace(
            defaults, n=n, max_tokens=_max_tokens(fields, chat=chat), logprobs=logprobs, prompt_logprobs=logprobs if echo else None, **values
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(str(error), param=str(error).split()[0]) from error
    return params, echo


def _max_tokens(fields: Fields, *, chat: bool) -> int | None:
    """OpenAI's defaults: 16 for a completion, as many as the model's length allows for a chat."""
    old = fields.whole("max_tokens", 1)
    new = fields.whole("max_completion_tokens", 1) if chat else None
    if old is not None and new is not None and old != new:
        raise RequestError(f"max_tokens={old} and max_completion_tokens={new} differ; give one of them", param="max_tokens")
    given = new if new is not None else old
    return given if given is not None or chat else 16


def _top_p(fields: Fields) -> float | None:
    """0 is OpenAI's way to ask for the likeliest token alone."""
    value = fields.number("top_p", 0, 1)
    return None if value is None else max(value, 1e-6)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, count = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_LOGPROBS["/v1/chat/completions"])
    if count and not wanted:
        raise RequestError(f"top_logprobs={count} needs logprobs=true", param="top_logprobs")
    return count or 0 if wanted else None


def _stop(fields: Fields) -> str | list[str] | None:
    value = fields.take("stop")
    texts = [value] if isinstance(value, str) else value
    if texts is not None and (not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts)):
        raise fields.error("stop", f"must be a non-empty string or a list of at most {MAX_STOPS} of them", value)
    return texts or None


def _stop_token_ids(fields: Fields) -> list[int] | None:
    value = fields.take("stop_token_ids")
    if value is not None and value != [] and not (isinstance(value, list) and _are_token_ids(value)):
        raise fields.error("stop_token_ids", "must be a list of token ids", value)
    return value or None


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    value = fields.take("logit_bias")
    if not value and value in (None, {}):
        return None
    if not isinstance(value, dict):
        raise fields.error("logit_bias", "must be an object of token ids and numbers", value)
    inner, bias = Fields(value, "logit_bias."), {}
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"logit_bias keys must be token ids, got {shown(key)}", param="logit_bias")
        amount = inner.number(key, -100, 100)
        if amount is not None:
            bias[int(key)] = amount
    return bias


def _structured(fields: Fields, *, chat: bool) -> StructuredOutputsParams | None:
    """From OpenAI's response_format (a chat's), or from vLLM's structured_outputs."""
    form, other = fields.take("response_format"), fields.take("structured_outputs")
    if form is not None and not chat:
        raise RequestError("response_format is a chat's field; use structured_outputs", param="response_format", code="unsupported_parameter")
    found = None if form is None else _response_format(Fields(form, "response_format."))
    if other is None:
        return found
    if found is not None:
        raise RequestError("response_format and structured_outputs exclude each other; give one of them", param="structured_outputs")
    inner = Fields(other, "structured_outputs.")
    values = {name: inner.take(name) for name in ("json", "regex", "choice", "grammar", "json_object")}
    if inner.unknown():
        raise RequestError(f"{inner.unknown()[0]} is not supported; use json, regex, choice, grammar or json_object", param=inner.unknown()[0])
    return _structured_params("structured_outputs", **{name: value for name, value in values.items() if value is not None})


def _response_format(form: Fields) -> StructuredOutputsParams | None:
    kind = form.choice("type", "text", "json_object", "json_schema")
    if kind is None:
        raise RequestError("response_format.type is missing", param="response_format.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _structured_params("response_format", json_object=True)
    described = Fields(form.take("json_schema"), "response_format.json_schema.")
    described.text("name")
    described.flag("strict")
    schema = described.take("schema")
    if not isinstance(schema, dict):
        raise described.error("schema", "must be a JSON object", schema)
    return _structured_params("response_format", json=schema)


def _structured_params(field: str, **values: Any) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**values)
    except ValueError as error:
        raise RequestError(f"{field}: {error}", param=field) from error
