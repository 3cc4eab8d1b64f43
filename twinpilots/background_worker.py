"""The solving process: ``python -m twinpilots.background_worker``, started by `background.Background` only.

Owns the frames of the pipe and the process's manners: low priority, all cores, asleep while there is nothing to solve, gone when the pipe ends. Knows nothing
of what is solved: it runs the picklable calls that its parent, and nobody else, sends.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

SPARE_CORES = 3  # with fewer, the pilots have all of them: one for each, and the driver's
BURST_S, REST_S = 0.003, 0.003  # on such a machine. A pilot that waits yields its core, and gets it back a scheduler's tick later: a pass meets few of them
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call returned (None where it failed: then ``error`` says how), and the processor time that it took."""

    value: Any
    cpu_s: float
    error: str | None = None


def write_frame(stream: IO[bytes], value: object) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(_SIZE.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """EOFError when the other end is gone."""
    (size,) = _SIZE.unpack(_exactly(stream, _SIZE.size))
    return pickle.loads(_exactly(stream, size))


def _exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError("the pipe has ended")
    return data


def answered(call: Any) -> Answer:
    began = time.process_time()
    try:
        value, error = call(), None
    except Exception:  # noqa: BLE001 the parent logs it
        value, error = None, traceback.format_exc()
    return Answer(value=value, cpu_s=time.process_time() - began, error=error)


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """A solve makes tens of thousands of objects, and no cycles: to look for garbage among them takes a third of a glance's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """Work in bursts, where there is no core to spare."""
    if num_cpus() >= SPARE_CORES:
        yield
        return

    def rest(_signal: int, _frame: FrameType | None) -> None:
        time.sleep(REST_S)
        signal.setitimer(signal.ITIMER_REAL, BURST_S)

    signal.signal(signal.SIGALRM, rest)
    signal.setitimer(signal.ITIMER_REAL, BURST_S)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def main(cpus: Iterable[int]) -> None:
    """``cpus``: where this process may run; the driver's thread, from which it was made, may be pinned to one of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    writer: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print cannot break the frames
    with contextlib.suppress(OSError, AttributeError):  # a system without these: the solve then has the driver's own standing
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.sched_setaffinity(0, cpus)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call = read_frame(sys.stdin.buffer)
            with resting(), collecting_later():
                answer = answered(call)
                write_frame(writer, answer)
    os._exit(0)


if __name__ == "__main__":
    from twinpilots import background_worker  # under its own name, by which the parent knows its classes

    background_worker.main(map(int, sys.argv[1:]))
