"""Typed, range-checked reading of untrusted model configuration (config.json, GGUF metadata).

Owns: `ConfigReader`, which turns every malformed value into one `CheckpointError` that names the file and the field. Knows nothing of architectures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from twinpilots.errors import CheckpointError

MAX_INT = 2**31 - 1  # sizes beyond this are nonsense, not big models
MAX_LAYERS = 4096


class ConfigReader:
    """One config mapping. A field that is absent or null counts as missing and takes the default; without a default it is an error."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where}: the configuration must be a JSON object, not {type(values).__name__}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, key: str, wanted: str) -> CheckpointError:
        """The error for a malformed field."""
        if self.values.get(key) is None:
            return CheckpointError(f"{self.where}: field '{key}' is missing; it must be {wanted}")
        return CheckpointError(f"{self.where}: field '{key}' is {_short(self.values[key])}; it must be {wanted}")

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_INT) -> int | None:
        """An integer in [low, high], or None when the field is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT) -> int:
        value = self.optional_integer(key, low=low, high=high)
        if value is None and default is None:
            raise self.error(key, f"an integer from {low} to {high}")
        return default if value is None else value  # type: ignore[return-value]

    def optional_number(self, key: str) -> float | None:
        """A positive finite number, or None when the field is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, "a positive number")
        return float(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.optional_number(key)
        if value is None and default is None:
            raise self.error(key, "a positive number")
        return default if value is None else value  # type: ignore[return-value]

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of exactly ``length`` positive finite numbers."""
        value = self.values.get(key)
        wanted = f"a list of {length} positive numbers"
        if not isinstance(value, list | tuple) or len(value) != length:
            raise self.error(key, wanted)
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) or v <= 0 for v in value):
            raise self.error(key, wanted)
        return [float(v) for v in value]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def optional_texts(self, key: str, length: int) -> list[str] | None:
        """A list of exactly ``length`` texts, or None when missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or not all(isinstance(v, str) for v in value):
            raise self.error(key, f"a list of {length} texts")
        return value

    def section(self, key: str) -> ConfigReader | None:
        """A nested object as a reader of its own, or None when missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return ConfigReader(value, f"{self.where}: {key}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
