"""Machines described by their data sheets: GPU, link and a named host each, for planning without the hardware.

Owns: `PRESETS`, `load_hardware`, and how a sheet becomes a `HardwareProfile` (attainable fractions of peaks). Knows nothing of models or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twinpilots.errors import UserError
from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile, LinkProfile, roofline_curve
from twinpilots.model.weight_format import FORMATS

GB, GIB, MIB, TERA = 1e9, 1 << 30, 1 << 20, 1e12
# What good kernels reach of the sheet's peak (common GEMM practice); the peaks themselves are kept for the hardware bound.
READ_FRAC, GPU_FLOPS_FRAC, CPU_FLOPS_FRAC = 0.85, 0.6, 0.7
ATTENTION_FRAC = 0.5  # paged attention gathers: measured 13 of 27 GB/s on a core
CONTEXT_BYTES = 600 * MIB  # driver reserve and CUDA context: never the planner's
DISK_READ_S = 100e-6  # stated, not from a sheet: an NVMe drive's latency
MAX_COPY_SLOWDOWN = 2.0  # measured: a bandwidth-bound linear next to a big copy, 1.7 to 2.0 times
# Quantised weights: a GPU unpacks them to 16 bits. A CPU multiplies integers: with activations rounded to 16 bits at about its fp32 rate, with 8 bits faster.
FAST_FLOPS_GAIN = 1.7  # stated, not from a sheet: `bench kernels` measures 1.2 to 1.9 (docs/performance.md)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Published peaks of one machine. Rates per second; ``*_flops`` by weight dtype width: 16-bit and fp32."""

    source: str
    gpu: str
    gpu_memory_bytes: int
    gpu_read: float
    gpu_flops_16: float
    gpu_flops_32: float
    link: float  # attainable host-to-device rate of big pinned copies
    host: str
    host_memory_bytes: int
    cpu_cores: int
    cpu_flops_16: float
    cpu_flops_32: float
    dram: float
    disk: float  # reading
    disk_write: float | None = None
    gpu_flops_frac: float = GPU_FLOPS_FRAC  # of the GPU's peak that products reach; less where power, not the arithmetic units, sets the clock


SHEETS: dict[str, Sheet] = {
    "t4": Sheet(
        source="NVIDIA T4 data sheet (320 GB/s, 65 TFLOPS fp16, 8.1 fp32); host and link of FlexGen (ICML 2023): 208 GB, 12.9 GB/s, disk read 2, write 1 GB/s",
        gpu="NVIDIA T4", gpu_memory_bytes=15 * GIB, gpu_read=320 * GB, gpu_flops_16=65 * TERA, gpu_flops_32=8.1 * TERA, link=12.9 * GB,
        host="GCP n1-highmem-32: 16 cores of a Skylake Xeon at 2.0 GHz, AVX-512, its share (16 of 28 cores) of 6 channels DDR4-2666",
        host_memory_bytes=int(208 * GB), cpu_cores=16, cpu_flops_16=2.0 * TERA, cpu_flops_32=2.0 * TERA, dram=73 * GB, disk=2 * GB,
        disk_write=1 * GB,
        gpu_flops_frac=0.37,  # 70 W cap its clock: cuBLAS reaches 24 TFLOP/s (NVIDIA developer forum, topic 264462)
    ),
    "a10g": Sheet(
        source="NVIDIA A10G data sheet (600 GB/s, 70 TFLOPS fp16, 35 fp32); link of TwinPilots (SYSTOR 2024) figure 6: 13.2 GB/s; AWS g5.16xlarge",
        gpu="NVIDIA A10G", gpu_memory_bytes=24 * GIB, gpu_read=600 * GB, gpu_flops_16=70 * TERA, gpu_flops_32=35 * TERA, link=13.2 * GB,
        host="AMD EPYC 7R32: 32 Zen 2 cores at 2.8 GHz, AVX2, their share (32 of 48) of 8 channels DDR4-3200",
        host_memory_bytes=256 * GIB, cpu_cores=32, cpu_flops_16=2.87 * TERA, cpu_flops_32=2.87 * TERA, dram=136 * GB, disk=2.5 * GB,
    ),
    "rtx-3060": Sheet(
        source="NVIDIA GA106 sheet (360 GB/s, 25.5 TFLOPS fp16 with fp32 sums, 12.7 fp32); PCIe 4.0 x16 measured 24 GB/s; AMD and JEDEC sheets",
        gpu="NVIDIA RTX 3060 12 GB", gpu_memory_bytes=12 * GIB, gpu_read=360 * GB, gpu_flops_16=25.5 * TERA, gpu_flops_32=12.7 * TERA, link=24 * GB,
        host="AMD Ryzen 5 5600X: 6 Zen 3 cores at 3.7 GHz, AVX2, 2 channels DDR4-3200, 64 GB",
        host_memory_bytes=int(64 * GB), cpu_cores=6, cpu_flops_16=0.71 * TERA, cpu_flops_32=0.71 * TERA, dram=51.2 * GB, disk=3.5 * GB,
    ),
    "rtx-4090": Sheet(
        source="NVIDIA Ada white paper (1008 GB/s, 165 TFLOPS fp16 with fp32 sums, 82.6 fp32); PCIe 4.0 x16 measured 24 GB/s; AMD and JEDEC sheets",
        gpu="NVIDIA RTX 4090", gpu_memory_bytes=24 * GIB, gpu_read=1008 * GB, gpu_flops_16=165 * TERA, gpu_flops_32=82.6 * TERA, link=24 * GB,
        host="AMD Ryzen 9 7950X: 16 Zen 4 cores at 4.5 GHz, AVX-512 (bf16 dot products), 2 channels DDR5-5200, 192 GB",
        host_memory_bytes=int(192 * GB), cpu_cores=16, cpu_flops_16=4.6 * TERA, cpu_flops_32=2.3 * TERA, dram=83.2 * GB, disk=7 * GB,
    ),
    "a6000": Sheet(
        source="NVIDIA RTX A6000 data sheet (768 GB/s, 154.8 TFLOPS fp16, 38.7 fp32); 252 GB host of ZeRO-Inference; PCIe 4.0 x16 measured 24 GB/s",
        gpu="NVIDIA RTX A6000", gpu_memory_bytes=48 * GIB, gpu_read=768 * GB, gpu_flops_16=154.8 * TERA, gpu_flops_32=38.7 * TERA, link=24 * GB,
        host="AMD Threadripper PRO 3975WX: 32 Zen 2 cores at 3.5 GHz, AVX2, 8 channels DDR4-3200, 252 GB",
        host_memory_bytes=int(252 * GB), cpu_cores=32, cpu_flops_16=3.58 * TERA, cpu_flops_32=3.58 * TERA, dram=204.8 * GB, disk=3.5 * GB,
    ),
    "h100": Sheet(
        source="NVIDIA H100 SXM data sheet (3350 GB/s, 989 TFLOPS bf16, 67 fp32); PCIe 5.0 x16 measured 55 GB/s; Intel Xeon 8480C sheet",
        gpu="NVIDIA H100 SXM 80 GB", gpu_memory_bytes=80 * GIB, gpu_read=3350 * GB, gpu_flops_16=989 * TERA, gpu_flops_32=67 * TERA, link=55 * GB,
        host="Intel Xeon Platinum 8480C: 56 cores at 2.0 GHz, AVX-512 and AMX (1024 bf16 operations per cycle and core), 8 channels DDR5-4800, 512 GB",
        host_memory_bytes=int(512 * GB), cpu_cores=56, cpu_flops_16=114.7 * TERA, cpu_flops_32=7.2 * TERA, dram=307 * GB, disk=7 * GB,
    ),
}  # fmt: skip


def _linear_curves(read: float, flops_16: float, flops_32: float, quantized_flops: tuple[float, float]) -> dict[str, Curve]:
    """Roofline curves of all weight formats, quantised ones with (exact, fast) activations; ops split along the input cost the same on a sheet."""
    curves = {}
    for chosen in FORMATS.values():
        kinds: dict[str, float] = {chosen.name: flops_32 if chosen.name == "fp32" else flops_16}
        if chosen.is_quantized:
            kinds = dict(zip((chosen.name, f"{chosen.name}/fast"), quantized_flops, strict=True))
        for kind, flops in kinds.items():
            curve = roofline_curve(chosen.bytes_per_weight, read, flops)
            curves[f"{kind}/out"] = curves[f"{kind}/in"] = curve
    return curves


def _processor(
    name: str, read: float, flops_16: float, flops_32: float, flops_frac: float, *, quantized: tuple[float, float], attention_flops: float, task_s: float,
    copy_slowdown: float,
) -> ComputeProfile:  # fmt: skip
    """``quantized``: FLOP/s of linears with quantised weights, activations exact and fast."""
    exact, fast = quantized
    return ComputeProfile(
        name=name,
        linear=_linear_curves(READ_FRAC * read, flops_frac * flops_16, flops_frac * flops_32, (flops_frac * exact, flops_frac * fast)),
        attention_bytes_per_s=ATTENTION_FRAC * read,
        attention_flops_per_s=ATTENTION_FRAC * flops_frac * attention_flops,
        elementwise_bytes_per_s=READ_FRAC * read,
        task_s=task_s,
        read_bytes_per_s=read,
        flops_per_s=max(flops_16, flops_32),
        copy_slowdown=copy_slowdown,
    )


def copy_slowdown(dram_bytes_per_s: float, link_bytes_per_s: float) -> float:
    """How much slower a processor that could use all of DRAM's bandwidth runs while the link takes its part."""
    left = dram_bytes_per_s - link_bytes_per_s
    return min(MAX_COPY_SLOWDOWN, dram_bytes_per_s / left) if left > 0 else MAX_COPY_SLOWDOWN


def from_sheet(name: str, sheet: Sheet) -> HardwareProfile:
    """The profile of a machine at the attainable fractions of its sheet."""
    slowdown = copy_slowdown(READ_FRAC * sheet.dram, sheet.link)
    return HardwareProfile(
        name=name,
        source=f"preset, not measured: {sheet.source}",
        cpu=_processor(  # its attention computes in fp32
            sheet.host, sheet.dram, sheet.cpu_flops_16, sheet.cpu_flops_32, CPU_FLOPS_FRAC,
            quantized=(sheet.cpu_flops_32, FAST_FLOPS_GAIN * sheet.cpu_flops_32), attention_flops=sheet.cpu_flops_32, task_s=4e-6, copy_slowdown=slowdown,
        ),
        gpu=_processor(
            sheet.gpu, sheet.gpu_read, sheet.gpu_flops_16, sheet.gpu_flops_32, sheet.gpu_flops_frac,
            quantized=(sheet.gpu_flops_16, sheet.gpu_flops_16), attention_flops=sheet.gpu_flops_16, task_s=6e-6, copy_slowdown=1.0,
        ),
        link=LinkProfile(up_bytes_per_s=sheet.link, down_bytes_per_s=sheet.link, packet_s=10e-6, copy_s=10e-6, handoff_s=15e-6),
        host_memory_bytes=sheet.host_memory_bytes,
        gpu_memory_bytes=sheet.gpu_memory_bytes - CONTEXT_BYTES,
        dram_bytes_per_s=sheet.dram,
        cpu_cores=sheet.cpu_cores,
        disk_bytes_per_s=sheet.disk,
        disk_write_bytes_per_s=sheet.disk_write,
        disk_read_s=DISK_READ_S,
        step_overhead_s=0.3e-3,
        step_seq_s=20e-6,  # stated, not from a sheet: sampling and bookkeeping of a sequence, as measured on a Zen 4 core
        notes={"gpu": sheet.gpu, "host": sheet.host},
    )  # fmt: skip


def _demo() -> HardwareProfile:
    """The emulated device `emulated:demo` on a plain 2-core AVX2 box: one core plays the GPU, and its link's copies take their time from that core."""
    read, flops, dram = 25 * GB, 90e9, 38.5 * GB

    def core(name: str, slowdown: float, fast_gain: float = 1.0) -> ComputeProfile:
        return ComputeProfile(
            name=name, linear=_linear_curves(read, flops, flops, (flops, fast_gain * flops)), attention_bytes_per_s=5 * GB, attention_flops_per_s=0.5 * flops,
            elementwise_bytes_per_s=8 * GB, task_s=3e-6, read_bytes_per_s=27 * GB, flops_per_s=104e9, copy_slowdown=slowdown,
        )  # fmt: skip

    return HardwareProfile(
        name="demo",
        source="preset, not measured: one AVX2 core at 27 GB/s and 104 GFLOP/s FMA peak for each pilot (measured on AMD Zen 3), a link throttled to 2.5 GB/s",
        cpu=core("one AVX2 core", 1.1, FAST_FLOPS_GAIN),
        gpu=core("one AVX2 core that plays the GPU", 1.25),
        link=LinkProfile(up_bytes_per_s=2.5 * GB, down_bytes_per_s=2.5 * GB, packet_s=20e-6, copy_s=8e-6, handoff_s=15e-6),
        host_memory_bytes=8 * GIB,
        gpu_memory_bytes=32 * MIB,
        dram_bytes_per_s=dram,
        cpu_cores=2,
        emulated=True,
        step_overhead_s=0.5e-3,
        step_seq_s=30e-6,
        notes={"gpu": "emulated", "host": "2 AVX2 cores, 8 GiB"},
    )


PRESETS: Mapping[str, HardwareProfile] = {"demo": _demo(), **{name: from_sheet(name, sheet) for name, sheet in SHEETS.items()}}


def load_hardware(name_or_file: str) -> HardwareProfile:
    """A preset by name, or a profile from a JSON file. Raises UserError that names the value and the presets, or what is wrong with the file."""
    if name_or_file in PRESETS:
        return PRESETS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UserError(f"hardware {name_or_file!r} is neither a preset ({', '.join(PRESETS)}) nor a file; choose one or give a profile's JSON file")
    try:
        return HardwareProfile.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"hardware file {name_or_file}: {error}; `twinpilots profile` writes a valid one") from error
