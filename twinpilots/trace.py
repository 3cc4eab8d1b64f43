"""The measured timeline of passes as a file that Perfetto and chrome://tracing open, with the predicted timeline of the same passes beside it.

Owns `Recorder` (which passes are kept: the first quarter and the last ones, so that memory and file stay bounded) and `write_trace` (Chrome trace event
format, one event a line, streamed to a temporary file that takes its name at the end). While the model runs only times are copied; predicting and
writing wait until it is over. Knows nothing of how passes are run or planned.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import numpy as np

from twinpilots.errors import UserError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import CostModel
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.tasks import Queue, Task
from twinpilots.runtime.stats import PassTimes

DEFAULT_PASSES = 32
FIRST_SHARE = 4  # one part in so many of the passes kept are the first ones, the others the last
LEAST_WAIT_NS = 1000  # shorter waits would only fill the file
Event = dict[str, Any]

# Processes and threads of the file: one process per device, one thread per queue; the predicted rows are processes of their own below.
DRIVER, CPU, GPU, PREDICTED = 1, 2, 3, 3  # PREDICTED: what is added to a device's number
PROCESSES = {DRIVER: "driver: passes", CPU: "CPU, measured", GPU: "GPU, measured", CPU + PREDICTED: "CPU, predicted", GPU + PREDICTED: "GPU, predicted"}
LANES: dict[Queue, tuple[int, int, str]] = {
    "cpu": (CPU, 1, "CPU queue"), "gpu": (GPU, 1, "compute queue"), "link_in": (GPU, 2, "link in"), "link_out": (GPU, 3, "link out"),
}  # fmt: skip
PROCESS_STEP = 10  # numbers from one contender's processes to the next one's
LINK_KINDS = {"load": "weights", "load_kv": "kv", "store_kv": "kv", "send": "activations", "recv": "activations"}


@dataclass(frozen=True, kw_only=True)
class TracedPass:
    """One pass as it was measured, and all that its prediction needs. Times in ns of the monotonic clock; ``predicted_s`` includes the driver."""

    number: int
    began_ns: int
    ended_ns: int
    num_prompt_tokens: int
    num_generated: int
    predicted_s: float
    times: PassTimes
    plan: Plan
    bucket: BucketPlan
    load: PassLoad
    profile: HardwareProfile


@dataclass
class Recorder:
    """Keeps the first passes and the last ones, ``num_passes`` in all."""

    num_passes: int = DEFAULT_PASSES
    num_seen: int = 0
    _first: list[TracedPass] = field(default_factory=list)
    _last: deque[TracedPass] = field(default_factory=deque)

    def add(self, make: Callable[[int], TracedPass]) -> None:
        """``make`` gets the pass's number."""
        one = make(self.num_seen)
        self.num_seen += 1
        num_first = -(-self.num_passes // FIRST_SHARE)
        if len(self._first) < num_first:
            self._first.append(one)
            return
        self._last.append(one)
        if len(self._first) + len(self._last) > self.num_passes:
            self._last.popleft()

    @property
    def passes(self) -> list[TracedPass]:
        return [*self._first, *self._last]


# -- the file --------------------------------------------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """UserError when no file can be made at ``path``: better now than after an hour's run."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a directory")
        part = _part(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error


def write_trace(path: Path, events: Iterable[Event], notes: Mapping[str, Any]) -> None:
    """Stream ``events`` to ``path``, which appears whole or not at all. UserError when it cannot be written."""
    part = _part(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            _write(file, events, notes)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write(file: TextIO, events: Iterable[Event], notes: Mapping[str, Any]) -> None:
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(notes)},"traceEvents":[')
    separator = "\n"
    for event in events:
        file.write(separator + json.dumps(event, separators=(",", ":")))
        separator = ",\n"
    file.write("\n]}\n")


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file of `write_trace`, one after another."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith('{"ph"'):
                yield json.loads(line.rstrip().rstrip(","))


@contextmanager
def joint_trace(path: Path | None, labels: Sequence[str], num_passes: int, notes: Mapping[str, Any]) -> Iterator[Callable[[int], dict[str, Any] | None]]:
    """Several engines in one file. Gives a function from an engine's number in ``labels`` to the arguments of its `LLM.trace` (None when ``path`` is None),
    each with a temporary file of its own; at the end these are put together."""
    if path is None:
        yield lambda _number: None
        return
    with TemporaryDirectory(prefix="twinpilots-") as folder:
        files = [Path(folder) / f"{number}.json" for number in range(len(labels))]
        yield lambda number: {"path": str(files[number]), "num_passes": num_passes, "label": labels[number], "contender": number}
        write_trace(path, (event for file in files if file.exists() for event in read_events(file)), notes)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


# -- events ----------------------------------------------------------------------------------------------------------------------------------


def trace_events(spec: ModelSpec, recorder: Recorder, *, label: str = "", emulated: bool = False, contender: int = 0) -> Iterator[Event]:
    """Everything that was recorded. ``label`` and ``contender`` tell several engines in one file apart."""
    writer = _Events(spec, PROCESS_STEP * contender)
    yield from writer.names(label, emulated)
    for one in recorder.passes:
        yield from writer.measured(one)
    yield from writer.link_counters(recorder.passes)
    yield from writer.predicted(recorder.passes)


def category(task: Task) -> str:
    """By these the durations add up to `LLM.stats`: "link" on any row to its link seconds, "compute" of a device to that device's."""
    return "link" if task.kind in LINK_KINDS else "embed" if task.kind == "embed" else "compute"


class _Events:
    """Makes the events of one engine; ``base`` is added to all process numbers."""

    def __init__(self, spec: ModelSpec, base: int) -> None:
        self.spec, self.base = spec, base
        self._simulated: dict[Hashable, tuple[list[tuple[Task, float, float, int]], float]] = {}

    def names(self, label: str, emulated: bool) -> Iterator[Event]:
        for process, name in PROCESSES.items():
            shown = name.replace("GPU", "GPU (emulated)") if emulated else name
            yield self._meta("process_name", process, 0, name=f"{label}: {shown}" if label else shown)
            yield self._meta("process_sort_index", process, 0, sort_index=self.base + process)
        yield self._meta("thread_name", DRIVER, 1, name="measured")
        yield self._meta("thread_name", DRIVER, 2, name="predicted")
        for process, thread, name in LANES.values():
            yield self._meta("thread_name", process, thread, name=name)
            yield self._meta("thread_name", process + PREDICTED, thread, name=name)

    def _meta(self, what: str, process: int, thread: int, **args: Any) -> Event:
        return {"ph": "M", "name": what, "pid": self.base + process, "tid": thread, "args": args}

    def _span(self, name: str, cat: str, process: int, thread: int, start_ns: float, end_ns: float, args: Mapping[str, Any]) -> Event:
        return {
            "ph": "X", "name": name, "cat": cat, "pid": self.base + process, "tid": thread, "ts": round(start_ns / 1000, 3),
            "dur": round((end_ns - start_ns) / 1000, 3), "args": args,
        }  # fmt: skip

    # -- measured ----------------------------------------------------------------------------------------------------------------------------

    def measured(self, one: TracedPass) -> Iterator[Event]:
        yield self._pass(one, 1, one.began_ns, one.ended_ns)
        for queue, found in one.times.queues.items():
            process, thread, _ = LANES[queue]
            for task, (wait_ns, start_ns, end_ns), rows, num_bytes in zip(
                one.times.schedule.queue(queue), found.times.tolist(), found.rows.tolist(), found.num_bytes.tolist(), strict=True
            ):
                if start_ns - wait_ns >= LEAST_WAIT_NS:
                    yield self._span("wait", "wait", process, thread, wait_ns, start_ns, {"pass": one.number, "for": _hazards(task)})
                yield self._span(_name(task), category(task), process, thread, start_ns, end_ns, _args(one.number, task, rows, num_bytes))

    def _pass(self, one: TracedPass, thread: int, start_ns: float, end_ns: float) -> Event:
        args = {
            "pass": one.number, "prompt_tokens": one.num_prompt_tokens, "generated": one.num_generated, "micro_batches": len(one.load.micro_batches),
            "measured_ms": (one.ended_ns - one.began_ns) / 1e6, "predicted_ms": 1e3 * one.predicted_s,
        }  # fmt: skip
        return self._span(f"{one.bucket.phase} pass {one.number}", "pass", DRIVER, thread, start_ns, end_ns, args)

    def link_counters(self, passes: Iterable[TracedPass]) -> Iterator[Event]:
        """Bytes over the link so far, by what they are, at the end of every copy of the passes in the file."""
        ends: list[np.ndarray] = []
        moved: list[np.ndarray] = []
        kinds = sorted(set(LINK_KINDS.values()))
        for one in passes:
            for queue, found in one.times.queues.items():
                tasks = one.times.schedule.queue(queue)
                table = np.zeros((len(tasks), len(kinds)), np.int64)
                for row, (task, num_bytes) in enumerate(zip(tasks, found.num_bytes, strict=True)):
                    if task.kind in LINK_KINDS:
                        table[row, kinds.index(LINK_KINDS[task.kind])] = num_bytes
                chosen = table.any(axis=1)
                ends.append(found.times[chosen, 2])
                moved.append(table[chosen])
        if not ends:
            return
        when, table = np.concatenate(ends), np.concatenate(moved)
        order = np.argsort(when, kind="stable")
        for end_ns, row in zip(when[order].tolist(), np.cumsum(table[order], axis=0).tolist(), strict=True):
            args = dict(zip(kinds, row, strict=True))
            yield {"ph": "C", "name": "link bytes", "pid": self.base + DRIVER, "tid": 0, "ts": round(end_ns / 1000, 3), "args": args}

    # -- predicted ---------------------------------------------------------------------------------------------------------------------------

    def predicted(self, passes: Iterable[TracedPass]) -> Iterator[Event]:
        """The same passes on the simulator's clock, each from its measured begin, or from the end of the one predicted before it where that is later."""
        free_ns = 0.0
        busy_until: dict[Queue, float] = {}
        for one in passes:
            tasks, _ = self._simulate(one)
            begin_ns = max(float(one.began_ns), free_ns)
            free_ns = begin_ns + 1e9 * one.predicted_s
            yield self._pass(one, 2, begin_ns, free_ns)
            for task, start_s, end_s, rows in tasks:
                process, thread, _ = LANES[task.queue]
                start_ns = max(begin_ns + 1e9 * start_s, busy_until.get(task.queue, 0.0))  # a prefetched packet begins in the pass before
                end_ns = max(start_ns, begin_ns + 1e9 * end_s)
                busy_until[task.queue] = end_ns
                yield self._span(_name(task), category(task), process + PREDICTED, thread, start_ns, end_ns, _args(one.number, task, rows, None))

    def _simulate(self, one: TracedPass) -> tuple[list[tuple[Task, float, float, int]], float]:
        """(task, start, end, rows) of every task, seconds since the pass began; and the pass's seconds. Alike passes are simulated once."""
        key = (id(one.bucket), one.load, id(one.profile))
        if key not in self._simulated:
            schedule = expand(self.spec, one.plan, one.bucket, one.load.shape)
            timing = simulate(schedule, self.spec, one.plan, one.profile, one.load, keep_timeline=True)
            model = CostModel(self.spec, one.plan, one.profile, one.load)
            found = [(schedule.tasks[e.task], e.start_s, e.end_s, 0 if schedule.tasks[e.task].kind == "load" else model.tokens(schedule.tasks[e.task]))
                     for e in timing.timeline]  # fmt: skip
            self._simulated[key] = found, timing.seconds
        return self._simulated[key]


def _name(task: Task) -> str:
    return task.op or task.kind


def _hazards(task: Task) -> str:
    return ", ".join(dict.fromkeys(wait.hazard for wait in task.waits))


def _args(number: int, task: Task, rows: int, num_bytes: int | None) -> dict[str, Any]:
    args: dict[str, Any] = {"pass": number, "layer": task.layer, "op": task.op, "kind": task.kind, "tokens": 0 if task.kind == "load" else rows}
    if task.mb >= 0:
        args["micro_batch"] = task.mb
    if num_bytes:
        args["bytes"] = num_bytes
    return args
