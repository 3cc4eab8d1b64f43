"""What `twinpilots plan` shows: the document (JSON), its text for a terminal, and its picture.

Owns the document's keys (docs/cli.md, schema 1) and wording. Everything in it is predicted, and says so. Knows nothing of how a plan was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinpilots.errors import UserError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.memory import TierUse
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.pricing import Price, PricedPass, waves_of
from twinpilots.plan.simulate import PassEstimator, simulate
from twinpilots.plan.solver import Solution
from twinpilots.plan.workload import Limits, Workload

DOCUMENT_SCHEMA = 1
TIMELINE_LAYERS = (3, 2)
PICTURES = (".png", ".svg", ".html")
COLOURS = {"cpu": "#d97706", "gpu": "#059669", "link_in": "#2563eb", "link_out": "#7c3aed"}
Document = dict[str, Any]


def plan_document(solution: Solution, spec: ModelSpec, profile: HardwareProfile, workload: Workload, limits: Limits) -> Document:
    """The JSON document of `twinpilots plan`. Fractions are of an op's rows; ``operations`` at the top are decode's."""
    plan, price, prediction = solution.plan, solution.price, solution.prediction
    phases = {phase: _phase(plan, price, phase) for phase in ("prefill", "decode")}
    return {
        "schema": DOCUMENT_SCHEMA,
        "model": spec.name,
        "hardware": profile.name,
        "hardware_source": profile.source,
        "emulated": profile.emulated,
        "workload": {
            "num_requests": workload.num_requests, "input_len": workload.input_len, "output_len": workload.output_len, "max_num_seqs": workload.max_num_seqs,
        },
        "policy": plan.policy,
        "prediction": {
            "prefill_s": prediction.prefill_s, "step_s": prediction.step_s, "tokens_per_s": prediction.tokens_per_s,
            "plan_bound": prediction.plan_bound, "hardware_bound": prediction.hardware_bound, "bottleneck": prediction.bottleneck,
            "busy_frac": dict(price.busy_frac), "num_waves": price.num_waves,
        },
        "sequences_at_once": sum(waves_of(plan, workload)[1:]),
        "phases": phases,
        "operations": phases["decode"]["operations"],
        "kv": _kv(plan, workload),
        "memory": {
            "gpu": _tier(solution.memory.gpu, limits.gpu_bytes if profile.gpu else 0), "host": _tier(solution.memory.host, limits.host_bytes),
            "disk": _tier(TierUse(weights=0, kv=0, ring=0, staging=0, workspace=0), 0),
        },
        "policies": {name: {"tokens_per_s": each.tokens_per_s, "reason": each.reason} for name, each in solution.candidates.items()},
        "timeline": _timeline(spec, profile, plan, price),
    }  # fmt: skip


def _phase(plan: Plan, price: Price, phase: str) -> Document:
    passes = [p for p in price.passes if p.phase == phase]
    bucket = passes[0].bucket if passes else plan.bucket_for("decode", plan.max_num_seqs)
    tokens = passes[0].load.tokens() if passes else 0
    return {"tokens_per_pass": tokens, "micro_batches": bucket.micro_batches, "operations": _operations(bucket)}


def _operations(bucket: BucketPlan) -> list[Document]:
    last = len(bucket.splits) - 1
    return [
        {
            "layer": layer if layer < last else -1, "name": name,
            "resident": split.resident / split.rows, "streamed": split.streamed / split.rows, "cpu": split.cpu / split.rows,
        }
        for layer, splits in enumerate(bucket.splits) for name, split in splits.items()
    ]  # fmt: skip


def _kv(plan: Plan, workload: Workload) -> dict[str, float]:
    """Where the KV of the running sequences lies and who attends it in decode, as fractions that add up to 1."""
    _, on_gpu, on_host = waves_of(plan, workload)
    host = on_host / (on_gpu + on_host)
    if plan.host_kv_layers:
        host = len(plan.host_kv_layers) / (len(plan.buckets[0].splits) - 1)
    streamed = plan.bucket_for("decode", on_gpu + on_host).host_attention == "gpu"
    return {"gpu": 1.0 - host, "host_cpu": 0.0 if streamed else host, "host_streamed": host if streamed else 0.0}


def _tier(use: TierUse, limit_bytes: int) -> dict[str, int]:
    """``ring`` includes the staging slots of streamed KV."""
    return {"weights": use.weights, "kv": use.kv, "ring": use.ring + use.staging, "workspace": use.workspace, "total": use.total, "limit": limit_bytes}


def _timeline(spec: ModelSpec, profile: HardwareProfile, plan: Plan, price: Price) -> list[Document]:
    """The tasks of one pass (decode where there is one) of the model's first kinds of layers: enough to see who waits for whom."""
    shown: PricedPass = price.passes[-1]
    estimator = PassEstimator(spec, plan, shown.bucket, profile, shown.load.shape, TIMELINE_LAYERS)
    (short, short_plan, _), schedule = estimator.models[0], estimator.schedules[0]
    timing = simulate(schedule, short, short_plan, profile, shown.load, keep_timeline=True)
    return [
        {"queue": e.queue, "kind": schedule.tasks[e.task].kind, "op": schedule.tasks[e.task].op, "start_s": e.start_s, "end_s": e.end_s}
        for e in timing.timeline
    ]  # fmt: skip


# -- text ----------------------------------------------------------------------------------------------------------------------------------


def plan_text(document: Mapping[str, Any]) -> str:
    """The document for a terminal."""
    emulated = " (emulated)" if document["emulated"] else ""
    work = document["workload"]
    lines = [
        f"{document['model']} on {document['hardware']}{emulated}, policy {document['policy']}",
        f"  hardware: {document['hardware_source']}",
        f"  workload: {work['num_requests']} requests of {work['input_len']} + {work['output_len']} tokens, {document['sequences_at_once']} at once"
        + (f", {document['prediction']['num_waves']} waves" if document["prediction"]["num_waves"] > 1 else ""),
        "",
        *_prediction_lines(document["prediction"], emulated),
        "",
        *_share_lines(document),
        "",
        *_memory_lines(document["memory"]),
        "",
        *_policy_lines(document, emulated),
    ]
    return "\n".join(lines)


def _prediction_lines(prediction: Mapping[str, Any], emulated: str) -> list[str]:
    busy = prediction["busy_frac"]
    because = {
        "cpu": "the CPU works longest in a step", "gpu": "the GPU works longest in a step", "link": "the link moves weights or KV during most of a step",
        "hand-offs": "no device is busy all the time: they wait for each other",
    }[prediction["bottleneck"]]  # fmt: skip
    return [
        f"predicted{emulated}: {prediction['tokens_per_s']:.4g} tokens/s (prefill {prediction['prefill_s']:.4g} s, step {prediction['step_s'] * 1e3:.4g} ms)",
        f"  bounds: plan {prediction['plan_bound']:.4g}, hardware {prediction['hardware_bound']:.4g} tokens/s",
        f"  busy: GPU {busy['gpu']:.0%}, CPU {busy['cpu']:.0%}, link {busy['link_in']:.0%}; bottleneck {prediction['bottleneck']}: {because}",
    ]


def _share_lines(document: Mapping[str, Any]) -> list[str]:
    """Mean shares of every op over the layers, decode beside prefill."""
    phases = document["phases"]
    names = list(dict.fromkeys(operation["name"] for operation in document["operations"]))
    tokens = {name: phases[name]["tokens_per_pass"] for name in ("decode", "prefill")}
    batches = {name: phases[name]["micro_batches"] for name in ("decode", "prefill")}
    lines = [
        f"who computes what     decode: {tokens['decode']} tokens x {batches['decode']} micro-batches     prefill: {tokens['prefill']} x {batches['prefill']}",
        f"  {'operation':14}{'resident':>10}{'streamed':>10}{'CPU':>8}{'':6}{'resident':>10}{'streamed':>10}{'CPU':>8}",
    ]
    for name in names:
        cells = []
        for phase in ("decode", "prefill"):
            rows = [operation for operation in phases[phase]["operations"] if operation["name"] == name]
            mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("resident", "streamed", "cpu")}
            cells.append(f"{mean['resident']:>10.0%}{mean['streamed']:>10.0%}{mean['cpu']:>8.0%}")
        lines.append(f"  {name:14}{cells[0]}{'':6}{cells[1]}")
    kv = document["kv"]
    return [*lines, f"  KV: {kv['gpu']:.0%} on the GPU, {kv['host_cpu']:.0%} in host memory attended by the CPU, {kv['host_streamed']:.0%} streamed to the GPU"]


def _memory_lines(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    columns = ("weights", "kv", "ring", "workspace", "total", "limit")
    lines = ["memory    " + "".join(f"{column:>12}" for column in columns)]
    for tier in ("gpu", "host"):
        lines.append(f"  {tier:8}" + "".join(f"{_size(memory[tier][column]):>12}" for column in columns))
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _policy_lines(document: Mapping[str, Any], emulated: str) -> list[str]:
    lines = [f"policies, predicted{emulated} tokens/s"]
    for name, each in sorted(document["policies"].items(), key=lambda item: -(item[1]["tokens_per_s"] or 0.0)):
        shown = f"{each['tokens_per_s']:>10.4g}" if each["tokens_per_s"] is not None else f"{'-':>10}   {each['reason']}"
        lines.append(f"  {name:12}{shown}")
    return lines


# -- picture -------------------------------------------------------------------------------------------------------------------------------


def plot(document: Mapping[str, Any], path: str | Path) -> None:
    """Tokens/s of every policy with the bounds, and who works when in one pass; png, svg or html (an svg inside) by the path's ending."""
    target = Path(path)
    if target.suffix not in PICTURES:
        raise UserError(f"cannot draw a {target.suffix or 'file without ending'}; name a file that ends in {', '.join(PICTURES)}")
    figure = _figure(document)
    try:
        if target.suffix == ".html":
            target.write_text(_html(figure, str(document["model"])), encoding="utf-8")
        else:
            figure.savefig(target, format=target.suffix[1:], dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another path") from error


def _figure(document: Mapping[str, Any]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib, which is not installed; pip install 'twinpilots[plot]'") from error
    figure = Figure(figsize=(11, 8), layout="constrained")
    bars, gantt = figure.subplots(2, 1)
    emulated = " (emulated)" if document["emulated"] else ""
    figure.suptitle(f"{document['model']} on {document['hardware']}{emulated}: predicted")
    _draw_bars(bars, document)
    _draw_gantt(gantt, document["timeline"])
    return figure


def _draw_bars(axes: Any, document: Mapping[str, Any]) -> None:
    rates = {name: each["tokens_per_s"] or 0.0 for name, each in document["policies"].items()}
    axes.bar(list(rates), list(rates.values()), color=["#059669" if name == document["policy"] else "#94a3b8" for name in rates])
    for place, (name, rate) in enumerate(rates.items()):
        axes.annotate(f"{rate:.3g}" if document["policies"][name]["tokens_per_s"] is not None else "infeasible", (place, rate), ha="center", va="bottom")
    for name, style in (("plan_bound", "--"), ("hardware_bound", ":")):
        axes.axhline(document["prediction"][name], linestyle=style, color="#475569", label=f"{name.replace('_', ' ')} {document['prediction'][name]:.3g}")
    axes.set_ylabel("tokens/s")
    axes.legend()


def _draw_gantt(axes: Any, timeline: Sequence[Mapping[str, Any]]) -> None:
    rows = ("link_out", "link_in", "cpu", "gpu")
    for place, queue in enumerate(rows):
        spans = [(1e3 * task["start_s"], 1e3 * (task["end_s"] - task["start_s"])) for task in timeline if task["queue"] == queue]
        axes.broken_barh(spans, (place - 0.4, 0.8), facecolors=COLOURS[queue], edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
    axes.set_xlabel("ms in one pass of three of the layers and the head")


def _html(figure: Any, title: str) -> str:
    from html import escape
    from io import StringIO

    drawing = StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    return f"<!doctype html><html><head><meta charset='utf-8'><title>{escape(title)}</title></head><body>{svg[svg.index('<svg') :]}</body></html>\n"
