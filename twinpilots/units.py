"""Memory sizes as people write them: "8GiB", "512KiB", "24GB" or plain bytes. Owns parsing and printing; knows nothing of limits."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BY_LOWER = {name.lower(): factor for name, factor in _UNITS.items()}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes of ``size``: a positive int, or text with a unit (upper or lower case). Raises ValueError that names what it got and what it takes."""
    hint = 'give bytes as an int, or text such as "8GiB", "512KiB" or "24GB"'
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ValueError(f"memory size {size!r} is neither an int nor text; {hint}")
    if isinstance(size, int):
        num_bytes = size
    else:
        match = _SIZE.fullmatch(size)
        if match is None or match[2].lower() not in _BY_LOWER:
            raise ValueError(f"memory size {size!r} is not understood; {hint}")
        num_bytes = int(float(match[1]) * _BY_LOWER[match[2].lower()]) if "." in match[1] else int(match[1]) * _BY_LOWER[match[2].lower()]
    if num_bytes <= 0:
        raise ValueError(f"memory size {size!r} is not positive; {hint}")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with a binary unit and three digits or so: "84 MiB", "1.5 GiB", "512 B"."""
    value, unit = float(num_bytes), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, bigger
    text = f"{value:.0f}" if unit == "B" or abs(value) >= 100 else f"{value:.1f}"
    return f"{text.removesuffix('.0')} {unit}"
