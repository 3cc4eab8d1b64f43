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
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_gguf import write_random_gguf
from benchmarks.gpu_peer_accelerate import PeerTask, kv_bytes
from benchmarks.gpu_points import GIB, Point
from benchmarks.gpu_workers import card_used_bytes, events_of, worker_environment
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import UserError

PEERS = ("accelerate", "llama.cpp")
RESERVE_BYTES = 3 * GIB // 2  # under the cap, beside llama.cpp's layers: context, libraries, what a pass computes with
ACCELERATE_SHARE = 0.6  # of the time: it makes its weights anew for every point
GENERATED = 16  # tokens per sequence that llama.cpp is timed with
LLAMA_BENCH = "llama-batched-bench"
Result = dict[str, Any]  # tokens_per_s, footprint_bytes and more; ``reason`` where there is no figure


def without(reason: str) -> Result:
    return {"tokens_per_s": None, "reason": reason}


def peer_results(points: Sequence[Point], device: str, budget_s: float, llama_cpp: Path | None) -> Iterator[tuple[Point, str, Result]]:
    """(point, peer, result) of every point that is compared with others."""
    compared = [point for point in points if point.against_peers]
    began = time.monotonic()
    yield from accelerate_results(compared, device, ACCELERATE_SHARE * budget_s)
    yield from llama_cpp_results(compared, device, budget_s - (time.monotonic() - began), llama_cpp)


def accelerate_results(points: Sequence[Point], device: str, budget_s: float) -> Iterator[tuple[Point, str, Result]]:
    """One process for all points of a family; those that it did not come to are left with the reason of its end."""
    reason = missing_accelerate(device)
    todo = list(points)
    if reason is None and todo:
        task = PeerTask(device=device, points=[asdict(point) for point in points])
        for event in events_of("benchmarks.gpu_peer_accelerate", "peer", task, limit_s=budget_s, stall_s=budget_s):
            if event["event"] == "case":
                point = points[event["point"]]
                todo.remove(point)
                yield point, "accelerate", {"reason": None, **event["figures"]} if event["ok"] else without(event["detail"])
            elif event["event"] == "end":
                reason = event["reason"] or "it ended without a result"
    for point in todo:
        yield point, "accelerate", without(reason or "not run")


def missing_accelerate(device: str) -> str | None:
    if not device.startswith("cuda:"):
        return "not here: it needs a CUDA device"
    lacking = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    return f"not here: {' and '.join(lacking)} cannot be imported" if lacking else None


def llama_cpp_results(points: Sequence[Point], device: str, budget_s: float, folder: Path | None) -> Iterator[tuple[Point, str, Result]]:
    """``folder``: where a llama.cpp built for this card lies."""
    reason = missing_llama_cpp(device, folder)
    if reason is not None or folder is None:
        yield from ((point, "llama.cpp", without(reason or "not here")) for point in points)
        return
    deadline = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory(prefix="twinpilots-gguf-") as scratch:
        for point in points:
            path = Path(scratch) / f"{point.model.removeprefix('dummy:')}.gguf"
            try:
                if not path.is_file():
                    write_random_gguf(point.spec, path)
                result = run_llama_cpp(folder / LLAMA_BENCH, path, point, device, deadline - time.monotonic())
            except (UserError, OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
                result = without(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            yield point, "llama.cpp", result


def missing_llama_cpp(device: str, folder: Path | None) -> str | None:
    if not device.startswith("cuda:"):
        return "not here: it is compared on a CUDA device"
    if folder is None:
        return f"not here: name a folder with a {LLAMA_BENCH} built for CUDA (--llama-cpp DIR)"
    return None if (folder / LLAMA_BENCH).is_file() else f"not here: {folder} has no {LLAMA_BENCH}"


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
