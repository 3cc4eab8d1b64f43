"""What other systems published, and all that is needed to predict it: cells, machines and the ledger of constants. Data only.

Owns every figure of `benchmarks.published` with the place it comes from. A cell's setup is hardware, lengths, memory cap and how many requests there are
where the source fixes that; a system's own batch, split and policy are constants of the ledger. Knows nothing of how a prediction is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from twinpilots.hardware.presets import GB, GIB, SHEETS, TERA, Sheet

Unit = Literal["tokens/s", "ms", "x", "%"]
Measure = Literal["throughput", "decode rate", "speed-up", "link traffic saved", "whole ops", "fractional", "op"]


# -- machines ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A sheet, and what its link reaches from memory that is not pinned (the driver copies through a buffer of its own)."""

    title: str
    sheet: Sheet
    pageable: float
    pageable_source: str
    disk_bytes: int = 0  # what may lie on its disk


OLD_PAGEABLE = 5.37 * GB, "NVIDIA developer blog, How to Optimize Data Transfers in CUDA C/C++ (2012): i7-3930K, pageable 5.37, pinned 6.19 GB/s"
PCIE4_PAGEABLE = 10.0 * GB, "CUDA bandwidthTest on a DGX A100 (PCIe 4.0 x16, EPYC 7742), gengwg's public notes: pageable 10.0, pinned 25.7 GB/s"
A10 = Sheet(
    source="NVIDIA A10 data sheet (600 GB/s, 125 TFLOPS fp16, 31.2 fp32); HeteGen (MLSys 2024) section 5.1: PCIe at 25 GB/s, at most 16 cores at 2.3 GHz",
    gpu="NVIDIA A10", gpu_memory_bytes=24 * GIB, gpu_read=600 * GB, gpu_flops_16=125 * TERA, gpu_flops_32=31.2 * TERA, link=25 * GB,
    host="Intel Xeon Platinum 8380, the Ice Lake part of 2.3 GHz (assumed): 16 of 40 cores, AVX-512, their share of 8 channels DDR4-3200",
    host_memory_bytes=256 * GIB, cpu_cores=16, cpu_flops_16=2.36 * TERA, cpu_flops_32=2.36 * TERA, dram=81.9 * GB, disk=3.5 * GB,
)  # fmt: skip
RTX_5090 = Sheet(
    source="NVIDIA Blackwell RTX white paper (1792 GB/s, 209.5 TFLOPS fp16 with fp32 sums, 104.8 fp32); Pipelined Sharding (MLSys 2026): PCIe 5 at 50 GB/s",
    gpu="NVIDIA RTX 5090", gpu_memory_bytes=32 * GIB, gpu_read=1792 * GB, gpu_flops_16=209.5 * TERA, gpu_flops_32=104.8 * TERA, link=50 * GB,
    host="16 cores with 153.6 GB/s (4 channels DDR5-4800; a Xeon w5-2465X at 3.1 GHz assumed), AVX-512",
    host_memory_bytes=128 * GIB, cpu_cores=16, cpu_flops_16=3.17 * TERA, cpu_flops_32=3.17 * TERA, dram=153.6 * GB, disk=7 * GB,
)  # fmt: skip
T4 = replace(  # this very card: what its users measured of its products
    SHEETS["t4"], gpu_flops_frac=21.24 / 65, source=f"{SHEETS['t4'].source}; 21.24 TFLOP/s of products (FlexGen repository, experimental/cost_model.py)"
)
MACHINES: dict[str, Machine] = {
    "t4": Machine(  # the disk: FlexGen (ICML 2023) section 6, 1.5 TB
        title="T4 16 GB + 16 cores, 208 GB DRAM, 1.5 TB disk", sheet=T4, pageable=OLD_PAGEABLE[0], pageable_source=OLD_PAGEABLE[1], disk_bytes=int(1.5e12)
    ),
    "a6000": Machine(title="RTX A6000 48 GB + 252 GB DRAM", sheet=SHEETS["a6000"], pageable=PCIE4_PAGEABLE[0], pageable_source=PCIE4_PAGEABLE[1]),
    "a10g": Machine(title="A10G 24 GB + EPYC 7R32", sheet=SHEETS["a10g"], pageable=PCIE4_PAGEABLE[0], pageable_source=PCIE4_PAGEABLE[1]),
    "a10": Machine(title="A10 24 GB + Xeon 2.3 GHz, 16 cores", sheet=A10, pageable=PCIE4_PAGEABLE[0], pageable_source=PCIE4_PAGEABLE[1]),
    "rtx-5090": Machine(title="RTX 5090 32 GB + 16 cores, 153.6 GB/s", sheet=RTX_5090, pageable=PCIE4_PAGEABLE[0], pageable_source=PCIE4_PAGEABLE[1]),
}


# -- cells ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One published figure. ``requests`` None: a batch job as large as a system likes. ``gap``: why we predict nothing here."""

    system: str
    source: str
    model: str  # of model/dummy.py; several, if the figure is over them
    weights: str = "fp16"  # or a quantised format of model/weight_format.py
    machine: str
    input_len: int
    output_len: int
    gpu_memory: float | None = None  # bytes; None: the whole card
    requests: int | None = None
    measure: Measure = "throughput"
    unit: Unit = "tokens/s"
    published: float
    op: str = ""  # measure "op": which, on which device; of several models, the one with the "least" or "most"
    gap: str = ""
    note: str = ""


FLEXGEN = "FlexGen (ICML 2023), benchmark/batch_size_table.md"
ZERO = "ZeRO-Inference README (DeepSpeedExamples, 2023), comparison table"
HETEGEN = "HeteGen (MLSys 2024), figure 6, read off"
SHARDING = "Pipelined Sharding (MLSys 2026), table 4"
FIGURE_6 = "TwinPilots (SYSTOR 2024), figure 6"
TWINPILOTS = "TwinPilots (SYSTOR 2024), section 5"


def _flexgen_table() -> Iterator[Cell]:
    figures = {"opt-6.7b": (25.26, 25.12), "opt-30b": (7.32, 0.62), "opt-175b": (0.69, 0.01)}
    for model, published in figures.items():
        for system, figure in zip(("FlexGen", "accelerate"), published, strict=True):
            yield Cell(
                system=system, source=FLEXGEN, model=model, machine="t4", input_len=512, output_len=32, published=figure,
                note="a tie: both compute from GPU memory" if model == "opt-6.7b" else "",
            )  # fmt: skip


def _zero_table() -> Iterator[Cell]:
    for model, published in {"opt-30b": 21.84, "opt-66b": 8.02, "llama-2-70b": 23.44}.items():
        yield Cell(system="ZeRO-Inference", source=ZERO, model=model, weights="q4_z64", machine="a6000", input_len=512, output_len=32, published=published)


def _hetegen_figure() -> Iterator[Cell]:
    for gigabytes, published in ((1.6, 1.19), (20.4, 2.02)):
        yield Cell(
            system="HeteGen", source=HETEGEN, model="opt-30b", machine="a10", input_len=512, output_len=64, gpu_memory=gigabytes * GB, requests=1,
            published=published,
        )  # fmt: skip


def _sharding_table() -> Iterator[Cell]:
    for gibibytes, requests, published in ((2, 1, 7.6), (8, 1, 12.4), (4, 64, 109.0)):
        yield Cell(
            system="Pipelined Sharding", source=SHARDING, model="minitron-8b", machine="rtx-5090", input_len=908, output_len=116,
            gpu_memory=gibibytes * GIB, requests=requests, measure="decode rate", published=published,
        )  # fmt: skip


def _twinpilots_cells() -> Iterator[Cell]:
    layer = {"machine": "a10g", "input_len": 896, "output_len": 128, "requests": 4}
    for measure, published in (("whole ops", 39.4), ("fractional", 36.6)):
        yield Cell(system="TwinPilots", source=FIGURE_6, model="opt-30b", measure=measure, unit="ms", published=published, **layer)  # type: ignore[arg-type]
    for op, on_gpu, on_cpu in (("q_proj", 7.9, 4.6), ("attention", 12.0, 3.5), ("fc1", 31.5, 18.0)):
        for device, published in (("gpu", on_gpu), ("cpu", on_cpu)):
            yield Cell(
                system="TwinPilots", source=FIGURE_6, model="opt-30b", measure="op", unit="ms", published=published, op=f"{op}/{device}", **layer  # type: ignore[arg-type]
            )  # fmt: skip
    for model, published in (("llama-13b", 3.39), ("llama-33b", 2.15), ("opt-30b", 2.83)):
        yield Cell(system="TwinPilots", source=TWINPILOTS, model=model, measure="speed-up", unit="x", published=published, **layer)  # type: ignore[arg-type]
    for op, published in (("least", 57.0), ("most", 72.0)):
        yield Cell(
            system="TwinPilots", source=TWINPILOTS, model="llama-13b, llama-33b, opt-30b", measure="link traffic saved", unit="%", published=published, op=op,
            note="the source gives the range over the three models", **layer,  # type: ignore[arg-type]
        )  # fmt: skip
    yield Cell(
        system="Park, Jo & Egger", source="Park, Jo & Egger (APSys 2023), abstract", model="opt-175b", machine="a10g", input_len=512, output_len=32,
        measure="speed-up", unit="x", published=1.4, gap="GPU, DRAM and NVMe together: we know neither its models nor its lengths",
    )  # fmt: skip


CELLS: tuple[Cell, ...] = (*_flexgen_table(), *_zero_table(), *_hetegen_figure(), *_sharding_table(), *_twinpilots_cells())


# -- the ledger ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One constant of one system's implementation or policy, and the place that names it. ``model``: a policy choice for that model only."""

    system: str
    name: str
    value: float
    unit: str
    source: str
    model: str = ""
    derived: tuple[tuple[str, float], ...] = ()  # estimated from figures of the cells themselves: the mean of these, by op and device


OPT_30B_PROJECTION_BYTES = 2 * 7168**2
COST_MODEL = "FlexGen repository, experimental/cost_model.py, CostModelConfig (its authors' fit to the T4)"
SUITE = "FlexGen repository, benchmark/flexllmgen/bench_suite.py"
HF_BENCH = "FlexGen repository, benchmark/hf_ds"
DEEPSPEED = "DeepSpeedExamples, inference/huggingface/zero_inference"
ARTIFACT = "Pipelined Sharding artifact, deepshnv/pipeshard-mlsys26-ae"
LLAMA_CPP_RUNS = (
    f"{ARTIFACT}, paper_results/benchmark_summary_5090_base.csv: plain llama.cpp, minitron-8b at 1K, 16 threads, takes 51.8 ms longer with 17 more layers of "
    "367 MB on the CPU, where the GPU took 0.24 ms for each"
)


def _of(system: str, *rows: tuple[str, float, str, str], model: str = "") -> tuple[Constant, ...]:
    return tuple(Constant(system=system, name=name, value=value, unit=unit, source=source, model=model) for name, value, unit, source in rows)


FLEXGEN_LEDGER = (
    *_of(
        "FlexGen",
        ("gpu_prefill_flops", 21.24 * TERA, "FLOP/s", f"{COST_MODEL}: mm_flops_p"),
        ("gpu_decode_flops", 4.3 * TERA, "FLOP/s", f"{COST_MODEL}: mm_flops_g"),
        ("gpu_prefill_attention_flops", 9.97 * TERA, "FLOP/s", f"{COST_MODEL}: bmm_flops_p"),
        ("gpu_decode_attention_flops", 0.079 * TERA, "FLOP/s", f"{COST_MODEL}: bmm_flops_g (one FLOP per byte of fp16 KV)"),
        ("cpu_attention_flops", 12.3e9, "FLOP/s", f"{COST_MODEL}: cpu_flops"),
        ("overlaps_loads_in_decode", 0, "bool", f"{COST_MODEL}: Tgen = ctogg + max(...)"),
    ),
    *_of(
        "FlexGen", ("batch", 2, "sequences", f"{SUITE}: suite_6b7_1x1"), ("gpu_batches", 1, "micro-batches", f"{SUITE}: suite_6b7_1x1"),
        ("weights_on_gpu", 1.0, "share", f"{SUITE}: suite_6b7_1x1, --percent 100 0 100 0"),
        ("weights_on_disk", 0.0, "share", f"{SUITE}: suite_6b7_1x1, --percent 100 0 100 0"), model="opt-6.7b",
    ),
    *_of(
        "FlexGen", ("batch", 144, "sequences", f"{SUITE}: suite_30b_1x1, --gpu-batch-size 48 --num-gpu-batches 3"),
        ("gpu_batches", 3, "micro-batches", f"{SUITE}: suite_30b_1x1"),
        ("weights_on_gpu", 0.2, "share", f"{SUITE}: suite_30b_1x1, --percent 20 80 0 100"),
        ("weights_on_disk", 0.0, "share", f"{SUITE}: suite_30b_1x1, --percent 20 80 0 100"), model="opt-30b",
    ),
    *_of(
        "FlexGen", ("batch", 256, "sequences", f"{SUITE}: suite_175b_1x1, --gpu-batch-size 32 --num-gpu-batches 8"),
        ("gpu_batches", 8, "micro-batches", f"{SUITE}: suite_175b_1x1"),
        ("weights_on_gpu", 0.0, "share", f"{SUITE}: suite_175b_1x1, --percent 0 50 0 0 --cpu: the rest of weights and all KV on the disk"),
        ("weights_on_disk", 0.5, "share", f"{SUITE}: suite_175b_1x1, --percent 0 50 0 0"), model="opt-175b",
    ),
)  # fmt: skip
TRANSFORMERS_LEDGER = (
    *_of(
        "transformers",
        ("kv_passes", 3, "passes", "transformers 4.31, modeling_opt.py and modeling_llama.py: torch.cat reads and writes the cache each step, bmm reads it"),
        ("repeats_kv", 1, "bool", "transformers 4.31, modeling_llama.py: repeat_kv writes a KV head once per query head of its group, and bmm reads that"),
    ),
    *_of(
        "accelerate",
        ("overlaps_loads", 0, "bool", "accelerate 0.15, hooks.py: AlignDevicesHook.pre_forward moves a module's weights when it runs"),
        ("pins_weights", 0, "bool", f"{HF_BENCH}/hf_opt.py: from_pretrained with a device map; nothing is pinned"),
    ),
    *_of(
        "accelerate", ("batch", 2, "sequences", f"{HF_BENCH}/bench_hf.py"), ("weights_on_gpu", 1.0, "share", f"{HF_BENCH}/bench_hf.py: device gpu"),
        ("weights_on_disk", 0.0, "share", f"{HF_BENCH}/bench_hf.py: device gpu"), model="opt-6.7b",
    ),
    *_of(
        "accelerate", ("batch", 8, "sequences", f"{HF_BENCH}/bench_hf.py"),
        ("weights_on_gpu", 0.0, "share", f"{HF_BENCH}/hf_opt.py: all layers on the CPU, lm_head on the GPU"),
        ("weights_on_disk", 0.0, "share", f"{HF_BENCH}/hf_opt.py: all layers on the CPU"), model="opt-30b",
    ),
    *_of(
        "accelerate", ("batch", 2, "sequences", f"{FLEXGEN}: 2 (disk)"), ("weights_on_gpu", 0.0, "share", f"{FLEXGEN}: 2 (disk)"),
        ("weights_on_disk", 1.0, "share", f"{FLEXGEN}: 2 (disk)"), model="opt-175b",
    ),
)  # fmt: skip
ZERO_LEDGER = (
    *_of(
        "ZeRO-Inference",
        ("live_parameters", 2, "hidden^2", f"{DEEPSPEED}/run_model.py: stage3_max_live_parameters; with a weight of that size nothing is fetched ahead"),
        ("codes_per_parameter", 2, "codes", "DeepSpeed, inference/quantization: two 4-bit codes are one uint8 parameter"),
        ("unpacks_to_16_bits", 1, "bool", "DeepSpeed, inference/quantization: weights are dequantised before each linear"),
        ("host_kv_bytes", 4, "bytes", "tjruwase/transformers, modeling_opt.py: host attention multiplies fp32 queries with the cache"),
    ),
    *_of(
        "ZeRO-Inference", ("batch", 24, "sequences", ZERO), ("host_kv", 0, "bool", f"{ZERO}: no KV offload"),
        ("pins_weights", 1, "bool", f"{DEEPSPEED}/run_opt30b_a6000.sh: --pin-memory 1"), model="opt-30b",
    ),
    *_of(
        "ZeRO-Inference", ("batch", 64, "sequences", ZERO), ("host_kv", 1, "bool", f"{ZERO}: KV offload, attention on the CPU (model-support.md)"),
        ("pins_weights", 0, "bool", f"{DEEPSPEED}/run_opt66b_a6000.sh: --pin-memory 0"), model="opt-66b",
    ),
    *_of(
        "ZeRO-Inference", ("batch", 96, "sequences", ZERO), ("host_kv", 0, "bool", f"{ZERO}: no KV offload"),
        ("pins_weights", 1, "bool", f"{DEEPSPEED}/run_llama2_70b_a6000.sh: --pin-memory 1"), model="llama-2-70b",
    ),
)  # fmt: skip
SHARDING_LEDGER = _of(
    "Pipelined Sharding",
    ("cpu_read", 111.5 * GB, "bytes/s", LLAMA_CPP_RUNS),
    ("prefill_chunk", 1024, "tokens", f"{ARTIFACT}, paper_results/repro_table4.sh: -ub 1024"),
    ("head_on_gpu", 0, "bool", f"{ARTIFACT}, src/llama-pipeline.h: STRATEGY_CONFIGS has the output on the CPU unless everything fits"),
    ("attends_on_cpu_beside_streams", 0, "bool", f"{ARTIFACT}, src/llama-pipeline.h: FULL_SHARD brings a layer's KV along with its weights"),
)
TWINPILOTS_LEDGER = (
    Constant(
        system="TwinPilots", name="cpu_read", value=22.6 * GB, unit="bytes/s", source=f"{FIGURE_6}: weights read per second by its CPU kernels",
        derived=(("q_proj/cpu", OPT_30B_PROJECTION_BYTES / 4.6e-3), ("fc1/cpu", 4 * OPT_30B_PROJECTION_BYTES / 18.0e-3)),
    ),
    Constant(
        system="TwinPilots", name="link", value=13.0 * GB, unit="bytes/s", source=f"{FIGURE_6}: weights loaded per second",
        derived=(("q_proj/gpu", OPT_30B_PROJECTION_BYTES / 7.9e-3), ("fc1/gpu", 4 * OPT_30B_PROJECTION_BYTES / 31.5e-3)),
    ),
    *_of("TwinPilots", ("baseline_weights_on_gpu", 0.0, "share", f"{FIGURE_6}: its all-GPU column loads every op, KV included")),
)  # fmt: skip
LEDGER: tuple[Constant, ...] = (*FLEXGEN_LEDGER, *TRANSFORMERS_LEDGER, *ZERO_LEDGER, *SHARDING_LEDGER, *TWINPILOTS_LEDGER)
