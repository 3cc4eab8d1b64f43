"""`python -m benchmarks.limits`: random models, memory limits and lengths through the planner; no limit may be exceeded, and every refusal must be true.

A refusal names the smallest limit that would do: planning again with it must work, and with one unit less it must not. Owns the random cases, the checks and
the report. ``--runs`` also runs small cases on the emulated GPU, whose ledger refuses the first byte past a limit. Interrupted (Ctrl-C, SIGTERM), it reports on
the cases that are done.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

from twinpilots.errors import LimitError
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import CONFIGS, dummy_spec
from twinpilots.model.spec import LayerSpec, ModelSpec, RopeSpec
from twinpilots.plan.draft import limit_step
from twinpilots.plan.memory import plan_memory
from twinpilots.plan.plan import POLICIES, Policy
from twinpilots.plan.pricing import sequences_at_once
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits, Workload

UNITS = {"B": 0, "K": 10, "M": 20, "G": 30}
TELL_S = 5.0  # between two words on how far it has come
INTERRUPTED = 130
NAMED = re.compile(r"--(gpu|host)-memory to (\d+)([KMG])iB")
NAMED_DISK = re.compile(r", or --(disk) to (\d+)([KMG])iB")  # instead of the others


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to the planner."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    limits: Limits
    policy: Policy

    def plans(self, limits: Limits) -> str | None:
        """None when the planner finds a plan within the limits, else its refusal. AssertionError when the plan breaks a promise."""
        try:
            solution = solve(self.spec, self.profile, self.workload, limits, policy=self.policy, compare=False)
        except LimitError as error:
            return str(error)
        solution.plan.check(self.spec)
        use = plan_memory(self.spec, solution.plan)
        assert use.gpu.total <= limits.gpu_bytes, f"{use.gpu.total} bytes of GPU memory planned, {limits.gpu_bytes} allowed"
        assert use.host.total <= limits.host_bytes, f"{use.host.total} bytes of host memory planned, {limits.host_bytes} allowed"
        assert use.disk.total <= limits.disk_bytes, f"{use.disk.total} bytes on the disk planned, {limits.disk_bytes} allowed"
        assert sum(sequences_at_once(solution.plan, self.workload)) >= 1
        return None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``refusal``: what the planner said (None: it planned); ``wrong``: what is not true of it, empty when all is well."""

    number: int
    model: str
    machine: str
    policy: str
    limits: tuple[int, int, int]  # of GPU memory, host memory and the disk
    refusal: str | None
    wrong: str


def log_uniform(rng: random.Random, low: float, high: float) -> int:
    return int(math.exp(rng.uniform(math.log(low), math.log(high))))


def random_case(seed: int, number: int) -> Case:
    """A known or a small random model on a preset machine; limits from far too little to more than enough."""
    rng = random.Random(f"{seed} {number}")
    spec = dummy_spec(rng.choice(sorted(CONFIGS))) if rng.random() < 0.3 else _small_model(rng)
    longest = min(spec.max_model_len, 4096)
    input_len = log_uniform(rng, 1, longest - 1)
    output_len = log_uniform(rng, 1, longest - input_len + 1)
    requests = log_uniform(rng, 1, 200)
    work = Workload(num_requests=requests, input_len=input_len, output_len=output_len, max_num_seqs=rng.choice((requests, max(1, requests // 4))))
    size = spec.linear_bytes + spec.embedding_bytes
    limits = Limits(gpu_bytes=log_uniform(rng, 1000 + size / 1000, 3e6 + 2 * size), host_bytes=log_uniform(rng, 1e6 + size / 50, 1e8 + 4 * size))
    policy = "auto" if rng.random() < 0.5 else rng.choice(POLICIES)
    profile = PRESETS[rng.choice(sorted(PRESETS))]
    if rng.random() < 0.25 and profile.disk_bytes_per_s is not None:
        limits = replace(limits, disk_bytes=log_uniform(rng, 1000 + size / 20, 2 * size))
    return Case(spec=spec, profile=profile, workload=work, limits=limits, policy=policy)


def _small_model(rng: random.Random) -> ModelSpec:
    head_dim, kv_heads = rng.choice((8, 16, 32, 64)), rng.choice((1, 2, 4))
    return ModelSpec(
        name="random", family="llama", vocab_size=rng.randint(2, 3000), hidden_size=8 * rng.randint(1, 60), num_heads=kv_heads * rng.choice((1, 2, 3)),
        num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=rng.randint(1, 900), layers=(LayerSpec(),) * rng.randint(1, 12), max_model_len=2048,
        weight_dtype=rng.choice(("fp32", "bf16", "fp16")), activation="silu", gated_mlp=rng.random() < 0.7, tied=rng.random() < 0.5,
        ropes=(RopeSpec(rotary_dim=head_dim, inv_freq=(1.0,) * (head_dim // 2)),),
    )  # fmt: skip


def outcome(seed: int, number: int) -> Outcome:
    case = random_case(seed, number)
    refusal, wrong = None, ""
    try:
        refusal = case.plans(case.limits)
        if refusal is not None:
            wrong = untruth(case, refusal)
    except AssertionError as error:
        wrong = str(error)
    return Outcome(
        number=number, model=case.spec.name, machine=case.profile.name, policy=case.policy,
        limits=(case.limits.gpu_bytes, case.limits.host_bytes, case.limits.disk_bytes), refusal=refusal, wrong=wrong,
    )  # fmt: skip


def named_limits(refusal: str) -> dict[str, int]:
    """The limits that a refusal asks for, in bytes: "gpu_bytes", "host_bytes"."""
    return _bytes_of(NAMED, refusal)


def _bytes_of(pattern: re.Pattern[str], refusal: str) -> dict[str, int]:
    return {f"{tier}_bytes": int(value) << UNITS[unit] for tier, value, unit in pattern.findall(refusal)}


def untruth(case: Case, refusal: str) -> str:
    """What is wrong about a refusal: it names no limit, its limit does not do, or a smaller one does. If it names a disk to use instead, that must do."""
    asked, on_disk = named_limits(refusal), _bytes_of(NAMED_DISK, refusal)
    if not asked:
        return "the refusal names no limit"
    return _untrue(case, asked) or (_untrue(case, on_disk, smallest=False) if on_disk else "")


def _untrue(case: Case, asked: dict[str, int], *, smallest: bool = True) -> str:
    enough = replace(case.limits, **asked)
    again = case.plans(enough)
    if again is not None:
        return f"with the limits that it asks for: {again}"
    for name, size in asked.items() if smallest else ():
        if case.plans(replace(enough, **{name: size - limit_step(size)})) is None:
            return f"{name} of {size - limit_step(size)} do, too"
    return ""


def run_small(seed: int, number: int) -> str:
    """A run of the small known model on the emulated GPU under random limits; what went wrong, or nothing. A refusal is asked for a limit that works."""
    from twinpilots import LLM, SamplingParams

    rng = random.Random(f"run {seed} {number}")
    limits = {"gpu_memory": log_uniform(rng, 4e6, PRESETS["demo"].gpu_memory_bytes), "host_memory": log_uniform(rng, 2e8, 2e9)}
    policy = rng.choice(POLICIES)
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(1, 60))] for _ in range(rng.randint(1, 6))]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for _ in range(2):
        try:
            with LLM("dummy:smollm2-135m", device="emulated:demo", policy=policy, max_model_len=128, max_num_seqs=4, **limits) as llm:
                llm.generate(prompts, params, use_tqdm=False)
            return ""
        except LimitError as error:
            asked = named_limits(str(error))
            if not asked:
                return f"{limits}, {policy}: {error}"
            if asked.get("gpu_bytes", 0) > PRESETS["demo"].gpu_memory_bytes:
                return ""  # no limit would do on this card
            limits |= {name.replace("bytes", "memory"): size for name, size in asked.items()}
    return f"{limits}, {policy}: refused with the limits that it asked for"


def outcomes(seed: int, numbers: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """In the order of their numbers, whoever is done first."""
    if jobs == 1:
        yield from (outcome(seed, number) for number in numbers)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts) as pool:
        try:
            yield from pool.map(partial(outcome, seed), numbers)
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """To the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def told(found: Iterator[Outcome], total: int) -> tuple[list[Outcome], bool]:
    """All outcomes, or those until the interrupt, and whether there was one; stderr hears how far it has come, and of every broken promise at once."""
    done: list[Outcome] = []
    began = said = time.monotonic()
    try:
        for each in found:
            done.append(each)
            now = time.monotonic()
            if each.wrong:
                sys.stderr.write(words(each) + "\n")
            if now - said >= TELL_S or each.wrong:
                said = now
                refused = sum(one.refusal is not None for one in done)
                sys.stderr.write(f"{len(done)} of {total} cases, {refused} refused, {sum(bool(one.wrong) for one in done)} wrong, {now - began:.0f} s\n")
                sys.stderr.flush()
    except KeyboardInterrupt:
        return done, True
    return done, False


def words(each: Outcome) -> str:
    return f"case {each.number} ({each.model}, {each.machine}, {each.policy}, {each.limits}): {each.wrong}"


def report(found: Sequence[Outcome], total: int) -> str:
    wrong = [each for each in found if each.wrong]
    refused = sum(each.refusal is not None for each in found)
    of_all = "" if len(found) == total else f" of {total}, then interrupted"
    lines = [f"{len(found)} cases{of_all}: {len(found) - refused} planned, {refused} refused; {len(wrong)} broke a promise"]
    return "\n".join([*lines, *map(words, wrong)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at work, for as many cores (default 1)")
    parser.add_argument("--runs", type=int, default=0, help="small cases to run on the emulated GPU as well")
    parser.add_argument("--json", action="store_true", help="print one JSON list of outcomes")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs takes a number of processes from 1 up, got {options.jobs}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        numbers = range(options.first, options.first + options.cases)
        found, interrupted = told(outcomes(options.seed, numbers, options.jobs), len(numbers))
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write((json.dumps([asdict(each) for each in found], indent=1) if options.json else report(found, options.cases)) + "\n")
    if interrupted:
        return INTERRUPTED
    failed = [text for number in range(options.runs) if (text := run_small(options.seed, number))]
    sys.stderr.write("".join(f"run: {text}\n" for text in failed))
    return 1 if failed or any(each.wrong for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
