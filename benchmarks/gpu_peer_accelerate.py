"""transformers + accelerate on the points of `make gpu-bench`: random weights of the true shapes, as many on the card as the cap allows, hooks for the rest.

``python -m benchmarks.gpu_peer_accelerate TASK`` (JSON) prints one JSON line per point, like `gpu_cases`. Owns how accelerate is driven: its own device map
under the same memory cap. Knows nothing of how a pass is timed, nor of our engine.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_peer_torch import DTYPES, WARM, PeerTask, cap_process, host_model, room_for_weights, run_placed
from benchmarks.gpu_points import Point
from benchmarks.gpu_workers import Emit, serve


def run_peer(task: PeerTask, emit: Emit) -> None:
    run_placed(task, emit, placed_model)


def placed_model(point: Point, device: str) -> tuple[Any, int]:
    """As much of the model on the card as the cap leaves beside the KV cache, the rest in host memory."""
    import accelerate
    import torch

    room, dtype = room_for_weights(point), getattr(torch, DTYPES[point.spec.weight_dtype])
    cap_process(point, device)
    model = host_model(point)
    place: Any = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
    budget = {place: room, "cpu": 1 << 40} if place != "cpu" else {"cpu": 1 << 40}
    layout = accelerate.infer_auto_device_map(model, max_memory=budget, no_split_module_classes=model._no_split_modules, dtype=dtype)
    return accelerate.dispatch_model(model, device_map=layout, main_device=place), WARM


if __name__ == "__main__":
    import sys

    serve(sys.argv[1:], {"peer": PeerTask}, {"peer": run_peer})
