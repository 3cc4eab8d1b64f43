"""A chat's messages and tools, checked and brought into the form that chat templates expect.

Owns which roles and parts are text that we can give a model. Knows nothing of templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from twinpilots.errors import RequestError
from twinpilots.openai.fields import Fields

Message = dict[str, Any]
# OpenAI's newer name for the system's role; templates know the older one.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any) -> tuple[Message, ...]:
    """Messages with string contents. RequestError names the first that is malformed or more than text."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of at least one message", param="messages")
    return tuple(_message(Fields(message, f"messages[{index}].")) for index, message in enumerate(value))


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The function tools, as they are."""
    if not isinstance(value, list):
        raise RequestError("tools must be a list", param="tools")
    for index, tool in enumerate(value):
        fields = Fields(tool, f"tools[{index}].")
        if fields.text("type") != "function":
            raise fields.error("type", "must be 'function'", fields.take("type"))
        if not Fields(fields.take("function"), f"tools[{index}].function.").text("name"):
            raise RequestError(f"tools[{index}].function.name is missing", param=f"tools[{index}].function.name")
    return tuple(value)


def _message(fields: Fields) -> Message:
    role = fields.text("role")
    if role not in _ROLES:
        raise fields.error("role", f"must be one of {', '.join(_ROLES)}", role)
    message: Message = {"role": _ROLES[role]}
    calls = fields.take("tool_calls")
    content = _content(fields)
    if content is None and not (role == "assistant" and calls):
        raise RequestError(f"{fields.name('content')} is missing; give a string", param=fields.name("content"))
    message["content"] = content or ""
    if calls is not None:
        message["tool_calls"] = _tool_calls(calls, fields)
    for name in ("name", "tool_call_id", "reasoning_content"):
        text = fields.text(name)
        if text is not None:
            message[name] = text
    return message


def _content(fields: Fields) -> str | None:
    """The text of a message; text parts are joined line by line."""
    value = fields.take("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.error("content", "must be a string or a list of text parts", value)
    texts = []
    for index, part in enumerate(value):
        inner = Fields(part, f"{fields.name('content')}[{index}].")
        kind = inner.text("type")
        if kind not in _TEXT_PARTS:
            raise inner.error("type", "must be 'text': this server reads text only", kind)
        text = inner.text("text")
        if text is None:
            raise RequestError(f"{inner.name('text')} is missing", param=inner.name("text"))
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(value: Any, fields: Fields) -> list[dict[str, Any]]:
    """An assistant's earlier calls; their arguments as an object, which templates write out themselves."""
    if not isinstance(value, list):
        raise fields.error("tool_calls", "must be a list", value)
    calls = []
    for index, call in enumerate(value):
        place = f"{fields.name('tool_calls')}[{index}]."
        function = Fields(call, place).take("function")
        inner = Fields(function, f"{place}function.")
        name, arguments = inner.text("name"), inner.text("arguments")
        if not name:
            raise RequestError(f"{inner.name('name')} is missing", param=inner.name("name"))
        try:
            parsed = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            parsed = arguments  # a model's broken call is part of the conversation, too
        calls.append({**call, "function": {**function, "arguments": parsed}})
    return calls
