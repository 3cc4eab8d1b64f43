"""CUDA graphs through torch: how one thread's launches are captured and launched again at one stroke.

Owns what must hold around a capture. Which launches are worth it, and when they are alike, is `runtime/graphs.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

_LOG = logging.getLogger(__name__)


def forget_error(device: torch.device) -> None:
    """A failed call of the CUDA run time is reported once more, by the next kernel launch: let that be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


class CudaGraphs:
    """Captures what the calling thread launches on its present stream (one of its own, as CUDA asks). Launches are those of kernels that have run before:
    nothing is compiled, loaded or allocated while capturing, and other threads may go on with whatever they do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

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
