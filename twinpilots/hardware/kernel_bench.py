"""Single kernels of the CPU pilot, timed as a pass runs them: the same instructions, queue, threads and pages.

Owns the cases (which kernel, which weight format, how many tokens) and the memory that they cycle through. `measure.py` fits a machine's profile with the
same rig; this times one kernel at a time, to be held against the limits. Knows nothing of limits or of how results are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from twinpilots.config import KvDtype
from twinpilots.device.cpu import CpuPilot
from twinpilots.hardware.peaks import host_region_bytes
from twinpilots.hardware.rig import Rig, instruction
from twinpilots.kernels.abi import ACT_CODES, DTYPE_CODES, NULL, Dtype, Epilogue, Op
from twinpilots.model.spec import ModelSpec
from twinpilots.model.weight_format import FORMATS, WeightFormat

Kernel = Literal["linear-out", "linear-in", "mlp-block", "decode-attention", "prefill-attention"]
LINEARS: tuple[Kernel, ...] = ("linear-out", "linear-in", "mlp-block")
KERNELS: tuple[Kernel, ...] = (*LINEARS, "decode-attention", "prefill-attention")
KV_FORMATS: dict[str, KvDtype] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "int8": "int8"}
FAST = "/fast"  # of a format's name: activations rounded to 8 bits, as --quantization int4-fast does
UNIT_ROWS = 64
PAGE_TOKENS = 16
MOST_REGION_BYTES = 768 << 20
MOST_INSTRUCTIONS = 4096
SPARE_BYTES = 4096  # alignment
WEIGHT_BYTE = 0x2C  # every format reads it as ordinary small numbers: denormals and NaN are slower than the truth
ACTIVATION_BYTE = 0x3C

Instruction = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One row of the bench. ``format`` is a weight format's name, with `FAST` behind it for rounded activations, or the KV cache's type.

    Linears: ``tokens`` rows of activations. Attention: ``sequences`` of ``tokens`` queries each, that end at ``context`` tokens.
    """

    kernel: Kernel
    format: str
    tokens: int
    sequences: int = 1
    context: int = 0

    @property
    def weight_format(self) -> WeightFormat:
        return FORMATS[self.format.removesuffix(FAST)]

    @property
    def kv_dtype(self) -> KvDtype:
        return KV_FORMATS[self.format]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Instructions that run a case, and how much of it they are: bytes read of weights or KV, and floating-point operations."""

    rows: tuple[Instruction, ...]
    num_bytes: float
    flops: float


def supported_formats() -> tuple[str, ...]:
    """Weight formats that the kernels know, each quantised one with exact and with fast activations."""
    known = [f for f in FORMATS.values() if f.name.upper() in Dtype.__members__]
    return tuple(name for f in known for name in ((f.name, f.name + FAST) if f.is_quantized else (f.name,)))


def whole_work(spec: ModelSpec, case: KernelCase) -> tuple[float, float]:
    """(bytes, FLOPs) of one whole kernel: of all its weights, or of all its sequences' KV. Activations stay in the caches and are not counted."""
    if case.kernel in LINEARS:
        weights = spec.intermediate_size * spec.hidden_size * (_mlp_parts(spec) if case.kernel == "mlp-block" else 1)
        return weights * case.weight_format.bytes_per_weight, 2.0 * weights * case.tokens
    num_bytes = float(spec.kv_token_bytes(case.kv_dtype) * case.sequences * case.context)
    mean_context = case.context - (case.tokens - 1) / 2
    return num_bytes, spec.attention_flops(case.sequences * case.tokens, mean_context)


def fits(spec: ModelSpec, case: KernelCase) -> bool:
    """Whether the model's widths can be kept in the format, and the sequences' pages in the memory that a bench may take."""
    if case.kernel not in LINEARS:
        return whole_work(spec, case)[0] <= MOST_REGION_BYTES
    fmt, sizes = case.weight_format, (spec.hidden_size, spec.intermediate_size)
    return (case.kernel == "linear-in" or fmt.fits(*sizes, "out")) and (case.kernel == "linear-out" or fmt.fits(*sizes[::-1], "in"))


def _mlp_parts(spec: ModelSpec) -> int:
    return 3 if spec.gated_mlp else 2


class KernelBench:
    """Runs cases in the widths of ``spec`` with the pilot's threads. Close it, or use it as a context manager."""

    def __init__(self, pilot: CpuPilot, spec: ModelSpec, *, most_tokens: int, most_bytes: float) -> None:
        self.spec = spec
        self._cycle_bytes = host_region_bytes()  # as the read rate that it is held against
        self.region_bytes = int(min(MOST_REGION_BYTES, max(self._cycle_bytes, most_bytes))) // 4096 * 4096
        widths = {"wide": max(spec.intermediate_size, spec.q_size + 2 * spec.kv_size), "act": spec.intermediate_size, "out": max(spec.hidden_size, spec.q_size)}
        self._rig = Rig(pilot, None, host_bytes=self.region_bytes + 4 * most_tokens * sum(widths.values()) + SPARE_BYTES, gpu_bytes=0)
        self._weights = self._rig.alloc_host(self.region_bytes)
        self._rig.fill(self._weights, self.region_bytes, WEIGHT_BYTE)
        self._buffers = {name: self._rig.alloc_host(4 * width * most_tokens) for name, width in widths.items()}
        for name, width in widths.items():
            self._rig.fill(self._buffers[name], 4 * width * most_tokens, ACTIVATION_BYTE)
        self._wide = widths["wide"]

    def work(self, case: KernelCase, most_frac: float) -> Work:
        """The case as many times as cycle through more memory than the caches hold, but at most ``most_frac`` of it in all: then one slice of it."""
        whole_bytes, whole_flops = whole_work(self.spec, case)
        copies = max(1, min(self.region_bytes / whole_bytes, MOST_INSTRUCTIONS / 2, self._cycle_bytes / whole_bytes + 1, most_frac))
        rows, done_frac = self._linear_work(case, copies, most_frac) if case.kernel in LINEARS else self._attention_work(case, int(copies))
        return Work(rows=tuple(rows), num_bytes=done_frac * whole_bytes, flops=done_frac * whole_flops)

    def seconds(self, case: KernelCase, work: Work) -> float:
        """One run on the queue, from its first instruction's start to the last one's end."""
        if case.kernel in LINEARS:
            self._rig.set_tokens(case.tokens)
        else:
            self._rig.set_sequences([(case.tokens, case.context)] * case.sequences, PAGE_TOKENS)
        trace = self._rig.run({"cpu": list(work.rows)})["cpu"]
        return float(trace[-1, 2] - trace[0, 1]) * 1e-9

    def _linear_work(self, case: KernelCase, copies: float, most_frac: float) -> tuple[list[Instruction], float]:
        """Copies lie one behind the other. A slice has whole units of the intermediate dimension and whole blocks of the format."""
        fmt, spec = case.weight_format, self.spec
        unit = int(np.lcm(UNIT_ROWS, fmt.block))
        row_bytes = spec.hidden_size * fmt.bytes_per_weight * (_mlp_parts(spec) if case.kernel == "mlp-block" else 1)
        share = min(1.0, most_frac, self.region_bytes / (spec.intermediate_size * row_bytes))
        count = spec.intermediate_size if share == 1.0 else max(unit, int(share * spec.intermediate_size) // unit * unit)
        rows: list[Instruction] = []
        for copy in range(int(copies)):
            rows += self._linears(case, self._weights + int(copy * count * row_bytes) // 64 * 64, min(count, spec.intermediate_size))
        return rows, int(copies) * min(count, spec.intermediate_size) / spec.intermediate_size

    def _linears(self, case: KernelCase, weight: int, count: int) -> Iterator[Instruction]:
        """``count`` rows of the intermediate dimension."""
        spec, b, fmt = self.spec, self._buffers, case.weight_format
        dtype, activations = Dtype[fmt.name.upper()], int(case.format.endswith(FAST)) if fmt.is_quantized else NULL
        if case.kernel != "linear-in":
            gated = case.kernel == "mlp-block" and spec.gated_mlp
            epilogue = Epilogue.NONE if case.kernel == "linear-out" else Epilogue.ACT_MUL if gated else Epilogue.ACT
            ends = (b["act"], spec.intermediate_size, b["wide"], self._wide, weight, dtype, count, spec.hidden_size)
            yield instruction(Op.LINEAR, (*ends, UNIT_ROWS, epilogue, ACT_CODES[spec.activation], NULL, NULL, activations))
            weight += int(count * spec.hidden_size * fmt.bytes_per_weight) * (1 + gated)
        if case.kernel != "linear-out":
            source = (b["act"], spec.intermediate_size) if case.kernel == "mlp-block" else (b["wide"], self._wide)
            yield instruction(Op.LINEAR_IN, (b["out"], spec.hidden_size, *source, weight, dtype, count, spec.hidden_size, 0, activations))

    def _attention_work(self, case: KernelCase, copies: int) -> tuple[list[Instruction], float]:
        spec, b = self.spec, self._buffers
        page_bytes = spec.kv_page_bytes(case.kv_dtype, PAGE_TOKENS)
        layer_bytes = page_bytes * -(-case.context // PAGE_TOKENS) * case.sequences
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        copies = max(1, min(copies, self.region_bytes // layer_bytes))

        def attend(layer: int) -> Instruction:
            kv = self._weights + layer * layer_bytes
            args = (b["out"], spec.q_size, b["wide"], self._wide, *heads, kv, page_bytes, PAGE_TOKENS, DTYPE_CODES[case.kv_dtype], 0)
            return instruction(Op.ATTEND, args, (spec.softmax_scale, 0.0))

        return [attend(layer) for layer in range(copies)], copies

    def close(self) -> None:
        self._rig.close()

    def __enter__(self) -> KernelBench:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
