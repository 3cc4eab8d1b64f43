"""The offline profiler: measures on the real devices what the planner needs, through the executor's own queues.

Owns the experiments and their arithmetic. Every rate is the lower quartile of repeated runs, with weights that cycle through more memory than the caches
hold. Knows nothing of plans; `store.py` keeps the result.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from typing import Literal

import numpy as np

from twinpilots.device.base import GpuDevice
from twinpilots.device.cpu import CpuPilot, choose_cores
from twinpilots.device.memory import host_memory_available_bytes
from twinpilots.hardware.peaks import PeakMeter, host_region_bytes
from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile, LinkProfile
from twinpilots.hardware.rig import Rig, instruction, work_s
from twinpilots.kernels.abi import ACT_CODES, DTYPE_CODES, NULL, Epilogue, NormKind, Op
from twinpilots.model.spec import BYTES_PER_WEIGHT, ModelSpec, OpSpec
from twinpilots.model.weight_format import FORMATS
from twinpilots.plan.tasks import Queue

Side = Literal["cpu", "gpu"]
PEERS: tuple[tuple[Side, Side], ...] = (("cpu", "gpu"), ("gpu", "cpu"))
FULL_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_GRID = (1, 4, 16, 64, 256)
MIN_RUNS = 3
PEAK_RUNS = 12
SLOWDOWN_RUNS = 7
HANDOFFS = 100
MOST_INSTRUCTIONS = 5000  # per queue: what the rig has room for. Only tiny models have so many linears in a cycle, and theirs lie in cache in a pass, too
CONTENTION_TOKENS = 4  # still bound by memory, but with some work: where a GPU and a CPU most often share a pass
PACKETS_PER_CARD = 128  # a plan's ring is a 32nd of GPU memory, in four packets
PEAK_REPEATS = 10
GPU_CACHE_BYTES = 40 << 20
FILL = {"fp32": 0x3C, "bf16": 0x3C}  # bytes that make ordinary small numbers in each format
FILL_HALF = 0x2C  # in fp16, and in the fp16 scales of quantised formats


@dataclass
class _Bench:
    """One side's measuring ground: where its weights, activations and pages lie in the rig."""

    rig: Rig
    side: Side
    spec: ModelSpec
    tokens: int
    weights: int = 0
    weight_bytes: int = 0
    buffers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = self.spec
        alloc = self.rig.alloc_host if self.side == "cpu" else self.rig.alloc_gpu
        self.weight_bytes = weight_region_bytes(self.rig.gpu is not None and self.side == "gpu", _gpu_budget(self.rig.gpu))
        self.weights = alloc(self.weight_bytes)
        self.fill_weights(spec.weight_dtype)
        widths = {"wide": max(spec.intermediate_size, spec.q_size + 2 * spec.kv_size), "hidden": spec.hidden_size, "out": spec.hidden_size, "attn": spec.q_size}
        for name, width in widths.items():
            self.buffers[name] = alloc(4 * width * self.tokens)
            self.rig.fill(self.buffers[name], 4 * width * self.tokens, FILL["fp32"])
        self.wide = widths["wide"]

    def run(self, rows: list[tuple[object, ...]]) -> np.ndarray:
        return self.rig.run({self.side: rows})[self.side]

    def run_cold(self, rows: list[tuple[object, ...]]) -> np.ndarray:
        """As `run`, with weights out of cache: an emulated GPU's memory may be smaller than the processor's L3, which other weights fill in a real pass."""
        if self.rig.gpu is not None and self.rig.gpu.emulated and self.side == "gpu":
            self.rig.read_host(host_region_bytes() // 2)
        return self.run(rows)

    def fill_weights(self, weights: str) -> None:
        """Ordinary numbers in this format."""
        self.rig.fill(self.weights, self.weight_bytes, FILL.get(weights, FILL_HALF))

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

    def curve(self, rate_key: str, grid: Sequence[int], budget_s: float) -> Curve:
        """Seconds per weight at each token count. All weights while that is quick; where computing takes longer than reading, as many as the time allows."""
        self.fill_weights(rate_key.partition("/")[0])
        rows, elements = self.linears(rate_key)
        cycle = len(self.ops(rate_key))
        per_weight: list[float] = []
        for i, tokens in enumerate(grid):
            expected_s = per_weight[-1] * tokens / grid[i - 1] if per_weight else 0.0
            runs_s = budget_s / len(grid) / MIN_RUNS
            count = len(rows)
            while count > cycle and expected_s * sum(elements[:count]) > runs_s:
                count -= cycle
            count = max(min(cycle, len(rows)), count)
            self.rig.set_tokens(tokens)
            seconds = _typical_s(lambda count=count: float(work_s(self.run_cold(rows[:count])).sum()), runs_s)  # type: ignore[misc]
            per_weight.append(seconds / sum(elements[:count]))
        # More tokens never take less time: where they seem to, a neighbour was busy at the smaller count.
        monotone = np.minimum.accumulate(per_weight[::-1])[::-1]
        return Curve(x=tuple(float(t) for t in grid), y=tuple(float(y) for y in monotone))

    def norm(self) -> tuple[object, ...]:
        """A small instruction that every interpreter runs alike."""
        b, hidden = self.buffers, self.spec.hidden_size
        return instruction(Op.NORM, (b["out"], hidden, b["hidden"], hidden, b["attn"], NULL, hidden, NormKind.RMS), (1e-5,))

    def elementwise_rate(self) -> float:
        """Bytes per second of a norm over many rows (read and write counted)."""
        tokens, hidden = self.tokens, self.spec.hidden_size
        self.rig.set_tokens(tokens)
        row = self.norm()
        return 8.0 * tokens * hidden / _typical_s(lambda: float(np.median(work_s(self.run([row] * 5)))), 0.02)

    def task_s(self) -> float:
        """Fixed cost of a task: the time of a one-row norm, dispatch between instructions included."""
        self.rig.set_tokens(1)
        row = self.norm()

        def per_task() -> float:
            trace = self.run([row] * 100)
            return float(trace[-1, 2] - trace[0, 0]) * 1e-9 / 100

        return _typical_s(per_task, 0.02)

    def attention(self, kv_dtype: str) -> tuple[float, float]:
        """(KV bytes per second of decode attention, FLOPs per second of prefill attention), through pages in the weight region."""
        spec, element, page = self.spec, BYTES_PER_WEIGHT[kv_dtype], 16
        token_bytes = 2 * spec.kv_size * element
        context = max(page, min(512, self.weight_bytes // 16 // token_bytes // page * page))
        num_seqs = max(1, min(8, self.tokens, self.weight_bytes // (4 * context * token_bytes)))
        layer_bytes = num_seqs * context * token_bytes
        layers = max(1, min(32, self.weight_bytes // layer_bytes))
        self.rig.set_sequences([(1, context)] * num_seqs, page)
        rows = [self._attend(self.weights + layer * layer_bytes, token_bytes * page, page, kv_dtype) for layer in range(layers)]
        decode_s = _typical_s(lambda: float(work_s(self.run_cold(rows)).sum()), 0.1)
        query = min(256, self.tokens, context)
        self.rig.set_sequences([(query, query)], page)
        prefill_s = _typical_s(lambda: float(work_s(self.run(rows[:1])).sum()), 0.1)
        return layers * layer_bytes / decode_s, spec.attention_flops(1, query * (query + 1) / 2) / prefill_s

    def _attend(self, kv: int, page_stride: int, page: int, kv_dtype: str) -> tuple[object, ...]:
        spec, b = self.spec, self.buffers
        args = (b["attn"], spec.q_size, b["wide"], self.wide, spec.num_heads, spec.num_kv_heads, spec.head_dim, kv, page_stride, page, DTYPE_CODES[kv_dtype], 0)
        return instruction(Op.ATTEND, args, (spec.softmax_scale, 0.0))


def weight_region_bytes(on_gpu: bool, gpu_budget_bytes: int) -> int:
    """How much weight memory an experiment cycles through: beyond the caches, but at most half of the GPU's memory."""
    if not on_gpu:
        return host_region_bytes()
    return min(max(GPU_CACHE_BYTES, gpu_budget_bytes // 4), gpu_budget_bytes // 2)  # a quarter of a GiB is more than any card's L2


def packet_bytes(gpu: GpuDevice | None) -> int:
    """Size of the packets that the link is measured with: a CUDA queue takes tens of microseconds to launch one, so small ones would measure that."""
    return 2 << 20 if gpu is None or gpu.emulated else 32 << 20


def _gpu_budget(gpu: GpuDevice | None) -> int:
    return 0 if gpu is None else min(gpu.memory_bytes, 1 << 30)


def _typical_s(experiment: Callable[[], float], budget_s: float) -> float:
    """The lower quartile of at least MIN_RUNS and at most 9 runs of an experiment that returns seconds, within a time budget after those."""
    began = time.perf_counter()
    found: list[float] = []
    while len(found) < MIN_RUNS or (len(found) < 9 and time.perf_counter() - began < budget_s):
        found.append(experiment())
    return typical_s(found)


def typical_s(runs: Sequence[float]) -> float:
    """What a run takes: the lower quartile. Neighbours on a shared box only ever add time, so the lower part says more about the machine than the middle."""
    return float(np.quantile(runs, 0.25, method="lower"))


def measure(
    pilot: CpuPilot,
    gpu: GpuDevice | None,
    spec: ModelSpec,
    *,
    kv_dtype: str | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> HardwareProfile:
    """Measures this machine for models of ``spec``'s formats and widths. ``quick`` takes about 2 s with fewer points, otherwise under 60 s."""
    grid: tuple[int, ...] = QUICK_GRID if quick else FULL_GRID
    budget_s = 0.3 if quick else 4.0
    rig_bytes = host_region_bytes() + GPU_CACHE_BYTES + 2 * packet_bytes(gpu)
    rig_bytes += 16 * max(grid) * (spec.intermediate_size + spec.hidden_size * 4 + spec.q_size * 4)
    gpu_budget = _gpu_budget(gpu)
    if gpu and gpu_budget < (64 << 20):
        grid = grid[:-2]
    with Rig(pilot, gpu, host_bytes=rig_bytes, gpu_bytes=gpu_budget) as rig:
        sides: dict[Side, ComputeProfile] = {}
        benches: dict[Side, _Bench] = {}
        for side in ("cpu", "gpu") if gpu else ("cpu",):
            progress(f"{side}: linears, attention, small ops")
            bench = benches[side] = _Bench(rig, side, spec, max(grid))
            sides[side] = _measure_compute(bench, grid, budget_s, kv_dtype or spec.weight_dtype, pilot.threads if side == "cpu" else 1, gpu)
        link = None
        if gpu:
            progress("link: packets, small copies, hand-off, contention")
            link = _measure_link(rig, spec)
            sides = _with_peers(rig, benches, _with_contention(rig, benches, sides, link))
        step_s = _measure_step(rig, benches)
    # What DRAM gives is at least what all cores read, and what the pilot reads beside a busy link together with what the link takes.
    dram = cpu_peaks(len(choose_cores(gpu=False, emulated=False).pilot))[0]
    if link is not None:
        dram = max(dram, sides["cpu"].read_bytes_per_s / sides["cpu"].copy_slowdown + link.up_bytes_per_s)
    return HardwareProfile(
        name=f"this machine ({gpu.name})" if gpu else "this machine",
        source=f"measured {date.today().isoformat()}, {'quick' if quick else 'full'} profile, model widths of {spec.name}",
        cpu=sides["cpu"], gpu=sides.get("gpu"), link=link, host_memory_bytes=host_memory_available_bytes(),
        gpu_memory_bytes=gpu.memory_bytes if gpu else 0, gpu_overhead_bytes=gpu.overhead_bytes if gpu else 0,
        dram_bytes_per_s=dram, cpu_cores=pilot.threads, emulated=bool(gpu and gpu.emulated), step_overhead_s=step_s,
    )  # fmt: skip


def _measure_compute(bench: _Bench, grid: Sequence[int], budget_s: float, kv_dtype: str, threads: int, gpu: GpuDevice | None) -> ComputeProfile:
    dtype = bench.spec.weight_dtype
    linear = {key: bench.curve(key, grid, budget_s) for key in bench.spec.rate_keys}
    bench.fill_weights(kv_dtype)
    # An emulated GPU computes on one core of the CPU's kind, so its peaks are one core's.
    read_rate, flop_rate = _cuda_peaks(dtype, gpu.name) if bench.side == "gpu" and gpu and not gpu.emulated else cpu_peaks(threads)
    attention_bytes, attention_flops = bench.attention(kv_dtype)
    return ComputeProfile(
        name=bench.side, linear=linear, attention_bytes_per_s=attention_bytes, attention_flops_per_s=attention_flops,
        elementwise_bytes_per_s=bench.elementwise_rate(), task_s=bench.task_s(), read_bytes_per_s=read_rate, flops_per_s=flop_rate,
    )  # fmt: skip


@cache
def cpu_peaks(threads: int) -> tuple[float, float]:
    """(DRAM read bytes/s, FMA FLOP/s) of ``threads`` cores, by routines that share nothing with our kernels."""
    with PeakMeter(threads) as meter:
        for _ in range(PEAK_RUNS):
            meter.sample()
        return meter.read_bytes_per_s, meter.flops_per_s


def _cuda_peaks(dtype: str, device: str) -> tuple[float, float]:
    """(read bytes/s, GEMM FLOP/s) of the card, by torch's own kernels; one after the other, for both at once do not fit beside the arena."""
    import torch

    def read_rate() -> float:
        data = torch.ones(64 << 20, dtype=torch.float32, device=device)
        return 4 * data.numel() / _typical_s(lambda: _cuda_s(data.sum, device), 0.2)

    def gemm_rate() -> float:
        kind, size = {"fp32": (torch.float32, 4096), "bf16": (torch.bfloat16, 8192), "fp16": (torch.float16, 8192)}[dtype]
        square = torch.randn(size, size, device=device, dtype=kind)  # all ones would draw less power, and run faster, than real numbers
        result = torch.empty_like(square)
        return 2 * size**3 / _typical_s(lambda: _cuda_s(lambda: torch.mm(square, square, out=result), device), 0.2)

    return read_rate(), gemm_rate()


def _cuda_s(work: Callable[[], object], device: str) -> float:
    """Seconds of ``work`` between events on the device: launching and waiting are not the card's work."""
    import torch

    with torch.cuda.device(device):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        began.record()
        for _ in range(PEAK_REPEATS):
            work()
        ended.record()
        ended.synchronize()
    return float(began.elapsed_time(ended)) * 1e-3 / PEAK_REPEATS


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _loads(rig: Rig, size: int, count: int, target: int, sources: Sequence[int]) -> list[tuple[object, ...]]:
    """``count`` packets of ``size`` bytes to ``target``, from each source in turn."""
    table = rig.alloc_host(24 * len(sources))
    rig.host.view(table & ((1 << 56) - 1), np.dtype(np.int64), (len(sources), 3))[:] = [(target, source, size) for source in sources]
    return [instruction(Op.LOAD, (table + 24 * (i % len(sources)), 1, size)) for i in range(count)]


def _measure_link(rig: Rig, spec: ModelSpec) -> LinkProfile:
    small, big = 64 << 10, packet_bytes(rig.gpu)
    source, target = rig.alloc_host(big), rig.alloc_gpu(big)

    def load_s(size: int) -> float:
        rows = _loads(rig, size, 12, target, [source])

        def per_load() -> float:
            trace = rig.run({"link_in": rows})["link_in"]
            return float(trace[-1, 2] - trace[3, 2]) * 1e-9 / (len(rows) - 4)  # steady state: the link carries its deadline over from packet to packet

        return _typical_s(per_load, 0.05)

    rate = big / load_s(big)
    columns, rows = spec.hidden_size, 64 if rig.gpu is None or rig.gpu.emulated else 512  # a real link takes 64 rows in a few microseconds
    near, far = rig.alloc_gpu(4 * columns * rows), rig.alloc_host(4 * columns * rows)

    def copy_s(tokens: int, down: bool) -> float:
        rig.set_tokens(tokens)
        ends = (far, columns, near, columns) if down else (near, columns, far, columns)
        row = instruction(Op.COPY, (*ends, columns, int(down)))
        return _typical_s(lambda: float(np.median(work_s(rig.run({"gpu": [row] * 20})["gpu"]))), 0.02)

    down_s = copy_s(rows, True)
    copy_fixed_s = max(copy_s(1, True) - 4 * columns / rate, 1e-7)
    return LinkProfile(
        up_bytes_per_s=rate, down_bytes_per_s=4 * columns * (rows - 1) / max(down_s - copy_s(1, True), 1e-9), packet_s=max(load_s(small) - small / rate, 0.0),
        copy_s=copy_fixed_s, handoff_s=_handoff_s(rig, near, far, columns, _loads(rig, small, 40, target, [source])),
        queue_handoff_s=_queue_handoff_s(rig, near, columns, target, source),
    )  # fmt: skip


def _handoff_s(rig: Rig, near: int, far: int, columns: int, loads: list[tuple[object, ...]]) -> float:
    """From a record on one side to the waiting instruction's start on the other: half of a ping-pong's turn, work excluded, while the link is busy as
    in a real pass. On an emulated GPU the link's copies share the core that has to answer."""
    rig.set_tokens(1)
    turns = HANDOFFS
    gain, spare = rig.alloc_host(4 * columns), rig.alloc_host(4 * columns)
    norm = (spare, columns, far, columns, gain, NULL, columns, NormKind.RMS)
    gpu = [instruction(Op.COPY, (far, columns, near, columns, columns, 1), waits=[2 * i] if i else [], record=2 * i + 1) for i in range(turns)]
    cpu = [instruction(Op.NORM, norm, (1e-5,), waits=[2 * i + 1], record=2 * i + 2) for i in range(turns)]

    def per_handoff() -> float:
        traces = rig.run({"link_in": loads, "gpu": gpu, "cpu": cpu})
        total_s = float(traces["cpu"][-1, 2] - traces["gpu"][0, 1]) * 1e-9
        return max(0.0, total_s - float(work_s(traces["gpu"]).sum() + work_s(traces["cpu"]).sum())) / (2 * turns)

    return float(np.median([per_handoff() for _ in range(SLOWDOWN_RUNS)]))


def _queue_handoff_s(rig: Rig, near: int, columns: int, target: int, source: int) -> float:
    """As `_handoff_s`, between the GPU's compute queue and a link queue: what streamed KV waits for."""
    rig.set_tokens(1)
    size = 4 << 10
    table = rig.alloc_host(24)
    rig.host.view(table & ((1 << 56) - 1), np.dtype(np.int64), (3,))[:] = (target, source, size)
    norm = (near, columns, near, columns, near, NULL, columns, NormKind.RMS)
    gpu = [instruction(Op.NORM, norm, (1e-5,), waits=[2 * i] if i else [], record=2 * i + 1) for i in range(HANDOFFS)]
    link = [instruction(Op.LOAD, (table, 1, size), waits=[2 * i + 1], record=2 * i + 2) for i in range(HANDOFFS)]

    def per_handoff() -> float:
        traces = rig.run({"link_in": link, "gpu": gpu})
        total_s = float(traces["link_in"][-1, 2] - traces["gpu"][0, 1]) * 1e-9
        return max(0.0, total_s - float(work_s(traces["gpu"]).sum() + work_s(traces["link_in"]).sum())) / (2 * HANDOFFS)

    return float(np.median([per_handoff() for _ in range(SLOWDOWN_RUNS)]))


def _with_contention(rig: Rig, benches: dict[Side, _Bench], sides: dict[Side, ComputeProfile], link: LinkProfile) -> dict[Side, ComputeProfile]:
    """Each side's slow-down while the link runs at its full rate, from memory out of the caches, in packets of the size that plans choose."""
    assert rig.gpu is not None
    size = max(64 << 10, min(packet_bytes(rig.gpu), rig.gpu.memory_bytes // PACKETS_PER_CARD & -4096))
    target = rig.alloc_gpu(size)
    region = benches["cpu"]
    found = {}
    for side, bench in benches.items():
        rig.set_tokens(CONTENTION_TOKENS)
        rows, _ = bench.linears(bench.most_common)
        alone_s = _typical_s(lambda rows=rows, side=side: float(work_s(rig.run({side: rows})[side]).sum()), 0.05)  # type: ignore[misc]
        count = 4 + int(3 * alone_s * link.up_bytes_per_s / size)
        sources = [region.weights + i * size for i in range(region.weight_bytes // size)]
        loads = _loads(rig, size, count, target, sources)
        ratios = [ratio for _ in range(SLOWDOWN_RUNS) if (ratio := _slowdown(rig, side, rows, loads)) is not None]
        found[side] = replace(sides[side], copy_slowdown=max(1.0, float(np.median(ratios))) if ratios else 1.0)
    return found


def _slowdown(rig: Rig, side: Side, rows: list[tuple[object, ...]], loads: list[tuple[object, ...]]) -> float | None:
    """Time of the instructions that ran while the link was busy, against the same ones alone; None when hardly any did."""
    return _beside(rig.run({"link_in": loads, side: rows}), rig.run({side: rows}), side, "link_in")


def _beside(together: dict[Queue, np.ndarray], alone: dict[Queue, np.ndarray], side: Side, other: Queue) -> float | None:
    trace = together[side]
    busy = (trace[:, 1] >= together[other][0, 1]) & (trace[:, 2] <= together[other][-1, 2])
    return float(work_s(trace)[busy].sum() / work_s(alone[side])[busy].sum()) if busy.mean() > 0.5 else None


def _with_peers(rig: Rig, benches: dict[Side, _Bench], sides: dict[Side, ComputeProfile]) -> dict[Side, ComputeProfile]:
    """Each side's slow-down while the other one reads its weights, too: they may share one memory."""
    rig.set_tokens(CONTENTION_TOKENS)
    rows = {side: bench.linears(bench.most_common)[0] for side, bench in benches.items()}
    alone_s = {side: _typical_s(lambda side=side: float(work_s(rig.run({side: rows[side]})[side]).sum()), 0.02) for side in rows}  # type: ignore[misc]
    for side, other in PEERS:  # both at work for about as long
        times = max(1, round(alone_s[other] / alone_s[side]))
        rows[side] = (rows[side] * times)[:MOST_INSTRUCTIONS]
    ratios: dict[Side, list[float]] = {"cpu": [], "gpu": []}
    for _ in range(SLOWDOWN_RUNS):
        together = rig.run({"gpu": rows["gpu"], "cpu": rows["cpu"]})
        for side, other in PEERS:
            ratio = _beside(together, rig.run({side: rows[side]}), side, other)
            if ratio is not None:
                ratios[side].append(ratio)
    return {side: replace(found, peer_slowdown=max(1.0, float(np.median(ratios[side] or [1.0])))) for side, found in sides.items()}


def _measure_step(rig: Rig, benches: dict[Side, _Bench]) -> float:
    """The driver's cost of a pass outside the queues' work: submitting, waking and collecting one instruction per queue."""
    rig.set_tokens(1)
    row: dict[Queue, list[tuple[object, ...]]] = {}
    for side, bench in benches.items():
        row[side] = [bench.norm()]
    return _typical_s(lambda: _timed(lambda: rig.run(dict(row))), 0.05)
