"""The OpenAPI document: what the endpoints take and answer, written down by hand because the bodies are checked by hand.

Owns the document. It describes every field that changes the output; the others are accepted or refused by `twinpilots.openai.requests`.
"""

from __future__ import annotations

from typing import Any

from twinpilots import __version__
from twinpilots.openai.requests import MAX_LOGPROBS, MAX_STOPS
from twinpilots.server.settings import ServerSettings

Schema = dict[str, Any]


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _whole(low: int, high: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, **({} if high is None else {"maximum": high})}


_FLAG: Schema = {"type": ["boolean", "null"]}
_TEXT: Schema = {"type": "string", "minLength": 1}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_BIAS: Schema = {"type": "number", "minimum": -100, "maximum": 100}
_NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
_STRUCTURED: Schema = {"type": ["object", "null"]}


def _sampling(settings: ServerSettings) -> Schema:
    return {
        "model": {"type": ["string", "null"], "enum": [*settings.model_names, None]}, "max_tokens": _whole(1), "temperature": _number(0, 2),
        "top_p": _number(0, 1), "top_k": _whole(-1), "min_p": _number(0, 1), "n": _whole(1, settings.max_choices), "seed": _whole(-(2**63), 2**63 - 1),
        "presence_penalty": _number(-2, 2), "frequency_penalty": _number(-2, 2), "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}, {"type": "null"}]},
        "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}}, "ignore_eos": _FLAG, "min_tokens": _whole(0),
        "logit_bias": {"type": ["object", "null"], "propertyNames": {"pattern": "^[0-9]{1,9}$"}, "additionalProperties": _BIAS},
        "stream": _FLAG, "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
        "structured_outputs": _STRUCTURED, "user": _NULLABLE_TEXT, "priority": _whole(-(2**31), 2**31 - 1),
    }  # fmt: skip


def _completion(settings: ServerSettings) -> Schema:
    prompts = [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, _TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1}]
    own = {"prompt": {"anyOf": prompts}, "echo": _FLAG, "logprobs": _whole(0, MAX_LOGPROBS["/v1/completions"])}
    return {"type": "object", "required": ["prompt"], "properties": {**_sampling(settings), **own}}


def _chat(settings: ServerSettings) -> Schema:
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]}
    roles = {"enum": ["system", "developer", "user", "assistant"]}
    message = {"type": "object", "required": ["role", "content"], "properties": {"role": roles, "content": content}}
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1}, "max_completion_tokens": _whole(1), "logprobs": _FLAG,
        "top_logprobs": _whole(0, MAX_LOGPROBS["/v1/chat/completions"]), "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {"enum": ["auto", "none", None]}, "response_format": _STRUCTURED,
    }  # fmt: skip
    return {"type": "object", "required": ["messages"], "properties": {**_sampling(settings), **own}}


def _tokenize() -> Schema:
    return {
        "type": "object", "required": ["prompt"],
        "properties": {"prompt": {"type": "string"}, "add_special_tokens": _FLAG, "return_token_strs": _FLAG, "model": {"type": ["string", "null"]}},
    }  # fmt: skip


def _detokenize() -> Schema:
    return {
        "type": "object",
        "required": ["tokens"],
        "properties": {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}},
    }


ERROR: Schema = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _NULLABLE_TEXT, "code": _NULLABLE_TEXT},
        }
    },
}  # fmt: skip
_REFUSALS = {
    400: "A field is malformed, out of range or not supported", 401: "The key is missing or wrong", 403: "A page of another site", 404: "No such model",
    408: "The body took too long", 413: "The body is too large", 429: "The queue is full; Retry-After says when to ask again", 503: "Loading or shutting down",
    500: "The engine failed", 504: "The request took too long",
}  # fmt: skip


def _answers(content: Schema, refusals: tuple[int, ...]) -> Schema:
    answers: Schema = {"200": {"description": "OK", "content": content}}
    for status in refusals:
        answers[str(status)] = {"description": _REFUSALS[status], "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return answers


def _post(summary: str, name: str, content: Schema, *, guarded: bool = True) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    return {
        "post": {
            "summary": summary, "operationId": name.lower(), "requestBody": body, "responses": _answers(content, tuple(sorted(_REFUSALS))),
            **({"security": [{"key": []}]} if guarded else {}),
        }
    }  # fmt: skip


def _get(summary: str, name: str, kind: str = "application/json", *, guarded: bool = False, refusals: tuple[int, ...] = (), **more: Any) -> Schema:
    security: Schema = {"security": [{"key": []}]} if guarded else {}
    return {"get": {"summary": summary, "operationId": name, "responses": _answers({kind: {"schema": {}}}, refusals), **security, **more}}


def describe(settings: ServerSettings) -> Schema:
    """The document for a server with these settings."""
    json_object = {"application/json": {"schema": {"type": "object"}}}
    either = {**json_object, "text/event-stream": {"schema": {"type": "string"}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(settings.model_names)}}
    since = {"name": "since", "in": "query", "schema": {"type": "number", "minimum": 0}, "description": "Only samples after this time (seconds since 1970)"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "TwinPilots", "version": __version__, "description": "OpenAI-compatible endpoints of one model, and the server's state."},
        "paths": {
            "/v1/completions": _post("Continue prompts", "Completion", either), "/v1/chat/completions": _post("Answer a conversation", "Chat", either),
            "/v1/models": _get("The served model's names", "models", guarded=True, refusals=(401,)),
            "/v1/models/{name}": _get("One of them", "model", guarded=True, refusals=(401, 404), parameters=[name]),
            "/tokenize": _post("Token ids of a text", "Tokenize", json_object), "/detokenize": _post("Text of token ids", "Detokenize", json_object),
            "/health": _get("200 when ready", "health", refusals=(503,)), "/version": _get("The server's version", "version"),
            "/metrics": _get("Prometheus metrics", "metrics", "text/plain"),
            "/live": _get("What the page shows", "live", refusals=(400,), parameters=[since]), "/": _get("The page", "page", "text/html"),
        },
        "components": {
            "schemas": {"Completion": _completion(settings), "Chat": _chat(settings), "Tokenize": _tokenize(), "Detokenize": _detokenize(), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip
