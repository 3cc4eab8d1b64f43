"""How each published system runs a cell, in our simulator's terms: its kernels as a `HardwareProfile`, its policy as a `Plan`.

Owns the translation of ledger constants into profiles and plans, one function per system. The simulator that prices them is the product's own
(`plan/pricing.py`): nothing here adds, scales or caps a predicted time. Knows nothing of published figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.published_data import LEDGER, MACHINES, Cell, Constant
from twinpilots.hardware.presets import GPU_FLOPS_FRAC, READ_FRAC, from_sheet
from twinpilots.hardware.profile import TOKEN_GRID, Curve, HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.model.quantization import fits, weight_names, with_formats
from twinpilots.model.spec import ModelSpec
from twinpilots.model.weight_format import FORMATS
from twinpilots.plan.draft import Draft, PlanOptions, everything_resident, fill_resident, ring_rule
from twinpilots.plan.packets import align, smallest_ring
from twinpilots.plan.plan import Phase, Plan
from twinpilots.plan.policies import build_policy
from twinpilots.plan.pricing import Price, price_plan
from twinpilots.plan.problem import Problem, fill, no_cpu
from twinpilots.plan.spill import with_share
from twinpilots.plan.workload import Limits, Workload

DECODE_TOKENS = 64  # where FlexGen's cost model changes from decode's rate of products to prefill's: no GPU batch of its decode is larger
NO_LIMIT = Limits(gpu_bytes=1 << 50, host_bytes=1 << 50)  # a published run fitted its machine; what fits ours is asked of `ours` only
HALF_BYTES = 2


@dataclass(kw_only=True)
class Ledger:
    """The constants, looked up by system, name and model; remembers which were used. ``without``: an op's figure that no estimate may rest on."""

    constants: tuple[Constant, ...] = LEDGER
    without: str = ""
    used: set[tuple[str, str, str]] = field(default_factory=set)

    def get(self, system: str, name: str, model: str = "") -> float:
        """The constant's value. KeyError for one that the ledger does not have."""
        for constant in self.constants:
            if (constant.system, constant.name, constant.model) == (system, name, model):
                self.used.add((system, name, model))
                estimates = [value for cell, value in constant.derived if cell != self.without]
                return sum(estimates) / len(estimates) if estimates else constant.value
        raise KeyError(f"the ledger has no constant {name!r} of {system} {model}".rstrip())


@dataclass(frozen=True, kw_only=True)
class Run:
    """A system's run of one cell: what it is priced with, and the price."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    plan: Plan
    price: Price

    @property
    def decode_per_s(self) -> float:
        """Generated tokens per second of decode alone."""
        return self.workload.num_requests / self.price.step_s

    @property
    def link_bytes(self) -> float:
        """Bytes over the link in both directions in a decode step."""
        passes = [each for each in self.price.passes if each.phase == "decode"]
        return sum(each.count * sum(each.timing.bytes.values()) for each in passes) / sum(each.count for each in passes)


def spec_of(cell: Cell) -> ModelSpec:
    spec = dummy_spec(cell.model, "fp16")
    if cell.weights == "fp16":
        return spec
    chosen = FORMATS[cell.weights].name
    return with_formats(spec, {name: chosen for name in weight_names(spec) if fits(spec, name, chosen)}, fast=False)


def hardware(cell: Cell) -> HardwareProfile:
    return from_sheet(cell.machine, MACHINES[cell.machine].sheet)


def workload(cell: Cell, num_seqs: int) -> Workload:
    return Workload(num_requests=num_seqs, input_len=cell.input_len, output_len=cell.output_len, max_num_seqs=num_seqs)


def simulated(cell: Cell, ledger: Ledger) -> Run:
    """The cell's system on the cell's machine."""
    return SYSTEMS[cell.system](cell, ledger)


def _run(problem: Problem, plan: Plan) -> Run:
    price = price_plan(problem.spec, problem.profile, problem.workload, plan)
    return Run(spec=problem.spec, profile=problem.profile, workload=problem.workload, plan=plan, price=price)


# -- systems that stream and let the GPU compute: one block of whole prompts, swept layer by layer ---------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Block:
    """``num_seqs`` sequences in ``batches`` GPU batches; ``weights_on_gpu``: share; ``overlaps``: the next layer loads while this one is computed."""

    num_seqs: int
    batches: int = 1
    weights_on_gpu: float = 0.0
    weights_on_disk: float = 0.0  # of all weights, as the GPU's
    head_on_gpu: bool = False
    overlaps: bool = True
    host_kv: bool = False
    kv_on_disk: bool = False
    cpu_attention: bool = False
    kv_dtype: str = "fp16"


def block_plan(cell: Cell, spec: ModelSpec, profile: HardwareProfile, block: Block) -> tuple[Problem, Plan]:
    """The block's plan: prompts pass in one sweep over the weights, as these systems do, and prefill attention is the GPU's."""
    options = PlanOptions(kv_dtype=block.kv_dtype)  # type: ignore[arg-type]
    problem = Problem.of(spec, profile, workload(cell, block.num_seqs), NO_LIMIT, options)
    packet_bytes, depth = ring_rule(MACHINES[cell.machine].sheet.gpu_memory_bytes)
    micro_batches: Mapping[Phase, int] = {"prefill": block.batches, "decode": block.batches}
    draft = Draft(
        policy="flexgen", num_seqs=block.num_seqs, gpu_seqs=0 if block.host_kv else block.num_seqs, pass_tokens=block.num_seqs * cell.input_len,
        micro_batches=micro_batches, uses_cpu=block.host_kv, streams=block.weights_on_gpu < 1, ring_depth=depth, packet_bytes=packet_bytes,
        staging_seqs=block.num_seqs if block.host_kv else 0, host_attention="cpu" if block.cpu_attention else "gpu", host_prefill_attention="gpu",
        kv_on_disk=block.kv_on_disk,
    )  # fmt: skip
    residency = fill_resident(spec, problem.templates, int(block.weights_on_gpu * spec.linear_bytes), leftover=False)
    if block.weights_on_gpu == 1:
        residency = everything_resident(spec, problem.ops)
    elif block.head_on_gpu:
        residency = (*residency[:-1], {"lm_head": problem.ops["lm_head"].rows})
    plan = problem.plan(draft, residency, no_cpu)
    if draft.streams and not block.overlaps:  # a buffer of one layer: it is loaded when the last one has been used
        one_layer = sum(align(split.streamed * problem.ops[name].row_bytes) for name, split in plan.buckets[0].splits[0].items())
        plan = problem.plan(replace(draft, packet_bytes=one_layer, ring_depth=1), residency, no_cpu)
    if block.weights_on_disk:  # whole packets are read: room for two, so that the disk works on
        staging_bytes = 2 * smallest_ring(spec, plan.unit_rows, plan.packet_bytes, 1)
        plan = with_share(spec, plan, block.weights_on_disk / (1 - block.weights_on_gpu), staging_bytes, problem.templates)
    return problem, plan


def flexgen(cell: Cell, ledger: Ledger) -> Run:
    spec = spec_of(cell)
    batches = int(ledger.get("FlexGen", "gpu_batches", cell.model))
    on_gpu = ledger.get("FlexGen", "weights_on_gpu", cell.model)
    on_disk = ledger.get("FlexGen", "weights_on_disk", cell.model)  # and then all of the KV, which the GPU attends
    block = Block(
        num_seqs=int(ledger.get("FlexGen", "batch", cell.model)), batches=batches, weights_on_gpu=on_gpu, weights_on_disk=on_disk,
        overlaps=bool(ledger.get("FlexGen", "overlaps_loads_in_decode")), host_kv=on_gpu < 1, kv_on_disk=on_disk > 0, cpu_attention=on_gpu < 1 and not on_disk,
    )  # fmt: skip
    return _run(*block_plan(cell, spec, flexgen_kernels(hardware(cell), ledger), block))


def flexgen_kernels(profile: HardwareProfile, ledger: Ledger) -> HardwareProfile:
    """FlexGen's own rates on the T4: two rates of products, two of attention, one of the CPU's."""
    assert profile.gpu is not None
    read = READ_FRAC * profile.gpu.read_bytes_per_s
    decode, prefill = ledger.get("FlexGen", "gpu_decode_flops"), ledger.get("FlexGen", "gpu_prefill_flops")

    def seconds(tokens: float) -> float:
        small = max(HALF_BYTES / read, 2 * min(tokens, DECODE_TOKENS) / decode)
        return max(small, 2 * tokens / prefill)

    curve = Curve(x=TOKEN_GRID, y=tuple(seconds(tokens) for tokens in TOKEN_GRID))
    cpu_rate = ledger.get("FlexGen", "cpu_attention_flops")  # one FLOP per byte of fp16 KV: either names the same rate
    gpu = replace(
        profile.gpu, linear={**profile.gpu.linear, "fp16/out": curve, "fp16/in": curve},
        attention_bytes_per_s=ledger.get("FlexGen", "gpu_decode_attention_flops"), attention_flops_per_s=ledger.get("FlexGen", "gpu_prefill_attention_flops"),
    )  # fmt: skip
    return replace(profile, gpu=gpu, cpu=replace(profile.cpu, attention_bytes_per_s=cpu_rate, attention_flops_per_s=cpu_rate))


def pageable(cell: Cell, profile: HardwareProfile) -> HardwareProfile:
    """The link as copies from memory that is not pinned find it."""
    assert profile.link is not None
    return replace(profile, link=replace(profile.link, up_bytes_per_s=MACHINES[cell.machine].pageable, down_bytes_per_s=MACHINES[cell.machine].pageable))


def accelerate(cell: Cell, ledger: Ledger) -> Run:
    profile = hardware(cell)
    if not ledger.get("accelerate", "pins_weights"):
        profile = pageable(cell, profile)
    block = Block(
        num_seqs=int(ledger.get("accelerate", "batch", cell.model)), weights_on_gpu=ledger.get("accelerate", "weights_on_gpu", cell.model),
        weights_on_disk=ledger.get("accelerate", "weights_on_disk", cell.model), head_on_gpu=True, overlaps=bool(ledger.get("accelerate", "overlaps_loads")),
    )  # fmt: skip
    spec = spec_of(cell)
    return _run(*block_plan(cell, spec, transformers_attention(profile, spec, ledger), block))


def transformers_attention(profile: HardwareProfile, spec: ModelSpec, ledger: Ledger) -> HardwareProfile:
    """Attention of the transformers library on the GPU: the cache is copied at every step, and expanded to all query heads where KV heads are fewer."""
    assert profile.gpu is not None
    passes, group = ledger.get("transformers", "kv_passes"), spec.num_heads // spec.num_kv_heads
    if group > 1 and ledger.get("transformers", "repeats_kv"):
        passes += 2 * group  # written and read expanded; what bmm read before, the expansion reads
    return replace(profile, gpu=replace(profile.gpu, attention_bytes_per_s=READ_FRAC * profile.gpu.read_bytes_per_s / passes))


def zero_inference(cell: Cell, ledger: Ledger) -> Run:
    spec, profile = spec_of(cell), hardware(cell)
    if not ledger.get("ZeRO-Inference", "pins_weights", cell.model):
        profile = pageable(cell, profile)
    if ledger.get("ZeRO-Inference", "unpacks_to_16_bits"):
        profile = unpacking(profile, cell.weights)
    host_kv = bool(ledger.get("ZeRO-Inference", "host_kv", cell.model))
    kv_dtype = "fp32" if host_kv and ledger.get("ZeRO-Inference", "host_kv_bytes") == 4 else "fp16"
    largest = spec.intermediate_size / spec.hidden_size / ledger.get("ZeRO-Inference", "codes_per_parameter")  # of its weights, in hidden^2 parameters
    block = Block(
        num_seqs=int(ledger.get("ZeRO-Inference", "batch", cell.model)), overlaps=largest < ledger.get("ZeRO-Inference", "live_parameters"),
        host_kv=host_kv, cpu_attention=host_kv, kv_dtype=kv_dtype,
    )  # fmt: skip
    return _run(*block_plan(cell, spec, transformers_attention(profile, spec, ledger), block))


def unpacking(profile: HardwareProfile, weights: str) -> HardwareProfile:
    """A GPU that writes quantised weights out in 16 bits before it multiplies with them."""
    assert profile.gpu is not None
    read, flops = READ_FRAC * profile.gpu.read_bytes_per_s, GPU_FLOPS_FRAC * profile.gpu.flops_per_s
    unpack_s = (FORMATS[weights].bytes_per_weight + HALF_BYTES) / read
    curve = Curve(x=TOKEN_GRID, y=tuple(unpack_s + max(HALF_BYTES / read, 2 * tokens / flops) for tokens in TOKEN_GRID))
    return replace(profile, gpu=replace(profile.gpu, linear={**profile.gpu.linear, f"{weights}/out": curve, f"{weights}/in": curve}))


# -- systems that let the CPU compute -------------------------------------------------------------------------------------------------------


def cap(cell: Cell) -> Limits:
    """The memory that a plan of this cell may take."""
    profile = hardware(cell)
    gpu_bytes = int(cell.gpu_memory) if cell.gpu_memory is not None else profile.gpu_memory_bytes
    return Limits(gpu_bytes=gpu_bytes, host_bytes=int(0.9 * profile.host_memory_bytes), disk_bytes=MACHINES[cell.machine].disk_bytes)


def hetegen(cell: Cell, ledger: Ledger) -> Run:  # noqa: ARG001 - it has no constants: its rule derives alpha from the machine
    problem = Problem.of(spec_of(cell), hardware(cell), workload(cell, cell.requests or 1), cap(cell), PlanOptions())
    return _run(problem, build_policy("hetegen", problem.spec, problem.profile, problem.workload, problem.limits, problem.options))


def pipelined_sharding(cell: Cell, ledger: Ledger) -> Run:
    """Whole layers first in GPU memory; the rest is computed on the CPU or streamed, in decode whichever its profile says is faster, in prefill streamed."""
    profile, num_seqs = slow_reader(hardware(cell), ledger.get("Pipelined Sharding", "cpu_read")), cell.requests or 1
    problem = Problem.of(spec_of(cell), profile, workload(cell, num_seqs), cap(cell), PlanOptions())
    chunk = max(num_seqs, int(ledger.get("Pipelined Sharding", "prefill_chunk")))
    head = float(not ledger.get("Pipelined Sharding", "head_on_gpu"))
    ways = [(1.0, "none"), (1.0, "cpu"), (0.0, "none"), (0.0, "gpu")]  # the CPU's part of the rest in decode, and who attends host KV
    if ledger.get("Pipelined Sharding", "attends_on_cpu_beside_streams"):
        ways.append((0.0, "cpu"))
    plans = [_sharded(problem, chunk, cpu, kv, head) for cpu, kv in ways]
    return min((_run(problem, plan) for plan in plans if problem.fits(plan)), key=lambda run: run.price.step_s)


def slow_reader(profile: HardwareProfile, read: float) -> HardwareProfile:
    """A CPU whose products read 16-bit weights at this rate at most, measured beside the link's copies."""
    curve = profile.cpu.linear["fp16/out"]
    slowed = Curve(x=curve.x, y=tuple(max(seconds, HALF_BYTES / read) for seconds in curve.y))
    return replace(profile, cpu=replace(profile.cpu, linear={**profile.cpu.linear, "fp16/out": slowed, "fp16/in": slowed}, copy_slowdown=1.0))


def _sharded(problem: Problem, chunk: int, cpu: float, kv: str, head: float) -> Plan:
    """One of its strategies: ``cpu`` and ``head`` are the CPU's share in decode of what is not resident; KV lies on the GPU ("none") or in host memory."""
    num_seqs = problem.workload.num_requests
    packet_bytes, depth = ring_rule(problem.limits.gpu_bytes)
    draft = Draft(
        policy="stream", num_seqs=num_seqs, gpu_seqs=num_seqs if kv == "none" else 0, pass_tokens=chunk, micro_batches={"prefill": 1, "decode": 1},
        uses_cpu=True, packet_bytes=packet_bytes, ring_depth=depth, share_of_rest=True, staging_seqs=0 if kv == "none" else num_seqs,
        host_attention="cpu" if kv == "cpu" else "gpu", host_prefill_attention="gpu",
    )  # fmt: skip

    def share(phase: Phase, _tokens: int) -> Mapping[str, float]:
        return {**dict.fromkeys(problem.ops, cpu if phase == "decode" else 0.0), "lm_head": head}

    return problem.plan(draft, fill(problem, draft, dict.fromkeys(problem.ops, 0.0)), share)


def twinpilots_kernels(cell: Cell, ledger: Ledger) -> HardwareProfile:
    """The paper's link, and torch's 16-bit kernels on its CPU: one rate of reading, of weights and of KV."""
    link, read = ledger.get("TwinPilots", "link"), ledger.get("TwinPilots", "cpu_read")
    profile = slow_reader(hardware(cell), read)
    assert profile.link is not None
    cpu = replace(profile.cpu, attention_bytes_per_s=read)
    return replace(profile, cpu=cpu, link=replace(profile.link, up_bytes_per_s=link, down_bytes_per_s=link))


def twinpilots_paper(cell: Cell, ledger: Ledger) -> Run:
    problem = Problem.of(spec_of(cell), twinpilots_kernels(cell, ledger), workload(cell, cell.requests or 1), cap(cell), PlanOptions())
    return _run(problem, build_policy("twinpilots", problem.spec, problem.profile, problem.workload, problem.limits, problem.options))


def twinpilots_baseline(cell: Cell, ledger: Ledger) -> Run:
    """FlexGen as that paper's all-GPU column has it: weights and KV of the same batch come over the link, the GPU computes everything."""
    on_gpu = ledger.get("TwinPilots", "baseline_weights_on_gpu")
    overlaps = bool(ledger.get("FlexGen", "overlaps_loads_in_decode"))
    block = Block(num_seqs=cell.requests or 1, weights_on_gpu=on_gpu, overlaps=overlaps, host_kv=True)
    return _run(*block_plan(cell, spec_of(cell), twinpilots_kernels(cell, ledger), block))


SYSTEMS = {
    "FlexGen": flexgen, "accelerate": accelerate, "ZeRO-Inference": zero_inference, "HeteGen": hetegen, "Pipelined Sharding": pipelined_sharding,
    "TwinPilots": twinpilots_paper,
}  # fmt: skip
