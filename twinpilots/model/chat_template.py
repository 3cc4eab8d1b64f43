"""Chat templates: untrusted Jinja text, rendered in a sandbox the way transformers does.

Owns: `ChatTemplate`. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from twinpilots.errors import UserError

Message = Mapping[str, Any]


class ChatTemplate:
    """One compiled template. ``special_tokens`` (bos_token, eos_token, ...) are its variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        from jinja2 import TemplateError

        self.source = source
        self._variables = dict(special_tokens)
        self._where = where
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template is malformed: {error}") from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt's text; ``options`` are further variables of the template's own. Raises UserError when the template refuses the messages."""
        from jinja2 import TemplateError

        ours = {"messages": list(messages), "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt, **self._variables}
        try:
            return str(self._template.render({**(options or {}), **ours}))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{self._where}: the chat template refuses these messages: {error}") from error


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own convention

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
