"""`python -m benchmarks.resolves`: what it takes to re-solve a bucket when rates have changed, at a glance and by a search, and what each finds.

Owns the cases and the table. Times are this process's processor time, so neighbours count little; plans are compared by the simulator's full price of a pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.adaptation_machine import slower
from twinpilots.background_worker import collecting_later
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.plan.glance import glance
from twinpilots.plan.priced import Layout
from twinpilots.plan.pricing import phase_loads
from twinpilots.plan.rebalance import Option, option_of, options
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits, Workload

WANTED_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a preset, so many sequences of such lengths."""

    model: str
    hardware: str
    num_seqs: int
    input_len: int
    output_len: int


CASES = (
    Case(model="smollm2-135m", hardware="demo", num_seqs=16, input_len=64, output_len=64),
    Case(model="llama-3-8b", hardware="rtx-3060", num_seqs=16, input_len=512, output_len=128),
    Case(model="opt-30b", hardware="t4", num_seqs=144, input_len=512, output_len=32),
    Case(model="llama-3-70b", hardware="a6000", num_seqs=32, input_len=512, output_len=128),
)


def slow_link(profile: HardwareProfile, factor: float) -> HardwareProfile:
    assert profile.link is not None
    link = profile.link
    return replace(profile, link=replace(link, up_bytes_per_s=link.up_bytes_per_s / factor, down_bytes_per_s=link.down_bytes_per_s / factor))


CHANGES: Mapping[str, Callable[[HardwareProfile], HardwareProfile]] = {
    "as planned": lambda profile: profile,
    "CPU 1.08 x": lambda profile: replace(profile, cpu=slower(profile.cpu, 1.08)),
    "CPU 0.9 x": lambda profile: replace(profile, cpu=slower(profile.cpu, 0.9)),
    "CPU 1.2 x": lambda profile: replace(profile, cpu=slower(profile.cpu, 1.2)),
    "link 1.15 x": lambda profile: slow_link(profile, 1.15),
    "CPU 3 x": lambda profile: replace(profile, cpu=slower(profile.cpu, 3.0)),
    "link 2 x": lambda profile: slow_link(profile, 2.0),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One re-solve. ``loss``: how much longer a pass of the glance's plan takes than of the search's."""

    model: str
    change: str
    glance_s: float
    search_s: float
    now_s: float
    loss: float


def rows_of(case: Case) -> Iterator[Row]:
    spec, profile = dummy_spec(case.model), PRESETS[case.hardware]
    workload = Workload(num_requests=case.num_seqs, input_len=case.input_len, output_len=case.output_len, max_num_seqs=case.num_seqs)
    plan = solve(spec, profile, workload, Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes)).plan
    bucket, load, _ = phase_loads(workload, plan, "decode")[0]
    for change, changed in CHANGES.items():
        rates, layout = changed(profile), Layout(spec, plan)
        options(spec, profile, plan, bucket, load, layout=layout)  # the search that the glance goes on from
        found, glance_s = timed(lambda rates=rates, layout=layout: glance(spec, rates, plan, bucket, load, layout))  # type: ignore[misc]
        searched, search_s = timed(lambda rates=rates: options(spec, rates, plan, bucket, load))  # type: ignore[misc]
        quick_s = min(searched[0].seconds, option_of(spec, rates, plan, best_of(found).bucket, load).seconds)
        yield Row(
            model=case.model, change=change, glance_s=glance_s, search_s=search_s, now_s=searched[0].seconds, loss=quick_s / best_of(searched).seconds - 1
        )


def best_of(found: Sequence[Option]) -> Option:
    return min(found, key=lambda option: option.seconds)


def timed(call: Callable[[], tuple[Option, ...]]) -> tuple[tuple[Option, ...], float]:
    with collecting_later():  # as the process does that solves beside a run
        began = time.process_time()
        found = call()
        return found, time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resolves", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=[case.model for case in CASES], help="this case alone (repeatable)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of rows")
    given = parser.parse_args(arguments)
    found = [row for case in CASES if not given.model or case.model in given.model for row in rows_of(case)]
    if given.json:
        sys.stdout.write(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    else:
        sys.stdout.write("| model | rates | glance | search | pass now | the glance's plan |\n|---|---|---|---|---|---|\n")
        for row in found:
            times = f"{1e3 * row.glance_s:.0f} ms | {1e3 * row.search_s:.0f} ms | {1e3 * row.now_s:.4g} ms"
            sys.stdout.write(f"| {row.model} | {row.change} | {times} | {100 * row.loss:+.1f} % |\n")
    return 0 if all(row.glance_s <= WANTED_S for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
