"""What no kernel can beat on this machine: the rate at which DRAM is read, and at which multiply-adds run on registers alone.

Owns the two experiments, by routines that share nothing with our kernels. Knows nothing of kernels, models or profiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.cpu import pinned
from twinpilots.device.numa import interleave
from twinpilots.device.topology import SYSFS_CPUS, allowed_cpus, memory_nodes
from twinpilots.kernels.native import load as load_native

PEAK_MS = 8  # short, so that some of the runs are not interrupted by a neighbour
L3_GUESS_PER_CORE_BYTES = 8 << 20
CACHE_BYTES = 160 << 20  # weights must come from DRAM, as in a real pass
CACHE_MULTIPLE = 4  # a cycle through only a little more than the L3 still finds a fifth of it there
TORCH_SQUARE = 512


class Peaks(NamedTuple):
    """What some samples gave at best."""

    read_bytes_per_s: float
    flops_per_s: float


class PeakMeter:
    """The best (read bytes/s, FLOP/s) of ``threads`` threads over all samples so far; pinned to ``cores`` where there are as many. Close it.
    ``memory``: what to read (`peak_memory`), where several meters share it."""

    def __init__(self, threads: int, cores: Sequence[int] | None = None, memory: NDArray[np.uint8] | None = None) -> None:
        self.read_bytes_per_s = self.flops_per_s = 0.0
        self.num_samples = 0
        self._native = load_native()
        self._pool = 0
        self._caller: frozenset[int] | None = None
        if self._native is None:
            self._sample = _torch_sampler(threads)
            return
        data = peak_memory(cores) if memory is None else memory
        own = cores[:threads] if cores is not None and threads <= len(cores) else None
        self._caller = frozenset(own[:1]) if own else None
        self._pool = self._native.pool_create(threads, own)
        native, pool = self._native, self._pool
        self._sample = lambda: (native.read_rate(data, pool=pool, duration_ms=PEAK_MS), native.fma_rate(pool=pool, duration_ms=PEAK_MS))

    def sample(self, times: int = 1) -> Peaks:
        """Both rates some times more, a few milliseconds each; the best of these."""
        with pinned(self._caller):
            found = [self._sample() for _ in range(times)]
        best = Peaks(max(read for read, _ in found), max(flops for _, flops in found))
        self.read_bytes_per_s = max(self.read_bytes_per_s, best.read_bytes_per_s)
        self.flops_per_s = max(self.flops_per_s, best.flops_per_s)
        self.num_samples += times
        return best

    def close(self) -> None:
        if self._native is not None and self._pool:
            self._native.pool_destroy(self._pool)
        self._pool = 0

    def __enter__(self) -> PeakMeter:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def peak_memory(cores: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Memory that no cache holds, spread as weights are."""
    data = np.empty(host_region_bytes(), np.uint8)
    interleave(data.ctypes.data, data.nbytes, memory_nodes(tuple(cores or allowed_cpus())))
    data.fill(1)
    return data


def host_region_bytes() -> int:
    """Memory to cycle through so that the CPU finds nothing in a cache: several times all the last-level caches that this process's cores share;
    servers have hundreds of MB."""
    found: dict[str, int] = {}
    cores = allowed_cpus()
    for core in cores:
        try:
            shared, size = ((SYSFS_CPUS / f"cpu{core}/cache/index3" / name).read_text().strip() for name in ("shared_cpu_list", "size"))
            found[shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):  # a container that does not say
            continue
    return max(CACHE_BYTES, (sum(found.values()) or L3_GUESS_PER_CORE_BYTES * len(cores)) * CACHE_MULTIPLE)


def _torch_sampler(threads: int) -> Callable[[], tuple[float, float]]:
    import torch

    torch.set_num_threads(threads)
    big, square = torch.ones(host_region_bytes() // 4), torch.ones(TORCH_SQUARE, TORCH_SQUARE)
    return lambda: (big.numel() * 4 / timed_s(lambda: big.sum()), 2 * TORCH_SQUARE**3 / timed_s(lambda: square @ square))


def timed_s(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
