"""The picture of `make gpu-bench`: what every policy achieved at every point, against the hardware bound. png.

Owns the drawing of a result document, nothing else. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_judge import best_bound
from benchmarks.gpu_points import GIB, MIB
from twinpilots.errors import UserError
from twinpilots.plan.picture import LINES

PEER_MARKS = {"accelerate": ("#888888", "*"), "llama.cpp": ("#7f3f00", "X")}
POINT_INCHES, LEGEND_INCHES = 0.85, 2.0


def plot(document: Mapping[str, Any], path: Path) -> None:
    """One panel per kind of pass, one column per point. UserError when ``path`` cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if path.suffix != ".png":
        raise UserError(f"cannot draw a {path.suffix or 'file without ending'}; name a file that ends in .png")
    panels = [(kind, found) for kind in ("decode", "prefill") if (found := [point for point in document["points"] if point["kind"] == kind])]
    widths = [len(found) + 1 for _, found in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(POINT_INCHES * sum(widths) + LEGEND_INCHES, 6.5), squeeze=False, gridspec_kw={"width_ratios": widths}, layout="constrained"
    )
    for axis, (kind, points) in zip(axes[0], panels, strict=True):
        _panel(axis, kind, points)
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    emulated = ", an emulated GPU: a rehearsal" if document["emulated"] else ""
    figure.suptitle(f"gpu-bench {document['slice']} of {document['commit']} on {document['gpu']}{emulated}: achieved against the hardware bound", fontsize=10)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another path") from error
    finally:
        plt.close(figure)


def _panel(axis: Any, kind: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Bars up to what the hardware allows; a mark per policy; the shares of it that `auto` achieved as numbers."""
    for column, point in enumerate(points):
        bound = best_bound(point)
        if bound is None:
            axis.text(column, 0.5, "infeasible\nor not run", transform=axis.get_xaxis_transform(), ha="center", va="center", fontsize=7, rotation=90)
            continue
        axis.bar(column, bound, width=0.8, color="#e8e8e8", edgecolor="#000000", linewidth=0.8, label="hardware bound", zorder=1)
        _marks(axis, column, point, bound)
    axis.set_yscale("log")
    axis.set_title(kind, fontsize=9)
    axis.set_ylabel("tokens generated per second" if kind == "decode" else "prompt tokens read per second", fontsize=8)
    axis.set_xlim(-0.7, len(points) - 0.3)
    axis.set_xticks(range(len(points)), [_label(point) for point in points], rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axis.grid(axis="y", color="#dddddd", linewidth=0.5, zorder=0)
    axis.tick_params(axis="y", labelsize=7)


def _marks(axis: Any, column: int, point: Mapping[str, Any], bound: float) -> None:
    shown = [(name, result["figures"]) for name, result in point["results"].items() if result["figures"] is not None]
    for number, (policy, figures) in enumerate(shown):
        colour, _, mark = LINES[policy]
        at = column + (0.0 if policy == "auto" else 0.6 * (number / max(1, len(shown) - 1) - 0.5))
        axis.plot(at, figures["tokens_per_s"], mark, color=colour, markersize=8 if policy == "auto" else 5, label=policy, zorder=3)
        if policy == "auto":
            axis.plot([column - 0.4, column + 0.4], [figures["plan_bound"]] * 2, "--", color="#555555", linewidth=0.9, label="plan bound", zorder=2)
            axis.plot(column, figures["predicted"], "_", color="#d55e00", markersize=14, markeredgewidth=1.5, label="auto, predicted", zorder=4)
            axis.annotate(f"{100 * figures['tokens_per_s'] / bound:.0f} %", (column, bound), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7)
    for peer, result in point["peers"].items():
        if result["tokens_per_s"]:
            colour, mark = PEER_MARKS[peer]
            axis.plot(column + 0.3, result["tokens_per_s"], mark, color=colour, markersize=7, label=peer, zorder=3)


def _label(point: Mapping[str, Any]) -> str:
    size = point["gpu_memory"]
    cap = f"{size // GIB} GiB" if size % GIB == 0 else f"{size // MIB} MiB"
    model = f"{point['model'].removeprefix('dummy:')}{' ' + point['quantization'] if point['quantization'] else ''}"
    return f"{model}, {cap}\n{point['num_seqs']} x {point['context']} tokens"
