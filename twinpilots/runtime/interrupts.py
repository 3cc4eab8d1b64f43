"""Ctrl-C between passes, never inside one: a pass that one pilot leaves half-way makes the others wait for ever.

Owns the deferral of SIGINT. Knows nothing of passes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


class Interrupts:
    """`held`: a first SIGINT inside is kept and handled at the end, as it would have been; a second one calls ``on_second`` at once.

    Signals are the main thread's business: elsewhere nothing changes, and nothing is needed.
    """

    def __init__(self, on_second: Callable[[], None]) -> None:
        self._on_second = on_second
        self._before: Any = None  # the handler that ours stands in for
        self._holding = False
        self._pending: list[tuple[int, Any]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Our handler in place for many `held` sections: setting it costs more than a small model's sampling."""
        before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        if not callable(before) or self._before is not None:
            yield
            return
        self._before = before
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._before = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """One section that is not interrupted. What came is delivered after it, unless the section failed."""
        with self.listening() if self._before is None else nullcontext():
            self._holding = True
            try:
                yield
            finally:
                self._holding = False
                pending, self._pending = self._pending, []
            if pending:
                self._before(*pending[0])

    def _handle(self, number: int, frame: Any) -> None:
        if not self._holding:
            self._before(number, frame)
            return
        self._pending.append((number, frame))
        if len(self._pending) > 1:
            self._on_second()
