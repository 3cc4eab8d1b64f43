"""Work beside the passes: one thread that solves while the devices compute.

Owns the thread and its manners (low priority, all cores, short turns with Python's lock). Knows nothing of what is solved.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from twinpilots.plan.rebalance import Option

logger = logging.getLogger(__name__)
FIRST_GUESS_S = 0.3  # of a solve's time, before there was one
NICENESS = 10  # beside the pilots a solve gets what they leave, and is still done in a second
SWITCH_INTERVAL_S = 1e-4  # while it runs, the driver waits at most this long for Python's lock
CLOSE_TIMEOUT_S = 10.0


class Background:
    """One solve at a time. Close it: a solve in progress is waited for."""

    def __init__(self) -> None:
        self.last_s = FIRST_GUESS_S
        self._thread: threading.Thread | None = None
        self._answer: tuple[Option, ...] | None = None

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        assert self._thread is None, "one solve at a time"
        self._answer = None
        self._thread = threading.Thread(target=self._work, args=(solve,), name="twinpilots re-solve", daemon=True)
        self._thread.start()

    def collect(self) -> tuple[Option, ...] | None:
        """The answer, once; None while there is none. A solve that failed gives an empty answer: the plan stays."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread = None
        return self._answer or ()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
            self._thread = None

    def _work(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a system without these: the solve then has the driver's own standing
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the driver's thread, from which this one was made, may be pinned
        began, before = time.thread_time(), sys.getswitchinterval()
        sys.setswitchinterval(min(before, SWITCH_INTERVAL_S))
        try:
            self._answer = solve()
        except Exception:
            logger.exception("a better plan could not be looked for; the run goes on with the present one")
        finally:
            sys.setswitchinterval(before)
            self.last_s = time.thread_time() - began
