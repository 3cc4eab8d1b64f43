"""Words of the host arena that a CUDA stream waits for and writes by itself, through the driver's stream memory operations.

Owns the two calls (ctypes on libcuda: torch exports neither), where the device sees host memory, and the probe that must succeed before they are trusted.
Knows nothing of events, queues or passes (`cuda_sync`).

- A wait holds the stream until (int32)(word - value) >= 0, the rule of event words; the CPU writes the word with a plain store.
- A write puts a system-wide fence before it: who sees the word sees all that the stream did before.
- CUDA does not know what a wait waits for, and may keep streams from running side by side: all that a wait depends on must have been launched before it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import CONTROL, EVENTS_OFFSET

WAIT_GEQ, WRITE_FENCED = 0, 0  # CU_STREAM_WAIT_VALUE_GEQ, CU_STREAM_WRITE_VALUE_DEFAULT
AWAITED_OFFSET, WRITTEN_OFFSET = EVENTS_OFFSET - 128, EVENTS_OFFSET - 64  # the probe's words, between the control block and the events
assert CONTROL.itemsize <= AWAITED_OFFSET
PROBE_S = 0.3  # for each step of the probe; a card takes microseconds
HOLD_S = 0.002  # how long the probe looks whether a wait holds


class StreamWords(Protocol):
    """32-bit words by their offset in the host arena. RuntimeError when the driver refuses."""

    def wait(self, stream: Any, offset: int, value: int) -> None:
        """What ``stream`` is given from now on begins when the word is at ``value`` or later (cyclic)."""
        ...

    def write(self, stream: Any, offset: int, value: int) -> None:
        """The word becomes ``value`` when all that ``stream`` was given so far is done, and can be seen."""
        ...


class DriverWords:
    """The real thing. ``base``: where the device sees the host arena. AttributeError where ``driver`` is too old to have the calls."""

    def __init__(self, driver: ctypes.CDLL, base: int) -> None:
        self._wait, self._write, self._base = _call(driver, "cuStreamWaitValue32"), _call(driver, "cuStreamWriteValue32"), base

    def wait(self, stream: Any, offset: int, value: int) -> None:
        _check("cuStreamWaitValue32", self._wait(stream.cuda_stream, self._base + offset, value % 2**32, WAIT_GEQ))

    def write(self, stream: Any, offset: int, value: int) -> None:
        _check("cuStreamWriteValue32", self._write(stream.cuda_stream, self._base + offset, value % 2**32, WRITE_FENCED))


def _call(driver: ctypes.CDLL, name: str) -> Callable[[int, int, int, int], int]:
    """(stream, device address, value, flags) -> status. The second version needs no permission of the kernel module; drivers before CUDA 11.7 lack it."""
    try:
        call = getattr(driver, f"{name}_v2")
    except AttributeError:
        call = getattr(driver, name)
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint), ctypes.c_int
    found: Callable[[int, int, int, int], int] = call
    return found


def _check(name: str, status: int) -> None:
    if status != 0:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def load_driver() -> ctypes.CDLL | None:
    """The CUDA driver's library, None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def device_pointer(driver: ctypes.CDLL | None, host_address: int) -> int | None:
    """Where the current device sees registered host memory, asked of the driver: torch does not export the call, and may carry its run time inside."""
    pointer = ctypes.c_uint64()
    if driver is None:
        return None
    try:
        status = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(pointer), ctypes.c_void_p(host_address), ctypes.c_uint(0))
    except AttributeError:
        return None
    return pointer.value if status == 0 else None


def probe(words: StreamWords, stream: Any, host: HostArena) -> str | None:
    """Why ``words`` must not be used here; None when they do as they should. ``stream`` is the probe's own. Takes at most some PROBE_S."""
    awaited, written = (host.view(offset, np.uint32, (1,)) for offset in (AWAITED_OFFSET, WRITTEN_OFFSET))
    try:
        return _tried(words, stream, awaited, written)
    except RuntimeError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        awaited[0] = 2  # whatever still waits goes on
        if _soon(lambda: _is_done(stream)):
            awaited[0] = written[0] = 0


def _tried(words: StreamWords, stream: Any, awaited: NDArray[np.uint32], written: NDArray[np.uint32]) -> str | None:
    awaited[0], written[0] = 2**32 - 2, 0  # the comparison is cyclic
    words.wait(stream, AWAITED_OFFSET, 2**32 - 3)
    words.write(stream, WRITTEN_OFFSET, 1)
    if not _soon(lambda: int(written[0]) == 1):
        return f"a stream did not pass a word that is there, or the CPU did not see what it wrote, within {PROBE_S:g} s"
    words.wait(stream, AWAITED_OFFSET, 1)
    words.write(stream, WRITTEN_OFFSET, 2)
    time.sleep(HOLD_S)
    if int(written[0]) != 1 or _is_done(stream):
        return "a stream did not wait for a word that is not there"
    awaited[0] = 2
    if not _soon(lambda: int(written[0]) == 2):
        return f"a stream did not see what the CPU wrote within {PROBE_S:g} s"
    return None


def _soon(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PROBE_S
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(20e-6)
    return True


def _is_done(stream: Any) -> bool:
    try:
        return bool(stream.query())
    except RuntimeError:  # the device is lost: nothing of it will write any more
        return True
