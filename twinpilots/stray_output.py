"""Keeps lines that a C library prints for itself off standard output.

Owns `muted`. Knows nothing of who prints what.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_ONE_AT_A_TIME = threading.Lock()  # the process has one file descriptor 1


@contextlib.contextmanager
def muted(begin: bytes) -> Iterator[None]:
    """Lines with this begin that are printed to file descriptor 1 meanwhile are dropped; all others, another thread's perhaps, follow when it is over."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        _flush()
        try:
            kept = os.dup(1)
        except OSError:  # there is no standard output
            yield
            return
        stack.callback(os.close, kept)
        caught = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 1)
            caught.seek(0)
            for line in caught:
                if not line.startswith(begin):
                    os.write(kept, line)


def _flush() -> None:
    """What is printed and not yet written, by Python and by C."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
