"""What the worker processes of `gpu_check` do: kernel cases, token cases, changes of plan, the machine's rates, one throughput point.

Owns the cases and what each must show. ``python -m benchmarks.gpu_steps TASK`` (JSON) prints one JSON line per event: ``begin`` names a case, ``case``
ends it. A process of its own each, because a CUDA error leaves its process useless. Knows nothing of budgets, reports or other workers.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_workers import Emit, card_used_bytes, outcome, serve, since
from twinpilots.device.base import GpuDevice
from twinpilots.errors import LimitError
from twinpilots.machine import open_gpu
from twinpilots.profiling import measure_machine

UNIT_ROWS = 8  # the zoo's models are small: larger units would leave nothing to split
HAND_PLANS = 2
HAND_OFF_PASSES = 25  # of tests/words_case.py's 40 hand-offs each
NUM_SEQS = 3
# Relative RMS of a prompt's first logits against transformers in fp32 with the same weights. On CUDA, 16-bit weights multiply activations rounded to
# 8 (bf16) or 11 (fp16) bits of mantissa and the KV cache is rounded likewise, in every one of up to seven layers; tests/unit/test_gpu_check.py runs
# that arithmetic.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True, kw_only=True)
class TokenTask:
    """``cases`` of one zoo model each: "family/dtype/variant", where a variant is a policy or "hand-N"."""

    device: str
    cases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RatesTask:
    device: str
    model: str


@dataclass(frozen=True, kw_only=True)
class PointTask:
    """One policy at one number of sequences. ``llm`` are `LLM`'s arguments."""

    llm: Mapping[str, Any]
    num_seqs: int
    input_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True)
class KernelTask:
    """Every Triton kernel compiled on ``device``, against torch there."""

    device: str


@dataclass(frozen=True, kw_only=True)
class GraphTask:
    """Passes whose launches are captured in graphs, against the same passes launched one by one, on ``device``."""

    device: str


@dataclass(frozen=True, kw_only=True)
class SwitchTask:
    """Passes of one zoo model between which the plan changes at random."""

    device: str
    family: str
    num_passes: int


@dataclass(frozen=True, kw_only=True)
class WaitsTask:
    """Hand-offs between CPU and GPU on ``device``, its stream waiting for the CPU by itself, and its launch thread polling."""

    device: str


TASKS = {
    "switches": SwitchTask, "kernels": KernelTask, "graphs": GraphTask, "waits": WaitsTask, "tokens": TokenTask, "rates": RatesTask, "point": PointTask,
}  # fmt: skip


def token_cases(families: tuple[str, ...], variants: tuple[str, ...], dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Every combination, models outermost: a worker makes each model once."""
    hand = tuple(f"hand-{number}" for number in range(HAND_PLANS))
    return tuple(f"{family}/{dtype}/{variant}" for family in families for dtype in dtypes for variant in variants + hand)


# -- tokens --------------------------------------------------------------------------------------------------------------------------------


def run_tokens(task: TokenTask, emit: Emit, gpu: GpuDevice | None = None) -> None:
    """Each case on ``gpu`` (default: opened from the task's device). An assertion that fails, or an error, is that case's; the next one runs on."""
    from tests.harness import SavedModel, save_with_references

    gpu = gpu or open_gpu(task.device)
    models: dict[tuple[str, str], SavedModel] = {}
    with tempfile.TemporaryDirectory(prefix="twinpilots-gpu-check-") as root:
        for case in task.cases:
            family, dtype, variant = case.split("/")
            emit({"event": "begin", "case": case})
            began = time.monotonic()

            def run(family: str = family, dtype: str = dtype, variant: str = variant) -> str | None:
                if (family, dtype) not in models:
                    models[family, dtype] = save_with_references(family, 0, dtype, Path(root) / f"{family}-{dtype}")
                return run_variant(models[family, dtype], dtype, variant, gpu)

            emit({"event": "case", "case": case, **outcome(run), "seconds": time.monotonic() - began})
            gpu.close()  # whatever a failed case left open


def run_kernels(task: KernelTask, emit: Emit) -> None:
    """Each case of tests/triton_cases.py once. Infeasible: the one case "kernels", with the reason."""
    import torch

    from twinpilots.kernels.triton import unavailable

    device = torch.device(task.device)
    if (reason := unavailable(device)) is not None:
        emit({"event": "case", "case": "kernels", "ok": None, "detail": reason, "seconds": 0.0})
        return
    from tests.triton_cases import CASES, run_case

    for name in CASES:
        emit({"event": "begin", "case": name})
        began = time.monotonic()

        def run(name: str = name) -> str:
            return ", ".join(f"{op} {count}" for op, count in run_case(name, 0, device).launches.items())

        emit({"event": "case", "case": name, **outcome(run), "seconds": time.monotonic() - began})


def run_graphs(task: GraphTask, emit: Emit) -> None:
    """Each hand-set plan of tests/graph_case.py once. Infeasible: the one case "graphs", with the reason."""
    import torch

    from twinpilots.kernels.triton import unavailable

    if (reason := unavailable(torch.device(task.device))) is not None:
        emit({"event": "case", "case": "graphs", "ok": None, "detail": reason, "seconds": 0.0})
        return
    from tests.graph_case import PLAN_SEEDS, Eager, compare
    from twinpilots.device.cuda import CudaGpu

    index = int(task.device.removeprefix("cuda:"))
    for seed in PLAN_SEEDS:
        emit({"event": "begin", "case": f"plan {seed}"})
        began = time.monotonic()

        def run(seed: int = seed) -> str:
            return compare(CudaGpu(index, Eager(index)), CudaGpu(index), seed)

        emit({"event": "case", "case": f"plan {seed}", **outcome(run), "seconds": time.monotonic() - began})


def run_waits(task: WaitsTask, emit: Emit) -> None:
    """tests/words_case.py both ways; infeasible where streams cannot wait for words, with the reason."""
    from tests.words_case import Polling, hand_offs
    from twinpilots.device.cuda import CudaGpu

    index = int(task.device.removeprefix("cuda:"))
    for name in ("on the device", "by polling"):
        emit({"event": "begin", "case": name})
        began = time.monotonic()

        def run(name: str = name) -> str:
            gpu = CudaGpu(index, Polling(index) if name == "by polling" else None)
            count, seconds = hand_offs(gpu, HAND_OFF_PASSES)
            if name == "on the device" and gpu.device_waits != "yes":
                raise LimitError(gpu.device_waits)
            return f"{count} hand-offs in order, {1e6 * seconds:.0f} us there and back"

        emit({"event": "case", "case": name, **outcome(run), "seconds": time.monotonic() - began})


def run_switches(task: SwitchTask, emit: Emit, gpu: GpuDevice | None = None) -> None:
    """Requests come, go and are aborted while the plan changes between a dozen hand-set ones; their tokens must be transformers'."""
    from tests.harness import save_with_references
    from tests.traffic import drive

    emit({"event": "begin", "case": "switches"})
    began = time.monotonic()

    def run() -> str:
        with tempfile.TemporaryDirectory(prefix="twinpilots-gpu-check-") as root:
            model = save_with_references(task.family, 0, "float32", Path(root) / task.family)

            def note(number: int) -> None:
                if number % 100 == 0:
                    emit({"event": "note", "note": f"pass {number}"})

            rig = drive(model, 1, num_passes=task.num_passes, device=gpu or open_gpu(task.device), after_pass=note)
            return f"{task.num_passes} passes, {rig.executor.plan_changes} changes of plan: all tokens are transformers'"

    emit({"event": "case", "case": "switches", **outcome(run), "seconds": time.monotonic() - began})


def run_variant(model: Any, dtype: str, variant: str, gpu: GpuDevice) -> str:
    """Generates with one plan and compares: the fp32 rule for fp32 weights, logits within the tolerance for all. Returns the largest logit error."""
    from tests.harness import NUM_TOKENS, PROMPTS, Rig, relative_rms

    with Rig(model.path, plan_of(model, variant), device=gpu) as rig:
        found = rig.generate(PROMPTS, NUM_TOKENS)
        first = [rig.logits[str(number)][0] for number in range(len(PROMPTS))]
    if dtype == "float32":
        model.assert_tokens(found)
    worst = float(np.max([relative_rms(row, reference[0]) for row, (_, reference) in zip(first, model.references, strict=True)]))
    if not worst < TOLERANCE[dtype]:
        raise AssertionError(f"first logits are {worst:.2e} off transformers' (relative RMS), {TOLERANCE[dtype]:.0e} allowed")
    return f"logits {worst:.1e}"


def plan_of(model: Any, variant: str) -> Any:
    """A policy's plan on GPU memory for a third of the model, for a made-up machine on which neither pilot can be spared; or a random hand-set plan."""
    from tests.hand_plans import random_plan
    from tests.machines import machine, processor
    from twinpilots.plan.solver import solve
    from twinpilots.plan.workload import Limits, Workload

    if variant.startswith("hand-"):
        return random_plan(model.spec, 200 + int(variant.removeprefix("hand-")))
    even = machine(cpu=processor(2e6, 8e6, task_s=0.0), gpu=processor(2e7, 8e7, task_s=0.0))
    workload = Workload(num_requests=NUM_SEQS, input_len=16, output_len=16, max_num_seqs=NUM_SEQS)
    limits = Limits(gpu_bytes=model.third_bytes, host_bytes=1 << 30)
    return solve(model.spec, even, workload, limits, policy=variant, unit_rows=UNIT_ROWS, compare=False).plan  # type: ignore[arg-type]


# -- rates and points ----------------------------------------------------------------------------------------------------------------------


def run_rates(task: RatesTask, emit: Emit) -> None:
    """The full profile of the device in the model's shapes; it is stored, so that the points plan with it."""
    from twinpilots.benchmarks.throughput import limits
    from twinpilots.model.dummy import dummy_spec

    emit({"event": "begin", "case": "rates"})
    began = time.monotonic()
    found: dict[str, Any] = {}

    def run() -> None:
        profile = measure_machine(task.device, dummy_spec(task.model), progress=lambda note: emit({"event": "note", "note": note}))
        found.update(rates=limits(profile), profile=asdict(profile))

    emit({"event": "case", "case": "rates", **outcome(run), **found, "seconds": time.monotonic() - began})


def run_point(task: PointTask, emit: Emit) -> None:
    """Generates twice for the same prompts, the first time to warm up, and reports the second."""
    case = f"{task.llm['policy']} x {task.num_seqs}"
    emit({"event": "begin", "case": case})
    began = time.monotonic()
    found: dict[str, Any] = {}
    result = outcome(lambda: found.update(point=measure_point(task)))
    emit({"event": "case", "case": case, **result, **found, "seconds": time.monotonic() - began})


def measure_point(task: PointTask) -> dict[str, Any]:
    """Measured tokens/s beside prediction and bounds, who was busy, what was moved, and the process's footprint on the card."""
    from twinpilots.api import LLM
    from twinpilots.benchmarks.throughput import prompts
    from twinpilots.request import SamplingParams

    token_ids = prompts(task.num_seqs, task.input_len)
    params = SamplingParams(temperature=0.0, max_tokens=task.output_len, ignore_eos=True)
    free_before = card_used_bytes(task.llm["device"])
    began = time.monotonic()
    with LLM(**task.llm, enable_prefix_caching=False) as llm:  # the second round reads its prompts again
        load_s = time.monotonic() - began
        llm.generate(token_ids, params, use_tqdm=False)
        warm = llm.stats()
        began = time.monotonic()
        outputs = llm.generate(token_ids, params, use_tqdm=False)
        seconds = time.monotonic() - began
        stats, used = llm.stats(), card_used_bytes(task.llm["device"])
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    if generated != task.num_seqs * task.output_len:
        raise AssertionError(f"{generated} tokens came back, {task.num_seqs * task.output_len} were asked for")
    footprint = stats["peak_bytes"]["gpu"] if used is None or free_before is None else used - free_before
    rates, bound = stats["tokens_per_s"], stats["tokens_per_s"]["hardware_bound"]
    return {
        "policy": task.llm["policy"], "num_seqs": task.num_seqs, "input_len": task.input_len, "output_len": task.output_len,
        "load_s": load_s, "seconds": seconds,
        "tokens_per_s": generated / seconds, "predicted": rates["predicted"], "plan_bound": rates["plan_bound"], "hardware_bound": bound,
        "efficiency": generated / seconds / bound if bound else None, "gpu_memory": task.llm["gpu_memory"], "footprint_bytes": footprint,
        "busy_s": since(warm["busy_s"], stats["busy_s"]), "bytes": since(warm["bytes"], stats["bytes"]), "weights_frac": stats["weights_frac"],
        "peak_bytes": stats["peak_bytes"], "plan_changes": stats["plan_changes"],
    }  # fmt: skip


# -- the process ---------------------------------------------------------------------------------------------------------------------------

RUN: Mapping[str, Callable[[Any, Emit], None]] = {
    "switches": run_switches, "kernels": run_kernels, "graphs": run_graphs, "waits": run_waits, "tokens": run_tokens, "rates": run_rates, "point": run_point,
}  # fmt: skip


if __name__ == "__main__":
    serve(sys.argv[1:], TASKS, RUN)
