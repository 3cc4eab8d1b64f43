"""transformers + accelerate on the points of `make gpu-bench`: random weights of the true shapes, as many on the card as the cap allows, hooks for the rest.

``python -m benchmarks.gpu_peer_accelerate TASK`` (JSON) prints one JSON line per point, like `gpu_cases`. Owns how accelerate is driven: its own device map
under the same memory cap, a KV cache of random values on the card, passes timed to the last kernel. Knows nothing of our engine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu_points import GIB, Point
from benchmarks.gpu_workers import Emit, card_used_bytes, outcome, serve
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import LimitError
from twinpilots.model.dummy import CONFIGS
from twinpilots.model.spec import ModelSpec

RESERVE_BYTES = GIB  # under the cap: context, libraries and what a pass computes with
WARM, TIMED = 1, 3
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    device: str
    points: Sequence[Mapping[str, Any]]


def run_peer(task: PeerTask, emit: Emit) -> None:
    """Point after point: the weights, then passes, or prompts, under the point's cap."""
    points, used = [Point(**fields) for fields in task.points], card_used_bytes(task.device)
    for number, point in enumerate(points):
        found: dict[str, Any] = {}

        def run(point: Point = point, found: dict[str, Any] = found) -> None:
            model = placed_model(point, task.device)
            found.update(measured(model, point, task.device))
            now = card_used_bytes(task.device)
            found["footprint_bytes"] = None if now is None or used is None else now - used

        result = outcome(partial(_within_memory, run))
        emit({"event": "case", "point": number, "ok": result["ok"], "detail": result["detail"], "figures": found if result["ok"] else None})
        _forget()


def _forget() -> None:
    """Give the last model's memory back: hooks and modules hold each other."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _within_memory(run: Any) -> None:
    import torch

    try:
        run()
    except torch.OutOfMemoryError as error:
        raise LimitError(f"out of memory under the cap: {str(error).splitlines()[0]}") from error


def placed_model(point: Point, device: str) -> Any:
    """The model with random weights in host memory, and as much of it on the card as the cap leaves beside the KV cache."""
    import accelerate
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(len(choose_cores(gpu=True, emulated=False).pilot))  # our own workers do with one

    spec, dtype = point.spec, getattr(torch, DTYPES[point.spec.weight_dtype])
    fields = {key: value for key, value in CONFIGS[point.model.removeprefix("dummy:")].items() if key not in ("model_type", "dtype")}
    config = AutoConfig.for_model(CONFIGS[point.model.removeprefix("dummy:")]["model_type"], **fields)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    if device.startswith("cuda:"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (point.gpu_memory - RESERVE_BYTES // 2) / total), torch.device(device))
    room = point.gpu_memory - RESERVE_BYTES - kv_bytes(spec, point)
    if room < 0:
        raise LimitError(f"KV of {kv_bytes(spec, point)} bytes does not fit on the card under the cap; this peer keeps it there")
    place: Any = int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device
    _materialise(model, dtype, spec)
    budget = {place: room, "cpu": 1 << 40} if place != "cpu" else {"cpu": 1 << 40}
    layout = accelerate.infer_auto_device_map(model, max_memory=budget, no_split_module_classes=model._no_split_modules, dtype=dtype)
    return accelerate.dispatch_model(model, device_map=layout, main_device=place)


def kv_bytes(spec: ModelSpec, point: Point) -> int:
    return point.num_seqs * (point.workload.seq_len) * spec.kv_bytes_per_token(spec.weight_dtype)


def _materialise(model: Any, dtype: Any, spec: ModelSpec) -> None:
    """One random block over and over: as fast as memory."""
    import torch

    block = torch.randn(1 << 20, dtype=torch.float32).mul_(spec.hidden_size**-0.5).to(dtype)
    done: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in done:
                flat = torch.ones(parameter.numel(), dtype=dtype) if parameter.dim() == 1 else torch.empty(parameter.numel(), dtype=dtype)
                for at in range(0, parameter.numel() if parameter.dim() > 1 else 0, len(block)):
                    part = flat[at : at + len(block)]
                    part.copy_(block[: len(part)])
                done[id(parameter)] = torch.nn.Parameter(flat.view(parameter.shape), requires_grad=False)
            module._parameters[name] = done[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def measured(model: Any, point: Point, device: str) -> dict[str, Any]:
    """Tokens per second: generated after ``point.context`` random tokens of KV, or read from prompts."""
    import torch
    from transformers import DynamicCache

    spec, seconds = point.spec, []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        cache = DynamicCache()
        if point.kind == "decode":
            shape = (point.num_seqs, spec.num_kv_heads, point.context - 1, spec.head_dim)
            values = torch.randn(shape, generator=generator).to(model.dtype).to(device)
            for layer in range(spec.num_layers):
                cache.update(values, values.clone(), layer)
        for _ in range(WARM + TIMED):
            if point.kind == "prefill":
                cache = DynamicCache()
            ids = torch.randint(3, 100, (point.num_seqs, 1 if point.kind == "decode" else point.context), generator=generator).to(device)
            began = time.perf_counter()
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            int(logits[0, -1].argmax())  # waits for the device
            seconds.append(time.perf_counter() - began)
    tokens = point.num_seqs * (1 if point.kind == "decode" else point.context)
    return {"tokens_per_s": tokens * TIMED / sum(seconds[WARM:]), "pass_s": seconds[WARM:]}


if __name__ == "__main__":
    import sys

    serve(sys.argv[1:], {"peer": PeerTask}, {"peer": run_peer})
