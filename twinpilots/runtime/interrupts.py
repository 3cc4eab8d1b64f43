"""Ctrl-C between passes, never inside one: a pass that one pilot leaves half-way makes the others wait for ever.

Owns the deferral of SIGINT. Knows nothing of passes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_interrupts(on_second: Callable[[], None]) -> Iterator[None]:
    """Inside, a first SIGINT is kept and handled at the end, as it would have been; a second one calls ``on_second`` at once.

    Signals are the main thread's business: elsewhere nothing changes, and nothing is needed.
    """
    before = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(before):
        yield
        return
    pending: list[tuple[int, Any]] = []

    def defer(number: int, frame: Any) -> None:
        pending.append((number, frame))
        if len(pending) > 1:
            on_second()

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        before(*pending[0])
