"""`python -m benchmarks.published`: what other systems published, what our simulator predicts for them, and what our best plan would do there.

Owns the rows, their summary (errors, leave-one-cell-out, order of systems), the table and the plot. Every figure is predicted on the virtual clock; nothing
runs. Figures and constants are in `published_data.py`, how a system is simulated in `published_systems.py`; docs/published.md explains the outliers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from statistics import median
from typing import Any

from benchmarks.published_data import CELLS, LEDGER, MACHINES, Cell
from benchmarks.published_systems import Ledger, Run, cap, hardware, simulated, spec_of, twinpilots_baseline, twinpilots_kernels, twinpilots_paper, workload
from twinpilots.errors import LimitError
from twinpilots.plan.makespan import balance, fractional_makespan
from twinpilots.plan.plan import Plan
from twinpilots.plan.pricing import price_plan
from twinpilots.plan.solver import solve

OUR_BATCHES = (16, 64, 256)  # requests at once that our plans try where the source leaves the number open
TIE = 0.03  # published figures that are closer than this have no order
FIGURE_6_GPU_MS = (7.9, 7.9, 7.9, 12.0, 7.9, 31.5, 31.5)
FIGURE_6_CPU_MS = (4.6, 4.6, 4.6, 3.5, 4.6, 18.0, 18.0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure beside ours. ``predicted``: the system itself, simulated; ``left_out``: the same, with no constant estimated from this very
    figure; ``ours``: the best plan that ``auto`` finds. None: no prediction, and ``note`` says why."""

    system: str
    source: str
    model: str
    setup: dict[str, Any]
    measure: str
    unit: str
    published: float
    predicted: float | None
    left_out: float | None
    ours: float | None
    note: str

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.published - 1

    @property
    def left_out_error(self) -> float | None:
        return None if self.left_out is None else self.left_out / self.published - 1


def rows(*, ours: bool = True, ledger: Ledger | None = None) -> list[Row]:
    """All cells in their order. ``ours=False`` leaves our own plans out: they take minutes, the rest seconds."""
    return [row_of(cell, ours=ours, ledger=ledger) for cell in CELLS]


def row_of(cell: Cell, *, ours: bool = True, ledger: Ledger | None = None) -> Row:
    predicted = None if cell.gap else predict(cell, ledger or Ledger())
    estimated = any(cell.op == name for constant in LEDGER for name, _ in constant.derived) and not cell.gap
    return Row(
        system=cell.system, source=cell.source, model=cell.model if cell.weights == "fp16" else f"{cell.model} ({cell.weights} weights)", setup=setup_of(cell),
        measure=cell.measure + (f" {cell.op}" if cell.op else ""), unit=cell.unit, published=cell.published, predicted=predicted,
        left_out=predict(cell, Ledger(without=cell.op)) if estimated else predicted, ours=our_best(cell) if ours and not cell.gap else None,
        note="; ".join(text for text in (cell.gap, cell.note) if text),
    )  # fmt: skip


def setup_of(cell: Cell) -> dict[str, Any]:
    """What every system finds there: hardware, memory cap, lengths, and the number of requests where the source fixes it."""
    limits = cap(cell)
    return {
        "hardware": MACHINES[cell.machine].title, "gpu_memory_bytes": limits.gpu_bytes, "host_memory_bytes": limits.host_bytes, "input_len": cell.input_len,
        "output_len": cell.output_len, "requests": cell.requests,
    }  # fmt: skip


# -- predictions ---------------------------------------------------------------------------------------------------------------------------


def predict(cell: Cell, ledger: Ledger) -> float:
    """The published quantity, simulated."""
    return MEASURES[cell.measure](cell, ledger)


def _speed_up(cell: Cell, ledger: Ledger) -> float:
    return twinpilots_paper(cell, ledger).price.tokens_per_s / twinpilots_baseline(cell, ledger).price.tokens_per_s


def _traffic_saved(cell: Cell, ledger: Ledger) -> float:
    """Percent of a decode step's link traffic that the paper's plan saves, of the model with the least or the most."""
    models = [replace(cell, model=name) for name in cell.model.split(", ")]
    saved = [100 * (1 - twinpilots_paper(each, ledger).link_bytes / twinpilots_baseline(each, ledger).link_bytes) for each in models]
    return min(saved) if cell.op == "least" else max(saved)


def _whole_ops(_cell: Cell, _ledger: Ledger) -> float:
    return balance(FIGURE_6_CPU_MS, FIGURE_6_GPU_MS).makespan_s  # in the figure's unit: milliseconds in, milliseconds out


def _fractional(_cell: Cell, _ledger: Ledger) -> float:
    return fractional_makespan(FIGURE_6_CPU_MS, FIGURE_6_GPU_MS)


def _op(cell: Cell, ledger: Ledger) -> float:
    """Milliseconds of one op of one layer: on the GPU what it takes to bring its weights or KV (its computing hides behind the next load), or on the CPU."""
    name, device = cell.op.split("/")
    spec, profile = spec_of(cell), twinpilots_kernels(cell, ledger)
    assert profile.link is not None
    num_seqs = cell.requests or 1
    if name == "attention":
        context = cell.input_len + cell.output_len / 2
        num_bytes = num_seqs * context * spec.kv_bytes_per_token("bf16") / spec.num_layers
        on_cpu = profile.cpu.attention_s(num_bytes, spec.attention_flops(num_seqs, context))
    else:
        op = spec.layer_ops(0, 64)[name]
        num_bytes, on_cpu = op.weight_bytes, profile.cpu.linear_s(op.rate_key, op.rows * op.row_elements, num_seqs)
    return 1e3 * (on_cpu if device == "cpu" else num_bytes / profile.link.up_bytes_per_s)


MEASURES: dict[str, Callable[[Cell, Ledger], float]] = {
    "throughput": lambda cell, ledger: simulated(cell, ledger).price.tokens_per_s,
    "decode rate": lambda cell, ledger: simulated(cell, ledger).decode_per_s,
    "speed-up": _speed_up, "link traffic saved": _traffic_saved, "whole ops": _whole_ops, "fractional": _fractional, "op": _op,
}  # fmt: skip


# -- our own best plan ---------------------------------------------------------------------------------------------------------------------


def our_best(cell: Cell) -> float | None:
    """The cell's quantity under the best plan of policy ``auto`` on this hardware as its sheet describes it; None where a plan has no such quantity."""
    if cell.measure in ("whole ops", "fractional"):
        return fractional_makespan(FIGURE_6_CPU_MS, FIGURE_6_GPU_MS)  # our plans split ops
    if cell.measure in ("op", "link traffic saved"):
        return None
    run = _our_run(cell.model, cell.weights, cell.machine, cell.gpu_memory, cell.requests, cell.input_len, cell.output_len)
    if run is None:
        return None
    if cell.measure == "decode rate":
        return run.decode_per_s
    if cell.measure == "throughput":
        return run.price.tokens_per_s
    return run.price.tokens_per_s / twinpilots_baseline(cell, Ledger()).price.tokens_per_s  # measure "speed-up"


@cache
def _our_run(model: str, weights: str, machine: str, gpu_memory: float | None, requests: int | None, input_len: int, output_len: int) -> Run | None:
    """The best over the numbers of requests at once; systems that share a setup share the answer."""
    cell = Cell(
        system="", source="", model=model, weights=weights, machine=machine, gpu_memory=gpu_memory, requests=requests, input_len=input_len,
        output_len=output_len, published=0.0,
    )  # fmt: skip
    found = [_auto(cell, num_seqs) for num_seqs in ((requests,) if requests else OUR_BATCHES)]
    return max((run for run in found if run is not None), key=lambda run: run.price.tokens_per_s, default=None)


def _auto(cell: Cell, num_seqs: int) -> Run | None:
    spec, profile, work = spec_of(cell), hardware(cell), workload(cell, num_seqs)
    try:
        plan: Plan = solve(spec, profile, work, cap(cell), policy="auto").plan
    except LimitError:
        return None
    return Run(spec=spec, profile=profile, workload=work, plan=plan, price=price_plan(spec, profile, work, plan))


# -- summary -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Errors are shares of the published figure. ``arithmetic`` rows (figure 6 through `balance`) are exact by nature and not counted."""

    predicted: int
    without_prediction: int
    median_error: float
    end_to_end_median_error: float  # without figure 6's single ops: some of the constants are estimated from them
    median_left_out_error: float
    worst_error: float
    pairs: int
    pairs_in_order: int


def summarise(found: Sequence[Row]) -> Summary:
    counted = [row for row in found if row.error is not None and row.measure not in ("whole ops", "fractional")]
    pairs = ordered_pairs(found)
    errors = [abs(row.error) for row in counted if row.error is not None]
    left_out = [abs(row.left_out_error) for row in counted if row.left_out_error is not None]
    return Summary(
        predicted=len(counted), without_prediction=sum(row.predicted is None for row in found), median_error=median(errors),
        end_to_end_median_error=median(abs(row.error) for row in counted if row.error is not None and not row.measure.startswith("op ")),
        median_left_out_error=median(left_out), worst_error=max(errors), pairs=len(pairs), pairs_in_order=sum(pairs),
    )  # fmt: skip


def ordered_pairs(found: Sequence[Row]) -> list[bool]:
    """For every two systems with one model and setup, and figures that differ by more than `TIE`: whether the predicted order is the published one."""
    kept = []
    for first, second in combinations([row for row in found if row.predicted is not None], 2):
        same = (first.model, first.setup, first.measure) == (second.model, second.setup, second.measure) and first.system != second.system
        if same and abs(first.published / second.published - 1) > TIE:
            assert first.predicted is not None and second.predicted is not None
            kept.append((first.published < second.published) == (first.predicted < second.predicted))
    return kept


# -- output --------------------------------------------------------------------------------------------------------------------------------


def as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "error": row.error, "left_out_error": row.left_out_error}


def table(found: Sequence[Row]) -> str:
    """A markdown table: published beside predicted beside ours."""
    lines = ["| system | model | setup | figure | published | predicted | error | ours, predicted |", "|---|---|---|---|---|---|---|---|"]
    for row in found:
        limit = f"{row.setup['gpu_memory_bytes'] / 1e9:.1f} GB"
        requests = "a batch job" if row.setup["requests"] is None else f"{row.setup['requests']} at once"
        setup = f"{row.setup['hardware']}, {limit} of GPU memory, {row.setup['input_len']} + {row.setup['output_len']}, {requests}"
        error = "" if row.error is None else f"{100 * row.error:+.1f} %"
        figures = [f"{value:.3g}" if value is not None else "none" for value in (row.published, row.predicted, row.ours)]
        lines.append(f"| {row.system} | {row.model} | {setup} | {row.measure}, {row.unit} | {figures[0]} | {figures[1]} | {error} | {figures[2]} |")
    return "\n".join(lines)


def report(found: Sequence[Row]) -> str:
    summary = summarise(found)
    whole, left_out = 100 * summary.end_to_end_median_error, 100 * summary.median_left_out_error
    return "\n".join([
        table(found), "",
        f"{summary.predicted} cells predicted, {summary.without_prediction} without a prediction (their notes say why).",
        f"median error {100 * summary.median_error:.1f} %, of whole runs alone {whole:.1f} %; leaving each cell out {left_out:.1f} %; "
        f"worst {100 * summary.worst_error:.1f} %.",
        f"order of systems kept in {summary.pairs_in_order} of {summary.pairs} pairs of one setup that differ by more than {100 * TIE:.0f} %.",
    ])  # fmt: skip


def plot(found: Sequence[Row], path: str) -> None:
    """Predicted against published, one point per cell, on logarithmic axes; the band is 15 % to either side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in found if row.predicted is not None]
    figure, axes = plt.subplots(figsize=(8, 7))
    low, high = 0.4 * min(row.published for row in shown), 2.5 * max(row.published for row in shown)
    axes.fill_between([low, high], [0.85 * low, 0.85 * high], [1.15 * low, 1.15 * high], color="0.9", label="within 15 %")
    axes.plot([low, high], [low, high], color="0.6", linewidth=1)
    for system in dict.fromkeys(row.system for row in shown):
        points = [(row.published, row.predicted) for row in shown if row.system == system and row.predicted is not None]
        axes.scatter([x for x, _ in points], [y for _, y in points], label=system, s=42, alpha=0.85)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="published", ylabel="predicted by the simulator")
    axes.set_title("Published figures (tokens/s, ms, ratios) and their prediction")
    for row in shown:
        if row.error is not None and abs(row.error) >= 0.15:
            name, left = row.measure.removeprefix("op ") if row.measure.startswith("op ") else row.model, row.error > 0
            axes.annotate(
                f"{name} {100 * row.error:+.0f} %", (row.published, row.predicted), textcoords="offset points", xytext=(-7 if left else 7, -3),
                ha="right" if left else "left", fontsize=8,
            )  # fmt: skip
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list")
    parser.add_argument("--plot", metavar="FILE", help="draw predicted against published (png, svg or pdf by ending)")
    parser.add_argument("--without-ours", action="store_true", help="leave our own best plans out: seconds instead of minutes")
    options = parser.parse_args(arguments)
    found = rows(ours=not options.without_ours)
    if options.plot:
        plot(found, options.plot)
    text = json.dumps([as_json(row) for row in found], indent=1) if options.json else report(found)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
