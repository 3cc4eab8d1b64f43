"""`python -m benchmarks.optimality`: how far `auto` is from the best plan of small random problems, found by exhaustive search.

Owns the random problems and the report. Plans are simulated on the virtual clock; nothing runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.exhaustive import TOLERANCE, Exhaustive, seconds_of
from twinpilots.errors import LimitError
from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile, roofline_curve
from twinpilots.model.spec import LayerSpec, ModelSpec, RopeSpec
from twinpilots.plan.draft import Draft, PlanOptions, nothing_resident
from twinpilots.plan.memory import plan_memory
from twinpilots.plan.problem import Problem, no_cpu
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits, Workload

GOOD = 0.01  # a gap up to here counts as optimal
# (layers, units of q and o, of k and v, of the MLP, of lm_head): spaces of up to some ten thousand combinations of splits
SHAPES = ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (1, 1, 1, 1, 2), (1, 1, 1, 2, 1), (2, 1, 1, 1, 1), (3, 1, 1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One problem. ``gap``: how much longer `auto`'s plan takes than the best; None: `auto` refused, and no plan of the space fits either."""

    number: int
    layers: int
    units: tuple[int, ...]
    sequences: int
    gap: float | None
    auto_s: float | None
    best_s: float | None
    plans: int
    priced: int
    seconds: float


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def random_problem(seed: int, number: int) -> Problem:
    """A model of a few units, a machine of random rates (fixed costs are small beside a layer's time), a short workload, and limits that bind."""
    rng = random.Random(f"{seed} {number}")
    spec = _random_model(rng)
    profile = _random_machine(rng, spec)
    requests = rng.choice((1, 1, 2, 2, 2, 3))
    work = Workload(num_requests=requests, input_len=rng.choice((8, 16, 24, 40, 64)), output_len=rng.choice((1, 4, 8, 16, 32)), max_num_seqs=requests)
    return Problem.of(spec, profile, work, _random_limits(rng, spec, profile, work), PlanOptions())


def _random_model(rng: random.Random) -> ModelSpec:
    layers, q_units, kv_units, mlp_units, head_units = rng.choice(SHAPES)
    hidden, head_dim = 64 * q_units, 16
    tail = rng.choice((0, 0, 24))  # the last unit of the MLP and the head is a short one
    return ModelSpec(
        name="random", family="llama", vocab_size=64 * head_units - tail, hidden_size=hidden, num_heads=hidden // head_dim,
        num_kv_heads=64 * kv_units // head_dim if kv_units > 1 else rng.choice((1, 2, 4)), head_dim=head_dim, intermediate_size=64 * mlp_units - tail,
        layers=(LayerSpec(),) * layers, max_model_len=256, weight_dtype=rng.choice(("fp16", "bf16", "fp32")), activation="silu",
        gated_mlp=rng.random() < 0.7, tied=rng.random() < 0.4, ropes=(RopeSpec(rotary_dim=head_dim, inv_freq=(1.0,) * (head_dim // 2)),),
    )  # fmt: skip


def _random_machine(rng: random.Random, spec: ModelSpec) -> HardwareProfile:
    """Rates around those of real machines: a GPU 3 to 40 times the CPU, a link of a sixth to one and a half times the CPU's memory."""
    read, element = 1e9, spec.weight_bytes_per_element
    layer_s = spec.linear_bytes / read / spec.num_layers
    slow = rng.random() < 0.3

    def processor(name: str, factor: float, knee: float) -> ComputeProfile:
        rate, flops = read * factor, read * factor * 2 * knee / element
        return ComputeProfile(
            name=name, linear={f"{spec.weight_dtype}/{side}": roofline_curve(element, rate, flops) for side in ("out", "in")},
            attention_bytes_per_s=rate * rng.uniform(0.3, 1), attention_flops_per_s=flops * rng.uniform(0.1, 1),
            elementwise_bytes_per_s=rate * rng.uniform(0.5, 2), task_s=layer_s * log_uniform(rng, 1e-3, 2e-2) / math.sqrt(factor), read_bytes_per_s=rate,
            flops_per_s=flops, copy_slowdown=rng.uniform(1, 1.5) if slow else 1.0, peer_slowdown=rng.uniform(1, 1.3) if slow else 1.0,
        )  # fmt: skip

    up = read * log_uniform(rng, 0.16, 1.5)
    link = LinkProfile(
        up_bytes_per_s=up, down_bytes_per_s=up * rng.uniform(0.5, 1), packet_s=layer_s * log_uniform(rng, 1e-3, 1e-2),
        copy_s=layer_s * log_uniform(rng, 1e-3, 1e-2), handoff_s=layer_s * log_uniform(rng, 1e-3, 2e-2), queue_handoff_s=layer_s * log_uniform(rng, 1e-4, 5e-3),
    )  # fmt: skip
    return HardwareProfile(
        name="random", source="random", link=link, cpu=processor("cpu", 1.0, log_uniform(rng, 1, 30)),
        gpu=processor("gpu", log_uniform(rng, 3, 40), log_uniform(rng, 20, 500)), host_memory_bytes=1 << 30, gpu_memory_bytes=1 << 30,
        dram_bytes_per_s=2 * read, cpu_cores=4, step_overhead_s=layer_s * log_uniform(rng, 1e-3, 5e-2),
    )  # fmt: skip


def _random_limits(rng: random.Random, spec: ModelSpec, profile: HardwareProfile, work: Workload) -> Limits:
    """GPU memory for the buffers and some of weights and KV; in one problem of four, host memory for no more than most of the rest."""
    problem = Problem.of(spec, profile, work, Limits(gpu_bytes=1 << 20, host_bytes=1 << 30), PlanOptions())
    chunk = min(64, work.concurrency * work.input_len)
    draft = Draft(
        policy="auto", num_seqs=work.concurrency, gpu_seqs=work.concurrency, pass_tokens=chunk, micro_batches={"prefill": 1, "decode": 1}, uses_cpu=True,
        packet_bytes=4096,
    )  # fmt: skip
    use = plan_memory(spec, problem.plan(draft, nothing_resident(spec, problem.ops), no_cpu))
    movable = spec.linear_bytes + use.gpu.kv
    on_gpu = int(movable * rng.uniform(0, 1.1))
    gpu_bytes = int((use.gpu.total - use.gpu.kv) * rng.uniform(0.8, 1.2)) + on_gpu
    host_bytes = use.host.total + use.gpu.kv - int(on_gpu * rng.uniform(0, 0.8)) if rng.random() < 0.25 else 1 << 30
    return Limits(gpu_bytes=gpu_bytes, host_bytes=host_bytes)


def outcome(seed: int, number: int) -> Outcome:
    began = time.process_time()
    problem = random_problem(seed, number)
    spec, work = problem.spec, problem.workload
    try:
        auto_s = seconds_of(problem, solve(spec, problem.profile, work, problem.limits).plan)
    except LimitError:
        auto_s = math.inf
    found = Exhaustive(problem).run(auto_s if math.isfinite(auto_s) else 1e9)
    nothing = found.plan is None and not math.isfinite(auto_s)
    return Outcome(
        number=number, layers=spec.num_layers, units=tuple(op.num_units for op in problem.ops.values()), sequences=work.concurrency,
        gap=None if nothing else auto_s / found.seconds - 1, auto_s=auto_s if math.isfinite(auto_s) else None, best_s=None if nothing else found.seconds,
        plans=found.plans, priced=found.priced, seconds=time.process_time() - began,
    )  # fmt: skip


def report(found: Sequence[Outcome]) -> str:
    gaps = sorted(each.gap for each in found if each.gap is not None)
    good, last = sum(gap <= GOOD for gap in gaps), len(gaps) - 1
    worst = max((each for each in found if each.gap is not None), key=lambda each: each.gap or 0.0)
    plans, priced, seconds = (sum(getattr(each, name) for each in found) for name in ("plans", "priced", "seconds"))
    return "\n".join([
        f"{len(found)} problems, {len(found) - len(gaps)} of them refused rightly; {plans:,} plans of a phase, {priced:,} simulated, a bound excludes the rest",
        f"within {100 * GOOD:.0f} % of the best in {good} of {len(gaps)} ({100 * good / len(gaps):.1f} %); the best is known to {100 * TOLERANCE:.1f} %",
        f"gap: median {100 * gaps[last // 2]:.2f} %, 99th {100 * gaps[int(0.99 * last)]:.2f} %, worst {100 * gaps[last]:.2f} % (problem {worst.number})",
        f"{seconds:.0f} s of CPU time",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimality", description=__doc__)
    parser.add_argument("--problems", type=int, default=500, help="how many (default 500)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON list of outcomes")
    parser.add_argument("--verbose", action="store_true", help="print every problem with a gap as it is found")
    options = parser.parse_args(arguments)
    found = []
    for number in range(options.first, options.first + options.problems):
        found.append(outcome(options.seed, number))
        if options.verbose and (found[-1].gap is None or found[-1].gap > GOOD):
            sys.stderr.write(f"{found[-1]}\n")
    sys.stdout.write((json.dumps([asdict(each) for each in found], indent=1) if options.json else report(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
