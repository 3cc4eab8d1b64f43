"""Work beside the passes: a process of its own solves while the devices compute.

Owns the process (started with the first solve, kept for the next ones, without work asleep) and the thread that waits for its answers. A thread alone would
not do: a solver holds Python's lock for milliseconds at a time, and passes would wait for it. Knows nothing of what is solved: a picklable call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import twinpilots
from twinpilots.background_worker import SPARE_CORES, Answer, num_cpus, read_frame, write_frame
from twinpilots.plan.rebalance import Option

logger = logging.getLogger(__name__)
FIRST_GUESS_S = 0.3  # of a solve's time, before there was one
STOP_TIMEOUT_S = 5.0


class Background:
    """One solve at a time. Close it: a solve in progress is given up."""

    def __init__(self) -> None:
        self.last_s = FIRST_GUESS_S
        self.disturbs = num_cpus() < SPARE_CORES
        self._thread: threading.Thread | None = None
        self._answer: tuple[Option, ...] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lost = self._closing = False
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()  # before the driver's thread takes its place on one of them

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return None if self._process is None else self._process.pid

    def submit(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        """``solve`` travels to another process: a function of a module and its arguments (`functools.partial`), no closure."""
        assert self._thread is None, "one solve at a time"
        self._answer = None
        self._thread = threading.Thread(target=self._ask, args=(solve,), name="twinpilots re-solve", daemon=True)
        self._thread.start()

    def collect(self) -> tuple[Option, ...] | None:
        """The answer, once; None while there is none. A solve that failed gives an empty answer: the plan stays."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread = None
        return self._answer or ()

    def close(self) -> None:
        self._closing = True
        if self._process is not None:
            if self._thread is not None:
                self._process.kill()  # in the middle of a solve that nobody waits for
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)
            self._thread = None
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def _ask(self, solve: Callable[[], tuple[Option, ...]]) -> None:
        """Sends the work and waits for the answer, without Python's lock."""
        if self._lost or self._closing:
            return
        try:
            answer = self._exchange(solve)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._lost = True
            if not self._closing:
                logger.warning("the process that looks for better plans is gone (%s); the run goes on with the plans that it has", error)
            return
        if answer.error is not None:
            logger.error("a better plan could not be looked for; the run goes on with the present one:\n%s", answer.error)
        self._answer, self.last_s = answer.value, answer.cpu_s

    def _exchange(self, solve: Callable[[], Any]) -> Answer:
        if self._process is None:
            self._process = _start(self._cpus)
        assert self._process.stdin is not None and self._process.stdout is not None
        write_frame(self._process.stdin, solve)
        answer = read_frame(self._process.stdout)
        assert isinstance(answer, Answer)
        return answer


def _start(cpus: Iterable[int]) -> subprocess.Popen[bytes]:
    package_root = str(Path(twinpilots.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # A process group of its own: Ctrl-C in the terminal is the driver's business. It ends with the end of its pipe, however the driver ends.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "twinpilots.background_worker", *map(str, sorted(cpus))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,
    )
