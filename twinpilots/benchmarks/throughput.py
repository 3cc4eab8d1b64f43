"""`twinpilots bench throughput`: tokens/s of the policies in alternating rounds.

Owns the order of rounds, the table and the JSON document. A round is: every contender generates once for the same prompts, one after the other, in an
order that turns round by round, so that a drifting machine favours nobody.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from twinpilots.benchmarks.contender import Contender, Run
from twinpilots.benchmarks.summary import best_other, compare
from twinpilots.commands import options
from twinpilots.errors import UserError
from twinpilots.progress import Progress
from twinpilots.trace import joint_trace

if TYPE_CHECKING:
    from twinpilots.hardware.profile import HardwareProfile

PROMPT_IDS = range(3, 100)  # tokens that every vocabulary has; a dense model's speed does not depend on which


@dataclass
class Standing:
    """One contender's results so far; ``reason`` says why it could not take part."""

    policy: str
    runs: list[Run] = field(default_factory=list)
    reason: str | None = None

    @property
    def tokens_per_s(self) -> list[float]:
        return [run.tokens_per_s for run in self.runs]


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure, then print the table or return the document."""
    profile = measured_limits(args)
    if not args.json:
        print(limits_text(profile), flush=True)
    standings = [Standing(policy=policy) for policy in args.policies]
    total = len(standings) * (args.rounds + 1)
    with Progress("bench", total=total, unit="runs") as bar, traces(args) as tracer:
        play = play_reloading if args.reload else play_loaded
        play(standings, args, bar, tracer)
    if all(standing.reason for standing in standings):
        raise UserError(f"no policy can run: {'; '.join(f'{standing.policy}: {standing.reason}' for standing in standings)}")
    document = summarize(args, standings, profile)
    if args.json:
        return document
    print(document_text(document))
    return None


def measured_limits(args: argparse.Namespace) -> HardwareProfile:
    """The machine's rates, measured now. A machine that was never measured for this model is first measured in full, so that all contenders plan alike."""
    from twinpilots.commands.models import model_spec
    from twinpilots.profiling import measure_machine, stored_profile

    spec = model_spec(args.model, revision=args.revision, dtype=args.dtype, quantization=args.quantization, keep=args.keep, strict=args.strict)
    with Progress("measuring", unit="steps") as bar:

        def step(note: str) -> None:
            bar.update(note=note)

        if stored_profile(args.device, spec, threads=args.threads) is None:
            return measure_machine(args.device, spec, threads=args.threads, progress=step)
        return measure_machine(args.device, spec, threads=args.threads, quick=True, store=False, progress=step)


def limits(profile: HardwareProfile) -> dict[str, Any]:
    """The rates that bound every contender, as the JSON document names them (bytes/s and FLOP/s; null without a GPU)."""
    gpu, link = profile.gpu, profile.link
    return {
        "cpu_read_bytes_per_s": profile.cpu.read_bytes_per_s, "cpu_flops_per_s": profile.cpu.flops_per_s, "dram_bytes_per_s": profile.dram_bytes_per_s,
        "gpu_read_bytes_per_s": gpu.read_bytes_per_s if gpu else None, "gpu_flops_per_s": gpu.flops_per_s if gpu else None,
        "link_up_bytes_per_s": link.up_bytes_per_s if link else None, "link_down_bytes_per_s": link.down_bytes_per_s if link else None,
    }  # fmt: skip


def limits_text(profile: HardwareProfile) -> str:
    """The limits first: what no contender can beat."""
    from twinpilots.commands.profile import profile_text

    return "limits, measured now:\n" + profile_text(profile)


Tracer = Callable[[int, str], dict[str, Any] | None]  # (round, policy) -> the arguments of `LLM.trace`, None for a run without


@contextmanager
def traces(args: argparse.Namespace) -> Iterator[Tracer]:
    """The last round of every contender is traced; all of them together are --trace FILE."""
    with joint_trace(args.trace, args.policies, args.trace_passes, {"model": args.model, "policies": list(args.policies), "round": args.rounds}) as arguments:
        yield lambda number, policy: arguments(args.policies.index(policy)) if number == args.rounds - 1 else None


def play_loaded(standings: Sequence[Standing], args: argparse.Namespace, bar: Progress, tracer: Tracer) -> None:
    """All contenders stay in memory; the waiting ones sleep."""
    contenders: dict[str, Contender] = {}
    try:
        for standing in standings:
            enter(standing, args, contenders)
            bar.update(note=f"warm-up, {standing.policy}")
        for number in range(args.rounds):
            for standing in turn(standings, number):
                if standing.policy in contenders:
                    standing.runs.append(contenders[standing.policy].run(tracer(number, standing.policy)))
                bar.update(note=f"round {number + 1} of {args.rounds}, {standing.policy}")
    except BaseException:
        for contender in contenders.values():
            contender.kill()
        raise
    for contender in contenders.values():
        contender.close()


def play_reloading(standings: Sequence[Standing], args: argparse.Namespace, bar: Progress, tracer: Tracer) -> None:
    """One contender in memory at a time: loaded and warmed up again for every round, neither of which is timed."""
    bar.update(len(standings))
    for number in range(args.rounds):
        for standing in turn(standings, number):
            if standing.reason is None:
                contenders: dict[str, Contender] = {}
                enter(standing, args, contenders)
                for contender in contenders.values():
                    try:
                        standing.runs.append(contender.run(tracer(number, standing.policy)))
                    except BaseException:
                        contender.kill()
                        raise
                    contender.close()
            bar.update(note=f"round {number + 1} of {args.rounds}, {standing.policy}")


def enter(standing: Standing, args: argparse.Namespace, contenders: dict[str, Contender]) -> None:
    """Start a contender and warm it up; one whose policy cannot be planned within the limits stays out, with the reason."""
    arguments = {**options.llm_arguments(args), "policy": standing.policy, "max_num_seqs": args.max_num_seqs or args.num_prompts}
    try:
        contender = Contender(arguments, prompts(args.num_prompts, args.input_len), args.output_len)
    except UserError as error:
        standing.reason = str(error)
        return
    contenders[standing.policy] = contender
    contender.run()


def turn(standings: Sequence[Standing], number: int) -> list[Standing]:
    """The order of one round: every second round runs backwards."""
    return list(standings) if number % 2 == 0 else list(reversed(standings))


def prompts(count: int, length: int) -> list[list[int]]:
    """The same token ids in every run; no tokenizer is needed."""
    draw = random.Random(0)
    return [draw.choices(PROMPT_IDS, k=length) for _ in range(count)]


def summarize(args: argparse.Namespace, standings: Sequence[Standing], profile: HardwareProfile) -> dict[str, Any]:
    """The JSON document: per-round numbers, medians, ratios with their 95 % lower bounds."""
    finished = {standing.policy: standing for standing in standings if standing.runs}
    medians = {policy: median(standing.tokens_per_s) for policy, standing in finished.items()}
    reference = "auto" if "auto" in finished else next(iter(finished))
    ratios = {
        policy: asdict(compare(finished[reference].tokens_per_s, standing.tokens_per_s)) for policy, standing in finished.items() if policy != reference
    }  # fmt: skip
    last = next(iter(finished.values())).runs[-1].stats
    return {
        "schema": 1, "benchmark": "throughput", "model": args.model, "device": last["device"], "emulated": last["emulated"],
        "workload": {"num_prompts": args.num_prompts, "input_len": args.input_len, "output_len": args.output_len, "rounds": args.rounds},
        "limits": limits(profile),
        "contenders": {standing.policy: _contender(standing, medians) for standing in standings},
        "reference": reference, "best_other": best_other(medians, reference), "ratios": ratios,
    }  # fmt: skip


def _contender(standing: Standing, medians: Mapping[str, float]) -> dict[str, Any]:
    rounds = [{"seconds": run.seconds, "generated": run.generated, "tokens_per_s": run.tokens_per_s} for run in standing.runs]
    stats = standing.runs[-1].stats if standing.runs else None
    return {"median_tokens_per_s": medians.get(standing.policy), "rounds": rounds, "stats": stats, "reason": standing.reason}


def document_text(document: Mapping[str, Any]) -> str:
    """The table: measured beside predicted and the bounds, who was busy, and the reference's lead."""
    rows = []
    for policy, entry in document["contenders"].items():
        if entry["stats"] is None:
            rows.append([policy, *["-"] * 8])
            continue
        ratio = document["ratios"].get(policy)
        rates, busy, seconds = entry["stats"]["tokens_per_s"], entry["stats"]["busy_s"], entry["stats"]["seconds"]
        rows.append(
            [
                policy,
                f"{entry['median_tokens_per_s']:.2f}",
                *(number(rates[name]) for name in ("predicted", "plan_bound", "hardware_bound")),
                *(f"{100 * busy[name] / seconds:.0f} %" for name in ("cpu", "gpu", "link")),
                f"{ratio['median']:.2f} (>= {ratio['lower_bound']:.2f})" if ratio else "",
            ]
        )
    header = ["policy", "tokens/s", "predicted", "plan bound", "hw bound", "cpu busy", "gpu busy", "link busy", f"{document['reference']} / it"]
    left_out = [f"{policy}: {entry['reason']}" for policy, entry in document["contenders"].items() if entry["reason"]]
    emulated = ", an emulated GPU" if document["emulated"] else ""
    where = f"{document['model']} on {document['device']}{emulated}; medians of {document['workload']['rounds']} rounds"
    return "\n".join([where, options.table(header, rows), *left_out, lead_text(document)])


def number(value: float | None) -> str:
    """A rate, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def lead_text(document: Mapping[str, Any]) -> str:
    """One sentence on the reference against the best of the others."""
    rival = document["best_other"]
    if rival is None:
        return f"{document['reference']} ran alone"
    ratio = document["ratios"][rival]
    bound = f"at least {ratio['lower_bound']:.3f} with 95 % confidence (bootstrap over rounds)"
    return f"{document['reference']} / {rival}, the best other: {ratio['median']:.3f}, {bound}"
