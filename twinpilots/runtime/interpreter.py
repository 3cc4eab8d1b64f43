"""Runs programs with torch: waits, events, mailboxes. The twin of tp_run and tp_queue_loop, and the loop of every CUDA stream.

Owns `run_program` (one entry), `queue_loop` (one mailbox) and `SerialRunner` (the reference: one pass in its serial order on one thread). How to wait
and record is a `Sync`, so that streams (device/cuda.py) and host events run through the same loop. What an instruction does is in `torch_ops.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinpilots.device.base import ENTRY_QUIT, OK
from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import CONTROL, ENTRY, EVENTS_OFFSET, INSN, MAILBOX, MAILBOX_ENTRIES, MAX_WAITS, NULL
from twinpilots.kernels.native import ABORTED, BAD_INSTRUCTION, CANCELLED, TIMED_OUT, Native
from twinpilots.runtime.graphs import Code, Replays
from twinpilots.runtime.machine import Insn, Machine
from twinpilots.runtime.torch_ops import Kernels, execute, is_known, link_bytes

POLL_S = 50e-6
WAIT_TIMEOUT_S = 120.0
KERNEL_LAUNCHES, TORCH_LAUNCHES = 8, 32  # what an instruction, or a replayed part, puts on a stream at most: kernels, marks and record; torch needs more


@dataclass(kw_only=True)
class LinkRates:
    """The emulated link, as native's LinkParams and LiveLink. Rates of 0: unthrottled. ``adversarial_seed`` other than 0: instructions start randomly late."""

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    adversarial_seed: int = 0

    def set_rates(self, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        self.up_bytes_per_s, self.down_bytes_per_s = up_bytes_per_s, down_bytes_per_s


class Sync(Protocol):
    """How a queue waits for events, records them and tells times. ``stopped`` gives the status to stop with, or OK."""

    def wait(self, event: int, value: int, stopped: Callable[[], int]) -> int:
        """Order what follows behind ``event`` reaching ``value``. OK, or the status to stop with."""
        ...

    def pace(self, launches: int, stopped: Callable[[], int]) -> None:
        """So many launches were made since the last call: hold the caller while they are too far ahead of what they wait for."""
        ...

    def record(self, event: int, value: int) -> None:
        """Let ``event`` reach ``value`` when all that this queue did so far is done."""
        ...

    def mark(self, times: NDArray[np.int64], which: int) -> None:
        """Write the present (of this queue) to ``times[which]``, at the latest in `drain`."""
        ...

    def drain(self, stopped: Callable[[], int]) -> int:
        """Return when all work of this queue is done: its entry is about to count as finished. OK, or why some of it did not wait for its events."""
        ...


def has_reached(word: int, value: int) -> bool:
    """Whether an event word (u32, wrapping) is at ``value`` or later."""
    return (word - value) % 2**32 < 2**31


class HostSync:
    """Events as words in the host arena, work that is done when the call returns: the CPU, and the emulated GPU."""

    def __init__(self, host: NDArray[np.uint8]) -> None:
        self._events = host[EVENTS_OFFSET : EVENTS_OFFSET + (host.size - EVENTS_OFFSET) // 4 * 4].view(np.uint32)

    def wait(self, event: int, value: int, stopped: Callable[[], int]) -> int:
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        while not has_reached(int(self._events[event]), value):
            status = stopped()
            if status != OK:
                return status
            if time.monotonic() > deadline:
                return TIMED_OUT
            time.sleep(POLL_S)
        return OK

    def pace(self, launches: int, stopped: Callable[[], int]) -> None:
        """Nothing is ever ahead of what is done."""

    def record(self, event: int, value: int) -> None:
        self._events[event] = value % 2**32

    def mark(self, times: NDArray[np.int64], which: int) -> None:
        times[which] = time.monotonic_ns()

    def drain(self, stopped: Callable[[], int]) -> int:  # noqa: ARG002  the protocol's
        """Nothing is ever under way between two calls."""
        return OK


class _Mailbox:
    """The queue's end of a mailbox."""

    def __init__(self, host: NDArray[np.uint8], offset: int) -> None:
        record = host[offset : offset + MAILBOX.itemsize].view(MAILBOX)
        self.head, self.tail, self.cancel_pass, self.status = (record[name] for name in ("head", "tail", "cancel_pass", "status"))
        self.entries = record["entries"][0]


class _Queue:
    """One interpreter's state: the machine, how it synchronises, what may stop it."""

    def __init__(
        self, machine: Machine, host: NDArray[np.uint8], sync: Sync, link: LinkRates | None, mailbox: _Mailbox | None, kernels: Kernels | None = None,
        replays: Replays | None = None,
    ) -> None:  # fmt: skip
        self._machine, self._host, self._sync, self._mailbox, self._kernels = machine, host, sync, mailbox, kernels
        self._replays = replays or Replays(None)
        self._link = link or LinkRates()
        self._random = random.Random(self._link.adversarial_seed)
        self._abort = host[: CONTROL.itemsize].view(CONTROL)["abort"]

    def stopped(self, pass_id: int) -> int:
        if self._abort[0]:
            return ABORTED
        return CANCELLED if self._mailbox is not None and pass_id <= self._mailbox.cancel_pass[0] else OK

    def run(self, entry: np.void | NDArray[Any]) -> int:
        """One entry to its end; its status as tp_run's."""
        with torch.inference_mode():  # all of it: a tensor made inside must not be written outside
            return self._run(entry)

    def _run(self, entry: np.void | NDArray[Any]) -> int:
        pass_id, trace = int(entry["pass_id"]), int(entry["trace"])
        code = self._code(int(entry["insns"]), int(entry["count"]))
        self._machine.begin(int(entry["meta"]))
        times = None if trace == NULL else self._host[trace : trace + 24 * len(code.insns)].view(np.int64).reshape(-1, 3)
        status = OK
        for part in code.parts:
            status = self._run_part(code, part, pass_id, int(entry["first_pass"]), times)
            if status != OK:
                break
        broken = status
        ended = self._sync.drain(lambda: self.stopped(pass_id) if broken == OK else broken)
        status = ended if status == OK else status
        if status == OK:
            self._replays.tell()
        else:
            self._replays.forget()
        return status

    def _code(self, address: int, count: int) -> Code:
        raw = self._host[address : address + count * INSN.itemsize].tobytes()
        return self._replays.code(raw, lambda: self._machine.insns(address, count), lambda insn: is_known(insn) and 0 <= insn.num_waits <= MAX_WAITS)

    def _run_part(self, code: Code, part: range, pass_id: int, first_pass: int, times: NDArray[np.int64] | None) -> int:
        """Instructions of which only the first waits and only the last records."""
        status = self.stopped(pass_id)
        if status == OK and not code.unknown.isdisjoint(part):
            status = BAD_INSTRUCTION
        if status == OK:
            status = self._wait(code.insns[part.start], pass_id, first_pass, None if times is None else times[part.start])
        if status != OK:
            return status

        def launch(index: int) -> bool:
            return self._execute(code.insns[index])

        launches = KERNEL_LAUNCHES  # by the last instruction, or the replay

        def timed(index: int) -> bool:
            nonlocal launches
            if index > part.start:
                self._sync.pace(launches, lambda: self.stopped(pass_id))
                if times is not None:
                    self._sync.mark(times[index], 0)
                    self._sync.mark(times[index], 1)
            taken = launch(index)
            launches = KERNEL_LAUNCHES if taken else TORCH_LAUNCHES
            if times is not None:
                self._sync.mark(times[index], 2)
            return taken

        each = None if times is None else times[part.start : part.stop]
        if not self._replays.run(self._machine, code, part, each, launch, timed) and each is not None:
            self._sync.mark(each[-1], 2)
        self._sync.pace(launches, lambda: self.stopped(pass_id))  # here, not in `timed`: to be held is no part of what launching takes
        record = code.insns[part.stop - 1].record
        if record >= 0:
            self._sync.record(record, pass_id)
        return OK

    def _wait(self, insn: Insn, pass_id: int, first_pass: int, times: NDArray[np.int64] | None) -> int:
        """Until the instruction may begin; marks the wait."""
        if times is not None:
            self._sync.mark(times, 0)
        for event, offset in zip(insn.wait_event[: insn.num_waits], insn.wait_offset, strict=False):
            if offset < 0 and pass_id == first_pass:
                continue
            status = self._sync.wait(event, pass_id + offset, lambda: self.stopped(pass_id))
            if status != OK:
                return status
        if self._link.adversarial_seed and self._random.random() < 0.5:
            time.sleep(self._random.random() * self._random.choice((1e-4, 2e-3)))
        if times is not None:
            self._sync.mark(times, 1)
        return OK

    def _execute(self, insn: Insn) -> bool:
        """The instruction, and what is left of the time that its bytes take on the emulated link. Whether a kernel of the device's own took it."""
        began = time.monotonic()
        taken = execute(self._machine, insn, self._kernels)
        link = self._link
        if not (link.up_bytes_per_s or link.down_bytes_per_s or link.latency_s):
            return taken
        moved = link_bytes(self._machine, insn)
        if moved is not None:
            num_bytes, direction = moved
            rate = (link.up_bytes_per_s, link.down_bytes_per_s)[direction]
            left = began + link.latency_s + (num_bytes / rate if rate else 0.0) - time.monotonic()
            if left > 0:
                time.sleep(left)
        return taken

    def loop(self) -> int:
        """Serve the mailbox until abort (ABORTED) or an entry with the quit flag (OK)."""
        box = self._mailbox
        assert box is not None
        while True:
            while box.head[0] == box.tail[0]:
                if self._abort[0]:
                    return ABORTED
                time.sleep(POLL_S)
            entry = box.entries[int(box.head[0]) % MAILBOX_ENTRIES].copy()
            status = self.run(entry)
            if status < 0 and box.status[0] == OK:
                box.status[0] = status
            box.head[0] = (int(box.head[0]) + 1) % 2**32
            if status == ABORTED:
                return ABORTED
            if int(entry["flags"]) & ENTRY_QUIT:
                return OK


def run_program(
    entry: np.void | NDArray[Any], host: HostArena | NDArray[np.uint8], gpu: Tensor | NDArray[np.uint8] | None, *, sync: Sync | None = None,
    kernels: Kernels | None = None,
) -> int:  # fmt: skip
    """Run one entry on the calling thread. ``gpu`` is the GPU arena (uint8) on any device, None for a CPU program; ``kernels`` are asked before torch.

    Returns tp_run's status: OK, or ABORTED, TIMED_OUT, BAD_INSTRUCTION.
    """
    memory = host.bytes if isinstance(host, HostArena) else host
    machine = Machine(memory, torch.from_numpy(gpu) if isinstance(gpu, np.ndarray) else gpu)
    return _Queue(machine, memory, sync or HostSync(memory), None, None, kernels).run(entry)


def queue_loop(
    mailbox_offset: int, host: NDArray[np.uint8], gpu: Tensor, *, host_alias: Tensor | None = None, sync: Sync | None = None, link: LinkRates | None = None,
    kernels: Kernels | None = None, replays: Replays | None = None,
) -> int:  # fmt: skip
    """Serve one mailbox on the calling thread: tp_queue_loop's twin, by polling. ``replays``: what may be launched at one stroke, and what was."""
    return _Queue(Machine(host, gpu, host_alias), host, sync or HostSync(host), link, _Mailbox(host, mailbox_offset), kernels, replays).loop()


class SerialRunner:
    """The reference loop: instructions of all queues, one after another in the order given, waits ignored, events not recorded.

    The GPU arena is plain memory of this process. With ``native`` the native interpreter runs each instruction, else torch.
    """

    def __init__(self, host: HostArena, gpu_bytes: int, native: Native | None = None) -> None:
        self._host, self._native = host, native
        self.gpu: NDArray[np.uint8] = np.zeros(gpu_bytes, dtype=np.uint8)
        self._machine = Machine(host.bytes, torch.from_numpy(self.gpu))
        self._scratch = host.alloc(INSN.itemsize, "programs")

    def run(self, insns: NDArray[Any], meta: int) -> None:
        """Run ``insns`` (INSN records in serial order) on the batch whose metadata lies at host address ``meta``. ValueError for a bad one."""
        slot = self._host.view(self._scratch, INSN, (1,))
        entry = np.zeros((), ENTRY)
        entry["insns"], entry["count"], entry["meta"], entry["trace"], entry["pass_id"] = self._scratch, 1, meta, NULL, 1
        for number in range(len(insns)):
            slot[0] = insns[number]
            slot["num_waits"], slot["record"] = 0, -1
            if self._native is not None:
                status = self._native.run(self._host.base, self.gpu.ctypes.data, entry)
            else:
                status = _Queue(self._machine, self._host.bytes, HostSync(self._host.bytes), None, None).run(entry)
            if status != OK:
                raise ValueError(f"instruction {number} (op {int(insns[number]['op'])}) ended with status {status}")
