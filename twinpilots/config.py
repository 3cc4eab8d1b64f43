"""The options of an engine: frozen, keyword-only, validated once.

Owns what each option may be. What an option means for a model or a machine is decided where models and machines are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from twinpilots.errors import UserError
from twinpilots.units import parse_bytes

POLICY_NAMES = ("auto", "twinpilots", "flexgen", "hetegen", "layer-split", "stream", "cpu", "resident")
KvDtype = Literal["fp32", "bf16", "fp16", "int8"]
KV_DTYPES: dict[str, KvDtype | None] = {
    "auto": None, "fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "int8": "int8",
}  # fmt: skip
Quantization = Literal["int8", "int4", "int4-fast"]
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "int4", "int4-fast")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Validated arguments of `LLM`. Sizes in bytes, None: decided by measurement and plan. ``kv_dtype`` None: the model's own."""

    dtype: str
    quantization: Quantization | None
    keep: tuple[str, ...]
    device: str
    gpu_bytes: int | None
    host_bytes: int | None
    max_model_len: int | None
    max_num_seqs: int | None
    kv_dtype: KvDtype | None
    policy: str
    plan: Any  # a Plan, the path of its JSON, or None
    threads: int | None
    seed: int
    deterministic: bool
    unit_rows: int | None
    enable_prefix_caching: bool

    @staticmethod
    def of(
        *, dtype: str, quantization: str | None, device: str, gpu_memory: int | str | None, host_memory: int | str | None, max_model_len: int | None,
        max_num_seqs: int | None, kv_cache_dtype: str, policy: str, plan: Any, threads: int | None, seed: int, deterministic: bool, unit_rows: int | None,
        keep: Sequence[str] = (), enable_prefix_caching: bool = True,
    ) -> EngineConfig:  # fmt: skip
        """Check and convert. Raises ValueError that names the option, the value and what it may be; UserError for what this version cannot do."""
        _check_choice("policy", policy, POLICY_NAMES)
        _check_choice("kv_cache_dtype", kv_cache_dtype, tuple(KV_DTYPES))
        if quantization is not None:
            _check_choice("quantization", quantization, QUANTIZATIONS)
        patterns = (keep,) if isinstance(keep, str) else tuple(keep)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"keep must be patterns of weight names, got {keep!r}")
        for name, value in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs), ("threads", threads), ("unit_rows", unit_rows)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if deterministic and device.startswith("cuda"):
            raise UserError("deterministic=True is not available on cuda: its kernels are not batch-invariant; use device='cpu'")
        return EngineConfig(
            dtype=dtype, quantization=cast("Quantization | None", quantization), keep=patterns, device=device,
            gpu_bytes=_size("gpu_memory", gpu_memory), host_bytes=_size("host_memory", host_memory), max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, kv_dtype=KV_DTYPES[kv_cache_dtype], policy=policy, plan=plan, threads=threads, seed=seed,
            deterministic=bool(deterministic), unit_rows=unit_rows, enable_prefix_caching=bool(enable_prefix_caching),
        )  # fmt: skip

    def read_plan(self) -> str | None:
        """The JSON text of the plan file, None when the plan is not a path. Raises UserError when it cannot be read."""
        if not isinstance(self.plan, str | Path):
            return None
        try:
            return Path(self.plan).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"plan {self.plan} cannot be read: {error}") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _size(name: str, value: int | str | None) -> int | None:
    if value is None:
        return None
    try:
        size = parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if size < 1 or not math.isfinite(size):
        raise ValueError(f"{name} must be a positive size, got {value!r}")
    return size
