"""What the figures of `make gpu-bench` are worth: verdicts over a result document, by the thresholds that the project set itself.

Owns the thresholds, the arithmetic and the merging of several slices' documents. Pure: the same document gives the same verdicts. Knows nothing of how a figure
was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.gpu_workers import Verdict, breaks_promise
from twinpilots.errors import UserError

DECODE_EFFICIENCY, PREFILL_EFFICIENCY = 0.85, 0.8  # of the hardware bound, at every point
OF_SIMULATED = 0.9  # auto / stream as measured, of the simulator's
OF_ROOFLINE, FEW_SEQUENCES = 0.9, 4  # and of min(B_link + B_cpu, B_dram) / B_link, for at most so many sequences
PREDICTION_ERROR = 0.1  # median
DRIVER_FRAC = 0.03
AGAINST_LLAMA_CPP = {("decode", 1): 1.0, ("decode", 8): 1.5, ("decode", 32): 3.0, ("prefill", 1): 1.0}  # by kind and sequences
AGAINST_ACCELERATE = 5.0
SHOWN_PEERS = ("FlexTensor", "FreeToken")  # against these nothing was promised
Document = Mapping[str, Any]


def judge(document: Document) -> list[Verdict]:
    """All verdicts. On an emulated GPU speed is shown, not judged."""
    points, emulated = document["points"], document["emulated"]
    found = [_cases(points), _memory(points), _finite(points)]
    speed = [
        _efficiency(points, "decode", DECODE_EFFICIENCY), _efficiency(points, "prefill", PREFILL_EFFICIENCY), _simulated_ratio(points),
        _roofline_ratio(document), _resident(points), _prediction(points), _driver(points), _graphs(points), _waits(points), *_peers(points),
    ]  # fmt: skip
    return found + [Verdict(name=verdict.name, ok=None if emulated else verdict.ok, detail=verdict.detail) for verdict in speed]


def figures(points: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """(point, policy, figures) of everything that was measured."""
    for point in points:
        for policy, result in point["results"].items():
            if result["figures"] is not None:
                yield point, policy, result["figures"]


def best_bound(point: Mapping[str, Any]) -> float | None:
    """The hardware bound of a point: the best over all ways of cutting it into passes that some policy took."""
    return max((each["hardware_bound"] for _, _, each in figures([point])), default=None)


def achieved(point: Mapping[str, Any], policy: str) -> float | None:
    """Measured tokens/s, None where it was not."""
    result = point["results"].get(policy)
    return None if result is None or result["figures"] is None else float(result["figures"]["tokens_per_s"])


def _at_least(name: str, values: Mapping[str, float], least: float | Mapping[str, float], what: str = "") -> Verdict:
    """Every value, by point, must be at least ``least`` (one number, or one per point)."""
    if not values:
        return Verdict(name=name, ok=None, detail="nothing was measured that would tell")
    wanted = least if isinstance(least, Mapping) else dict.fromkeys(values, least)
    short = sorted((values[key] / wanted[key], key) for key in values if values[key] < wanted[key])
    worst = min(values, key=lambda key: values[key] / wanted[key])
    text = f"{len(values) - len(short)} of {len(values)} points{what}; worst {values[worst]:.2f}, {wanted[worst]:.2f} wanted ({worst})"
    return Verdict(name=name, ok=not short, detail=text)


def _cases(points: Sequence[Mapping[str, Any]]) -> Verdict:
    results = [(point["name"], policy, result) for point in points for policy, result in point["results"].items()]
    counts = {ok: sum(result["ok"] is ok for _, _, result in results) for ok in (True, False, None)}
    failed = "; ".join(f"{name} {policy}: {result['detail']}" for name, policy, result in results if result["ok"] is False)
    text = f"{counts[True]} measured, {counts[False]} failed, {counts[None]} infeasible or out of time" + (f": {failed}" if failed else "")
    return Verdict(name="cases", ok=counts[True] > 0 and not counts[False], detail=text)


def _memory(points: Sequence[Mapping[str, Any]]) -> Verdict:
    seen = list(figures(points))
    over = [f"{point['name']} {policy}: {each['footprint_bytes'] / 2**20:.0f} MiB" for point, policy, each in seen if breaks_promise(each)]
    return Verdict(name="memory promise", ok=not over if seen else None, detail="; ".join(over) or f"kept in {len(seen)} runs")


def _finite(points: Sequence[Mapping[str, Any]]) -> Verdict:
    seen = list(figures(points))
    bad = [f"{point['name']} {policy}" for point, policy, each in seen if not each["finite"]]
    return Verdict(name="finite logits", ok=not bad if seen else None, detail="; ".join(bad) or f"in {len(seen)} runs")


def _efficiency(points: Sequence[Mapping[str, Any]], kind: str, least: float) -> Verdict:
    values = {}
    for point in points:
        rate, bound = achieved(point, "auto"), best_bound(point)
        if point["kind"] == kind and rate and bound:
            values[point["name"]] = rate / bound
    return _at_least(f"{kind} / hardware bound", values, least)


def _ratios(points: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
    """``of`` auto over ``of`` stream, where both were measured."""
    found = {}
    for point in points:
        pair = [each for name in ("auto", "stream") for _, policy, each in figures([point]) if policy == name]
        if len(pair) == 2:
            found[point["name"]] = of(pair[0]) / of(pair[1])
    return found


def _simulated_ratio(points: Sequence[Mapping[str, Any]]) -> Verdict:
    measured, simulated = (_ratios(points, lambda each, name=name: float(each[name])) for name in ("tokens_per_s", "predicted"))  # type: ignore[misc]
    return _at_least("auto / stream, of the simulated", {name: measured[name] / simulated[name] for name in measured}, OF_SIMULATED)


def _roofline_ratio(document: Document) -> Verdict:
    """Where few sequences decode and `stream` does stream, the CPU's memory bandwidth must show."""
    few = [
        point for point in document["points"]
        if point["kind"] == "decode" and point["num_seqs"] <= FEW_SEQUENCES and any(
            policy == "stream" and each["weights_frac"]["streamed"] > 0 for _, policy, each in figures([point])
        )
    ]  # fmt: skip
    measured = _ratios(few, lambda each: float(each["tokens_per_s"]))
    rates = {(family["model"], family["quantization"]): family["rates"] for family in document["families"]}
    wanted = {point["name"]: OF_ROOFLINE * roofline_ratio(rates[point["model"], point["quantization"]]) for point in few if point["name"] in measured}
    return _at_least(f"auto / stream at 1 to {FEW_SEQUENCES} sequences", measured, wanted)


def roofline_ratio(rates: Mapping[str, float]) -> float:
    """min(B_link + B_cpu, B_dram) / B_link."""
    link = rates["link_up_bytes_per_s"]
    return min(link + rates["cpu_read_bytes_per_s"], rates["dram_bytes_per_s"]) / link


def _resident(points: Sequence[Mapping[str, Any]]) -> Verdict:
    """What fits entirely is not streamed, nor left to the CPU."""
    fitting = [point for point in points if achieved(point, "resident") is not None and achieved(point, "auto") is not None]
    bad = [point["name"] for point in fitting if point["results"]["auto"]["figures"]["weights_frac"]["resident"] < 1.0 - 1e-9]
    text = f"{', '.join(bad)}: not all weights are resident" if bad else f"{len(fitting)} points: all weights resident"
    return Verdict(name="fits entirely", ok=not bad if fitting else None, detail=text)


def _prediction(points: Sequence[Mapping[str, Any]]) -> Verdict:
    errors = [abs(each["predicted"] / each["tokens_per_s"] - 1.0) for _, _, each in figures(points)]
    if not errors:
        return Verdict(name="prediction", ok=None, detail="nothing was measured")
    text = f"{100 * median(errors):.1f} % off (median of {len(errors)}, worst {100 * max(errors):.0f} %), {100 * PREDICTION_ERROR:.0f} % allowed"
    return Verdict(name="prediction", ok=median(errors) <= PREDICTION_ERROR, detail=text)


def _driver(points: Sequence[Mapping[str, Any]]) -> Verdict:
    shares = {point["name"]: each["driver_frac"] for point, policy, each in figures(points) if policy == "auto"}
    if not shares:
        return Verdict(name="step loop", ok=None, detail="nothing was measured")
    worst = max(shares, key=lambda name: shares[name])
    text = f"at most {100 * shares[worst]:.1f} % of a pass outside the executor ({worst}), {100 * DRIVER_FRAC:.0f} % allowed"
    return Verdict(name="step loop", ok=shares[worst] <= DRIVER_FRAC, detail=text)


def _graphs(points: Sequence[Mapping[str, Any]]) -> Verdict:
    """On a card, the compute queue's launches are captured and replayed: where nothing was, something has refused."""
    seen = [each for _, policy, each in figures(points) if policy == "auto" and each["launches"]]
    if not seen:
        return Verdict(name="graphs", ok=None, detail="no instructions on a card")
    replayed, launched = (sum(each["launches"].get(name, 0) for each in seen) for name in ("replayed", "launched"))
    most = max(1e-9 * each["launches"].get("host_ns", 0) / each["seconds"] for each in seen)
    share = 100 * replayed / max(1, replayed + launched)
    text = f"{share:.0f} % of auto's instructions on the card were replayed; launching took {100 * most:.0f} % of a pass at most"
    return Verdict(name="graphs", ok=replayed > 0, detail=text)


def _waits(points: Sequence[Mapping[str, Any]]) -> Verdict:
    """Shown, not judged: where the card waits for the CPU by itself, its launch thread hardly polls."""
    seen = [each for _, policy, each in figures(points) if policy == "auto" and each["launches"]]
    device, polled = (sum(each["launches"].get(name, 0) for each in seen) for name in ("waits_on_device", "waits_by_polling"))
    reasons = sorted({each["device_waits"] for each in seen} - {"yes"})
    text = "; ".join(reasons) or f"yes: auto's passes made {device} waits for the CPU on the card, and polled {polled} times for launches of its other queues"
    return Verdict(name="device waits", ok=None, detail=text if seen else "no instructions on a card")


def _peers(points: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    verdicts = []
    for peer in ("llama.cpp", "accelerate", *SHOWN_PEERS):
        name, ratios, wanted, reasons = f"auto / {peer}", {}, {}, []
        for point in points:
            found, rate = point["peers"].get(peer), achieved(point, "auto")
            least = AGAINST_LLAMA_CPP.get((point["kind"], point["num_seqs"])) if peer == "llama.cpp" else AGAINST_ACCELERATE
            if found is not None and found["reason"]:
                reasons.append(found["reason"])
            elif found is not None and rate and least:
                ratios[point["name"]], wanted[point["name"]] = rate / found["tokens_per_s"], least
        if not ratios:
            verdicts.append(Verdict(name=name, ok=None, detail=reasons[0] if reasons else "no point of this slice asks for it"))
        elif peer in SHOWN_PEERS:
            verdicts.append(Verdict(name=name, ok=None, detail="; ".join(f"{ratio:.2f} ({point})" for point, ratio in ratios.items())))
        else:
            verdicts.append(_at_least(name, ratios, wanted))
    return verdicts


def merged(documents: Sequence[Document]) -> dict[str, Any]:
    """Several slices of one benchmark as one document, judged as a whole. Of a point measured twice the last one counts. UserError for results that do not
    belong together."""
    if not documents:
        raise UserError("no result to merge; name at least one JSON file of make gpu-bench")
    for name in ("gpu", "commit"):
        if len(values := {document[name] for document in documents}) > 1:
            raise UserError(f"these results differ in {name}: {', '.join(sorted(values))}; merge those of one run")
    points = {point["name"]: point for document in documents for point in document["points"]}
    families = {(family["model"], family["quantization"]): family for document in documents for family in document["families"]}
    whole = {**documents[-1], "slice": ", ".join(document["slice"] for document in documents), "seconds": sum(document["seconds"] for document in documents)}
    whole |= {"points": list(points.values()), "families": list(families.values())}
    return whole
