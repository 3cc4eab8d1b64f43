"""A CUDA GPU behind the device seam: one arena, three streams, one launch thread each.

Owns the arena, the pinning of the host arena in place, and the launch threads. Each runs the torch interpreter's queue loop on its stream, the compute queue's
with Triton kernels where they can be had; what an instruction does is not known here, how events cross between streams and the host is `cuda_sync`'s.
`Runtime` is the little of CUDA that is needed, so that all of this runs on a stand-in without a GPU (tests/cpu/test_cuda_standin.py).

- An entry counts as finished when its stream has run dry. Trace times are the stream's own (CUDA events), resolved then.
- Footprint on the card: the arena, the CUDA context with its libraries (`overhead_bytes`, measured), torch's temporaries, capped at TEMPORARY_BYTES by
  torch's own limit, and captured launches, of which no more are made once they take GRAPH_BYTES.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinpilots.device.base import ENTRY_QUIT, QUEUE_NAMES, Mailbox, QueueName
from twinpilots.device.cuda_graphs import GRAPH_BYTES, CudaGraphs, forget_error
from twinpilots.device.cuda_sync import Board, Event, HostView, StreamSync
from twinpilots.device.cuda_words import DriverWords, device_pointer, load_driver, probe
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceUnavailableError, LimitError
from twinpilots.kernels.abi import ENTRY, INSN, NULL
from twinpilots.kernels.triton import unavailable
from twinpilots.runtime.graphs import Graphs, Replays
from twinpilots.runtime.interpreter import WAIT_TIMEOUT_S, queue_loop
from twinpilots.runtime.torch_ops import Kernels
from twinpilots.units import format_bytes

_LOG = logging.getLogger(__name__)
TEMPORARY_BYTES = 768 * 2**20  # what the interpreter's intermediate results may take beside the arena
CONTEXT_GUESS_BYTES = 600 * 2**20  # a CUDA context with cuBLAS, where nvidia-smi is not there to measure it
REGISTER_FLAGS = 1 | 2  # cudaHostRegisterPortable | cudaHostRegisterMapped
ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered
ALL_PASSES = 2**31 - 1


class Runtime(Protocol):
    """What `CudaGpu` needs of CUDA."""

    def allocate(self, num_bytes: int) -> Tensor:
        """The arena: ``num_bytes`` of uint8 on the device."""
        ...

    def pin(self, host: HostArena) -> HostView:
        """Pin the host arena where it lies. Where it cannot be mapped, copies are slower and streams cannot wait for its words."""
        ...

    def release(self, host: HostArena) -> None:
        """Undo `pin`, and give cached memory back."""
        ...

    def stream(self) -> Any: ...
    def event(self, *, timed: bool) -> Event: ...
    def kernels(self) -> Kernels | None:
        """Kernels of the device's own for the compute queue; None: torch's operations do it all."""
        ...

    def graphs(self) -> Graphs | None:
        """How launches of the compute queue are captured; None: not at all."""
        ...

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Launches inside this block go to ``stream``."""
        ...


class CudaRuntime:
    """The real thing, on device ``index``."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self._pinned = False

    def allocate(self, num_bytes: int) -> Tensor:
        # Before the arena: torch must not take more than arena and temporaries, whatever an instruction asks for. What it holds already (the libraries'
        # workspaces, another engine's arena) stays allowed.
        torch.cuda.empty_cache()
        self._cap(torch.cuda.memory_reserved(self.device) + num_bytes + TEMPORARY_BYTES)
        arena = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        torch.cuda.synchronize(self.device)  # zeroed on this thread's stream, which the queues' streams do not wait for
        return arena

    def pin(self, host: HostArena) -> HostView:
        with torch.cuda.device(self.device):  # memory is registered with the current device, whose address the alias gets
            status = int(torch.cuda.cudart().cudaHostRegister(host.base, host.num_bytes, REGISTER_FLAGS))
            if status == ALREADY_REGISTERED:  # by who keeps the arena for several engines, and unpins it in the end
                forget_error(self.device)
            elif status != 0:
                forget_error(self.device)
                _LOG.warning("cannot pin %s of host memory (CUDA error %d): copies will be slow and block", format_bytes(host.num_bytes), status)
                return HostView(alias=None, words=None, reason="host memory is not pinned")
            else:
                self._pinned = True
            driver = load_driver()
            address = device_pointer(driver, host.base)
            if driver is None or address is None:
                _LOG.warning("pinned host memory cannot be mapped: activation copies will go through the copy engine, behind the weights")
                return HostView(alias=None, words=None, reason="host memory is not mapped")
            alias = torch.as_tensor(_CudaBytes(address, host.num_bytes), device=self.device)
            try:
                return HostView(alias=alias, words=DriverWords(driver, address), reason="")
            except AttributeError:
                return HostView(alias=alias, words=None, reason="the CUDA driver has no stream memory operations")

    def release(self, host: HostArena) -> None:
        try:
            if self._pinned:
                self._pinned = False
                torch.cuda.synchronize(self.device)
                torch.cuda.cudart().cudaHostUnregister(host.base)
            torch.cuda.empty_cache()
            self._cap(torch.cuda.get_device_properties(self.device).total_memory)
        except RuntimeError as error:  # after a CUDA error every call fails until the process ends; the error itself was reported by its queue
            _LOG.warning("%s could not be released in order: %s", self.device, str(error).splitlines()[0])

    def _cap(self, num_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.device)

    def stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def event(self, *, timed: bool) -> Event:
        return torch.cuda.Event(enable_timing=timed)

    def kernels(self) -> Kernels | None:
        reason = unavailable(self.device)
        if reason is not None:
            _LOG.warning("no Triton kernels on %s, torch's operations run instead, more slowly: %s", self.device, reason)
            return None
        from twinpilots.runtime.triton_ops import kernels_for

        return kernels_for(self.device)

    def graphs(self) -> Graphs | None:
        return CudaGraphs(self.device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)


class _CudaBytes:
    """Device-visible bytes for torch.as_tensor."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None}


class CudaGpu:
    """A `GpuDevice` on CUDA device ``index``. ``runtime`` replaces CUDA in tests.

    ``overhead_bytes`` is what this process takes on the card beside the arena; ``memory_bytes`` what an arena may take now. ``device_waits``, once opened:
    "yes" where the compute queue's stream waits for the CPU pilot by itself, else "no" and the reason, and its launch thread polls.
    """

    emulated = False

    def __init__(self, index: int = 0, runtime: Runtime | None = None) -> None:
        self.name = f"cuda:{index}"
        if runtime is None:
            self.memory_bytes, self.overhead_bytes = _measure_memory(index)
        else:
            self.memory_bytes, self.overhead_bytes = 2**30, 0
        self._runtime: Runtime = CudaRuntime(index) if runtime is None else runtime
        self._arena: Tensor | None = None
        self._host: HostArena | None = None
        self._threads: list[threading.Thread] = []
        self._failure: str | None = None
        self.launches: Counter[str] = Counter()  # of the compute queue, as `Replays.counts` and `StreamSync`'s
        self.device_waits = "no: not opened"

    def open(self, host: HostArena, num_bytes: int) -> None:
        if self._arena is not None:
            raise ValueError(f"{self.name} is open already")
        if num_bytes > self.memory_bytes:
            raise LimitError(
                f"{self.name} has {format_bytes(self.memory_bytes)} of memory free beside the CUDA context, {format_bytes(num_bytes)} asked for; "
                f"lower --gpu-memory to {self.memory_bytes + self.overhead_bytes} bytes or less"
            )
        try:
            self._arena = self._runtime.allocate(num_bytes)
        except torch.OutOfMemoryError as error:
            raise LimitError(f"{self.name} cannot allocate {format_bytes(num_bytes)}; lower --gpu-memory or end what else uses the card") from error
        self._host, self._failure = host, None
        view = self._proven(self._runtime.pin(host), host)
        self.device_waits = "yes" if view.words is not None else f"no: {view.reason}"
        host.set_polled(True)
        self._mailboxes = {queue: Mailbox(host, queue, None) for queue in QUEUE_NAMES}  # the launch threads poll: no futex to wake
        self._board = Board(host)
        for queue in QUEUE_NAMES:
            thread = threading.Thread(target=self._serve, args=(queue, host, view), name=f"{self.name} {queue}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _proven(self, view: HostView, host: HostArena) -> HostView:
        """The view, without words where streams do not wait for them as they should."""
        if view.words is None:
            return view
        stream = self._runtime.stream()
        with self._runtime.use(stream):
            self._runtime.event(timed=False).record(stream)  # makes the device's context this thread's
            reason = probe(view.words, stream, host)
        if reason is None:
            return view
        _LOG.warning("streams of %s cannot wait for the CPU, its launch thread polls instead, and passes with many hand-offs are slower: %s", self.name, reason)
        return replace(view, words=None, reason=reason)

    def _serve(self, queue: QueueName, host: HostArena, view: HostView) -> None:
        """One launch thread: the queue loop, launching on a stream of its own."""
        assert self._arena is not None
        stream = self._runtime.stream()
        try:
            with self._runtime.use(stream):
                counts = self.launches if queue == "gpu" else Counter[str]()
                sync = StreamSync(self._runtime.event, stream, host, view, self._board, waits=queue == "gpu", counts=counts)
                kernels = self._runtime.kernels() if queue == "gpu" else None
                replays = Replays(None if kernels is None else self._runtime.graphs(), counts)
                queue_loop(self._mailboxes[queue].offset, host.bytes, self._arena, host_alias=view.alias, sync=sync, kernels=kernels, replays=replays)
        except (RuntimeError, AssertionError, ValueError, LookupError, TypeError) as error:
            self._failure = f"{queue} of {self.name} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _LOG.exception("%s", self._failure)
            host.set_abort()

    def submit(self, queue: QueueName, entry: np.void | NDArray[Any]) -> None:
        self._opened()
        assert self._host is not None
        insns = self._host.view(int(entry["insns"]), INSN, int(entry["count"]))
        self._board.promise(insns["record"], int(entry["pass_id"]))
        self._mailboxes[queue].submit(entry)

    def cancel(self, queue: QueueName, pass_id: int) -> None:
        self._opened()
        self._mailboxes[queue].request_cancel(pass_id)
        self._mailboxes[queue].wait_idle(WAIT_TIMEOUT_S, lambda: self._failure)

    def wait(self, queue: QueueName, timeout_s: float) -> None:
        self._opened()
        self._mailboxes[queue].wait_idle(timeout_s, lambda: self._failure)

    def write(self, offset: int, data: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        target = self._range(offset, raw.nbytes)
        target.copy_(torch.from_numpy(raw if raw.flags.writeable else raw.copy()))

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        result: NDArray[np.uint8] = self._range(offset, num_bytes).cpu().numpy().copy()
        return result

    def close(self) -> None:
        if self._arena is None or self._host is None:
            return
        quit_entry = np.zeros((), ENTRY)
        quit_entry["meta"], quit_entry["trace"], quit_entry["flags"] = NULL, NULL, ENTRY_QUIT
        for mailbox in self._mailboxes.values():
            mailbox.request_cancel(ALL_PASSES)  # whatever still waits for an event gives up
        if not self._host.aborted:
            for mailbox in self._mailboxes.values():
                mailbox.submit(quit_entry)
        for thread in self._threads:
            while thread.is_alive():
                self._board.let_go()  # the compute queue's may be stuck launching into a full queue, where it sees nothing of the cancel
                thread.join(0.05)
        self._board.let_go()  # or have failed and left its stream held, for which what follows would wait
        for mailbox in self._mailboxes.values():
            mailbox.request_cancel(0)
        self._host.set_polled(False)
        self._threads.clear()
        self._arena = None
        self._runtime.release(self._host)
        self._host = None

    def _opened(self) -> Tensor:
        if self._arena is None:
            raise ValueError(f"{self.name} is not open")
        return self._arena

    def _range(self, offset: int, num_bytes: int) -> Tensor:
        arena = self._opened()
        if offset < 0 or num_bytes < 0 or offset + num_bytes > arena.numel():
            raise ValueError(f"bytes {offset} to {offset + num_bytes} leave the GPU arena of {arena.numel()} bytes")
        return arena[offset : offset + num_bytes]


def _measure_memory(index: int) -> tuple[int, int]:
    """(bytes an arena may take now, bytes this process takes on the card beside it) of CUDA device ``index``.

    The context's size is what the card's use grew by while the context and cuBLAS were made: others' changes meanwhile would be counted as ours.
    """
    if not torch.cuda.is_available():
        raise DeviceUnavailableError(f"cuda:{index} is not here: torch {torch.__version__} finds no CUDA device; use --device cpu or --device emulated:demo")
    if index >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"cuda:{index} is not here: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    before = card_used_bytes(index)
    if torch.backends.cuda.matmul.allow_tf32:
        _LOG.warning("TF32 was switched on in this process; fp32 weights need it off, so it is off now")
        torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", index)
    for dtype in (torch.float32, torch.float16):  # cuBLAS handles and their workspaces come with the first product
        torch.ones((16, 16), device=device, dtype=dtype) @ torch.ones((16, 16), device=device, dtype=dtype)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    context = CONTEXT_GUESS_BYTES if before is None else max(0, total - free - before)
    beside = TEMPORARY_BYTES + GRAPH_BYTES
    return max(0, free - beside), context + beside


def card_used_bytes(index: int) -> int | None:
    """Bytes in use on the card, by whoever, asked without a CUDA context of our own; None without nvidia-smi."""
    name = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
    uuid = name if name.startswith("GPU-") else f"GPU-{name}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
