"""Round-numbered machines for tests of the planner's arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile, roofline_curve
from twinpilots.model.weight_format import FORMATS

LINK = LinkProfile(up_bytes_per_s=1e6, down_bytes_per_s=5e5, packet_s=1e-3, copy_s=2e-3, handoff_s=0.0)


def processor(read: float, flops: float, **changes: Any) -> ComputeProfile:
    kinds = {name: weights.bytes_per_weight for name, weights in FORMATS.items()}
    kinds |= {f"{name}/fast": kinds[name] for name in ("q8_0", "q4_1")}
    curves = {f"{kind}/{dim}": roofline_curve(size, read, flops) for kind, size in kinds.items() for dim in ("out", "in")}
    plain = ComputeProfile(
        name="test", linear=curves, attention_bytes_per_s=read, attention_flops_per_s=flops, elementwise_bytes_per_s=read, task_s=1e-3, read_bytes_per_s=read,
        flops_per_s=flops,
    )  # fmt: skip
    return replace(plain, **changes)


def machine(cpu: ComputeProfile | None = None, gpu: ComputeProfile | None = None, link: LinkProfile = LINK, **changes: Any) -> HardwareProfile:
    """A CPU of 2 MB/s and 8 MFLOP/s beside a GPU ten times as fast, unless given."""
    plain = HardwareProfile(
        name="test", source="made up", cpu=cpu or processor(2e6, 8e6), gpu=gpu or processor(2e7, 8e7), link=link, host_memory_bytes=1 << 30,
        gpu_memory_bytes=1 << 24, dram_bytes_per_s=4e6, cpu_cores=2,
    )  # fmt: skip
    return replace(plain, **changes)


def without_gpu(profile: HardwareProfile) -> HardwareProfile:
    return replace(profile, gpu=None, link=None, gpu_memory_bytes=0)
