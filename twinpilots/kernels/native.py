"""The native library's Python face: ctypes, one thin method per C function.

Owns the C signatures. Importing it loads nothing; `load` does, once. ctypes releases the GIL for the length of every call.
Knows nothing of programs, arenas or devices: addresses come in as plain integers.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels.abi import ABI_VERSION

ISA_NAMES = ("portable", "avx2", "avx512", "avx512vnni", "amx")
AVX512_VNNI, AMX = 3, 4
EMULATED_TILES = 5  # AMX in plain C++: what tests the tiled kernels where there are no tiles
NO_MAILBOX = -1
CANCELLED, ABORTED, TIMED_OUT, BAD_INSTRUCTION, QUEUE_FULL = 1, -1, -2, -3, -4

_LIBRARY = Path(__file__).resolve().parent / f"_native_{ABI_VERSION}.so"
_LOG = logging.getLogger(__name__)


class _LinkParams(ctypes.Structure):
    _fields_ = [("up_bytes_per_s", c_double), ("down_bytes_per_s", c_double), ("latency_s", c_double), ("adversarial_seed", c_uint64)]


@dataclass(frozen=True, kw_only=True)
class LinkParams:
    """The emulated link. Rates of 0: unthrottled. ``adversarial_seed`` != 0: instructions start randomly late (tests)."""

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    adversarial_seed: int = 0

    def _c(self) -> _LinkParams:
        return _LinkParams(self.up_bytes_per_s, self.down_bytes_per_s, self.latency_s, self.adversarial_seed)


class LiveLink:
    """A link whose rates may change, from any thread, while a queue is served: transfers that begin later go at the new ones."""

    def __init__(self, params: LinkParams) -> None:
        self._params = params._c()

    def set_rates(self, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        self._params.up_bytes_per_s, self._params.down_bytes_per_s = up_bytes_per_s, down_bytes_per_s

    def _c(self) -> _LinkParams:
        return self._params


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tp_abi_version": (c_int, []),
    "tp_abi_layout": (c_int, [c_void_p, c_int]),
    "tp_best_isa": (c_int, []),
    "tp_isa": (c_int, []),
    "tp_has_isa": (c_int, [c_int]),
    "tp_set_isa": (c_int, [c_int]),
    "tp_set_timeout": (None, [c_double]),
    "tp_pin_thread": (c_int, [c_int]),
    "tp_pool_create": (c_void_p, [c_void_p, c_int]),
    "tp_pool_destroy": (None, [c_void_p]),
    "tp_run": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64]),
    "tp_run_chain": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "tp_draw": (c_int, [c_void_p, c_int64, c_void_p, c_double]),
    "tp_queue_loop": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    "tp_submit": (c_int, [c_void_p, c_int64, c_void_p]),
    "tp_wait_idle": (c_int, [c_void_p, c_int64, c_double]),
    "tp_event_set": (None, [c_void_p, c_int, c_int32]),
    "tp_event_wait": (c_int, [c_void_p, c_int, c_int32, c_double]),
    "tp_quantize": (None, [c_int, c_void_p, c_int64, c_void_p, c_void_p]),
    "tp_pack_columns": (None, [c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p]),
    "tp_read_rate": (c_double, [c_void_p, c_int64, c_void_p, c_int]),
    "tp_fma_rate": (c_double, [c_void_p, c_int]),
    "tp_linear_seconds": (c_double, [c_int, c_void_p, c_int64, c_int64]),
    "tp_copy_rate": (c_double, [c_void_p, c_void_p, c_int64, c_int]),
}


def _address(record: np.void | NDArray[Any]) -> int:
    return int(np.asarray(record).ctypes.data) if isinstance(record, np.ndarray) else int(record.__array_interface__["data"][0])


class Native:
    """The loaded library. Bases, pools and mailbox offsets are integers; ``entry`` is one ENTRY record (kernels/abi.py)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        found = self._lib.tp_abi_version()
        if found != ABI_VERSION:
            raise OSError(f"{path} speaks ABI {found}, this version needs {ABI_VERSION}")
        self.isa_was_set = False

    @property
    def best_isa(self) -> int:
        """The best instruction set of this machine, an index of ISA_NAMES."""
        return int(self._lib.tp_best_isa())

    @property
    def isas(self) -> tuple[int, ...]:
        """All levels that `set_isa` takes here."""
        return tuple(level for level in range(EMULATED_TILES + 1) if self._lib.tp_has_isa(level))

    @property
    def isa(self) -> int:
        """The level in use. Before `set_isa` the best one without tiles: whether those are faster is measured (hardware/isa.py)."""
        return int(self._lib.tp_isa())

    @property
    def isa_name(self) -> str:
        return (*ISA_NAMES, "amx-emulated")[self.isa]

    def set_isa(self, level: int) -> None:
        """Use instruction set ``level`` for everything that starts from now on, in this process."""
        self.isa_was_set = True
        if self._lib.tp_set_isa(level) != level:
            raise ValueError(f"instruction set {level} is not available here; the best is {self.best_isa} ({ISA_NAMES[self.best_isa]})")

    def set_timeout(self, seconds: float) -> None:
        """How long an instruction waits for an event before its entry fails (120 s unless set), process-wide."""
        self._lib.tp_set_timeout(seconds)

    def abi_layout(self) -> tuple[int, ...]:
        """Record sizes and field offsets as compiled (tests/cpu/test_native_queue.py names them)."""
        out = (c_int64 * 32)()
        return tuple(out[: self._lib.tp_abi_layout(ctypes.byref(out), 32)])

    def pin_thread(self, cpu: int) -> None:
        """Pin the calling thread to one core. ValueError when it may not run there."""
        if self._lib.tp_pin_thread(cpu):
            raise ValueError(f"cannot pin a thread to core {cpu}: it is not in this process's set of cores")

    def pool_create(self, threads: int, cpus: Sequence[int] | None = None) -> int:
        """A pool of ``threads`` compute threads, the caller included; workers 1.. are pinned to cpus[1:]. Free it with `pool_destroy`."""
        if threads < 1 or (cpus is not None and len(cpus) != threads):
            raise ValueError(f"a pool of {threads} threads needs as many cores, got {cpus}")
        array = None if cpus is None else (c_int * threads)(*cpus)
        pool = self._lib.tp_pool_create(array, threads)
        if not pool:
            raise ValueError(f"cannot start a pool of {threads} threads pinned to {cpus}: a core is not in this process's set of cores")
        return int(pool)

    def pool_destroy(self, pool: int) -> None:
        self._lib.tp_pool_destroy(pool)

    def run(
        self, host_base: int, gpu_base: int, entry: np.void | NDArray[Any], *, pool: int = 0, link: LinkParams | None = None, mailbox_offset: int = NO_MAILBOX
    ) -> int:
        """Run one entry on the calling thread (and ``pool``). 0, or CANCELLED, ABORTED, TIMED_OUT, BAD_INSTRUCTION."""
        params = None if link is None else link._c()
        return int(
            self._lib.tp_run(host_base, gpu_base or None, _address(entry), pool or None, None if params is None else ctypes.byref(params), mailbox_offset)
        )

    def run_chain(self, host_base: int, entry: np.void | NDArray[Any], chain: NDArray[Any], *, pool: int = 0) -> int:
        """Run the decoding passes of one CHAIN record, from ``entry`` on, on the calling thread (and ``pool``); returns as `run` does."""
        return int(self._lib.tp_run_chain(host_base, _address(entry), _address(chain), pool or None))

    def draw(self, row: NDArray[np.float32], choice: NDArray[Any], uniform: float) -> int:
        """The token that a CHOICE record takes from a contiguous row of logits at ``uniform`` in [0, 1); -1 when they are not finite."""
        return int(self._lib.tp_draw(row.ctypes.data, len(row), _address(choice), uniform))

    def queue_loop(self, host_base: int, gpu_base: int, mailbox_offset: int, *, pool: int = 0, link: LinkParams | LiveLink | None = None) -> int:
        """Serve a mailbox on the calling thread until abort (ABORTED) or an entry with flag 1 (0)."""
        params = None if link is None else link._c()
        return int(self._lib.tp_queue_loop(host_base, gpu_base or None, mailbox_offset, pool or None, None if params is None else ctypes.byref(params)))

    def submit(self, host_base: int, mailbox_offset: int, entry: np.void | NDArray[Any]) -> int:
        """Append a copy of ``entry``; 0 or QUEUE_FULL. One submitter per mailbox."""
        return int(self._lib.tp_submit(host_base, mailbox_offset, _address(entry)))

    def wait_idle(self, host_base: int, mailbox_offset: int, timeout_s: float) -> int:
        """Until the queue is idle: the mailbox's status (0, or its first failed entry's), else ABORTED or TIMED_OUT."""
        return int(self._lib.tp_wait_idle(host_base, mailbox_offset, timeout_s))

    def event_set(self, host_base: int, event: int, value: int) -> None:
        self._lib.tp_event_set(host_base, event, value)

    def event_wait(self, host_base: int, event: int, value: int, timeout_s: float) -> int:
        """Until the event's value is ``value`` or later: 0, ABORTED or TIMED_OUT."""
        return int(self._lib.tp_event_wait(host_base, event, value, timeout_s))

    def quantize(self, weights: NDArray[np.float32], dtype: int, out: NDArray[np.uint8], *, pool: int = 0) -> None:
        """Contiguous ``weights`` (a whole number of blocks of 32) to Q8_0 or Q4_1 row blocks; kernels/quant_format.py says how."""
        self._lib.tp_quantize(dtype, weights.ctypes.data, weights.size // 32, out.ctypes.data, pool or None)

    def pack_columns(self, row_blocks: NDArray[np.uint8], dtype: int, panel: NDArray[np.uint8], width: int, column: int, *, pool: int = 0) -> None:
        """Row blocks [R, B, block_bytes], each row contiguous, to columns [column, column + R) of a contiguous panel of ``width`` columns."""
        rows, blocks, _ = row_blocks.shape
        self._lib.tp_pack_columns(dtype, row_blocks.ctypes.data, row_blocks.strides[0], rows, blocks, panel.ctypes.data, width, column, pool or None)

    def read_rate(self, data: NDArray[Any], *, pool: int = 0, duration_ms: int = 100) -> float:
        """Bytes per second at which all threads of ``pool`` read ``data`` (whole MiB of it, over and over)."""
        return float(self._lib.tp_read_rate(data.ctypes.data, data.nbytes, pool or None, duration_ms))

    def fma_rate(self, *, pool: int = 0, duration_ms: int = 50) -> float:
        """FLOP/s (fp32) of all threads of ``pool`` on registers alone."""
        return float(self._lib.tp_fma_rate(pool or None, duration_ms))

    def linear_seconds(self, isa: int, weights: NDArray[np.uint16], rows: int) -> float:
        """Of one linear of ``rows`` rows over all of ``weights`` (bf16; whole MiB of them count), on the calling thread, with instruction set ``isa``."""
        return float(self._lib.tp_linear_seconds(isa, weights.ctypes.data, weights.nbytes, rows))

    def copy_rate(self, dst: NDArray[Any], src: NDArray[Any], *, duration_ms: int = 100) -> float:
        """Bytes per second at which one thread copies ``src`` to ``dst`` (equal sizes), counted once."""
        if dst.nbytes != src.nbytes:
            raise ValueError(f"copy_rate needs equal sizes, got {dst.nbytes} and {src.nbytes} bytes")
        return float(self._lib.tp_copy_rate(dst.ctypes.data, src.ctypes.data, src.nbytes, duration_ms))


@cache
def load() -> Native | None:
    """The library, or None when it was not built (no compiler at install time) or cannot be loaded here (logged)."""
    if not _LIBRARY.exists():
        return None
    try:
        return Native(_LIBRARY)
    except (OSError, AttributeError) as error:
        _LOG.warning("the native library cannot be used (%s); run python -m twinpilots.kernels.build", error)
        return None
