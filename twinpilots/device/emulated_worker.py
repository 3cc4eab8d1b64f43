"""The emulated GPU's process: ``python -m twinpilots.device.emulated_worker OPTIONS`` (JSON), started by `emulated.EmulatedGpu` only.

Owns the GPU arena and three queue threads on one core, and answers the pipe on stdin and stdout. Knows nothing of plans or models. With the native
module it imports no torch; without it, the torch interpreter runs the queues.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.base import OK, QUEUE_NAMES, QueueName
from twinpilots.device.emulated import EmulatedPreset, Pipe
from twinpilots.device.memory import HostArena, advise_huge_pages
from twinpilots.kernels import native as native_module
from twinpilots.kernels.abi import CONTROL

if TYPE_CHECKING:
    from twinpilots.runtime.interpreter import LinkRates

PR_SET_PDEATHSIG = 1
NAN_BYTE = 0xFF


class Worker:
    """One emulated GPU: its memory, its queues."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.preset = EmulatedPreset(**options["preset"])
        self.adversarial_seed = int(options["adversarial_seed"])
        self.native = native_module.load() if options["native"] else None  # as the driver does: one of them on futexes, one polling would be slow
        num_bytes = int(options["num_bytes"])
        assert num_bytes <= self.preset.memory_bytes, "the driver checks the limit before it starts us"
        if options["core"] is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {options["core"]})  # before any thread starts: they inherit it
        self.host = HostArena.attach(options["host_fd"], options["host_bytes"], num_events=options["host_events"])
        self._memory = mmap.mmap(-1, max(num_bytes, 1))
        advise_huge_pages(self._memory)
        self._links: list[native_module.LiveLink | LinkRates] = []  # of the queues
        self.gpu: NDArray[np.uint8] = np.frombuffer(self._memory, dtype=np.uint8, count=num_bytes)
        self.gpu[:] = NAN_BYTE if self.adversarial_seed else 0  # a GPU's memory is there from the start: no page faults in measured passes

    def start(self) -> None:
        """Start one thread per queue."""
        for number, queue in enumerate(QUEUE_NAMES):
            link = self._link(self.adversarial_seed * len(QUEUE_NAMES) + number if self.adversarial_seed else 0)
            self._links.append(link)
            threading.Thread(target=self._run_queue, args=(queue, link), name=queue, daemon=True).start()

    def _link(self, seed: int) -> native_module.LiveLink | LinkRates:
        if self.native is not None:
            return native_module.LiveLink(native_module.LinkParams(**self.preset.link_rates(), adversarial_seed=seed))
        from twinpilots.runtime.interpreter import LinkRates  # torch only without the native module: importing it takes seconds

        return LinkRates(**self.preset.link_rates(), adversarial_seed=seed)

    def _run_queue(self, queue: QueueName, link: native_module.LiveLink | LinkRates) -> None:
        assert CONTROL.fields is not None
        mailbox = int(CONTROL.fields[queue][1])
        try:
            if isinstance(link, native_module.LiveLink):
                assert self.native is not None
                status = self.native.queue_loop(self.host.base, self.gpu.ctypes.data, mailbox, link=link)  # no pool: this thread computes alone
            else:
                status = self._interpret(mailbox, link)
        except BaseException:
            self.host.set_abort()
            raise
        if status != OK and not self.host.aborted:
            self.host.set_abort()

    def _interpret(self, mailbox_offset: int, link: LinkRates) -> int:
        import torch

        from twinpilots.runtime.interpreter import queue_loop

        torch.set_num_threads(1)
        return queue_loop(mailbox_offset, self.host.bytes, torch.from_numpy(self.gpu), link=link)

    def handle(self, header: Mapping[str, Any], payload: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Serve one request; returns the answer's bytes."""
        do = header["do"]
        if do == "start":
            self.start()
        elif do == "link":
            for link in self._links:
                link.set_rates(header["up_bytes_per_s"], header["down_bytes_per_s"])
        elif do == "write":
            self.gpu[header["offset"] : header["offset"] + payload.nbytes] = payload
        elif do == "read":
            return self.gpu[header["offset"] : header["offset"] + header["num_bytes"]]
        else:
            raise ValueError(f"unknown request {do!r}")
        return None


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the driver dies, however it dies. End of file on the pipe says the same where there is no prctl."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def take_pipe() -> Pipe:
    """The driver's pipe. File descriptor 1 becomes stderr, so that a stray print cannot break the frames."""
    writer: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Pipe(sys.stdin.buffer, writer)


def serve(worker: Worker, pipe: Pipe) -> None:
    """Answer requests until "quit" or the end of the pipe."""
    while True:
        try:
            header, payload = pipe.receive()
        except EOFError:
            return
        if header["do"] == "quit":
            return
        try:
            data = worker.handle(header, payload)
        except (ValueError, TypeError, KeyError) as error:  # the driver raises it where the request was made
            pipe.send({"error": f"{type(error).__name__}: {error}"})
            continue
        pipe.send({}, data)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = json.loads(sys.argv[1])
    die_with_parent(options["parent"])
    pipe = take_pipe()
    serve(Worker(options), pipe)
    # The queue threads sleep in native code and own nothing outside this process: no need to wake them to end.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
