"""The link and the ring as a played pass sees them, over several passes and for many ways to split the ops at once.

Owns `PlayedLink`: when streamed rows and staged KV are there, and how much slower devices work beside copies and beside each other, taken from what each was
doing in the pass before. Times are from the begin of the pass. Knows nothing of tasks and their order (`lower_bound.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import OpSpec
from twinpilots.plan.grid import Bools, Floats
from twinpilots.plan.packets import ALIGN_BYTES
from twinpilots.plan.schedule import OTHER
from twinpilots.plan.tasks import Device


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Rows in the ring: from byte ``lo`` to ``hi``, there at ``arrived``, in use until ``end``."""

    key: Hashable
    lo: Floats
    hi: Floats
    arrived: Floats
    end: Floats


class PlayedLink:
    """One for all passes of a phase under one load."""

    def __init__(self, profile: HardwareProfile, ring_bytes: Floats, packet_bytes: Floats, *, driver_s: float, interleaved: bool) -> None:
        assert profile.gpu is not None and profile.link is not None
        self.profile, self.ring_bytes, self.packet_bytes, self.link = profile, ring_bytes, packet_bytes, profile.link
        self.copy_slowdown = {"cpu": profile.cpu.copy_slowdown, "gpu": profile.gpu.copy_slowdown}
        self.peer_slowdown = {"cpu": profile.cpu.peer_slowdown, "gpu": profile.gpu.peer_slowdown}
        self.driver_s = driver_s  # between two passes
        self.interleaved = interleaved  # micro-batches: a device works on one while the other works on another
        self.zero = np.zeros(len(ring_bytes))
        self.free, self.place, self.busy_s = self.zero, self.zero, self.zero
        self.old: list[_Entry] = []  # of the pass before
        self.entries: dict[Hashable, _Entry] = {}
        self.slots: dict[int, Floats] = {}
        self.began: Floats | None = None  # when the first of the pass's loads did
        # The link is at work until it has ``loaded`` all of a pass, and again when it ``loads_on`` for the next; in between it rests.
        self.loaded, self.loads_on, self.density = self.zero, self.zero + np.inf, self.zero
        self.busy: dict[Device, Floats] = {"cpu": self.zero, "gpu": self.zero}
        reads = {"cpu": profile.cpu.read_bytes_per_s, "gpu": profile.gpu.read_bytes_per_s}
        self.share = {device: rate / sum(reads.values()) for device, rate in reads.items()}

    def fetched(self, key: Hashable, op: OpSpec, rows: Floats) -> Floats:
        """When streamed rows are there; the first to ask has them loaded."""
        if key not in self.entries:
            num_bytes = rows * op.row_bytes
            packets = np.ceil(rows / (np.maximum(1.0, self.packet_bytes // (op.unit_rows * op.row_bytes)) * op.unit_rows))
            size = np.ceil(num_bytes / ALIGN_BYTES) * ALIGN_BYTES
            lo = np.where(self.place + size <= self.ring_bytes, self.place, 0.0)
            start = self.free
            for entry in (*self.old, *self.entries.values()):
                start = np.maximum(start, np.where((entry.lo < lo + size) & (lo < entry.hi), entry.end + self.link.queue_handoff_s, -np.inf))
            seconds = packets * self.link.packet_s + num_bytes / self.link.up_bytes_per_s
            there = rows > 0
            self.began = np.where(there & (self.busy_s == 0), start, self.zero if self.began is None else self.began)
            self.free = np.where(there, start + seconds, self.free)
            self.place = np.where(there, lo + size, self.place)
            self.busy_s = self.busy_s + np.where(there, seconds, 0.0)
            self.entries[key] = _Entry(key=key, lo=lo, hi=np.where(there, lo + size, lo), arrived=self.free + self.link.queue_handoff_s, end=self.free)
        return self.entries[key].arrived

    def used(self, key: Hashable, end: Floats) -> None:
        self.entries[key] = replace(self.entries[key], end=end)

    def fetched_kv(self, slot: int, num_bytes: int) -> Floats:
        start = np.maximum(np.maximum(self.free, self.driver_s), self.slots.get(slot, self.zero))
        seconds = self.link.packet_s + self.link.load_kv_s + num_bytes / self.link.up_bytes_per_s
        self.free, self.busy_s = start + seconds, self.busy_s + seconds
        return self.free + self.link.queue_handoff_s

    def used_kv(self, slot: int, end: Floats) -> None:
        self.slots[slot] = end

    def slowed(self, device: Device, start: Floats, seconds: Floats | float) -> Floats | float:
        """What a task of so many seconds takes beside the link's work, about."""
        slowdown = self.copy_slowdown[device]
        if slowdown == 1.0:
            return seconds
        beside: Floats = np.maximum(0.0, np.minimum(self.loaded, start + seconds) - start) + np.maximum(0.0, start + seconds - np.maximum(self.loads_on, start))
        slowed: Floats = seconds + (slowdown - 1.0) * np.minimum(seconds, beside) * self.density
        return slowed

    def peer_drag(self, device: Device, fracs: Mapping[Device, float], beside: Floats | float) -> Floats | float:
        """How much slower beside the other device is what keeps memory busy for these parts of its time; ``beside``: of that time, the part in which the
        other works on the same op, at least."""
        traffic = sum(self.share[each] * frac for each, frac in fracs.items())
        drag = max(1.0, fracs[device] * self.peer_slowdown[device] * traffic) - 1.0
        if drag == 0.0:
            return 1.0
        shared: Floats = np.maximum(beside, self.busy[OTHER[device]] if self.interleaved else 0.0)
        dragged: Floats = 1.0 + drag * shared
        return dragged

    def crowded(self, keys: Sequence[Hashable]) -> Bools:
        """Where these rows are not in the ring all at once."""
        found: Bools = self.zero != 0
        entries = [self.entries[key] for key in keys if key in self.entries]
        for i, one in enumerate(entries):
            for two in entries[:i]:
                found = found | ((one.lo < two.hi) & (two.lo < one.hi))
        return found

    def saved(self) -> Any:
        return self.free, self.place, self.busy_s, dict(self.entries)

    def restore(self, saved: Any) -> None:
        self.free, self.place, self.busy_s = saved[:3]
        self.entries = dict(saved[3])

    def keep(self, where: Bools, other: Any) -> None:
        """What is now stays ``where``; elsewhere what was saved."""
        free, place, busy_s, entries = other
        self.free, self.place = np.where(where, self.free, free), np.where(where, self.place, place)
        self.busy_s = np.where(where, self.busy_s, busy_s)
        self.entries = {
            key: _Entry(
                key=key, lo=np.where(where, mine.lo, entries[key].lo), hi=np.where(where, mine.hi, entries[key].hi),
                arrived=np.where(where, mine.arrived, entries[key].arrived), end=np.where(where, mine.end, entries[key].end),
            )
            for key, mine in self.entries.items()
        }  # fmt: skip

    def end_pass(self, seconds: Floats, busy_s: Mapping[Device, Floats]) -> None:
        """The next pass's times are from its own begin."""
        self.busy = {device: np.minimum(1.0, each / seconds) for device, each in busy_s.items()}
        began = self.zero if self.began is None else self.began
        self.loaded, self.loads_on = self.free, np.where(self.busy_s > 0, began + seconds, np.inf)
        self.density = np.minimum(1.0, self.busy_s / np.maximum(self.free - began, 1e-12))
        self.began = None
        self.old = [replace(entry, arrived=entry.arrived - seconds, end=entry.end - seconds) for entry in self.entries.values()]
        self.free = self.free - seconds
        self.place, self.busy_s, self.entries = self.zero, self.zero, {}
        self.slots = {}
