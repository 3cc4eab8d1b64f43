"""One side's measuring ground: its linears, attention and small instructions, run in a rig over memory that the caches do not hold.

Owns those experiments and what a repeated run "takes". Knows nothing of the other side or of the link (`contention.py`).
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from twinpilots.config import KvDtype
from twinpilots.device.base import GpuDevice
from twinpilots.hardware.peaks import host_region_bytes
from twinpilots.hardware.profile import AttentionRates, Curve
from twinpilots.hardware.rig import Rig, instruction, work_s
from twinpilots.kernels.abi import ACT_CODES, DTYPE_CODES, NULL, Epilogue, NormKind, Op
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.model.weight_format import FORMATS

Side = Literal["cpu", "gpu"]
K = TypeVar("K", bound=Hashable)
MIN_RUNS = 3
MOST_RUNS = 9
MOST_INSTRUCTIONS = 5000  # per queue: what the rig has room for. Only tiny models have so many linears in a cycle, and theirs lie in cache in a pass, too
GPU_CACHE_BYTES = 40 << 20
PAGE = 16  # tokens
OFFSET_MASK = (1 << 56) - 1
MOST_FIXED = 0.5  # of an instruction's time that may be its fixed part
FILL = {"fp32": 0x3C, "bf16": 0x3C, "int8": 0x3C}  # bytes that make ordinary small numbers in each format
FILL_HALF = 0x2C  # in fp16, and in the fp16 scales of quantised formats


Experiments = dict[tuple[str, int], Callable[[], float]]  # by kind ("bf16/out"; "int8/long" of attention), and tokens or context: each returns seconds


@dataclass
class Bench:
    """One side's measuring ground: where its weights, activations and pages lie in the rig."""

    rig: Rig
    side: Side
    spec: ModelSpec
    tokens: int
    region_frac: float = 1.0
    weights: int = 0
    weight_bytes: int = 0
    filled: int = -1
    buffers: dict[str, int] = field(default_factory=dict)
    instructions: dict[tuple[str, int], float] = field(default_factory=dict)  # per weight, of the linears' experiments
    first_s: dict[tuple[str, int], float] = field(default_factory=dict)  # what these took when they were made up

    def __post_init__(self) -> None:
        spec = self.spec
        alloc = self.rig.alloc_host if self.side == "cpu" else self.rig.alloc_gpu
        self.weight_bytes = weight_region_bytes(self.rig.gpu is not None and self.side == "gpu", gpu_arena_bytes(self.rig.gpu), self.region_frac)
        self.weights = alloc(self.weight_bytes)
        self.fill_weights(spec.weight_dtype)
        widths = {"wide": max(spec.intermediate_size, spec.q_size + 2 * spec.kv_size), "hidden": spec.hidden_size, "out": spec.hidden_size, "attn": spec.q_size}
        for name, width in widths.items():
            self.buffers[name] = alloc(4 * width * self.tokens)
            self.rig.fill(self.buffers[name], 4 * width * self.tokens, FILL["fp32"])
        self.wide = widths["wide"]

    @property
    def region(self) -> NDArray[np.uint8]:
        """The CPU's weight memory."""
        assert self.side == "cpu"
        return self.rig.host.view(self.weights & OFFSET_MASK, np.dtype(np.uint8), (self.weight_bytes,))

    def run(self, rows: list[tuple[object, ...]]) -> np.ndarray:
        return self.rig.run({self.side: rows})[self.side]

    def run_cold(self, rows: list[tuple[object, ...]]) -> np.ndarray:
        """As `run`, with weights out of cache: an emulated GPU's memory may be smaller than the processor's L3, which other weights fill in a real pass."""
        if self.rig.gpu is not None and self.rig.gpu.emulated and self.side == "gpu":
            self.rig.read_host(host_region_bytes() // 2)
        return self.run(rows)

    def fill_weights(self, weights: str) -> None:
        """Ordinary numbers in this format, unless they are there already."""
        value = FILL.get(weights, FILL_HALF)
        if value != self.filled:
            self.rig.fill(self.weights, self.weight_bytes, value)
            self.filled = value

    @property
    def most_common(self) -> str:
        """The kind that most of the model's weights split along the output have."""
        sizes = Counter[str]()
        for op in self.spec.ops(64):
            if op.split_dim == "out":
                sizes[op.rate_key] += op.weight_bytes
        return sizes.most_common(1)[0][0]

    def ops(self, rate_key: str) -> list[OpSpec]:
        """One layer's linears of a kind (`OpSpec.rate_key`), as if all that can be were of that kind: those of the model may be too few to cycle through."""
        name, *fast, dim = rate_key.split("/")
        weights = FORMATS[name]
        ops = [op for op in self.spec.layer_ops(0, 64).values() if op.split_dim == dim]
        shapes = {op.name: (op.width, op.rows) if dim == "out" else (op.rows, op.width) for op in ops}  # (inputs, outputs)
        return [replace(op, format=weights, fast=bool(fast)) for op in ops if weights.fits(*shapes[op.name], op.split_dim)]

    def linears(self, rate_key: str) -> tuple[list[tuple[object, ...]], list[int]]:
        """The layer's linears of a kind over and over, through all of the weight region once; and how many weights each has."""
        ops = self.ops(rate_key)
        rows: list[tuple[object, ...]] = []
        elements: list[int] = []
        position = 0
        while True:
            op = ops[len(rows) % len(ops)]
            count = max(min(op.unit_rows, op.rows), min(op.rows, self.weight_bytes // 4 // (op.row_bytes * op.unit_rows) * op.unit_rows))
            if position + count * op.row_bytes > self.weight_bytes or len(rows) == MOST_INSTRUCTIONS:
                return rows, elements
            rows.append(self._linear(op, count, self.weights + position))
            elements.append(count * op.row_elements)
            position += -(-count * op.row_bytes // 64) * 64

    def _linear(self, op: OpSpec, count: int, weight: int) -> tuple[object, ...]:
        spec, b = self.spec, self.buffers
        dtype = DTYPE_CODES[op.format.name]
        fast = int(op.fast and self.side == "cpu")
        if op.split_dim == "in":
            return instruction(Op.LINEAR_IN, (b["out"], spec.hidden_size, b["wide"], self.wide, weight, dtype, count, spec.hidden_size, 0, fast))
        epilogue = {"gate_up_proj": Epilogue.ACT_MUL, "fc1": Epilogue.ACT}.get(op.name, Epilogue.NONE)
        where = (b["wide"], self.wide, b["hidden"], spec.hidden_size, weight, dtype)
        return instruction(Op.LINEAR, (*where, count, op.width, op.unit_rows, epilogue, ACT_CODES[spec.activation], NULL, NULL, fast))

    @property
    def kv_dtypes(self) -> tuple[KvDtype, ...]:
        """The types of KV that attention is measured over: the weights' own first."""
        return (self.spec.weight_dtype, "int8")

    def experiments(self, grid: Sequence[int], run_s: float) -> Experiments:
        """What `rates` needs, ready to run again and again. A linear's experiment goes through all weights while that takes at most ``run_s``; where
        computing takes longer than reading, through as many as that allows."""
        found: Experiments = {}
        for key in self.spec.rate_keys:
            rows, elements = self.linears(key)
            cycle, count = len(self.ops(key)), len(rows)
            weight_s = 0.0
            for i, tokens in enumerate(grid):
                expected_s = weight_s * tokens / grid[max(i - 1, 0)]
                while count > cycle and expected_s * sum(elements[:count]) > run_s:
                    count -= cycle
                self.instructions[key, tokens] = count / sum(elements[:count])
                found[key, tokens] = functools.partial(self._weight_s, key.partition("/")[0], rows[:count], sum(elements[:count]), tokens)
                weight_s = self.first_s[key, tokens] = found[key, tokens]()
        found["fixed", 0] = self._fixed_s
        for kv_dtype in self.kv_dtypes:
            for name, context in self._contexts(kv_dtype).items():
                found[f"{kv_dtype}/{name}", context] = functools.partial(self._decode_attention_s, kv_dtype, context)
            found[f"{kv_dtype}/prefill", 0] = functools.partial(self._prefill_attention_s, kv_dtype)
        return found

    def curves(self, seconds: Mapping[tuple[str, int], float], grid: Sequence[int]) -> dict[str, Curve]:
        """What the typical seconds of the experiments say of each kind of linears."""
        curves = {}
        for key in self.spec.rate_keys:
            # More tokens never take less time: where they seem to, a neighbour was busy at the smaller count.
            each = [self._net_s(seconds[key, tokens], seconds["fixed", 0] * self.instructions[key, tokens]) for tokens in grid]
            monotone = np.minimum.accumulate(each[::-1])[::-1]
            curves[key] = Curve(x=tuple(float(tokens) for tokens in grid), y=tuple(float(y) for y in monotone))
        return curves

    def attention_rates(self, seconds: Mapping[tuple[str, int], float], kv_dtype: KvDtype) -> AttentionRates:
        """Decode attention: KV bytes per second and what each sequence costs beside; prefill attention: FLOPs per second."""
        contexts = self._contexts(kv_dtype)
        longest, short = contexts["long"], contexts["short"]
        long_s, short_s = seconds[f"{kv_dtype}/long", longest], seconds[f"{kv_dtype}/short", short]
        per_token_s = (long_s - short_s) / (longest - short) if long_s > short_s else long_s / longest
        query = self._prefill_tokens(kv_dtype)
        return AttentionRates(
            bytes_per_s=self.spec.kv_token_bytes(kv_dtype) / per_token_s, seq_s=max(0.0, short_s - short * per_token_s),
            flops_per_s=self.spec.attention_flops(1, query * (query + 1) / 2) / seconds[f"{kv_dtype}/prefill", 0],
        )  # fmt: skip

    @staticmethod
    def _net_s(seconds: float, fixed_s: float) -> float:
        """Without what an instruction takes however little it does: that is a task's (`task_s`), and a slice has few weights to share it."""
        return max(seconds - fixed_s, (1.0 - MOST_FIXED) * seconds)

    def _fixed_s(self) -> float:
        """The work of an instruction on one row."""
        self.rig.set_tokens(1)
        return float(np.median(work_s(self.run([self.norm()] * 20))))

    def _weight_s(self, weights: str, rows: list[tuple[object, ...]], elements: int, tokens: int) -> float:
        """Seconds per weight of these linears."""
        self.fill_weights(weights)
        self.rig.set_tokens(tokens)
        return float(work_s(self.run_cold(rows)).sum()) / elements

    def norm(self) -> tuple[object, ...]:
        """A small instruction that every interpreter runs alike."""
        b, hidden = self.buffers, self.spec.hidden_size
        return instruction(Op.NORM, (b["out"], hidden, b["hidden"], hidden, b["attn"], NULL, hidden, NormKind.RMS), (1e-5,))

    def elementwise_rate(self) -> float:
        """Bytes per second of a norm over many rows (read and write counted)."""
        tokens, hidden = self.tokens, self.spec.hidden_size
        self.rig.set_tokens(tokens)
        row = self.norm()
        return 8.0 * tokens * hidden / repeated_s(lambda: float(np.median(work_s(self.run([row] * 5)))), 0.02, self.rig.clock)

    def task_s(self) -> float:
        """Fixed cost of a task: the time of a one-row norm, dispatch between instructions included."""
        self.rig.set_tokens(1)
        row = self.norm()

        def per_task() -> float:
            trace = self.run([row] * 100)
            return float(trace[-1, 2] - trace[0, 0]) * 1e-9 / 100

        return repeated_s(per_task, 0.02, self.rig.clock)

    def _contexts(self, kv_dtype: KvDtype) -> dict[str, int]:
        """A long and a short context of whole pages; equal where memory has room for one page only."""
        longest = max(PAGE, min(512, self.weight_bytes // 16 // self.spec.kv_page_bytes(kv_dtype, PAGE) * PAGE))
        return {"long": longest, "short": max(PAGE, longest // 8 // PAGE * PAGE)}

    def _prefill_tokens(self, kv_dtype: KvDtype) -> int:
        return min(256, self.tokens, self._contexts(kv_dtype)["long"])

    def _decode_attention_s(self, kv_dtype: KvDtype, context: int) -> float:
        """Seconds that one sequence of ``context`` tokens adds to a call of decode attention, through pages in the weight region."""
        seq_bytes = context // PAGE * self.spec.kv_page_bytes(kv_dtype, PAGE)
        num_seqs = max(1, min(8, self.tokens, self.weight_bytes // (4 * seq_bytes)))
        layer_bytes = num_seqs * seq_bytes
        layers = max(1, min(32, self.weight_bytes // layer_bytes))
        self.fill_weights(kv_dtype)
        self.rig.set_sequences([(1, context)] * num_seqs, PAGE)
        rows = [self._attend(self.weights + layer * layer_bytes, kv_dtype) for layer in range(layers)]
        return float(work_s(self.run_cold(rows)).sum()) / (layers * num_seqs)

    def _prefill_attention_s(self, kv_dtype: KvDtype) -> float:
        query = self._prefill_tokens(kv_dtype)
        self.fill_weights(kv_dtype)
        self.rig.set_sequences([(query, query)], PAGE)
        return float(work_s(self.run([self._attend(self.weights, kv_dtype)])).sum())

    def _attend(self, kv: int, kv_dtype: KvDtype) -> tuple[object, ...]:
        spec, b = self.spec, self.buffers
        page_stride = spec.kv_page_bytes(kv_dtype, PAGE)
        args = (b["attn"], spec.q_size, b["wide"], self.wide, spec.num_heads, spec.num_kv_heads, spec.head_dim, kv, page_stride, PAGE, DTYPE_CODES[kv_dtype], 0)
        return instruction(Op.ATTEND, args, (spec.softmax_scale, 0.0))


def weight_region_bytes(on_gpu: bool, gpu_budget_bytes: int, host_frac: float = 1.0) -> int:
    """How much weight memory an experiment cycles through: beyond the caches, but at most half of the GPU's memory."""
    if not on_gpu:
        return int(host_frac * host_region_bytes())
    return min(max(GPU_CACHE_BYTES, gpu_budget_bytes // 4), gpu_budget_bytes // 2)  # a quarter of a GiB is more than any card's L2


def gpu_arena_bytes(gpu: GpuDevice | None) -> int:
    return 0 if gpu is None else min(gpu.memory_bytes, 1 << 30)


def in_rounds(
    experiments: Mapping[K, Callable[[], float]], until_s: float, clock: Callable[[], float] = time.perf_counter, *, least: int = MIN_RUNS,
    before: Mapping[K, float] = MappingProxyType({}),
) -> dict[K, float]:  # fmt: skip
    """What each experiment takes: all of them in turn, ``least`` to MOST_RUNS times, of which ``before`` has the first of some; beyond ``least`` until the
    clock says ``until_s``. A second in which a neighbour is busy then costs each of them one run, not one of them all its runs."""
    found: dict[K, list[float]] = {key: [before[key]] if key in before else [] for key in experiments}
    for number in range(MOST_RUNS):
        for key, experiment in experiments.items():
            if len(found[key]) > number:
                continue
            if number >= least and clock() >= until_s:
                break
            found[key].append(experiment())
    return {key: typical_s(runs) for key, runs in found.items()}


def repeated_s(experiment: Callable[[], float], budget_s: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """What one experiment takes, as `in_rounds`."""
    return in_rounds({0: experiment}, clock() + budget_s, clock)[0]


def typical_s(runs: Sequence[float]) -> float:
    """What a run takes: the lower quartile. Neighbours on a shared box only ever add time, so the lower part says more about the machine than the middle."""
    return float(np.quantile(runs, 0.25, method="lower"))
