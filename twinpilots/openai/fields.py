"""Reading the fields of a JSON object one by one, each with its type and range.

Owns the errors' wording and which fields nobody asked for. Knows nothing of what the fields mean. A null is an absent field, as in OpenAI's API.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from twinpilots.errors import RequestError


class Fields:
    """``place`` is put before the fields' names in messages: "stream_options."."""

    def __init__(self, body: Any, place: str = "") -> None:
        if not isinstance(body, Mapping):
            raise RequestError(f"{place.rstrip('.') or 'the body'} must be a JSON object, got {shown(body)}", param=place.rstrip(".") or None)
        self._body = body
        self._place = place
        self._read: set[str] = set()

    def name(self, field: str) -> str:
        """The field's full name."""
        return self._place + field

    def take(self, field: str) -> Any:
        """The field as it is; None when it is absent."""
        self._read.add(field)
        return self._body.get(field)

    def number(self, field: str, low: float, high: float) -> float | None:
        """A finite number in [low, high]."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or not math.isfinite(value):
            raise self.error(field, f"must be a number from {low:g}{'' if math.isinf(high) else f' to {high:g}'}", value)
        return float(value)

    def whole(self, field: str, low: int, high: int | None = None) -> int | None:
        """A whole number in [low, high]."""
        value = self.take(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise self.error(field, f"must be a whole number {f'of at least {low}' if high is None else f'from {low} to {high}'}", value)
        return value

    def flag(self, field: str) -> bool | None:
        """True or false."""
        value = self.take(field)
        if value is not None and not isinstance(value, bool):
            raise self.error(field, "must be true or false", value)
        return value

    def text(self, field: str) -> str | None:
        """A string."""
        value = self.take(field)
        if value is not None and not isinstance(value, str):
            raise self.error(field, "must be a string", value)
        return value

    def choice(self, field: str, *allowed: str) -> str | None:
        """One of a few strings."""
        value = self.take(field)
        if value is not None and value not in allowed:
            raise self.error(field, f"must be {' or '.join(map(repr, allowed))}", value)
        return None if value is None else str(value)

    def error(self, field: str, rule: str, value: Any) -> RequestError:
        """The error of a field whose value breaks ``rule``."""
        return RequestError(f"{self.name(field)} {rule}, got {shown(value)}", param=self.name(field))

    def unknown(self) -> tuple[str, ...]:
        """Fields that nobody has asked for."""
        return tuple(self.name(str(field)) for field, value in self._body.items() if field not in self._read and value is not None)


def shown(value: Any) -> str:
    """The value as JSON, cut to a line's length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def from_json(data: bytes | str) -> Any:
    """The JSON value in ``data``. RequestError when it is none: NaN and infinities are not JSON either."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("the JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"the JSON is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}") from None


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8, without any free white space."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from somebody's \\ud800
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
