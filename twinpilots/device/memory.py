"""Memory: the arenas that everything of size is allocated from, and the ledger that counts it.

Owns: `HostArena` (one mapping shared by all pilots of one engine), `GpuArena` (offsets inside a device's one allocation), `Ledger` (bytes by tier and
purpose, against limits), and how much host memory this process may still take. Knows nothing of what the bytes mean, nor of devices.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from twinpilots.device.numa import interleave
from twinpilots.errors import LimitError
from twinpilots.kernels.abi import ABI_VERSION, CONTROL, EVENTS_OFFSET
from twinpilots.units import format_bytes

Tier = Literal["gpu", "host", "disk"]
Purpose = Literal["weights", "kv", "ring", "workspace", "staging", "programs"]
TIERS: tuple[Tier, ...] = ("gpu", "host", "disk")
PURPOSES: tuple[Purpose, ...] = ("weights", "kv", "ring", "workspace", "staging", "programs")
_FLAG_TO_RAISE: dict[str, str] = {"gpu": "--gpu-memory", "host": "--host-memory", "disk": "the disk space"}
EVENT_BYTES = 4
HUGE_PAGE_BYTES = 2**21
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux; Python's mmap has no names for them
POPULATE_MOST_BYTES = 2 << 30  # larger arenas would take seconds; theirs come as they are touched


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise ValueError(f"purpose {purpose!r} is not one of {', '.join(PURPOSES)}")


class Ledger:
    """Bytes in use by tier and purpose. A tier with a limit never holds more: `add` raises LimitError and counts nothing."""

    def __init__(self, limits: Mapping[Tier, int]) -> None:
        for tier in limits:
            self._check_tier(tier)
        self.limits: dict[Tier, int] = dict(limits)
        self._by_purpose: dict[Tier, dict[Purpose, int]] = {tier: {} for tier in TIERS}
        self._peak: dict[Tier, int] = dict.fromkeys(TIERS, 0)

    def add(self, tier: Tier, purpose: Purpose, num_bytes: int) -> None:
        """Count ``num_bytes`` more. Call it before allocating, so that a refusal costs nothing."""
        self._check_tier(tier)
        _check_purpose(purpose)
        if num_bytes < 0:
            raise ValueError(f"cannot add {num_bytes} bytes")
        limit, used = self.limits.get(tier), self.used(tier)
        if limit is not None and used + num_bytes > limit:
            raise LimitError(
                f"{purpose} needs {format_bytes(num_bytes)} of {tier} memory, {format_bytes(limit - used)} of the limit of {format_bytes(limit)} is left; "
                f"raise {_FLAG_TO_RAISE[tier]} to at least {used + num_bytes} bytes"
            )
        counts = self._by_purpose[tier]
        counts[purpose] = counts.get(purpose, 0) + num_bytes
        self._peak[tier] = max(self._peak[tier], used + num_bytes)

    def remove(self, tier: Tier, purpose: Purpose, num_bytes: int) -> None:
        """Take back what `add` counted."""
        self._check_tier(tier)
        held = self._by_purpose[tier].get(purpose, 0)
        if not 0 <= num_bytes <= held:
            raise ValueError(f"cannot remove {num_bytes} bytes of {tier} {purpose}: {held} are counted")
        self._by_purpose[tier][purpose] = held - num_bytes

    def used(self, tier: Tier) -> int:
        self._check_tier(tier)
        return sum(self._by_purpose[tier].values())

    def peak(self, tier: Tier) -> int:
        """The most bytes that this tier ever held at once."""
        self._check_tier(tier)
        return self._peak[tier]

    def by_purpose(self, tier: Tier) -> dict[Purpose, int]:
        self._check_tier(tier)
        return dict(self._by_purpose[tier])

    def check_integrity(self) -> None:
        """0 <= every purpose, used <= peak <= limit, in every tier; AssertionError with both sides otherwise."""
        for tier in TIERS:
            used, peak, limit = self.used(tier), self._peak[tier], self.limits.get(tier)
            assert all(count >= 0 for count in self._by_purpose[tier].values()), f"{tier}: negative count in {self._by_purpose[tier]}"
            assert used <= peak, f"{tier}: used {used} > peak {peak}"
            assert limit is None or peak <= limit, f"{tier}: peak {peak} > limit {limit}"

    @staticmethod
    def _check_tier(tier: str) -> None:
        if tier not in TIERS:
            raise ValueError(f"tier {tier!r} is not one of {', '.join(TIERS)}")


@dataclass(kw_only=True)
class _Bump:
    """Hands out offsets in ascending order; nothing is ever given back one by one. Alignment gaps count for the allocation that made them."""

    tier: Tier
    num_bytes: int
    ledger: Ledger | None
    used: int = 0
    counts: dict[Purpose, int] = field(default_factory=dict)

    def alloc(self, num_bytes: int, purpose: Purpose, align: int) -> int:
        _check_purpose(purpose)
        if num_bytes < 0 or align <= 0 or align & (align - 1):
            raise ValueError(f"cannot allocate {num_bytes} bytes aligned to {align}: sizes are >= 0, alignments powers of two")
        offset = -(-self.used // align) * align
        taken = offset + num_bytes - self.used
        if offset + num_bytes > self.num_bytes:
            raise LimitError(
                f"{purpose} needs {format_bytes(num_bytes)}, {format_bytes(self.num_bytes - self.used)} of the {self.tier} arena's "
                f"{format_bytes(self.num_bytes)} are left; raise {_FLAG_TO_RAISE[self.tier]} by at least {offset + num_bytes - self.num_bytes} bytes"
            )
        if self.ledger is not None:
            self.ledger.add(self.tier, purpose, taken)
        self.used += taken
        self.counts[purpose] = self.counts.get(purpose, 0) + taken
        return offset

    def release(self) -> None:
        """Everything at once, when the arena closes."""
        if self.ledger is not None:
            for purpose, count in self.counts.items():
                self.ledger.remove(self.tier, purpose, count)
        self.counts.clear()
        self.used = 0

    def check_integrity(self) -> None:
        total = sum(self.counts.values())
        assert total == self.used <= self.num_bytes, f"{self.tier} arena: purposes add up to {total}, used {self.used}, size {self.num_bytes}"
        if self.ledger is not None:
            counted = self.ledger.by_purpose(self.tier)
            for purpose, count in self.counts.items():
                assert counted.get(purpose, 0) >= count, f"{self.tier} {purpose}: arena holds {count}, ledger counts {counted.get(purpose, 0)}"


class GpuArena:
    """Offsets inside one GPU's one allocation of ``num_bytes``; the device itself holds the memory. With a ledger, every `alloc` is counted there."""

    def __init__(self, num_bytes: int, *, ledger: Ledger | None = None) -> None:
        self.num_bytes = num_bytes
        self._bump = _Bump(tier="gpu", num_bytes=num_bytes, ledger=ledger)

    @property
    def used(self) -> int:
        return self._bump.used

    def alloc(self, num_bytes: int, purpose: Purpose, align: int = 256) -> int:
        """The offset of ``num_bytes`` fresh bytes. LimitError when the arena (or the ledger's limit) is too small."""
        return self._bump.alloc(num_bytes, purpose, align)

    def by_purpose(self) -> dict[Purpose, int]:
        return dict(self._bump.counts)

    def close(self) -> None:
        """Take all counts back from the ledger."""
        self._bump.release()

    def check_integrity(self) -> None:
        self._bump.check_integrity()


class HostArena:
    """One mapping of host memory that all pilots of one engine see: control block, event slots, then whatever is allocated, in that order.

    Pages are touched lazily: the mapping costs address space only until written. ``shared`` backs it with an unlinked file in memory, whose ``fd`` a
    device's process maps too (`attach`); otherwise the memory is this process's own and ``fd`` is -1. Fresh bytes are zero. ``nodes``: the NUMA nodes
    over which its pages are interleaved (none: the kernel's choice).
    """

    def __init__(
        self, num_bytes: int, shared: bool = True, *, num_events: int = 1024, ledger: Ledger | None = None, nodes: Sequence[int] = ()
    ) -> None:  # fmt: skip
        reserved = EVENTS_OFFSET + EVENT_BYTES * num_events
        if num_bytes < reserved:
            raise LimitError(
                f"host arena of {num_bytes} bytes cannot hold its control block and {num_events} events; raise --host-memory to at least {reserved} bytes"
            )
        self.num_events = num_events
        self.fd = _memory_file(num_bytes) if shared else -1
        self._bump = _Bump(tier="host", num_bytes=num_bytes, ledger=ledger)
        try:
            self._map(num_bytes)
            interleave(self.base, num_bytes, nodes)
            self._bump.alloc(reserved, "programs", 64)
        except BaseException:
            self.close()
            raise
        self._control["abi"] = ABI_VERSION

    @classmethod
    def attach(cls, fd: int, num_bytes: int, *, num_events: int) -> HostArena:
        """Another process's arena by its inherited ``fd`` (owned from now on). Such a view allocates nothing: it counts as full."""
        arena = cls.__new__(cls)
        arena.num_events, arena.fd = num_events, fd
        arena._bump = _Bump(tier="host", num_bytes=num_bytes, ledger=None, used=num_bytes, counts={"programs": num_bytes})
        arena._map(num_bytes)
        if arena._mmap is not None and os.fstat(fd).st_blocks * 512 >= num_bytes:  # all of it is there: map it at once
            _populate(arena._mmap, MADV_POPULATE_READ)
        if int(arena._control["abi"]) != ABI_VERSION:
            raise ValueError(f"host arena has ABI {int(arena._control['abi'])}, this version speaks {ABI_VERSION}")
        return arena

    def renew(self, ledger: Ledger | None) -> None:
        """Begin anew in the same memory: nothing is allocated but the control block and the events, and those are zero; all else holds what it held.
        For engines that follow one another over the same weights. LimitError when the ledger's limit is too small."""
        self._bump.release()
        self._bump.ledger = ledger
        reserved = EVENTS_OFFSET + EVENT_BYTES * self.num_events
        self._bump.alloc(reserved, "programs", 64)
        self.bytes[:reserved] = 0
        self._control["abi"] = ABI_VERSION

    def populate(self) -> None:
        """Take all pages now, so that no pass pays for first touches. Large arenas are left as they are."""
        if self._mmap is not None and self.num_bytes <= POPULATE_MOST_BYTES:
            _populate(self._mmap, MADV_POPULATE_WRITE)

    def _map(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._mmap: mmap.mmap | None = mmap.mmap(self.fd, num_bytes, flags=mmap.MAP_SHARED if self.fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advise_huge_pages(self._mmap)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mmap, dtype=np.uint8)
        self.base: int = self.bytes.ctypes.data
        self._control: NDArray[Any] = self.bytes[: CONTROL.itemsize].view(CONTROL)[0]
        self.events: NDArray[np.uint32] = self.view(EVENTS_OFFSET, np.uint32, (self.num_events,))
        self.abort_word: NDArray[np.uint32] = self.view(_control_offset("abort"), np.uint32, (1,))

    @property
    def used(self) -> int:
        return self._bump.used

    @property
    def closed(self) -> bool:
        return self._mmap is None

    def alloc(self, num_bytes: int, purpose: Purpose, align: int = 64) -> int:
        """The offset of ``num_bytes`` fresh zero bytes. LimitError when the arena (or the ledger's limit) is too small."""
        return self._bump.alloc(num_bytes, purpose, align)

    def view(self, offset: int, dtype: DTypeLike, shape: int | tuple[int, ...]) -> NDArray[Any]:
        """An array over the arena's bytes, no copy. Keep no view beyond `close`: it would read zeros."""
        dims = (shape,) if isinstance(shape, int) else shape
        if offset < 0 or offset + int(np.prod(dims, dtype=np.int64)) * np.dtype(dtype).itemsize > self.num_bytes:
            raise ValueError(f"view of {dims} {np.dtype(dtype)} at {offset} leaves the host arena of {self.num_bytes} bytes")
        return np.ndarray(dims, dtype, buffer=self.bytes, offset=offset)

    def set_abort(self) -> None:
        """Make every wait of every pilot return with an error. There is no way back: the arena's engine is lost."""
        self.abort_word[0] = 1

    def set_polled(self, polled: bool) -> None:
        """Whether a device writes event words without waking who sleeps on them: waits then poll."""
        self._control["polled"] = int(polled)

    @property
    def aborted(self) -> bool:
        return not self.closed and bool(self.abort_word[0])

    def by_purpose(self) -> dict[Purpose, int]:
        return dict(self._bump.counts)

    def check_integrity(self) -> None:
        self._bump.check_integrity()

    def close(self) -> None:
        """Give the memory back, even if somebody still holds a view. Safe to repeat."""
        mapping: mmap.mmap | None = getattr(self, "_mmap", None)
        self._mmap = None
        if mapping is not None:
            for name in ("bytes", "_control", "events", "abort_word"):
                self.__dict__.pop(name, None)
            _release_pages(mapping, shared=self.fd >= 0)
            with contextlib.suppress(BufferError):  # a view is still held: its address range goes with it, the pages are gone already
                mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._bump.release()


def _control_offset(name: str) -> int:
    assert CONTROL.fields is not None
    return int(CONTROL.fields[name][1])


def _memory_file(num_bytes: int) -> int:
    """A file descriptor of ``num_bytes`` of memory without a name; a file in /dev/shm or the temporary directory where memfd is missing."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("twinpilots", os.MFD_CLOEXEC)
    else:
        directory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        fd, path = tempfile.mkstemp(prefix="twinpilots-", dir=directory)
        os.unlink(path)
    os.ftruncate(fd, num_bytes)
    return fd


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for 2 MiB pages: fewer TLB misses when gigabytes of weights are read once per pass. Advice only: a kernel without them ignores it."""
    if hasattr(mmap, "MADV_HUGEPAGE") and len(mapping) >= HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)


def _populate(mapping: mmap.mmap, advice: int) -> None:
    """Take or map all pages now. Where the kernel cannot (before 5.14), they come one fault at a time, in the first passes."""
    with contextlib.suppress(OSError):
        mapping.madvise(advice)


def _release_pages(mapping: mmap.mmap, *, shared: bool) -> None:
    """Free the pages now: a forgotten view must not keep gigabytes. (Python's mmap keeps its own duplicate of the fd until the last view dies.)"""
    advice = getattr(mmap, "MADV_REMOVE" if shared else "MADV_DONTNEED", None)
    if advice is not None:
        with contextlib.suppress(OSError):  # a file system without hole punching: the pages go with the last view
            mapping.madvise(advice)


def host_memory_available_bytes(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may still take: the kernel's MemAvailable, and what every cgroup (v1 or v2) above it leaves.

    ``root`` replaces "/" in tests. Page cache that the kernel can drop (inactive_file) counts as available in a cgroup, as it does in MemAvailable.
    """
    rooms = [_cgroup_room(group) for group in cgroup_directories("memory", root)]
    return max(0, min([_mem_available(root), *(room for room in rooms if room is not None)]))


def _mem_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemAvailable in /proc/meminfo")


def cgroup_directories(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The cgroup (v1: of ``controller``) of this process and all above it. In a container the path of /proc/self/cgroup may not exist below the mount
    point; then the mount's root is the container's own group, and the walk ends there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        while True:
            yield group
            if group == mount or mount not in group.parents:
                break
            group = group.parent


def _cgroup_room(group: Path) -> int | None:
    """Bytes left below one cgroup's limit; None when it has none."""
    unified = (group / "memory.max").exists()
    limit, usage = ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        text = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if text == "max":
        return None
    return int(text) - used + int(stat.get("inactive_file", 0))
