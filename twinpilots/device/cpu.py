"""The CPU pilot: which cores it flies with, and one call per pass that runs its program to the end.

Owns the choice of cores, the native worker pool and the pinning of the calling thread. Knows nothing of instructions or of what a pass is for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.base import OK, REASONS
from twinpilots.device.memory import HostArena
from twinpilots.device.topology import CoreInfo, allowed_cpus, cpu_quota, memory_nodes, physical_cores, read_topology
from twinpilots.errors import DeviceLostError
from twinpilots.hardware.isa import settle_isa
from twinpilots.kernels import native as native_module


@dataclass(frozen=True, kw_only=True)
class CoreChoice:
    """Logical CPUs, one per physical core. ``pilot[0]`` is the calling thread's; ``device`` is the emulated GPU's own core, None without one."""

    pilot: tuple[int, ...]
    device: int | None = None


def choose_cores(gpu: bool, emulated: bool) -> CoreChoice:
    """The pilot's cores on this machine, among those that this process may use. The choice depends on the devices only, never on the policy."""
    return assign_cores(read_topology(allowed_cpus()), gpu=gpu, emulated=emulated, most=cpu_quota())


def assign_cores(infos: Sequence[CoreInfo], *, gpu: bool, emulated: bool, most: int | None = None) -> CoreChoice:
    """Performance cores first, at most ``most`` (a cgroup's quota). An emulated GPU takes the last core for itself (a lone core is shared). With a
    real GPU and three or more cores the last one is left to the driver; on two the driver shares the pilot's."""
    cores = tuple(info.cpu for info in physical_cores(infos))[:most]
    if emulated:
        return CoreChoice(pilot=cores[:-1] or cores, device=cores[-1])
    if gpu and len(cores) >= 3:
        return CoreChoice(pilot=cores[:-1])
    return CoreChoice(pilot=cores)


@contextmanager
def pinned(cpus: frozenset[int] | None) -> Iterator[None]:
    """The calling thread stays on ``cpus`` for a while; its own set comes back afterwards. None, or a platform without pinning: no change."""
    before = os.sched_getaffinity(0) if cpus and hasattr(os, "sched_setaffinity") else None
    if cpus is None or before is None or before == cpus:
        yield
        return
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class CpuPilot:
    """Runs CPU-queue programs with ``threads`` threads, the caller's included, pinned to ``cores`` (physical, performance cores first).

    Without the native module the torch interpreter runs them (slow; torch's own global thread count is set to ``threads`` then).
    ``threads`` beyond the cores are allowed and float unpinned: a user who asks for them measures something.
    """

    def __init__(self, threads: int | None = None, cores: Sequence[int] | None = None) -> None:
        self.native = native_module.load()
        if self.native is not None:
            settle_isa(self.native)
        self._pool = 0
        self._take(tuple(cores) if cores is not None else choose_cores(gpu=False, emulated=False).pilot, threads)

    def resize(self, cores: Sequence[int]) -> None:
        """Fly with ``cores`` from the next pass on, one thread on each: a group of its own for each GPU's worker (`topology.core_groups`).
        What lies in memory stays where it lies."""
        self.close()
        self._take(tuple(cores), None)

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA nodes on which what this pilot reads should lie; none where there is nothing to choose."""
        return memory_nodes(self.cores[: self.threads])

    def _take(self, cores: tuple[int, ...], threads: int | None) -> None:
        self.cores = cores
        self.threads = threads if threads is not None else len(cores)
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        pin = self.threads <= len(self.cores)
        # The native pool pins its own workers; torch's threads inherit the caller's set.
        self._pinned_thread: int | None = None  # a thread that is on its place, and stays there for now
        self._caller_cpus = None if not pin else frozenset(self.cores[:1] if self.native is not None else self.cores)
        if self.native is not None:
            self._pool = self.native.pool_create(self.threads, self.cores[: self.threads] if pin else None)

    def run(self, entry: np.void | NDArray[Any], host: HostArena) -> None:
        """Run one CPU-queue entry to its end. Ctrl-C takes effect after it: the pass is then whole, and the engine may go on.

        DeviceLostError when it cannot end: another pilot is gone, an event never comes, or the program is bad. ``host`` is then aborted.
        """
        with nullcontext() if self._pinned_thread == threading.get_ident() else self.caller_pinned():
            status = self._run(entry, host)
        self._check(status, entry, host)

    def run_chain(self, entry: np.void | NDArray[Any], chain: NDArray[Any], host: HostArena) -> None:
        """Run the passes of one CHAIN record from ``entry`` on, as `run` does one. Only with the native module."""
        assert self.native is not None, "only the native module chains passes"
        with nullcontext() if self._pinned_thread == threading.get_ident() else self.caller_pinned():
            status = self.native.run_chain(host.base, entry, chain, pool=self._pool)
        self._check(status, entry, host)

    @staticmethod
    def _check(status: int, entry: np.void | NDArray[Any], host: HostArena) -> None:
        if status != OK:
            host.set_abort()  # the other queues must not wait for events that this one will never record
            reason = REASONS.get(status, f"status {status}")
            raise DeviceLostError(f"the CPU pilot stopped in pass {int(entry['pass_id'])}: {reason}; the engine cannot go on, start a new one")

    @contextmanager
    def caller_pinned(self) -> Iterator[None]:
        """The calling thread on its place in the pool. `run` sees to it by itself; around many runs it need not be done, and undone, in each."""
        with pinned(self._caller_cpus):
            before, self._pinned_thread = self._pinned_thread, threading.get_ident()
            try:
                yield
            finally:
                self._pinned_thread = before

    def _run(self, entry: np.void | NDArray[Any], host: HostArena) -> int:
        if self.native is not None:
            return self.native.run(host.base, 0, entry, pool=self._pool)
        import torch

        from twinpilots.runtime.interpreter import run_program  # torch only where there is no compiler: importing it takes seconds

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        try:
            return run_program(entry, host, None)
        except BaseException:  # Ctrl-C lands between two instructions here: the pass cannot finish
            host.set_abort()
            raise

    def close(self) -> None:
        """Stop the workers. Safe to repeat."""
        if self.native is not None and self._pool:
            self.native.pool_destroy(self._pool)
        self._pool = 0
