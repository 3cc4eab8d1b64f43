"""How a running plan follows what happens to the machine and to the load, against an oracle that is told everything.

Four scenarios on the virtual clock: another process takes the CPU and goes away; the link's bandwidth halves; KV grows until attention dominates; a batch
drains from 64 sequences to one. The planner gets what a real pass reports (seconds by kind of work), from rates that it was never told and that its profile
has wrong by up to 10 %. The oracle searches plans over the same memory at the true rates.

    python -m benchmarks.adaptation [--json] [--plot FILE]
    python -m benchmarks.adaptation --live [--scenario NAME] [--model MODEL] [--settle PASSES] [--json]      # on this box (`adaptation_live`)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.adaptation_machine import VirtualMachine, busy_cpu, misjudged, oracle_seconds, slow_link
from twinpilots.adaptation import Inline
from twinpilots.hardware.presets import GB, GIB, PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.model.spec import ModelSpec
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.load import decode_load
from twinpilots.plan.plan import Plan
from twinpilots.plan.pricing import waves_of
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits, Workload

MODEL, LAYERS, HARDWARE = "llama-2-13b", 6, "a10g"
GPU_BYTES = int(1.4 * GIB)  # a third of the six layers and the head
SETTLED = 20  # passes after a change by which the plan must have followed
GOOD = 0.95  # of the oracle's throughput
ORACLE_STEP = 256  # tokens of context for which the oracle searches anew; between, its gain over the first plan is taken to stay
KV_STEP = 32  # contexts are told apart as the session does


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The load and the machine at one pass."""

    num_seqs: int
    context: int
    change: Callable[[HardwareProfile], HardwareProfile] = lambda profile: profile


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``events``: passes at which something changes at once. ``moment(pass)`` is what is true then."""

    name: str
    title: str
    passes: int
    events: tuple[int, ...]
    workload: Workload
    moment: Callable[[int], Moment]

    def stretch(self, step: int) -> int:
        """The number of the stretch between two events that a pass belongs to: the true rates are the same all along it."""
        return sum(event <= step for event in self.events)


@dataclass(kw_only=True)
class Outcome:
    """Tokens/s of every pass under three plans: the adapting one, the oracle's, and the first one kept for ever."""

    scenario: str
    adaptive: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    asks: int = 0
    settled: list[int] = field(default_factory=list)  # the passes that are judged
    events: tuple[int, ...] = ()

    @property
    def worst(self) -> float:
        """The least share of the oracle's throughput over any five judged passes in a row."""
        ratios = [self.adaptive[i] / self.oracle[i] for i in self.settled]
        return min(sum(ratios[i : i + 5]) / 5 for i in range(max(1, len(ratios) - 4)))

    @property
    def mean(self) -> float:
        return sum(self.adaptive[i] / self.oracle[i] for i in self.settled) / len(self.settled)

    @property
    def frozen_mean(self) -> float:
        return sum(self.frozen[i] / self.oracle[i] for i in self.settled) / len(self.settled)

    @property
    def returns(self) -> int:
        """Changes back to a plan left within the last 40 passes, with nothing happening in between that called for it: oscillation."""
        count = 0
        for index, change in enumerate(self.changes):
            new = change["change"].split(" -> ")[1]
            since = max([change["pass"] - 2 * SETTLED, *(event for event in self.events if event < change["pass"])])
            lately = [each for each in self.changes[:index] if each["pass"] > since]
            count += any(each["change"].split(" -> ")[0] == new for each in lately)
        return count

    def as_dict(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario, "passes": len(self.adaptive), "worst_of_oracle": self.worst, "mean_of_oracle": self.mean,
            "frozen_plan_of_oracle": self.frozen_mean, "plan_changes": len(self.changes), "oscillations": self.returns, "re_solves": self.asks,
            "good": self.worst >= GOOD and self.returns == 0, "changes": self.changes,
        }  # fmt: skip


# -- the four scenarios ------------------------------------------------------------------------------------------------------------------------


def _cpu_load(step: int, per: int) -> Moment:
    return Moment(num_seqs=32, context=512, change=busy_cpu(3.0) if per <= step < 2 * per else busy_cpu(1.0))


def _link_halves(step: int, per: int) -> Moment:
    return Moment(num_seqs=32, context=512, change=slow_link(2.0) if step >= per else slow_link(1.0))


def _kv_grows(step: int, per: int) -> Moment:
    return Moment(num_seqs=16, context=64 + step * 3900 // (3 * per))


def _drains(step: int, per: int) -> Moment:
    return Moment(num_seqs=max(1, 64 >> (step // per)), context=512)


def scenarios(per: int = 40) -> tuple[Scenario, ...]:
    """``per``: passes between two events."""

    def workload(count: int, input_len: int, output_len: int) -> Workload:
        return Workload(num_requests=count, input_len=input_len, output_len=output_len, max_num_seqs=count)

    return (
        Scenario(
            name="cpu-load", title="another process takes two thirds of the CPU, then goes", passes=3 * per, events=(0, per, 2 * per),
            workload=workload(32, 448, 128), moment=lambda step: _cpu_load(step, per),
        ),
        Scenario(
            name="link-halves", title="the link's bandwidth halves", passes=2 * per, events=(0, per), workload=workload(32, 448, 128),
            moment=lambda step: _link_halves(step, per),
        ),
        Scenario(
            name="kv-grows", title="KV grows until attention dominates", passes=3 * per, events=(0,), workload=workload(16, 64, 3968),
            moment=lambda step: _kv_grows(step, per),
        ),
        Scenario(
            name="batch-drains", title="the batch drains from 64 to 1", passes=7 * per, events=tuple(per * i for i in range(7)),
            workload=workload(64, 448, 128), moment=lambda step: _drains(step, per),
        ),
    )  # fmt: skip


# -- running one -------------------------------------------------------------------------------------------------------------------------------


def model_and_machine() -> tuple[ModelSpec, HardwareProfile, Limits]:
    """A slice of a 13B model, and what its share of an A10G would be."""
    spec = dummy_spec(MODEL)
    spec = replace(spec, name=f"{MODEL} ({LAYERS} layers)", layers=spec.layers[:LAYERS])
    profile = PRESETS[HARDWARE]
    return spec, profile, Limits(gpu_bytes=GPU_BYTES, host_bytes=int(64 * GB))


def run(scenario: Scenario, seed: int = 1) -> Outcome:
    spec, truth, limits = model_and_machine()
    believed = misjudged(truth, seed)
    plan = solve(spec, believed, scenario.workload, limits).plan
    first = plan
    machine = VirtualMachine(spec, truth, seed)
    planner = OnlinePlanner(spec, believed, Inline(), adapts=True)
    on_gpu_most, _ = waves_of(plan, scenario.workload)[1:]
    outcome, known = Outcome(scenario=scenario.name, events=scenario.events), dict[tuple[int, int, int], float]()
    for step in range(scenario.passes):
        moment = scenario.moment(step)
        machine.truth = moment.change(truth)
        on_gpu = min(moment.num_seqs, on_gpu_most)
        context = -(-moment.context // KV_STEP) * KV_STEP
        bucket = plan.bucket_for("decode", moment.num_seqs)
        load = decode_load(on_gpu, moment.num_seqs - on_gpu, context, bucket)
        frozen_s = _frozen_seconds(machine, first, moment.num_seqs, on_gpu, context)
        key = moment.num_seqs, context // ORACLE_STEP, scenario.stretch(step)
        if key not in known:
            known[key] = oracle_seconds(machine, first, load) / frozen_s
        outcome.oracle.append(moment.num_seqs / (known[key] * frozen_s))
        outcome.frozen.append(moment.num_seqs / frozen_s)
        prediction = planner.predict(plan, bucket, load)
        done = machine.run(plan, bucket, load)
        outcome.adaptive.append(moment.num_seqs / done.true_s)
        change = planner.after_pass(
            PassDone(
                plan=plan, bucket=bucket, load=load, schedule=done.schedule, work_s=done.work_s, seconds=done.seconds,
                driver_s=machine.truth.step_s(load.num_seqs), remaining=scenario.passes - step,
            ),
            prediction,
        )  # fmt: skip
        if change is not None:
            plan = change.plan
            planner.switched(plan, 0.05)
    outcome.changes = [record.as_dict() for record in planner.adaptation.history]
    outcome.asks = planner.adaptation.num_asks
    outcome.settled = [step for step in range(scenario.passes) if all(not event <= step < event + SETTLED for event in scenario.events)]
    return outcome


def _frozen_seconds(machine: VirtualMachine, plan: Plan, num_seqs: int, on_gpu: int, context: int) -> float:
    bucket = plan.bucket_for("decode", num_seqs)
    return machine.seconds(plan, bucket, decode_load(on_gpu, num_seqs - on_gpu, context, bucket))


# -- reporting ---------------------------------------------------------------------------------------------------------------------------------


def report(found: Sequence[Outcome]) -> str:
    lines = ["| scenario | passes | of the oracle, worst five passes | mean | first plan kept | changes | oscillations |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {each.scenario} | {len(each.adaptive)} | {each.worst:.3f} | {each.mean:.3f} | {each.frozen_mean:.3f} | {len(each.changes)} | {each.returns} |"
        for each in found
    ]
    lines += [f"{each.scenario}, pass {change['pass']}: {change['reason']}: {change['change']}" for each in found for change in each.changes]
    return "\n".join(lines)


def plot(found: Sequence[tuple[Scenario, Outcome]], path: str) -> None:
    """Throughput of the three plans pass by pass, one panel per scenario; events dotted, plan changes marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(13, 8.5))
    for axes, (scenario, outcome) in zip(panels.flat, found, strict=False):
        axes.plot(outcome.oracle, color="0.55", linewidth=2.5, label="oracle (knows the rates)")
        axes.plot(outcome.frozen, color="tab:red", linewidth=1.2, linestyle="--", label="first plan kept")
        axes.plot(outcome.adaptive, color="tab:blue", linewidth=1.4, label="TwinPilots")
        at = [change["pass"] for change in outcome.changes]
        axes.plot(at, [outcome.adaptive[min(step, scenario.passes - 1)] for step in at], "v", color="tab:blue", markersize=7, label="plan changed")
        for event in scenario.events[1:]:
            axes.axvline(event, color="0.75", linewidth=0.8, linestyle=":")
        axes.set(xlabel="pass", ylabel="tokens/s", title=f"{scenario.title}\nworst {100 * outcome.worst:.1f} % of the oracle after {SETTLED} passes")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0, 0].legend(loc="lower left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _live(names: Sequence[str], model: str | None, settle: int, *, as_json: bool) -> int:
    from benchmarks import adaptation_live as live  # the engine is needed only here

    found = live.run_live(names, model or live.MODEL, settle, tell=lambda line: sys.stderr.write(line + "\n"))
    sys.stdout.write((json.dumps([each.as_dict() for each in found], indent=1) if as_json else live.report(found)) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list, a row per scenario")
    parser.add_argument("--plot", metavar="FILE", help="draw all scenarios (png, svg or pdf by ending)")
    parser.add_argument("--seed", type=int, default=1, help="of the noise and of the profile's errors (default: 1)")
    parser.add_argument("--live", action="store_true", help="on this box with an emulated GPU, instead of the virtual clock")
    parser.add_argument("--scenario", metavar="NAME", choices=[each.name for each in scenarios()], action="append", help="only this one (may be repeated)")
    parser.add_argument("--model", metavar="MODEL", help="of the live run (default: smollm2-135m)")
    parser.add_argument("--settle", type=int, metavar="PASSES", help=f"after an event, before live passes are judged (default: {SETTLED})")
    options = parser.parse_args(arguments)
    if options.live and options.plot:
        parser.error("--plot draws the virtual clock's scenarios; leave out --live")
    if options.settle is not None and (options.settle < 1 or not options.live):
        parser.error(f"--settle is for --live and at least 1, got {options.settle}")
    if options.model and not options.live:
        parser.error("--model is for --live; the virtual clock has its own")
    wanted = options.scenario or [each.name for each in scenarios()]
    if options.live:
        return _live(wanted, options.model, options.settle or SETTLED, as_json=options.json)
    chosen = [each for each in scenarios() if each.name in wanted]
    found = [(scenario, run(scenario, options.seed)) for scenario in chosen]
    if options.plot:
        plot(found, options.plot)
    outcomes = [outcome for _, outcome in found]
    sys.stdout.write((json.dumps([each.as_dict() for each in outcomes], indent=1) if options.json else report(outcomes)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
