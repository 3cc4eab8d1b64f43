"""Progress of a long step, on stderr, and only when that is a terminal.

Owns one line that is redrawn in place. Knows nothing of what is being done.
"""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

REDRAW_S = 0.1  # often enough to look alive, rare enough to cost nothing


class Progress:
    """``with Progress("profile", total=12, unit="steps") as bar: bar.update(note="link")``.

    ``enabled`` None: when the stream is a terminal. ``total`` None: a count without a bar.
    """

    def __init__(self, label: str, *, total: int | None = None, unit: str = "", enabled: bool | None = None, stream: TextIO | None = None) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = 0
        self._note = ""
        self._stream = sys.stderr if stream is None else stream
        self.enabled = self._stream.isatty() if enabled is None else enabled
        self._began_s = time.monotonic()
        self._drawn_s = 0.0

    def update(self, amount: int = 1, *, note: str | None = None) -> None:
        """Count ``amount`` more; ``note`` says what is being done now."""
        self.done += amount
        self._note = self._note if note is None else note
        if self.enabled and time.monotonic() - self._drawn_s >= REDRAW_S:
            self._draw()

    def show(self, done: int, total: int) -> None:
        """The count as a callback gives it: done so far, of how many."""
        self.total = total
        self.update(done - self.done)

    def line(self) -> str:
        """What the terminal shows: label, bar, count, elapsed seconds, note."""
        elapsed_s = time.monotonic() - self._began_s
        count = f"{self.done}" if self.total is None else f"{_bar(self.done, self.total)} {self.done}/{self.total}"
        return " ".join(part for part in (f"{self.label}:", count, self.unit, f"{elapsed_s:.0f} s", self._note) if part)

    def close(self) -> None:
        """Clear the line."""
        if self._drawn_s:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("\r\x1b[K" + self.line()[:width])
        self._stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _bar(done: int, total: int, width: int = 24) -> str:
    filled = width if total <= 0 else min(width, width * done // total)
    return "[" + "#" * filled + "." * (width - filled) + "]"
