"""The CPU pilot: which cores it flies with, and one call per pass that runs its program to the end.

Owns the choice of cores, the native worker pool and the pinning of the calling thread. Knows nothing of instructions or of what a pass is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.base import OK, REASONS
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError
from twinpilots.kernels import native as native_module

SYSFS_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class CoreChoice:
    """Logical CPUs, one per physical core. ``pilot[0]`` is the calling thread's; ``device`` is the emulated GPU's own core, None without one."""

    pilot: tuple[int, ...]
    device: int | None = None


@dataclass(frozen=True, kw_only=True)
class CoreInfo:
    """One logical CPU: ``core`` names its physical core (the lowest sibling), ``speed`` orders cores by what they can do (any unit)."""

    cpu: int
    core: int
    speed: float


def choose_cores(gpu: bool, emulated: bool) -> CoreChoice:
    """The pilot's cores on this machine, among those that this process may use. The choice depends on the devices only, never on the policy."""
    return assign_cores(read_topology(allowed_cpus()), gpu=gpu, emulated=emulated)


def assign_cores(infos: Sequence[CoreInfo], *, gpu: bool, emulated: bool) -> CoreChoice:
    """Performance cores first. An emulated GPU takes the last core for itself (a lone core is shared). With a real GPU and three or more cores the
    last one is left to the driver; on two the driver shares the pilot's."""
    best: dict[int, CoreInfo] = {}
    for info in sorted(infos, key=lambda info: info.cpu):
        best.setdefault(info.core, info)
    cores = tuple(info.cpu for info in sorted(best.values(), key=lambda info: (-info.speed, info.cpu)))
    if emulated:
        return CoreChoice(pilot=cores[:-1] or cores, device=cores[-1])
    if gpu and len(cores) >= 3:
        return CoreChoice(pilot=cores[:-1])
    return CoreChoice(pilot=cores)


def allowed_cpus() -> set[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def read_topology(cpus: Iterable[int], sysfs: Path = SYSFS_CPUS) -> list[CoreInfo]:
    """What the kernel says about ``cpus``. Where it says nothing, each is a core of its own and all are equally fast."""
    infos = []
    for cpu in sorted(cpus):
        directory = sysfs / f"cpu{cpu}"
        siblings = _text(directory / "topology/core_cpus_list") or _text(directory / "topology/thread_siblings_list") or str(cpu)
        capacity, frequency = _text(directory / "cpu_capacity"), _text(directory / "cpufreq/cpuinfo_max_freq")
        # Capacity first: it weighs instructions per clock, too. Frequencies of equal cores differ by a few per cent (favoured cores); both only order.
        speed = float(capacity or 0) * 1e9 + float(frequency or 0)
        infos.append(CoreInfo(cpu=cpu, core=min(parse_cpu_list(siblings)), speed=speed))
    return infos


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format: "0-2,8" is [0, 1, 2, 8]."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
        self.cores: tuple[int, ...] = tuple(cores) if cores is not None else choose_cores(gpu=False, emulated=False).pilot
        self.threads = threads if threads is not None else len(self.cores)
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        self.native = native_module.load()
        self._pool = 0
        pin = self.threads <= len(self.cores)
        # The native pool pins its own workers; torch's threads inherit the caller's set.
        self._caller_cpus = None if not pin else frozenset(self.cores[:1] if self.native is not None else self.cores)
        if self.native is not None:
            self._pool = self.native.pool_create(self.threads, self.cores[: self.threads] if pin else None)

    def run(self, entry: np.void | NDArray[Any], host: HostArena) -> None:
        """Run one CPU-queue entry to its end. Ctrl-C takes effect after it: the pass is then whole, and the engine may go on.

        DeviceLostError when it cannot end: another pilot is gone, an event never comes, or the program is bad. ``host`` is then aborted.
        """
        with self.caller_pinned():
            status = self._run(entry, host)
        if status != OK:
            host.set_abort()  # the other queues must not wait for events that this one will never record
            reason = REASONS.get(status, f"status {status}")
            raise DeviceLostError(f"the CPU pilot stopped in pass {int(entry['pass_id'])}: {reason}; the engine cannot go on, start a new one")

    def caller_pinned(self) -> AbstractContextManager[None]:
        """The calling thread on its place in the pool. `run` sees to it by itself; around many runs it need not be done, and undone, in each."""
        return pinned(self._caller_cpus)

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
