"""Runs of instructions that are launched at one stroke: which they are, when they may be, and how their times are told apart.

Owns the cutting of programs into parts and the memory of captured ones (`Replays`). A part is captured when it has run once before with the same
instructions, the same rows and the same class of contexts, and every one of its instructions went to a kernel of the device's own: then all that such a launch
depends on is fixed, for weights, buffers and metadata lie at fixed addresses, and what changes from pass to pass is read from the metadata on the device. How
to capture is a `Graphs` (device/cuda.py), so that all of this is tested without a GPU. Knows nothing of streams, waits or what an instruction does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels.abi import Op
from twinpilots.runtime.machine import Insn, Machine, launched_kv
from twinpilots.units import format_bytes

_LOG = logging.getLogger(__name__)
MOST_GRAPHS = 2048  # then all are forgotten and made anew
MOST_PROGRAMS = 32

Times = NDArray[np.int64]  # [instructions][3]: wait began, work began, work ended (ns)
Replay = Callable[[], object]


class Graphs(Protocol):
    """How one queue's launches are captured."""

    taken_bytes: int  # of the card, as of the last `room`

    def room(self) -> bool:
        """Whether another capture keeps to what was set aside on the card for them."""
        ...

    def capture(self, launch: Callable[[], bool]) -> Replay | None:
        """What launches again all that ``launch`` launches, which does not run now. None when it cannot be captured, or ``launch`` says False."""
        ...


@dataclass(frozen=True, eq=False)
class Code:
    """A program as this queue runs it: decoded, and cut into parts of which only the first instruction waits and only the last one records."""

    insns: list[Insn]
    parts: tuple[range, ...]
    unknown: frozenset[int]  # instructions that no interpreter runs


def cut(insns: Sequence[Insn]) -> tuple[range, ...]:
    """The longest such parts, in order; together they are the program."""
    edges = [0]
    for index, insn in enumerate(insns):
        if index > edges[-1] and insn.num_waits:
            edges.append(index)
        if insn.record >= 0:
            edges.append(index + 1)
    if edges[-1] != len(insns):
        edges.append(len(insns))
    return tuple(range(first, last) for first, last in zip(edges, edges[1:], strict=False) if first < last)


@dataclass(eq=False)
class _Known:
    """One part under one key: seen once, or captured. ``shares``: of its instructions in its time."""

    replay: Replay | None = None
    shares: NDArray[np.float64] | None = None


@dataclass(eq=False)
class Replays:
    """What one queue knows of its parts. ``graphs`` None: nothing is captured, ever (any more)."""

    graphs: Graphs | None
    # instructions "launched" one by one, "replayed"; parts "captured", the "graph_bytes" that they take; "host_ns" spent on all that
    counts: Counter[str] = field(default_factory=Counter)
    _full: bool = False  # no room for another capture: what is captured stays, all else is launched one by one
    _codes: dict[bytes, Code] = field(default_factory=dict)
    _known: dict[Hashable, _Known] = field(default_factory=dict)
    _learning: list[tuple[_Known, Times]] = field(default_factory=list)
    _untold: list[tuple[_Known, Times]] = field(default_factory=list)

    def code(self, raw: bytes, decode: Callable[[], list[Insn]], is_known: Callable[[Insn], bool]) -> Code:
        """By content: an address may hold another program after a change of plan. Where nothing is captured, every instruction is a part."""
        found = self._codes.get(raw)
        if found is None:
            if len(self._codes) >= MOST_PROGRAMS:
                self._codes.clear()
                self._forget_captured()
            insns = decode()
            parts = cut(insns) if self.graphs is not None else tuple(range(index, index + 1) for index in range(len(insns)))
            found = self._codes[raw] = Code(insns, parts, frozenset(index for index, insn in enumerate(insns) if not is_known(insn)))
        return found

    def run(
        self, machine: Machine, code: Code, part: range, times: Times | None, launch: Callable[[int], bool], timed: Callable[[int], bool]
    ) -> bool:  # fmt: skip
        """Run a part: ``launch(index)`` is an instruction of it (whether a kernel of the device's own took it), ``timed`` the same with its times. False
        when the part was replayed: then the caller sees to when it ended, and `tell` makes up the times between."""
        began_ns = time.perf_counter_ns()
        launched = self._run(machine, code, part, times, launch, timed)
        self.counts["host_ns"] += time.perf_counter_ns() - began_ns
        return launched

    def _run(
        self, machine: Machine, code: Code, part: range, times: Times | None, launch: Callable[[int], bool], timed: Callable[[int], bool]
    ) -> bool:  # fmt: skip
        known = self._find(machine, code, part)
        if known is not None and known.replay is None and known.shares is not None and self._has_room():
            known.replay = self._captured(part, launch)
        if known is not None and known.replay is not None:
            known.replay()
            self.counts["replayed"] += len(part)
            if times is not None:
                self._untold.append((known, times))
            return False
        taken = [timed(index) for index in part]
        self.counts["launched"] += len(part)
        if known is None and all(taken) and self._may_capture(machine):
            self._remember(machine, code, part, times)
        return True

    def _may_capture(self, machine: Machine) -> bool:
        return self.graphs is not None and machine.has_metadata

    def _find(self, machine: Machine, code: Code, part: range) -> _Known | None:
        return self._known.get(_key(machine, code, part)) if self._may_capture(machine) else None

    def _remember(self, machine: Machine, code: Code, part: range, times: Times | None) -> None:
        if len(self._known) >= MOST_GRAPHS:
            self._forget_captured()
        known = self._known[_key(machine, code, part)] = _Known()
        if times is None:
            known.shares = np.full(len(part), 1.0 / len(part))
        else:
            self._learning.append((known, times))

    def _has_room(self) -> bool:
        """Asked once more only after all were forgotten, whose memory is free again."""
        assert self.graphs is not None
        if not self._full:
            self._full = not self.graphs.room()
            if self.graphs.taken_bytes:
                self.counts["graph_bytes"] = self.graphs.taken_bytes
            if self._full:
                _LOG.warning(
                    "captured launches take %s of the card, all that was set aside; others are launched one by one", format_bytes(self.graphs.taken_bytes)
                )
        return not self._full

    def _forget_captured(self) -> None:
        self._known.clear()
        self._full = False

    def _captured(self, part: range, launch: Callable[[int], bool]) -> Replay | None:
        assert self.graphs is not None
        replay = self.graphs.capture(lambda: all(launch(index) for index in part))
        if replay is None:
            _LOG.warning("launches cannot be captured in graphs here; every instruction is launched by itself from now on, more slowly")
            self.graphs = None
            self._known.clear()
            return None
        self.counts["captured"] += 1
        return replay

    def tell(self) -> None:
        """The pass is over and its times are known: learn the shares of what was launched one by one, and deal out the time of what was replayed."""
        for known, times in self._learning:
            seconds = np.maximum(times[:, 2] - times[:, 1], 1)
            known.shares = seconds / seconds.sum()
        for known, times in self._untold:
            assert known.shares is not None
            began, ended = int(times[0, 1]), int(times[-1, 2])
            edges = began + np.rint(np.cumsum(known.shares) * (ended - began)).astype(np.int64)
            times[:-1, 2] = times[1:, 1] = times[1:, 0] = edges[:-1]
        self._learning.clear()
        self._untold.clear()

    def forget(self) -> None:
        """The pass broke off: its times say nothing."""
        for known, times in self._learning:
            known.shares = np.full(len(times), 1.0 / len(times))
        self._learning.clear()
        self._untold.clear()


def _key(machine: Machine, code: Code, part: range) -> Hashable:
    """All that launches of the part depend on beside addresses: rows and offsets of the pass, where its metadata lies, and the contexts' class."""
    attends = tuple(launched_kv(machine, insn) for insn in code.insns[part.start : part.stop] if insn.op == Op.ATTEND)
    return id(code), part.start, machine.batch.shape, attends
