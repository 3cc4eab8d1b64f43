"""CUDA graphs through torch: how one thread's launches are captured and launched again at one stroke.

Owns what must hold around a capture, and what captured launches may take of the card. Which launches are worth it, and when they are alike, is
`runtime/graphs.py`'s.

Torch's part is counted by torch: what is allocated during a capture comes from the graph's private pool, which is under the process's limit like all that
torch reserves, and ours allocate nothing. The executable graph itself is made by the driver when a capture ends, or when it first runs; torch does not know
of it, nor does CUDA promise a size. So the card is asked: what it lost since the first capture beside torch's memory is what captures have taken, kernels
that were loaded meanwhile and other processes' changes with it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
GRAPH_BYTES = 128 * 2**20  # that captured launches may take of the card, set aside beside the arena
CAPTURE_BYTES = 8 * 2**20  # of it must be left before another capture: the driver takes memory in pieces of some MiB


def forget_error(device: torch.device) -> None:
    """A failed call of the CUDA run time is reported once more, by the next kernel launch: let that be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def beside_torch_bytes(device: torch.device) -> int:
    """Bytes in use on the card that torch's allocator of this process does not hold."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


class CudaGraphs:
    """Captures what the calling thread launches on its present stream (one of its own, as CUDA asks). Launches are those of kernels that have run before:
    nothing is compiled, loaded or allocated while capturing, and other threads may go on with whatever they do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._before: int | None = None  # bytes beside torch's at the first capture
        self.taken_bytes = 0

    def room(self) -> bool:
        now = beside_torch_bytes(self._device)
        if self._before is None:
            self._before = now
        self.taken_bytes = max(0, now - self._before)
        return self.taken_bytes + CAPTURE_BYTES <= GRAPH_BYTES

    def capture(self, launch: Callable[[], bool]) -> Callable[[], object] | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                whole = launch()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            _LOG.warning("capturing launches on %s failed: %s", self._device, (str(error).splitlines() or [""])[0])
            forget_error(self._device)
            return None
        return graph.replay if whole else None
