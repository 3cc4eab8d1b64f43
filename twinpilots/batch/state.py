"""What a run was started with, kept beside its output, so that only the same run is resumed.

Owns the file OUT.run.json and the comparison. Knows nothing of how the values were found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinpilots.errors import UserError

SCHEMA = 1


def state_path(output: Path) -> Path:
    """Where the run's description lies."""
    return output.with_name(output.name + ".run.json")


def read_state(output: Path) -> dict[str, Any] | None:
    """The description of the run that made ``output``; None when there is none. UserError when it cannot be read."""
    path = state_path(output)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); it says how {output} was made: pass --overwrite to begin anew") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of this version; pass --overwrite to begin anew")
    return state


def write_state(output: Path, state: Mapping[str, Any]) -> None:
    """Keep the description: whole or not at all, and on the disk before anything is computed. UserError when the disk refuses."""
    path = state_path(output)
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"schema": SCHEMA, **state}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}; make room, or give another -o") from error


def check_same(output: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError when what ``now`` says of the run differs from what was kept; it names the first difference."""
    for name, value in now.items():
        before = kept.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            check_same(output, before, value)
        elif before != value:
            raise UserError(
                f"output {output} was made with {name} {_short(before)}, this run has {_short(value)}; go on as before, give another -o, "
                "or pass --overwrite to begin anew"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}..."
