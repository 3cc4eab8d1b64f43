"""What the peers that drive a transformers model share: the model with random weights in host memory, passes timed to the last kernel, one point after another.

Owns the worker's task, the weights, the cap on torch's own allocator and the timing. Knows nothing of who places the weights, nor of our engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu_points import GIB, Point
from benchmarks.gpu_workers import Emit, card_used_bytes, outcome
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import LimitError
from twinpilots.model.dummy import CONFIGS
from twinpilots.model.spec import ModelSpec

RESERVE_BYTES = GIB  # under the cap: context, libraries and what a pass computes with
WARM, TIMED = 1, 3
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
Place = Callable[[Point, str], tuple[Any, int]]  # (point, device) -> the model where it runs, and how many passes it needs before one is timed


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    """``used_bytes``: of the card, before the worker was started. Asked by who starts it, for asking initialises CUDA, which some peers do themselves."""

    device: str
    points: Sequence[Mapping[str, Any]]
    used_bytes: int | None = None


def run_points(task: PeerTask, emit: Emit, figures: Callable[[Point], Mapping[str, Any]]) -> None:
    """One event per point: its figures and the footprint with them, or why there are none."""
    for number, fields in enumerate(task.points):
        found: dict[str, Any] = {}
        result = outcome(partial(_within_memory, partial(_measure, Point(**fields), task, figures, found)))
        emit({"event": "case", "point": number, "ok": result["ok"], "detail": result["detail"], "figures": found if result["ok"] else None})
        give_back()


def _measure(point: Point, task: PeerTask, figures: Callable[[Point], Mapping[str, Any]], found: dict[str, Any]) -> None:
    found.update(figures(point))  # torch keeps what a point took until it is told to give it back: the footprint is read before that
    now = card_used_bytes(task.device)
    found["footprint_bytes"] = None if now is None or task.used_bytes is None else now - task.used_bytes


def run_placed(task: PeerTask, emit: Emit, place: Place) -> None:
    """Point after point: the weights, then passes, or prompts, under the point's cap."""

    def figures(point: Point) -> Mapping[str, Any]:
        model, warm = place(point, task.device)
        return measured(model, point, task.device, warm)

    run_points(task, emit, figures)


def give_back() -> None:
    """The last model's memory: hooks and modules hold each other."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _within_memory(run: Callable[[], None]) -> None:
    import torch

    try:
        run()
    except torch.OutOfMemoryError as error:
        raise LimitError(f"out of memory under the cap: {str(error).splitlines()[0]}") from error


# -- the model -------------------------------------------------------------------------------------------------------------------------------


def config_fields(point: Point) -> dict[str, Any]:
    """The config as published, without its type and dtype."""
    return {key: value for key, value in CONFIGS[point.model.removeprefix("dummy:")].items() if key not in ("model_type", "dtype")}


def host_model(point: Point) -> Any:
    """The model of a point in host memory, with random weights of its dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(len(choose_cores(gpu=True, emulated=False).pilot))  # our own workers do with one
    dtype = getattr(torch, DTYPES[point.spec.weight_dtype])
    config = AutoConfig.for_model(CONFIGS[point.model.removeprefix("dummy:")]["model_type"], **config_fields(point))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.tie_weights()
    _real_buffers(model, config)
    _materialise(model, dtype, point.spec)
    return model


def _real_buffers(model: Any, config: Any) -> None:
    """Rotary frequencies are computed when a module is made, and on meta they were not."""
    for module in model.modules():
        for name, child in module.named_children():
            if hasattr(child, "inv_freq"):
                setattr(module, name, type(child)(config))


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


# -- memory ----------------------------------------------------------------------------------------------------------------------------------


def kv_bytes(spec: ModelSpec, point: Point) -> int:
    return point.num_seqs * (point.workload.seq_len) * spec.kv_bytes_per_token(spec.weight_dtype)


def room_for_weights(point: Point) -> int:
    """Bytes of the cap that are left beside the reserve and the KV cache. LimitError when there are none."""
    room = point.gpu_memory - RESERVE_BYTES - kv_bytes(point.spec, point)
    if room < 0:
        raise LimitError(f"KV of {kv_bytes(point.spec, point)} bytes does not fit on the card under the cap; this peer keeps it there")
    return room


def cap_process(point: Point, device: str) -> None:
    """Torch's allocator takes no more than the point's cap, whatever a peer asks of it."""
    import torch

    if device.startswith("cuda:"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (point.gpu_memory - RESERVE_BYTES // 2) / total), torch.device(device))


# -- passes ----------------------------------------------------------------------------------------------------------------------------------


def measured(model: Any, point: Point, device: str, warm: int = WARM) -> dict[str, Any]:
    """Tokens per second: generated after ``point.context`` random tokens of KV, or read from prompts."""
    import torch
    from transformers import DynamicCache

    spec, seconds = point.spec, []
    dtype, generator = getattr(torch, DTYPES[spec.weight_dtype]), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        cache = DynamicCache()
        if point.kind == "decode":
            shape = (point.num_seqs, spec.num_kv_heads, point.context - 1, spec.head_dim)
            values = torch.randn(shape, generator=generator).to(dtype).to(device)
            for layer in range(spec.num_layers):
                cache.update(values, values.clone(), layer)
        for _ in range(warm + TIMED):
            if point.kind == "prefill":
                cache = DynamicCache()
            ids = torch.randint(3, 100, (point.num_seqs, 1 if point.kind == "decode" else point.context), generator=generator).to(device)
            began = time.perf_counter()
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            int(logits[0, -1].argmax())  # waits for the device
            seconds.append(time.perf_counter() - began)
    tokens = point.num_seqs * (1 if point.kind == "decode" else point.context)
    return {"tokens_per_s": tokens * TIMED / sum(seconds[warm:]), "pass_s": seconds[warm:]}
