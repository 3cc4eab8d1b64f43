"""A GPU that is not there: a process of its own with its own memory, queues and link, for tests, demos and what-if runs on any box.

Owns the presets, the child process and the pipe to it (`Pipe`, used by both ends). The arithmetic and the copies are real; the link is throttled to
the preset. Knows nothing of instructions: the child (`emulated_worker.py`) runs them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

import twinpilots
from twinpilots.device.base import QUEUE_NAMES, Mailbox, QueueName
from twinpilots.device.cpu import choose_cores
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError, DeviceUnavailableError, LimitError
from twinpilots.kernels import native as native_module
from twinpilots.units import format_bytes

PIPE_CHUNK_BYTES = 16 * 2**20
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
_FRAME = struct.Struct("<IQ")  # bytes of the JSON header, bytes of the payload


@dataclass(frozen=True, kw_only=True)
class EmulatedPreset:
    """What an emulated GPU pretends to be. Its arithmetic runs at the speed of one core of this box; a rate of 0 leaves the link unthrottled."""

    name: str
    memory_bytes: int
    up_bytes_per_s: float
    down_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        for field in ("up_bytes_per_s", "down_bytes_per_s", "latency_s"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{field} must be a number of at least 0, got {value!r}")
        if isinstance(self.memory_bytes, bool) or not isinstance(self.memory_bytes, int) or self.memory_bytes <= 0:
            raise ValueError(f"memory_bytes must be a positive int, got {self.memory_bytes!r}")

    def link_rates(self) -> dict[str, float]:
        """The link's part, as the interpreters take it."""
        return {"up_bytes_per_s": self.up_bytes_per_s, "down_bytes_per_s": self.down_bytes_per_s, "latency_s": self.latency_s}


EMULATED: Mapping[str, EmulatedPreset] = {
    "demo": EmulatedPreset(name="demo", memory_bytes=32 * 2**20, up_bytes_per_s=2.5e9, down_bytes_per_s=2.5e9, latency_s=5e-6),
}


def emulated_preset(text: str) -> EmulatedPreset:
    """The preset named ``text``, or described by the JSON file ``text`` (the fields of `EmulatedPreset`; ``name`` may be left out)."""
    if text in EMULATED:
        return EMULATED[text]
    if not text.endswith(".json"):
        raise DeviceUnavailableError(
            f"emulated:{text} cannot be acted in real time on this box, only {', '.join(EMULATED)} and emulated:FILE.json can; "
            f"for a prediction use: twinpilots plan MODEL --hardware {text}"
        )
    try:
        fields = json.loads(Path(text).read_text())
        if not isinstance(fields, dict):
            raise TypeError("not a JSON object")
        return EmulatedPreset(**{"name": Path(text).stem, **fields})
    except (OSError, TypeError, ValueError) as error:
        raise DeviceUnavailableError(f"emulated:{text}: {error}; give a JSON file with memory_bytes, up_bytes_per_s, down_bytes_per_s, latency_s") from error


class Pipe:
    """Frames over a pair of byte streams: a JSON header and raw bytes. One thread at a time."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer

    def send(self, header: Mapping[str, Any], payload: NDArray[np.uint8] | None = None) -> None:
        text = json.dumps(header).encode()
        self._writer.write(_FRAME.pack(len(text), 0 if payload is None else payload.nbytes) + text)
        if payload is not None:
            self._writer.write(payload.data)
        self._writer.flush()

    def receive(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The next frame. EOFError when the other end is gone."""
        header_bytes, payload_bytes = _FRAME.unpack(self._exactly(_FRAME.size))
        header = json.loads(self._exactly(header_bytes))
        return header, np.frombuffer(self._exactly(payload_bytes), dtype=np.uint8)

    def _exactly(self, num_bytes: int) -> bytes:
        data = self._reader.read(num_bytes) if num_bytes else b""
        if len(data) < num_bytes:
            raise EOFError("the other end of the pipe is gone")
        return data

    def close(self) -> None:
        for stream in (self._reader, self._writer):
            with contextlib.suppress(BrokenPipeError):  # unsent bytes for an end that is gone
                stream.close()


class EmulatedGpu:
    """A `GpuDevice` in a child process on one fixed core.

    ``adversarial_seed`` other than 0 makes the queues run as late and as early as their waits allow (drawn from the seed), and fills fresh GPU memory
    with NaN: a missing wait then gives wrong tokens in a test. ``core`` defaults to the last of this machine's (see `choose_cores`).
    """

    emulated = True
    overhead_bytes = 0

    def __init__(self, preset: EmulatedPreset, core: int | None = None, adversarial_seed: int = 0) -> None:
        if adversarial_seed < 0:
            raise ValueError(f"adversarial_seed must be at least 0, got {adversarial_seed}")
        self.preset = preset
        self.name = f"emulated:{preset.name}"
        self.memory_bytes = preset.memory_bytes
        self.core = core if core is not None else choose_cores(gpu=True, emulated=True).device
        self.adversarial_seed = adversarial_seed
        self.num_bytes = 0
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._child.process.pid if self._child is not None and self._child.process is not None else None

    def open(self, host: HostArena, num_bytes: int) -> None:
        if self._child is not None:
            raise ValueError(f"{self.name} is open already")
        if host.fd < 0:
            raise ValueError("an emulated GPU needs a shared host arena: HostArena(num_bytes, shared=True)")
        if num_bytes > self.memory_bytes:
            raise LimitError(
                f"{self.name} has {format_bytes(self.memory_bytes)} of memory, {format_bytes(num_bytes)} asked for; "
                f"lower --gpu-memory to {self.memory_bytes} bytes or less"
            )
        self.num_bytes = num_bytes
        native = native_module.load()
        options = {
            "preset": asdict(self.preset), "core": self.core, "adversarial_seed": self.adversarial_seed, "num_bytes": num_bytes,
            "host_fd": host.fd, "host_bytes": host.num_bytes, "host_events": host.num_events, "native": native is not None,
        }  # fmt: skip
        self._mailboxes = {queue: Mailbox(host, queue, native) for queue in QUEUE_NAMES}
        self._child = _Child(self.name, host, options)
        try:
            self._child.start()
        except BaseException:
            self.close()
            raise

    def submit(self, queue: QueueName, entry: np.void | NDArray[Any]) -> None:
        self._opened()
        self._mailboxes[queue].submit(entry)

    def cancel(self, queue: QueueName, pass_id: int) -> None:
        child = self._opened()
        self._mailboxes[queue].request_cancel(pass_id)
        self._mailboxes[queue].wait_idle(START_TIMEOUT_S, child.lost)

    def wait(self, queue: QueueName, timeout_s: float) -> None:
        child = self._opened()
        self._mailboxes[queue].wait_idle(timeout_s, child.lost)

    def write(self, offset: int, data: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._check_range(offset, raw.nbytes)
        for start in range(0, raw.nbytes, PIPE_CHUNK_BYTES):
            self._opened().call({"do": "write", "offset": offset + start}, raw[start : start + PIPE_CHUNK_BYTES])

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        self._check_range(offset, num_bytes)
        result = np.empty(num_bytes, dtype=np.uint8)
        for start in range(0, num_bytes, PIPE_CHUNK_BYTES):
            part = result[start : start + PIPE_CHUNK_BYTES]
            part[:] = self._opened().call({"do": "read", "offset": offset + start, "num_bytes": part.nbytes})
        return result

    def set_link_rates(self, *, up_bytes_per_s: float, down_bytes_per_s: float) -> None:
        """Another speed of the link, for transfers that begin from now on: a machine that changes while it runs. Nobody is told."""
        changed = replace(self.preset, up_bytes_per_s=up_bytes_per_s, down_bytes_per_s=down_bytes_per_s)  # checks the values
        self._opened().call({"do": "link", "up_bytes_per_s": changed.up_bytes_per_s, "down_bytes_per_s": changed.down_bytes_per_s})

    def close(self) -> None:
        if self._child is not None:
            self._child.stop()
        self._child = None
        self._mailboxes = {}

    def _opened(self) -> _Child:
        if self._child is None:
            raise ValueError(f"{self.name} is not open")
        return self._child

    def _check_range(self, offset: int, num_bytes: int) -> None:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} leave the GPU arena of {self.num_bytes} bytes")


class _Child:
    """The process behind an `EmulatedGpu`, started and watched by one thread.

    The kernel kills the child when the thread that started it ends (PDEATHSIG), so that thread must live as long as the child: it is the watcher,
    which aborts the host arena the moment the child dies, so that no pilot goes on waiting for it.
    """

    def __init__(self, name: str, host: HostArena, options: Mapping[str, Any]) -> None:
        self._name, self._host, self._options = name, host, options
        self.process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._pipe: Pipe | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._exit_code: int | None = None
        self._spawned = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name=f"{name} watcher", daemon=True)

    def start(self) -> None:
        """Spawn, and return when the child's queues run."""
        self._watcher.start()
        self._spawned.wait()
        if self._error is not None:
            raise DeviceUnavailableError(f"{self._name} cannot start: {self._error}")
        self.call({"do": "start"})

    def _watch(self) -> None:
        package_root = str(Path(twinpilots.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
        # One thread per library: the child has one core, and its threads must not outnumber it.
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "twinpilots.device.emulated_worker", json.dumps({**self._options, "parent": os.getpid()})]
        try:
            # A process group of its own: Ctrl-C in the terminal is the driver's business.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, pass_fds=(self._options["host_fd"],), process_group=0
            )
        except OSError as error:
            self._error = error
            self._spawned.set()
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        self._pipe = Pipe(self.process.stdout, self.process.stdin)
        self._spawned.set()
        self._exit_code = self.process.wait()
        if not self._stopping and not self._host.closed:
            self._host.set_abort()

    def lost(self) -> str | None:
        """Why the child is gone, or None while it lives."""
        if self._exit_code is None:
            return None
        code = self._exit_code
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process of {self._name} {cause}"

    def call(self, header: Mapping[str, Any], payload: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """One request and its answer's bytes. DeviceLostError when the child is gone, or its own error."""
        assert self._pipe is not None
        try:
            with self._lock:
                self._pipe.send(header, payload)
                answer, data = self._pipe.receive()
        except (EOFError, OSError) as error:
            self._watcher.join(STOP_TIMEOUT_S)
            self._host.set_abort()
            raise DeviceLostError(f"{self.lost() or error}; the engine cannot go on, start a new one") from error
        if "error" in answer:
            raise DeviceLostError(f"{self._name}: {answer['error']}")
        return data

    def stop(self) -> None:
        """Ask, wait, then kill; leaves neither process nor open pipe."""
        self._stopping = True
        if self.process is not None and self._pipe is not None:
            with contextlib.suppress(OSError), self._lock:  # gone already
                self._pipe.send({"do": "quit"})
            self._watcher.join(STOP_TIMEOUT_S)
            if self._watcher.is_alive():
                self.process.kill()
                self._watcher.join()
            self._pipe.close()
        elif self._watcher.is_alive():
            self._watcher.join()
