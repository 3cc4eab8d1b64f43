"""The picture of a plan: who works when in one pass, and tokens/s of every policy against the batch, with the bounds. png, svg or html.

Owns the drawing of a document that has the figures of `figures.py`, nothing else: it computes none. matplotlib is imported when something is drawn.
An html page holds the svg and needs nothing else; its tasks say what they are when the pointer is on them (so do those of an svg file).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from twinpilots.errors import UserError

PICTURES = (".png", ".svg", ".html")
# From the top; queues without a task are left out.
ROWS = {"gpu": "GPU", "cpu": "CPU", "link_in": "link in", "link_out": "link out", "disk": "disk", "disk_out": "disk out"}
# Okabe and Ito's colours, told apart by everybody, and a brown; by what a task is about.
COLOURS = {
    "q, k, v, o": "#0072b2", "attention": "#cc79a7", "MLP": "#009e73", "head": "#e69f00", "norms, sums, rotary": "#999999",
    "activations over the link": "#56b4e9", "weights over the link": "#d55e00", "KV over the link": "#f0e442",
    "weights from the disk": "#6b3d1e", "KV on the disk": "#8f8a2c",
}  # fmt: skip
ATTENTION_OPS, HEAD_OPS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("lm_head",)
KINDS = {
    "attend": "attention", "send": "activations over the link", "recv": "activations over the link", "load": "weights over the link",
    "load_kv": "KV over the link", "store_kv": "KV over the link", "read": "weights from the disk",
    "read_kv": "KV on the disk", "write_kv": "KV on the disk",
}  # fmt: skip
SHORT = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_up_proj": "gate up", "down_proj": "down", "fc1": "fc1", "fc2": "fc2",
    "lm_head": "head", "attend": "attend", "load": "", "read": "",
}  # fmt: skip
LETTER = 0.0072  # of the axes' width, at the labels' size: a label is drawn only where it fits
LINES = {
    "auto": ("#000000", "-", "o"), "twinpilots": ("#0072b2", "-", "s"), "hetegen": ("#009e73", "-", "^"), "flexgen": ("#d55e00", "-", "v"),
    "layer-split": ("#cc79a7", "-", "D"), "stream": ("#56b4e9", "-", "<"), "cpu": ("#e69f00", "-", ">"), "resident": ("#999999", "-", "P"),
}  # fmt: skip


def plot(document: Mapping[str, Any], path: str | Path) -> None:
    """Draw ``document``, one of `report.plan_document` with `figures.pass_figures` and `figures.batch_figures`, to ``path``; its ending says how."""
    target = Path(path)
    if target.suffix not in PICTURES:
        raise UserError(f"cannot draw a {target.suffix or 'file without ending'}; name a file that ends in {', '.join(PICTURES)}")
    try:
        if target.suffix == ".png":
            _figure(document)[0].savefig(target, format="png", dpi=150)
        else:
            svg = _svg(document)
            target.write_text(_page(svg, str(document["model"])) if target.suffix == ".html" else svg, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another path") from error


def category(task: Mapping[str, Any]) -> str:
    """What a task is about: a key of `COLOURS`."""
    if task["op"]:
        return "q, k, v, o" if task["op"] in ATTENTION_OPS else "head" if task["op"] in HEAD_OPS else "MLP"
    return KINDS.get(task["kind"], "norms, sums, rotary")


# -- the whole figure ------------------------------------------------------------------------------------------------------------------------


def _figure(document: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """(figure, titles of the tasks, which have the ids task0, task1, ...)"""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib, which is not installed; pip install 'twinpilots[plot]'") from error
    figure = Figure(figsize=(13, 11), layout="constrained")
    gantt, dram, rates = figure.subplots(3, 1, height_ratios=(3.4, 1, 4.2))
    dram.sharex(gantt)
    emulated = " (emulated)" if document["emulated"] else ""
    work = document["workload"]
    lengths = f"{work['input_len']} + {work['output_len']} tokens"
    figure.suptitle(f"{document['model']} on {document['hardware']}{emulated}, policy {document['policy']}, {lengths}: predicted", fontsize=13)
    titles = _draw_gantt(gantt, document)
    _draw_dram(dram, document["pass"]["tasks"])
    _draw_rates(rates, document)
    return figure, titles


def _svg(document: Mapping[str, Any]) -> str:
    """The figure as svg, text as text, with a title on every task."""
    from matplotlib import rc_context

    figure, titles = _figure(document)
    drawing = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "twinpilots"}):
        figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    for number, title in enumerate(titles):
        mark = f'<g id="task{number}">'
        svg = svg.replace(mark, f"{mark}<title>{escape(title)}</title>", 1)
    return svg


def _page(svg: str, title: str) -> str:
    drawing = svg[svg.index("<svg") :]
    style = "body{margin:0;background:#fff}svg{width:100%;height:auto;max-width:1400px;display:block;margin:auto}g[id^=task]:hover path{opacity:.6}"
    return f"<!doctype html><html><head><meta charset='utf-8'><title>{escape(title)}</title><style>{style}</style></head><body>{drawing}</body></html>\n"


# -- one pass --------------------------------------------------------------------------------------------------------------------------------


def _draw_gantt(axes: Any, document: Mapping[str, Any]) -> list[str]:
    from matplotlib.patches import Patch, Rectangle

    timeline: Sequence[Mapping[str, Any]] = document["pass"]["tasks"]
    rows = [queue for queue in ROWS if any(task["queue"] == queue for task in timeline)]
    whole_ms = 1e3 * max(task["end_s"] for task in timeline)
    axes.set_xlim(0, whole_ms)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    titles = []
    for number, task in enumerate(timeline):
        kind, row = category(task), rows.index(task["queue"])
        start_ms, length_ms = 1e3 * task["start_s"], 1e3 * (task["end_s"] - task["start_s"])
        line = 0.4 if length_ms > 0.005 * whole_ms else 0.0  # around a thin task it would leave nothing of it
        box = Rectangle((start_ms, row - 0.4), length_ms, 0.8, facecolor=COLOURS[kind], edgecolor="white", linewidth=line, clip_on=True)
        box.set_gid(f"task{number}")
        axes.add_patch(box)
        titles.append(_title(task))
        _label(axes, task, row, length_ms / whole_ms)
    _mark_layers(axes, timeline)
    axes.set_yticks(range(len(rows)), [ROWS[row] for row in rows])
    axes.tick_params(labelbottom=False)
    axes.set_title(_pass_title(document["pass"]), loc="left", fontsize=11)
    used = [kind for kind in COLOURS if any(category(task) == kind for task in timeline)]
    axes.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in used], loc="lower left", bbox_to_anchor=(0.0, 1.1), ncols=len(used), fontsize=9,
        frameon=False, borderaxespad=0.0, columnspacing=1.2, handlelength=1.2,
    )  # fmt: skip
    return titles


def _pass_title(shown: Mapping[str, Any]) -> str:
    which = "all layers and the head" if shown["shown_layers"] == shown["num_layers"] else f"the first {shown['shown_layers']} of {shown['num_layers']} layers"
    return f"one {shown['phase']} pass of {1e3 * shown['seconds']:.4g} ms: {which}"


def _title(task: Mapping[str, Any]) -> str:
    where = f"layer {task['layer']}" if task["layer"] >= 0 else "head"
    what = f"{task['op']} ({task['kind']})" if task["op"] else task["kind"]
    micro_batch = f", micro-batch {task['mb']}" if task["mb"] >= 0 else ""
    return f"{what}, {where}{micro_batch}: {1e3 * task['start_s']:.3f} to {1e3 * task['end_s']:.3f} ms, {1e3 * (task['end_s'] - task['start_s']):.3f} ms"


def _label(axes: Any, task: Mapping[str, Any], row: int, width: float) -> None:
    """The operation's name inside its box, where there is room; dark on light colours."""
    text = SHORT.get(task["op"] or task["kind"], "")
    if not text or width < LETTER * (len(text) + 1):
        return
    middle_ms = 1e3 * (task["start_s"] + task["end_s"]) / 2
    dark = category(task) in ("q, k, v, o", "MLP", "weights over the link")
    axes.text(middle_ms, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black", clip_on=True)


def _mark_layers(axes: Any, timeline: Sequence[Mapping[str, Any]]) -> None:
    """A thin line where the compute queues begin another layer."""
    starts: dict[int, float] = {}
    for task in timeline:
        if task["queue"] in ("cpu", "gpu") and task["layer"] != 0:
            starts[task["layer"]] = min(starts.get(task["layer"], task["start_s"]), task["start_s"])
    for start_s in starts.values():
        axes.axvline(1e3 * start_s, color="#444444", linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.5)


def _draw_dram(axes: Any, timeline: Sequence[Mapping[str, Any]]) -> None:
    """The share of host memory's bandwidth that the tasks under way use together."""
    events = sorted((when, change) for task in timeline for when, change in ((task["start_s"], task["dram_frac"]), (task["end_s"], -task["dram_frac"])))
    times, loads, load = [0.0], [0.0], 0.0
    for when, change in events:
        load += change
        times.append(1e3 * when)
        loads.append(100 * max(0.0, load))
    axes.fill_between(times, loads, step="post", color="#7f7f7f", alpha=0.7, linewidth=0)
    axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(110.0, 1.05 * max(loads)))
    axes.set_ylabel("DRAM load, %")
    axes.set_xlabel("ms since the previous pass ended")


# -- throughput against the batch ------------------------------------------------------------------------------------------------------------


def _draw_rates(axes: Any, document: Mapping[str, Any]) -> None:
    """Log-log: every policy's tokens/s, and the two bounds."""
    batches: Sequence[Mapping[str, Any]] = document["batches"]
    counts = [batch["max_num_seqs"] for batch in batches]
    for name, style, label in (("hardware_bound", ":", "hardware bound"), ("plan_bound", "--", "plan bound")):
        marker = "_" if len(counts) == 1 else ""
        axes.plot(counts, [batch[name] for batch in batches], linestyle=style, color="#444444", linewidth=1.5, label=label, marker=marker)
    for name in sorted(document["policies"], key=lambda name: name == "auto"):  # auto last: on top of those it equals
        colour, style, marker = LINES.get(name, ("#333333", "-", "x"))
        points = [(batch["max_num_seqs"], rate) for batch in batches if (rate := batch["policies"].get(name)) is not None]
        label = f"{name}{'' if points else ' (infeasible)'}{' = auto' if name != 'auto' and _same_as_auto(batches, name) else ''}"
        axes.plot([x for x, _ in points], [y for _, y in points], linestyle=style, marker=marker, color=colour, label=label, markersize=5,
                  linewidth=2.4 if name == "auto" else 1.3)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    _label_decades(axes)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("sequences at once (requests of the workload)")
    axes.set_ylabel("generated tokens/s")
    axes.set_title("throughput against the batch, every policy", loc="left", fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)


def _same_as_auto(batches: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a policy's curve lies under auto's: it would not be seen."""
    pairs = [(batch["policies"].get(name), batch["policies"].get("auto")) for batch in batches]
    return all(rate is not None and best is not None and abs(rate - best) < 0.005 * best for rate, best in pairs)


def _label_decades(axes: Any) -> None:
    """Ticks at 1, 2 and 5 of every decade, written as plain numbers: a range of rates is often less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
