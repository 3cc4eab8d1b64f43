"""The reference way to run a pass: every task of both pilots and the link, one after another in the schedule's serial order, in one thread.

Owns the in-process GPU stand-in and the order; the instructions are those that the pipelined executor runs. Knows nothing of waits: there are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.base import QueueName
from twinpilots.device.memory import HostArena
from twinpilots.errors import LimitError
from twinpilots.kernels.abi import INSN, Space, address
from twinpilots.kernels.native import Native

if TYPE_CHECKING:
    from twinpilots.runtime.executor import Executor, Placed


class SerialGpu:
    """GPU memory as plain memory of this process, and the runner of whole passes on it (`Executor`'s ``gpu`` and ``runner`` at once).

    ``native`` None: torch runs the instructions.
    """

    name = "serial"
    emulated = True
    overhead_bytes = 0

    def __init__(self, memory_bytes: int, native: Native | None = None) -> None:
        self.memory_bytes, self._native = memory_bytes, native

    def open(self, host: HostArena, num_bytes: int) -> None:
        """Take the arena. LimitError when it is larger than the memory."""
        from twinpilots.runtime.interpreter import SerialRunner  # brings torch, which nothing else here needs

        if num_bytes > self.memory_bytes:
            raise LimitError(f"the serial device has {self.memory_bytes} bytes of memory, {num_bytes} asked for; lower --gpu-memory")
        self._runner = SerialRunner(host, num_bytes, self._native)

    def write(self, offset: int, data: NDArray[Any]) -> None:
        self._runner.gpu[offset : offset + data.nbytes] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        return self._runner.gpu[offset : offset + num_bytes].copy()

    def run_pass(self, executor: Executor, placed: Placed, pass_id: int) -> None:  # noqa: ARG002  no events to record
        """All instructions of the pass in serial order."""
        queues = {queue: iter(executor.host.view(start, INSN, len(placed.program.queues[queue]))) for queue, start in placed.insns.items()}
        insns = np.array([next(queues[task.queue]) for task in placed.program.schedule.tasks], INSN)
        self._runner.run(insns, address(Space.HOST, executor.meta_offset))

    def run_insns(self, executor: Executor, insns: NDArray[Any]) -> None:
        """Instructions beside those of a pass."""
        self._runner.run(insns, address(Space.HOST, executor.meta_offset))

    def submit(self, queue: QueueName, entry: np.void | NDArray[Any]) -> None:  # noqa: ARG002  the seam's signature
        raise AssertionError("a serial device has no queues: give it to the executor as its runner, too")

    def cancel(self, queue: QueueName, pass_id: int) -> None:
        """Nothing ever runs ahead."""

    def wait(self, queue: QueueName, timeout_s: float) -> None:
        """A pass is over when `run_pass` returns."""

    def close(self) -> None:
        """The memory goes with the object."""
