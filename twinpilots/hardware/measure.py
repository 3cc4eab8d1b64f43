"""The offline profiler: measures on the real devices what the planner needs, through the executor's own queues.

Owns what is measured and in which order; the experiments are `bench.py`'s and `contention.py`'s, the peaks of CUDA cards are here. Knows nothing of plans;
`store.py` keeps the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twinpilots.device.base import GpuDevice
from twinpilots.device.cpu import choose_cores
from twinpilots.device.memory import host_memory_available_bytes
from twinpilots.hardware.bench import GPU_CACHE_BYTES, Bench, Side, gpu_arena_bytes, in_rounds, repeated_s
from twinpilots.hardware.contention import Slowdown, measure_link, packet_bytes, peer_slowdowns, with_contention, with_kv_copies
from twinpilots.hardware.effort import FULL, QUICK, Effort
from twinpilots.hardware.peaks import PeakMeter, host_region_bytes, peak_memory
from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile
from twinpilots.hardware.rig import Pilot, Rig
from twinpilots.hardware.scaled import Anchors, scaled
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.tasks import RunQueue

ACTIVATIONS_SHARE = 8  # activations of the largest pass that is measured take at most so little of GPU memory
PEAK_REPEATS = 10
Peaks = Callable[[Literal["cpu", "gpu", "all cores"]], tuple[float, float]]  # (read bytes/s, FLOP/s), by routines that share nothing with our kernels


def measure(
    pilot: Pilot,
    gpu: GpuDevice | None,
    spec: ModelSpec,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    peaks: Peaks | None = None,
    clock: Callable[[], float] = time.perf_counter,
    until_s: float = math.inf,
) -> HardwareProfile:
    """Measures this machine for models of ``spec``'s formats and widths. ``quick`` takes 1 to 2 s with fewer points, otherwise under 60 s.

    ``until_s``: when, by the clock, what has been measured once is not measured again. ``peaks`` and ``clock``: of devices that are not this machine's.
    """
    effort = QUICK if quick else FULL
    grid = effort.grid
    rig_bytes = int(effort.region_frac * host_region_bytes()) + GPU_CACHE_BYTES + 2 * packet_bytes(gpu)
    rig_bytes += 16 * max(grid) * (spec.intermediate_size + spec.hidden_size * 4 + spec.q_size * 4)
    gpu_budget = gpu_arena_bytes(gpu)
    token_bytes = 4 * (max(spec.intermediate_size, spec.q_size + 2 * spec.kv_size) + 2 * spec.hidden_size + spec.q_size)
    while gpu and len(grid) > 1 and grid[-1] * token_bytes * ACTIVATIONS_SHARE > gpu_budget:
        grid = grid[:-1]
    with Rig(pilot, gpu, host_bytes=rig_bytes, gpu_bytes=gpu_budget, clock=clock) as rig:
        benches: dict[Side, Bench] = {side: Bench(rig, side, spec, max(grid), effort.region_frac) for side in (("cpu", "gpu") if gpu else ("cpu",))}
        link, slow, peers = None, dict[Side, Slowdown](), dict[Side, float]()
        if gpu:
            progress("link: packets, small copies, hand-off, contention")
            link, slow, peers = _measure_link(rig, benches, effort)
        step_s = _measure_step(rig, benches)
        progress("linears and attention")
        peaks = peaks or _peaks_here(pilot, gpu, spec.weight_dtype, effort.peak_runs, benches["cpu"].region)
        sides = _measure_compute(benches, replace(effort, grid=grid), peaks, clock, until_s)
        dram = peaks("all cores")[0]
    for side, (reading, computing) in slow.items():
        sides[side] = replace(sides[side], copy_slowdown=reading, copy_slowdown_computing=computing, peer_slowdown=peers[side])
    # What DRAM gives is at least what all cores read, and what the pilot reads beside a busy link together with what the link takes.
    if link is not None:
        dram = max(dram, sides["cpu"].read_bytes_per_s / sides["cpu"].copy_slowdown + link.up_bytes_per_s)
    return HardwareProfile(
        name=f"this machine ({gpu.name})" if gpu else "this machine",
        source=f"measured {date.today().isoformat()}, {'quick' if quick else 'full'} profile, model widths of {spec.name}",
        cpu=sides["cpu"], gpu=sides.get("gpu"), link=link, host_memory_bytes=host_memory_available_bytes(),
        gpu_memory_bytes=gpu.memory_bytes if gpu else 0, gpu_overhead_bytes=gpu.overhead_bytes if gpu else 0,
        dram_bytes_per_s=dram, cpu_cores=pilot.threads, emulated=bool(gpu and gpu.emulated), step_overhead_s=step_s,
    )  # fmt: skip


def measure_scaled(
    pilot: Pilot, gpu: GpuDevice | None, spec: ModelSpec, *, peaks: Peaks | None = None, clock: Callable[[], float] = time.perf_counter
) -> HardwareProfile:  # fmt: skip
    """The nearest preset at a few rates of this machine, measured in under 10 s: each processor's reading and multiply-adds, and the link."""
    peaks = peaks or _peaks_here(pilot, gpu, spec.weight_dtype, FULL.peak_runs, peak_memory())
    (cpu_read, cpu_flops), dram = peaks("cpu"), peaks("all cores")[0]
    anchors = Anchors(cpu_read=cpu_read, cpu_flops=cpu_flops)
    if gpu:
        gpu_read, gpu_flops = peaks("gpu")
        room = 4 * packet_bytes(gpu) + (32 << 20)
        with Rig(pilot, gpu, host_bytes=room, gpu_bytes=min(room, gpu_arena_bytes(gpu)), clock=clock) as rig:
            link = measure_link(rig, spec, FULL.slowdown_runs)
        anchors = replace(anchors, gpu_read=gpu_read, gpu_flops=gpu_flops, up=link.up_bytes_per_s, down=link.down_bytes_per_s)
    made = scaled(anchors)
    if gpu:
        made = replace(made, link=link, gpu_memory_bytes=gpu.memory_bytes, gpu_overhead_bytes=gpu.overhead_bytes, emulated=gpu.emulated)
    return replace(
        made, name=f"this machine ({gpu.name})" if gpu else "this machine", host_memory_bytes=host_memory_available_bytes(), dram_bytes_per_s=dram,
        cpu_cores=pilot.threads, disk_bytes_per_s=None,
    )  # fmt: skip


def _measure_link(rig: Rig, benches: dict[Side, Bench], effort: Effort) -> tuple[LinkProfile, dict[Side, Slowdown], dict[Side, float]]:
    """The link, and what both sides lose beside it and beside each other."""
    link = with_kv_copies(rig, benches["gpu"], measure_link(rig, benches["gpu"].spec, effort.slowdown_runs))
    slow, link = with_contention(rig, benches, link, effort)
    return link, slow, peer_slowdowns(rig, benches, effort)


def _measure_compute(benches: dict[Side, Bench], effort: Effort, peaks: Peaks, clock: Callable[[], float], until_s: float) -> dict[Side, ComputeProfile]:
    """Both sides in the same rounds, so that a busy neighbour does not make one look slower than the other."""
    experiments = {(side, key): run for side, bench in benches.items() for key, run in bench.experiments(effort.grid, effort.run_s).items()}
    first_s = {(side, key): seconds for side, bench in benches.items() for key, seconds in bench.first_s.items()} if effort.least_runs == 1 else {}
    rates = {side: peaks(side) for side in benches}
    rounds_s = effort.rounds_s * sum(len(bench.spec.rate_keys) for bench in benches.values())
    seconds = in_rounds(experiments, min(until_s, clock() + rounds_s), clock, least=effort.least_runs, before=first_s)
    sides: dict[Side, ComputeProfile] = {}
    for side, bench in benches.items():
        of_side = {key: found for (of, key), found in seconds.items() if of == side}
        own, *others = bench.kv_dtypes
        attention = bench.attention_rates(of_side, own)
        read_rate, flop_rate = rates[side]
        sides[side] = ComputeProfile(
            name=side, linear=bench.curves(of_side, effort.grid), attention_bytes_per_s=attention.bytes_per_s, attention_flops_per_s=attention.flops_per_s,
            attention_seq_s=attention.seq_s, kv_attention={kv_dtype: bench.attention_rates(of_side, kv_dtype) for kv_dtype in others},
            elementwise_bytes_per_s=bench.elementwise_rate(), task_s=bench.task_s(),
            read_bytes_per_s=read_rate, flops_per_s=flop_rate,
        )  # fmt: skip
    return sides


def _peaks_here(pilot: Pilot, gpu: GpuDevice | None, dtype: str, runs: int, memory: NDArray[np.uint8]) -> Peaks:
    """This machine's, who reads ``memory`` that no cache holds. An emulated GPU computes on one core of the CPU's kind, so its peaks are one core's."""
    every, found = len(choose_cores(gpu=False, emulated=False).pilot), dict[int, tuple[float, float]]()

    def peaks(of: Literal["cpu", "gpu", "all cores"]) -> tuple[float, float]:
        if of == "gpu" and gpu is not None and not gpu.emulated:
            return _cuda_peaks(dtype, gpu.name)
        threads = {"cpu": pilot.threads, "gpu": 1, "all cores": every}[of]
        if threads not in found:
            found[threads] = cpu_peaks(threads, runs, memory)
        return found[threads]

    return peaks


def cpu_peaks(threads: int, runs: int, memory: NDArray[np.uint8]) -> tuple[float, float]:
    """(DRAM read bytes/s, FMA FLOP/s) of so many cores, the best of ``runs`` samples, by routines that share nothing with our kernels."""
    with PeakMeter(threads, memory=memory) as meter:
        return meter.sample(runs)


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
    row: dict[RunQueue, list[tuple[object, ...]]] = {}
    for side, bench in benches.items():
        row[side] = [bench.norm()]

    def run_s() -> float:
        began = rig.clock()
        rig.run(dict(row))
        return rig.clock() - began

    return repeated_s(run_s, 0.05, rig.clock)
