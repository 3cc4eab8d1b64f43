"""FlexTensor on the points of `make gpu-bench`: a transformers model whose layers it keeps on the card or streams, by its own profile under the same cap.

``python -m benchmarks.gpu_peer_flextensor TASK`` (JSON) prints one JSON line per point. Owns how FlexTensor (written against 0.5.0) is driven: which modules it
offloads, what it is told of memory, how many passes it profiles before the first is timed. All else is its default. It has a process per point, for it
leaves a model in pieces. Knows nothing of how a pass is timed, nor of our engine.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_peer_torch import PeerTask, cap_process, host_model, room_for_weights, run_placed
from benchmarks.gpu_points import Point
from benchmarks.gpu_workers import Emit, serve
from twinpilots.errors import LimitError

LAYERS = "model.layers.*"  # decoder layers, all of a size, as its blocks like them; embedding and head stay on the card


def run_peer(task: PeerTask, emit: Emit) -> None:
    run_placed(task, emit, placed_model)


def placed_model(point: Point, device: str) -> tuple[Any, int]:
    """The model behind FlexTensor's proxy, and the passes that it watches and profiles, with one more that runs as it decided."""
    import flextensor
    import torch

    room = room_for_weights(point)
    cap_process(point, device)
    model = host_model(point)
    room -= outside_bytes(model)
    if room <= 0:
        raise LimitError(f"embedding and head of {outside_bytes(model)} bytes do not fit on the card under the cap beside the KV; this peer keeps both there")
    config = flextensor.OffloadConfig(
        gpu_device=int(device.removeprefix("cuda:")), include_patterns=[LAYERS],
        max_gpu_mem_fraction=room / torch.cuda.get_device_properties(device).total_memory,
    )  # fmt: skip
    proxy = flextensor.offload(model, config)
    return proxy, flextensor.get_offload_manager().iters_before_inference + 1


def outside_bytes(model: Any) -> int:
    """What stays on the card whatever happens. Its budget is for the weights that it manages: what lies on the card before is none of its business."""
    return sum(int(parameter.nbytes) for name, parameter in model.named_parameters() if not name.startswith(LAYERS.removesuffix("*")))


if __name__ == "__main__":
    import sys

    serve(sys.argv[1:], {"peer": PeerTask}, {"peer": run_peer})
