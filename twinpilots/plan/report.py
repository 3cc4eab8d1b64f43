"""What `twinpilots plan` shows: the document (JSON) and its text for a terminal; `picture.py` draws it.

Owns the document's keys (docs/cli.md, schema 1) and wording. Everything in it is predicted, and says so. Knows nothing of how a plan was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.explain import Explanation, explain
from twinpilots.plan.memory import TierUse
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.pricing import Price, waves_of
from twinpilots.plan.solver import Solution
from twinpilots.plan.workload import Limits, Workload

DOCUMENT_SCHEMA = 1
TEXT_WIDTH = 100
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
            "disk": _tier(solution.memory.disk, limits.disk_bytes),
        },
        "policies": {name: {"tokens_per_s": each.tokens_per_s, "reason": each.reason} for name, each in solution.candidates.items()},
        "explanation": _explanation(explain(spec, profile, workload, limits, plan, price)),
    }  # fmt: skip


def _phase(plan: Plan, price: Price, phase: str) -> Document:
    passes = [p for p in price.passes if p.phase == phase]
    bucket = passes[0].bucket if passes else plan.bucket_for("decode", plan.max_num_seqs)
    tokens = passes[0].load.tokens() if passes else 0
    return {"tokens_per_pass": tokens, "micro_batches": bucket.micro_batches, "operations": _operations(plan, bucket)}


def _operations(plan: Plan, bucket: BucketPlan) -> list[Document]:
    """``disk``: of the rows that are streamed or the CPU's, those whose home is the disk."""
    last = len(bucket.splits) - 1
    return [
        {
            "layer": layer if layer < last else -1, "name": name,
            "resident": split.resident / split.rows, "streamed": split.streamed / split.rows, "cpu": split.cpu / split.rows,
            "disk": plan.on_disk(layer if layer < last else -1, name) / split.rows,
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
    """``ring`` includes staging: on the GPU the slots of streamed KV, on the host the ring that the disk is read through."""
    return {"weights": use.weights, "kv": use.kv, "ring": use.ring + use.staging, "workspace": use.workspace, "total": use.total, "limit": limit_bytes}


def _explanation(found: Explanation) -> Document:
    return {
        "limits": {phase: asdict(limit) for phase, limit in found.limits.items()},
        "operations": [asdict(why) for why in found.operations],
        "what_if": [asdict(answer) for answer in found.what_if],
    }  # fmt: skip


# -- text ----------------------------------------------------------------------------------------------------------------------------------


def plan_text(document: Mapping[str, Any]) -> str:
    """The document for a terminal."""
    emulated = " (emulated)" if document["emulated"] else ""
    work = document["workload"]
    lines = [
        f"{document['model']} on {document['hardware']}{emulated}, policy {document['policy']}",
        *_wrapped(f"hardware: {document['hardware_source']}"),
        f"  workload: {work['num_requests']} requests of {work['input_len']} + {work['output_len']} tokens, {document['sequences_at_once']} at once"
        + (f", {document['prediction']['num_waves']} waves" if document["prediction"]["num_waves"] > 1 else ""),
        "",
        *_prediction_lines(document["prediction"], emulated),
        "",
        *_limit_lines(document["explanation"]["limits"]),
        "",
        *_share_lines(document),
        "",
        *_why_lines(document["explanation"]["operations"]),
        *_what_if_lines(document["explanation"]["what_if"], emulated),
        *_memory_lines(document["memory"]),
        "",
        *_policy_lines(document, emulated),
    ]
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return wrap(text, TEXT_WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False)


def _prediction_lines(prediction: Mapping[str, Any], emulated: str) -> list[str]:
    busy = prediction["busy_frac"]
    because = {
        "cpu": "the CPU works longest in a step", "gpu": "the GPU works longest in a step", "link": "the link moves weights or KV during most of a step",
        "disk": "the disk reads weights during most of a step", "hand-offs": "no device is busy all the time: they wait for each other",
    }[prediction["bottleneck"]]  # fmt: skip
    return [
        f"predicted{emulated}: {prediction['tokens_per_s']:.4g} tokens/s (prefill {prediction['prefill_s']:.4g} s, step {prediction['step_s'] * 1e3:.4g} ms)",
        f"  bounds: plan {prediction['plan_bound']:.4g}, hardware {prediction['hardware_bound']:.4g} tokens/s",
        f"  busy: GPU {busy['gpu']:.0%}, CPU {busy['cpu']:.0%}, link {busy['link_in']:.0%}" + (f", disk {busy['disk']:.0%}" if busy["disk"] else ""),
        f"  bottleneck {prediction['bottleneck']}: {because}",
    ]


RESOURCES = {
    "cpu": "CPU",
    "gpu": "GPU",
    "link": "link",
    "link_out": "link out",
    "dram": "DRAM",
    "disk": "disk",
    "disk_out": "disk out",
    "chain": "one stage waiting for another",
}


def _limit_lines(limits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Per phase who is busy for which part of a pass, and what the program says a second less of work would save."""
    lines = ["what limits (share of a pass that each works; what 1 ms less of its work would save, by the program)"]
    for phase, limit in limits.items():
        busy = ", ".join(f"{RESOURCES[name]} {share:.0%}" for name, share in sorted(limit["busy_frac"].items(), key=lambda item: -item[1]) if share >= 0.005)
        saves = ", ".join(f"{RESOURCES[name]} {price:.2f} ms" for name, price in sorted((limit["prices"] or {}).items(), key=lambda i: -i[1]) if price >= 0.005)
        lines += _wrapped(f"{phase + ':':9}{busy}" + (f"; saves: {saves}" if saves else ""))
    return lines


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
    kv, on_disk = document["kv"], document["memory"]["disk"]
    if on_disk["total"]:
        parts = ([f"{_size(on_disk['weights'])} of the weights, spread over all layers, read once in every pass"] if on_disk["weights"] else []) + (
            [f"{_size(on_disk['kv'])} of KV, read and written as it is streamed"] if on_disk["kv"] else []
        )  # fmt: skip
        lines += _wrapped(f"on the disk: {'; '.join(parts)}. Planned and predicted only: this version does not run such plans")
    elif on_disk["limit"]:
        lines += _wrapped("on the disk: nothing, memory holds it all")
    return [*lines, f"  KV: {kv['gpu']:.0%} on the GPU, {kv['host_cpu']:.0%} in host memory attended by the CPU, {kv['host_streamed']:.0%} streamed to the GPU"]


def _why_lines(operations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the choice was between, and the reasons; operations of one reason together."""
    lines = _cost_lines(operations)
    for phase in ("decode", "prefill"):
        reasons: dict[str, list[str]] = {}
        for why in operations:
            if why["phase"] == phase:
                reasons.setdefault(why["reason"], []).append(why["name"])
        if reasons:
            lines.append(f"why, in {phase}")
            for reason, names in reasons.items():
                lines += _wrapped(f"{'all' if len(reasons) == 1 else ', '.join(names)}: {reason}")
    return [*lines, ""]


def _cost_lines(operations: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {(why["phase"], why["name"]): why for why in operations if why["cpu_s"] is not None}
    if not found:
        return []
    lines = [f"{'ms if all of it...':16}{'streamed':>10}{'on GPU':>10}{'on CPU':>8}{'':6}{'streamed':>10}{'on GPU':>10}{'on CPU':>8}"]
    for name in dict.fromkeys(name for _, name in found):
        cells = []
        for phase in ("decode", "prefill"):
            why = found.get((phase, name))
            widths = (("link_s", 10), ("gpu_s", 10), ("cpu_s", 8))
            cells.append("".join(f"{_ms(why[key]) if why else '-':>{width}}" for key, width in widths))
        lines.append(f"  {name:14}{cells[0]}{'':6}{cells[1]}")
    return lines


def _ms(seconds: float) -> str:
    """Three digits at least, never an exponent."""
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _what_if_lines(answers: Sequence[Mapping[str, Any]], emulated: str) -> list[str]:
    if not answers:
        return []
    lines = [f"what more would buy, solved again, predicted{emulated}"]
    for each in answers:
        note = f"  ({each['note']})" if each["note"] else ""
        lines += _wrapped(f"{each['change']:28}{each['tokens_per_s']:>10.4g} tokens/s{each['ratio']:>9.3f}x{note}")
    return [*lines, ""]


def _memory_lines(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    columns = ("weights", "kv", "ring", "workspace", "total", "limit")
    lines = ["memory    " + "".join(f"{column:>12}" for column in columns)]
    for tier in ("gpu", "host", "disk") if memory["disk"]["limit"] else ("gpu", "host"):
        lines.append(f"  {tier:8}" + "".join(f"{_size(memory[tier][column]):>12}" for column in columns))
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _policy_lines(document: Mapping[str, Any], emulated: str) -> list[str]:
    lines = [f"policies, predicted{emulated} tokens/s"]
    for name, each in sorted(document["policies"].items(), key=lambda item: -(item[1]["tokens_per_s"] or 0.0)):
        rate = "-" if each["tokens_per_s"] is None else f"{each['tokens_per_s']:.4g}"
        lines += _wrapped(f"{name:12}{rate:>10}" + (f"   {each['reason']}" if each["reason"] else ""))
    return lines
