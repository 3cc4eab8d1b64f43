"""Other engines on the points of `make gpu-bench`: same shapes, same bits, same memory cap, same card, one after the other.

Owns which peers there are, how each is asked, and what is said where one is not here. Every peer is a process of its own with a time limit; nothing is
downloaded. Knows nothing of our engine's figures.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_gguf import write_random_gguf
from benchmarks.gpu_peer_freetoken import why_not as why_not_freetoken
from benchmarks.gpu_peer_torch import PeerTask, kv_bytes
from benchmarks.gpu_points import GIB, Point
from benchmarks.gpu_workers import card_used_bytes, events_of, worker_environment
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import UserError

RESERVE_BYTES = 3 * GIB // 2  # under the cap, beside llama.cpp's layers: context, libraries, what a pass computes with
GENERATED = 16  # tokens per sequence that llama.cpp is timed with
LLAMA_BENCH = "llama-batched-bench"
PEER_S = 75.0  # set aside for each one that is here
Result = dict[str, Any]  # tokens_per_s, footprint_bytes and more; ``reason`` where there is no figure


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A peer that is a Python package, driven by a module of ours. ``needs``: what it imports that a box may lack. ``alone``: it has a process per point."""

    name: str
    module: str
    needs: tuple[str, ...]
    alone: bool


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where peers are looked for: ``llama_cpp`` holds a llama.cpp built for this card, ``packages`` unpacked Python packages. None: not carried."""

    device: str
    llama_cpp: Path | None = None
    packages: Path | None = None


WORKERS = (
    Worker(name="accelerate", module="benchmarks.gpu_peer_accelerate", needs=("transformers", "accelerate"), alone=False),
    Worker(
        name="FlexTensor", module="benchmarks.gpu_peer_flextensor", alone=True,
        needs=("transformers", "flextensor", "pydantic", "pydantic_core", "yaml", "psutil", "beartype", "proxytypes3", "posix_ipc", "shared_memory_dict"),
    ),
    Worker(
        name="FreeToken", module="benchmarks.gpu_peer_freetoken", alone=True,
        needs=("transformers", "freetoken", "flashlib", "tvm_ffi", "msgpack", "zmq", "triton"),
    ),
)  # fmt: skip
LLAMA_CPP = "llama.cpp"
PEERS = (LLAMA_CPP, *(worker.name for worker in WORKERS))


def without(reason: str) -> Result:
    return {"tokens_per_s": None, "reason": reason}


def peer_results(points: Sequence[Point], budget_s: float, where: Where) -> Iterator[tuple[Point, str, Result]]:
    """(point, peer, result) of every point that is compared with others. Each peer that is here has its part of the time left when its turn comes."""
    deadline, missing = time.monotonic() + budget_s, missing_peers(where)
    turns = [peer for peer in PEERS if missing[peer] is None]
    for peer in PEERS:
        asked = compared(points, peer)
        if (reason := missing[peer]) is not None:
            yield from ((point, peer, without(reason)) for point in asked)
            continue
        left_s = (deadline - time.monotonic()) / (len(turns) - turns.index(peer))
        worker = next((worker for worker in WORKERS if worker.name == peer), None)
        results = llama_cpp_results(asked, left_s, where) if worker is None else worker_results(worker, asked, left_s, where)
        yield from ((point, peer, result) for point, result in results)


def compared(points: Sequence[Point], peer: str) -> list[Point]:
    """FreeToken is asked wherever a model fits entirely, too: elsewhere it has no figures."""
    return [point for point in points if point.against_peers or (peer == "FreeToken" and why_not_freetoken(point) is None)]


# -- what is here ----------------------------------------------------------------------------------------------------------------------------


def missing_peers(where: Where) -> dict[str, str | None]:
    """Peer -> why it cannot be asked here; None: it can."""
    return {LLAMA_CPP: missing_llama_cpp(where), **{worker.name: missing_worker(worker, where) for worker in WORKERS}}


def set_aside_s(points: Sequence[Point], where: Where) -> float:
    """What the peers that are here should be left of a slice's time."""
    return PEER_S * sum(reason is None and bool(compared(points, peer)) for peer, reason in missing_peers(where).items())


def missing_worker(worker: Worker, where: Where) -> str | None:
    if not where.device.startswith("cuda:"):
        return "not here: it needs a CUDA device"
    if worker.name == "FreeToken" and where.device != "cuda:0":
        return f"not here: it runs on the first card only, this is {where.device}"
    lacking = [name for name in worker.needs if not _can_import(name, where.packages)]
    hint = "" if worker.name == "accelerate" or where.packages is not None else "; carry a folder with what it needs (--peers DIR)"
    return f"not here: {' and '.join(lacking)} cannot be imported{hint}" if lacking else None


def _can_import(name: str, packages: Path | None) -> bool:
    return find_spec(name) is not None or (packages is not None and PathFinder.find_spec(name, [str(packages)]) is not None)


def missing_llama_cpp(where: Where) -> str | None:
    if not where.device.startswith("cuda:"):
        return "not here: it is compared on a CUDA device"
    if where.llama_cpp is None:
        return f"not here: name a folder with a {LLAMA_BENCH} built for CUDA (--llama-cpp DIR)"
    return None if (where.llama_cpp / LLAMA_BENCH).is_file() else f"not here: {where.llama_cpp} has no {LLAMA_BENCH}"


# -- Python packages -------------------------------------------------------------------------------------------------------------------------


def worker_results(worker: Worker, points: Sequence[Point], budget_s: float, where: Where) -> Iterator[tuple[Point, Result]]:
    """Points that it did not come to are left with the reason of its end."""
    deadline = time.monotonic() + budget_s
    for group in [[point] for point in points] if worker.alone else [list(points)]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            yield from ((point, without("not run: the time was up")) for point in group)
        else:
            yield from _group_results(worker, group, left_s, where)


def _group_results(worker: Worker, points: Sequence[Point], limit_s: float, where: Where) -> Iterator[tuple[Point, Result]]:
    todo, reason = list(points), "it ended without a result"
    task = PeerTask(device=where.device, points=[asdict(point) for point in points], used_bytes=card_used_bytes(where.device))
    for event in events_of(worker.module, "peer", task, limit_s=limit_s, stall_s=limit_s, packages=where.packages) if points else ():
        if event["event"] == "case":
            point = points[event["point"]]
            todo.remove(point)
            yield point, {"reason": None, **event["figures"]} if event["ok"] else without(event["detail"])
        elif event["event"] == "end":
            reason = event["reason"] or reason
    yield from ((point, without(reason)) for point in todo)


# -- llama.cpp -------------------------------------------------------------------------------------------------------------------------------


def llama_cpp_results(points: Sequence[Point], budget_s: float, where: Where) -> Iterator[tuple[Point, Result]]:
    deadline = time.monotonic() + budget_s
    assert where.llama_cpp is not None
    with tempfile.TemporaryDirectory(prefix="twinpilots-gguf-") as scratch:
        for point in points:
            path = Path(scratch) / f"{point.model.removeprefix('dummy:')}.gguf"
            try:
                if not path.is_file():
                    write_random_gguf(point.spec, path)
                result = run_llama_cpp(where.llama_cpp / LLAMA_BENCH, path, point, where.device, deadline - time.monotonic())
            except (UserError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                result = without(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            yield point, result


def layers_on_card(point: Point) -> int:
    """As many layers as fit under the cap, each with its KV; the head last."""
    spec = point.spec
    layer_bytes = (sum(op.weight_bytes for op in spec.ops(64) if op.layer >= 0) + kv_bytes(spec, point)) // spec.num_layers
    return max(0, min(spec.num_layers + 1, (point.gpu_memory - RESERVE_BYTES) // layer_bytes))


def llama_cpp_command(program: Path, model: Path, point: Point) -> list[str]:
    """One prompt for all sequences (what decoding costs does not depend on which tokens there are), then a few tokens of each."""
    generated, cores = (GENERATED if point.kind == "decode" else 1), len(choose_cores(gpu=True, emulated=False).pilot)
    context = point.num_seqs * (point.context + generated)
    shared = ["-pps"] if point.kind == "decode" else []
    return [
        str(program), "-m", str(model), "-c", str(context), "-b", "2048", "-ub", "512", "-fa", "on", "-ngl", str(layers_on_card(point)), "-t", str(cores),
        "-npp", str(point.context), "-ntg", str(generated), "-npl", str(point.num_seqs), *shared, "--output-format", "jsonl",
    ]  # fmt: skip


def run_llama_cpp(program: Path, model: Path, point: Point, device: str, limit_s: float) -> Result:
    """The rate that it reports, and the most of the card that was seen in use. SubprocessError when it fails or takes too long."""
    before, most, began = card_used_bytes(device), 0, time.monotonic()
    command = llama_cpp_command(program, model, point)
    environment = {name: value for name, value in worker_environment().items() if name != "OMP_NUM_THREADS"}  # its threads are its own affair
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**environment, "CUDA_VISIBLE_DEVICES": device.partition(":")[2]})
        try:
            while child.poll() is None:
                if time.monotonic() - began > limit_s:
                    raise subprocess.TimeoutExpired(command, limit_s)
                most = max(most, (card_used_bytes(device) or 0) - (before or 0))
                time.sleep(0.2)
        finally:
            child.kill()
            child.wait()
        output.seek(0)
        lines = output.read().splitlines()
    if child.returncode:
        raise ValueError(f"llama.cpp ended with exit code {child.returncode}: {(lines or ['no output'])[-1]}")
    return llama_cpp_result(lines, point) | {"footprint_bytes": most, "layers_on_card": layers_on_card(point)}


def llama_cpp_result(lines: Sequence[str], point: Point) -> Result:
    """The one line of JSON among what it prints. ValueError when there is none."""
    found: list[Mapping[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
    if not found:
        raise ValueError(f"llama.cpp printed no result: {(list(lines) or ['nothing'])[-1]}")
    return {"tokens_per_s": float(found[-1]["speed_tg" if point.kind == "decode" else "speed_pp"]), "reason": None}
