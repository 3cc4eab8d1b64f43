"""The offline profiler: measures on the real devices what the planner needs, through the executor's own queues.

Owns what is measured and in which order; the experiments are `bench.py`'s and `contention.py`'s, the peaks of CUDA cards are here. Knows nothing of plans;
`store.py` keeps the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import cache

from twinpilots.device.base import GpuDevice
from twinpilots.device.cpu import CpuPilot, choose_cores
from twinpilots.device.memory import host_memory_available_bytes
from twinpilots.hardware.bench import GPU_CACHE_BYTES, MIN_RUNS, Bench, Side, gpu_arena_bytes, in_rounds, repeated_s
from twinpilots.hardware.contention import measure_link, packet_bytes, with_contention, with_kv_copies, with_peers
from twinpilots.hardware.peaks import PeakMeter, host_region_bytes, timed_s
from twinpilots.hardware.profile import ComputeProfile, HardwareProfile
from twinpilots.hardware.rig import Rig
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.tasks import Queue

FULL_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_GRID = (1, 2, 4, 8, 16, 64, 256)  # kernels walk few tokens in steps: what lies between two points there is no straight line
PEAK_RUNS = 12
PEAK_REPEATS = 10


def measure(
    pilot: CpuPilot,
    gpu: GpuDevice | None,
    spec: ModelSpec,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> HardwareProfile:
    """Measures this machine for models of ``spec``'s formats and widths. ``quick`` takes about 4 s with fewer points, otherwise under 60 s."""
    grid: tuple[int, ...] = QUICK_GRID if quick else FULL_GRID
    budget_s = 0.3 if quick else 4.0
    rig_bytes = host_region_bytes() + GPU_CACHE_BYTES + 2 * packet_bytes(gpu)
    rig_bytes += 16 * max(grid) * (spec.intermediate_size + spec.hidden_size * 4 + spec.q_size * 4)
    gpu_budget = gpu_arena_bytes(gpu)
    if gpu and gpu_budget < (64 << 20):
        grid = grid[:-2]
    with Rig(pilot, gpu, host_bytes=rig_bytes, gpu_bytes=gpu_budget) as rig:
        benches: dict[Side, Bench] = {side: Bench(rig, side, spec, max(grid)) for side in (("cpu", "gpu") if gpu else ("cpu",))}
        progress("linears and attention")
        sides = _measure_compute(benches, grid, budget_s, pilot.threads, gpu)
        link = None
        if gpu:
            progress("link: packets, small copies, hand-off, contention")
            link = with_kv_copies(rig, benches["gpu"], measure_link(rig, spec))
            sides = with_peers(rig, benches, with_contention(rig, benches, sides, link))
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


def _measure_compute(
    benches: dict[Side, Bench], grid: Sequence[int], budget_s: float, threads: int, gpu: GpuDevice | None
) -> dict[Side, ComputeProfile]:  # fmt: skip
    """Both sides in the same rounds, so that a busy neighbour does not make one look slower than the other."""
    experiments = {
        (side, key): run
        for side, bench in benches.items()
        for key, run in bench.experiments(grid, budget_s / len(grid) / MIN_RUNS).items()
    }  # fmt: skip
    seconds = in_rounds(experiments, budget_s * sum(len(bench.spec.rate_keys) for bench in benches.values()))
    sides: dict[Side, ComputeProfile] = {}
    for side, bench in benches.items():
        of_side = {key: found for (of, key), found in seconds.items() if of == side}
        own, *others = bench.kv_dtypes
        attention = bench.attention_rates(of_side, own)
        # An emulated GPU computes on one core of the CPU's kind, so its peaks are one core's.
        on_card = side == "gpu" and gpu is not None and not gpu.emulated
        read_rate, flop_rate = _cuda_peaks(bench.spec.weight_dtype, gpu.name) if on_card and gpu else cpu_peaks(threads if side == "cpu" else 1)
        sides[side] = ComputeProfile(
            name=side, linear=bench.curves(of_side, grid), attention_bytes_per_s=attention.bytes_per_s, attention_flops_per_s=attention.flops_per_s,
            attention_seq_s=attention.seq_s, kv_attention={kv_dtype: bench.attention_rates(of_side, kv_dtype) for kv_dtype in others},
            elementwise_bytes_per_s=bench.elementwise_rate(), task_s=bench.task_s(),
            read_bytes_per_s=read_rate, flops_per_s=flop_rate,
        )  # fmt: skip
    return sides


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
        return 4 * data.numel() / repeated_s(lambda: _cuda_s(data.sum, device), 0.2)

    def gemm_rate() -> float:
        kind, size = {"fp32": (torch.float32, 4096), "bf16": (torch.bfloat16, 8192), "fp16": (torch.float16, 8192)}[dtype]
        square = torch.randn(size, size, device=device, dtype=kind)  # all ones would draw less power, and run faster, than real numbers
        result = torch.empty_like(square)
        return 2 * size**3 / repeated_s(lambda: _cuda_s(lambda: torch.mm(square, square, out=result), device), 0.2)

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


def _measure_step(rig: Rig, benches: dict[Side, Bench]) -> float:
    """The driver's cost of a pass outside the queues' work: submitting, waking and collecting one instruction per queue."""
    rig.set_tokens(1)
    row: dict[Queue, list[tuple[object, ...]]] = {}
    for side, bench in benches.items():
        row[side] = [bench.norm()]
    return repeated_s(lambda: timed_s(lambda: rig.run(dict(row))), 0.05)
