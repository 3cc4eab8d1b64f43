"""What `gpu_check` and `gpu` (the benchmark) share: worker processes and their events, the device that is asked for, verdicts, names in reports.

Owns both ends of a worker: `events_of` in the parent, `serve` in the child, one JSON line per event between them. A process of its own each, because a CUDA
error leaves its process useless. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twinpilots.doctor import cuda_devices, torch_cuda_version
from twinpilots.errors import LimitError, UserError

ROOT = Path(__file__).resolve().parents[1]
SOFTWARE = ("torch", "transformers", "numpy", "scipy", "triton", "accelerate")
NVIDIA_SMI_BYTES = 1 << 20  # its unit
Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``ok`` None: nothing was asked of it here."""

    name: str
    ok: bool | None
    detail: str


@dataclass(kw_only=True)
class TimedRun:
    """What every run on a card is told, and how long it still has."""

    device: str
    commit: str
    budget_s: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.began + self.budget_s - time.monotonic()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def mark(ok: bool | None) -> str:
    return {True: "pass", False: "FAIL", None: "-   "}[ok]


# -- the parent's end ------------------------------------------------------------------------------------------------------------------------


def events_of(
    module: str, kind: str, task: Any, *, limit_s: float, stall_s: float, packages: Path | None = None
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The events of a worker (``python -m module``), as they come. The last one is ``end``, with the reason when the worker died, hung or ran out of time,
    else None. ``packages``: a folder with unpacked ones, for this worker alone."""
    return command_events([sys.executable, "-m", module, json.dumps({kind: asdict(task)})], limit_s=limit_s, stall_s=stall_s, packages=packages)


def command_events(command: Sequence[str], *, limit_s: float, stall_s: float, packages: Path | None = None) -> Iterator[dict[str, Any]]:
    """As `events_of`, of any command that prints one JSON object per line."""
    # A group of its own: what a command starts ends with it, and holds no pipe open.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=worker_environment(packages), start_new_session=True)
    lines: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    reader = threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True)
    reader.start()
    deadline, reason = time.monotonic() + limit_s, None
    try:
        while True:
            patience_s = min(stall_s, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(patience_s, 0.0))
            except queue.Empty:
                reason = f"no answer for {stall_s:g} s" if patience_s == stall_s < limit_s else f"its {limit_s:.3g} s were up"
                break
            if line is None:
                code = child.wait()
                reason = f"its process ended with exit code {code}" if code else None
                break
            yield json.loads(line)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join()
        child.stdout.close()
    yield {"event": "end", "reason": reason}


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def worker_environment(packages: Path | None = None) -> dict[str, str]:
    """One thread for libraries (the pilots count their own), and our packages in reach, then those of a folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), "" if packages is None else str(packages.resolve()))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def only_case(module: str, kind: str, task: Any, limit_s: float) -> dict[str, Any]:
    """The result of a worker with one case; a failed one when the worker did not come to its end."""
    found: dict[str, Any] = {}
    for event in events_of(module, kind, task, limit_s=limit_s, stall_s=limit_s):
        if event["event"] == "case":
            found = event
        elif event["event"] == "end" and not found:
            found = {"ok": False, "detail": event["reason"] or "it ended without a result"}
    return found


def build_native() -> str | None:
    """The CPU pilot's library, with this box's own compiler. None, or why there is none: everything still runs then, on torch, too slowly to be worth
    measuring."""
    done = subprocess.run(
        [sys.executable, "-m", "twinpilots.kernels.build"], cwd=ROOT, env=worker_environment(), capture_output=True, text=True, check=False, timeout=120.0
    )  # fmt: skip
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None


# -- the child's end -------------------------------------------------------------------------------------------------------------------------


def serve(argv: Sequence[str], tasks: Mapping[str, type], run: Mapping[str, Callable[[Any, Emit], None]]) -> None:
    """Runs the tasks of ``{kind: fields}`` (JSON). Keeps stdout for the events alone: whatever else prints goes to stderr."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    for kind, fields in json.loads(argv[0]).items():
        run[kind](tasks[kind](**fields), emit)


def outcome(run: Callable[[], str | None]) -> dict[str, Any]:
    """``ok`` True with what was found, None (infeasible) with the reason, or False with the error. The traceback of an error goes to stderr."""
    try:
        return {"ok": True, "detail": run() or ""}
    except LimitError as error:
        return {"ok": None, "detail": str(error)}
    except Exception as error:  # noqa: BLE001  one failure must not hide the rest
        import traceback

        traceback.print_exc(limit=-4)  # where it happened; many cases may fail alike
        return {"ok": False, "detail": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def card_used_bytes(device: str) -> int | None:
    """Bytes in use on the card by whoever (the box is ours); None on an emulated one, whose ledger knows."""
    if not device.startswith("cuda:"):
        return None
    from twinpilots.device.cuda import card_used_bytes as used

    return used(int(device.removeprefix("cuda:")))


def breaks_promise(run: Mapping[str, Any]) -> bool:
    """Whether the process took more of the card than it was allowed, by more than nvidia-smi's unit."""
    return bool(run["footprint_bytes"] > run["gpu_memory"] + NVIDIA_SMI_BYTES)


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What a second run added to sums."""
    return {name: after[name] - before[name] for name in after}


# -- devices and names -----------------------------------------------------------------------------------------------------------------------


def require_device(device: str) -> None:
    """UserError unless ``device`` is a CUDA device that torch can drive, or an emulated one."""
    if re.fullmatch(r"cuda:\d+", device):
        cards = cuda_devices()
        if int(device.removeprefix("cuda:")) >= len(cards) or torch_cuda_version() is None:
            here = f"the driver shows {len(cards)} CUDA devices, torch is built for CUDA {torch_cuda_version()}"
            raise UserError(f"no usable {device}: {here}; rehearse with --device emulated:demo")
    elif not device.startswith("emulated:"):
        raise UserError(f"unknown device {device!r}; give cuda:N or emulated:PRESET")


def device_name(device: str) -> str:
    if device.startswith("emulated:"):
        return device
    return cuda_devices()[int(device.removeprefix("cuda:"))].name


def slug(name: str) -> str:
    """For file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_document(device: str) -> dict[str, Any]:
    """What a result file says of where it was made."""
    return {
        "device": device, "gpu": device_name(device), "emulated": device.startswith("emulated:"),
        "processor": f"{platform.machine()}, {os.cpu_count()} logical CPUs", "software": software(),
    }  # fmt: skip


def software() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch_cuda_version()}
    for name in SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_document(document: Mapping[str, Any], folder: Path, name: str) -> Path:
    """``NAME.json`` in ``folder``, which is made when it is not there."""
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path
