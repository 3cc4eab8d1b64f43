"""Side by side: TwinPilots, llama.cpp and transformers on this machine's CPU. ``python -m benchmarks.peers`` makes all it needs and prints one table.

Owns the engines, the three measurements, the order of runs and the verdicts. Each engine is a process of its own that is stopped while another one runs; the
machine's limits are sampled before every run. A ratio is of runs of the same round, which ran one after the other. Knows nothing of how engines are driven
(`peer_engines.py`) or where their files come from (`peer_models.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks import peer_models
from twinpilots.benchmarks.summary import Ratio, compare
from twinpilots.commands.models import model_spec
from twinpilots.commands.options import positive_int, table
from twinpilots.device.cpu import choose_cores
from twinpilots.errors import UserError
from twinpilots.hardware.peaks import PeakMeter, Peaks
from twinpilots.model.spec import ModelSpec
from twinpilots.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
CHILD = ROOT / "benchmarks" / "peer_engines.py"
LIMIT_SAMPLES = 3  # before every run

MetricName = Literal["decode-1", "decode-16", "prefill-512"]
Bits = Literal[4, 8, 16, 32]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a run does, and which of its tokens count. Decoding starts from one token, so that every pass is a decoding one."""

    name: MetricName
    sequences: int
    input_len: int
    output_len: int

    def rate(self, seconds: float) -> float:
        counted = self.output_len if self.output_len > 1 else self.input_len
        return self.sequences * counted / seconds


METRICS = (
    Metric(name="decode-1", sequences=1, input_len=1, output_len=64),
    Metric(name="decode-16", sequences=16, input_len=1, output_len=32),
    Metric(name="prefill-512", sequences=1, input_len=512, output_len=1),
)


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One engine with one set of weights. ``model``: the type of its GGUF file, or "safetensors"."""

    name: str
    engine: Literal["llama.cpp", "transformers", "twinpilots"]
    bits: Bits
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)


ENTRANTS = (
    Entrant(name="llama.cpp-f16", engine="llama.cpp", bits=16, model="F16"),
    Entrant(name="llama.cpp-q8_0", engine="llama.cpp", bits=8, model="Q8_0"),
    Entrant(name="llama.cpp-q4_1", engine="llama.cpp", bits=4, model="Q4_1"),
    Entrant(name="llama.cpp-q4_0", engine="llama.cpp", bits=4, model="Q4_0"),
    Entrant(name="transformers-fp32", engine="transformers", bits=32, model="safetensors", options={"dtype": "float32"}),
    Entrant(name="transformers-bf16", engine="transformers", bits=16, model="safetensors", options={"dtype": "bfloat16"}),
    Entrant(name="twinpilots", engine="twinpilots", bits=16, model="F16", options={"quantization": None}),
    Entrant(name="twinpilots-int8", engine="twinpilots", bits=8, model="F16", options={"quantization": "int8"}),
    Entrant(name="twinpilots-int4", engine="twinpilots", bits=4, model="F16", options={"quantization": "int4"}),
    Entrant(name="twinpilots-int4-fast", engine="twinpilots", bits=4, model="F16", options={"quantization": "int4-fast"}),
)
BYTES_OF_BITS: dict[Bits, str] = {4: "Q4_1", 8: "Q8_0", 16: "F16"}  # whose file says how many bytes a pass reads


@dataclass(frozen=True, kw_only=True)
class Target:
    """``ours`` is to run at least ``factor`` times as fast as the best of ``theirs``, or at ``limit_frac`` of our limit where that is less."""

    metric: MetricName
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    factor: float
    limit_frac: float | None = None

    def wanted(self, limit: float, rival: float) -> float:
        return self.factor if self.limit_frac is None else min(self.factor, self.limit_frac * limit / rival)


FOUR_BIT, LLAMA_FOUR_BIT = ("twinpilots-int4", "twinpilots-int4-fast"), ("llama.cpp-q4_1", "llama.cpp-q4_0")
NATIVE, LLAMA_NATIVE, TORCH = ("twinpilots",), ("llama.cpp-f16",), ("transformers-fp32", "transformers-bf16")
TARGETS = (
    Target(metric="decode-1", ours=FOUR_BIT, theirs=LLAMA_FOUR_BIT, factor=1.3),
    Target(metric="decode-1", ours=NATIVE, theirs=LLAMA_NATIVE, factor=1.1),
    Target(metric="decode-16", ours=FOUR_BIT, theirs=LLAMA_FOUR_BIT, factor=3.0),
    Target(metric="decode-16", ours=NATIVE, theirs=LLAMA_NATIVE, factor=3.0, limit_frac=0.8),
    Target(metric="prefill-512", ours=FOUR_BIT, theirs=LLAMA_FOUR_BIT, factor=2.0),
    Target(metric="prefill-512", ours=NATIVE, theirs=LLAMA_NATIVE, factor=1.0),
    Target(metric="decode-1", ours=NATIVE, theirs=TORCH, factor=4.0, limit_frac=0.75),
    Target(metric="decode-16", ours=NATIVE, theirs=TORCH, factor=4.0, limit_frac=0.75),
)


class Peer:
    """The benchmark's end of one engine's process, which is stopped but for its own runs."""

    def __init__(self, entrant: Entrant, threads: int) -> None:
        python = peer_models.llama_cpp_python(say) if entrant.engine == "llama.cpp" else Path(sys.executable)
        model = peer_models.safetensors_path(say) if entrant.model == "safetensors" else peer_models.gguf_path(entrant.model, say)
        setup = {"engine": entrant.engine, "model": str(model), "threads": threads, **entrant.options}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT) if entrant.engine == "twinpilots" else ""}
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `close`; not a pipe: nobody would empty it
        self._child = subprocess.Popen(
            [str(python), str(CHILD), json.dumps(setup)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True, env=environment,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        self._child.send_signal(signal.SIGSTOP)

    def run(self, metric: Metric, seed: int) -> float:
        """Seconds of one run. UserError when the engine fails or does less than was asked."""
        request = {"sequences": metric.sequences, "input_len": metric.input_len, "output_len": metric.output_len, "seed": seed}
        assert self._child.stdin is not None
        self._child.send_signal(signal.SIGCONT)
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        reply = self._answer()
        self._child.send_signal(signal.SIGSTOP)
        if reply["generated"] != metric.sequences * metric.output_len:
            raise UserError(f"it generated {reply['generated']} tokens, {metric.sequences * metric.output_len} were asked for")
        return float(reply["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._messages.seek(0)
            raise UserError(f"it ended: {' '.join(self._messages.read().split())[-300:]}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._messages.close()


@dataclass
class Standing:
    """One entrant's seconds by metric; ``reason`` says why it did not take part."""

    entrant: Entrant
    seconds: dict[MetricName, list[float]] = field(default_factory=dict)
    reason: str | None = None

    def rates(self, metric: Metric) -> list[float]:
        return [metric.rate(seconds) for seconds in self.seconds.get(metric.name, [])]


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def play(standings: Sequence[Standing], metrics: Sequence[Metric], args: argparse.Namespace, meter: PeakMeter) -> None:
    """A round of warming up, then the counted ones, every second one backwards."""
    peers: dict[str, Peer] = {}
    try:
        for standing in standings:
            say(f"loading {standing.entrant.name}")
            try:
                peers[standing.entrant.name] = Peer(standing.entrant, args.threads)
            except (UserError, OSError, subprocess.SubprocessError) as error:
                standing.reason = str(error)
        with Progress("peers", total=(args.rounds + 1) * len(metrics) * len(peers), unit="runs") as bar:
            for number in range(args.rounds + 1):
                for metric in metrics:
                    for standing in standings if number % 2 else reversed(standings):
                        if standing.entrant.name in peers and standing.reason is None:
                            bar.update(note=f"{metric.name} {standing.entrant.name}")
                            run_once(standing, peers[standing.entrant.name], metric, number, meter)
    finally:
        for peer in peers.values():
            peer.close()


def run_once(standing: Standing, peer: Peer, metric: Metric, number: int, meter: PeakMeter) -> None:
    """One run, limits first; round 0 does not count."""
    for _ in range(LIMIT_SAMPLES):
        meter.sample()
    try:
        seconds = peer.run(metric, seed=1000 * number + metric.sequences + metric.input_len)
    except UserError as error:
        standing.reason = str(error)
        return
    if number:
        standing.seconds.setdefault(metric.name, []).append(seconds)


def limit_rate(spec: ModelSpec, weight_bytes: int, metric: Metric, meter: PeakMeter | Peaks) -> float:
    """Tokens/s that the machine's best rates allow: a pass reads all weights and the KV so far (16 bit), and does two operations per weight and token."""
    tokens = metric.sequences if metric.output_len > 1 else metric.input_len
    layers = sum(op.rows * op.row_elements for op in spec.ops(64) if op.layer >= 0)
    head = spec.vocab_size * spec.hidden_size
    logits = tokens if metric.output_len > 1 else metric.sequences
    context = metric.input_len + metric.output_len / 2 if metric.output_len > 1 else metric.input_len / 2
    flops = 2.0 * layers * tokens + 2.0 * head * logits + spec.num_layers * spec.attention_flops(tokens, context)
    num_bytes = weight_bytes + spec.kv_bytes_per_token("bf16") * metric.sequences * context
    return tokens / max(num_bytes / meter.read_bytes_per_s, flops / meter.flops_per_s)


def judge(target: Target, standings: Mapping[str, Standing], limits: Mapping[Bits, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The verdict on each of ours that ran, against the best of theirs that did; none where one side is missing."""
    metric = next(metric for metric in METRICS if metric.name == target.metric)
    rivals = {name: median(standings[name].rates(metric)) for name in target.theirs if name in standings and standings[name].rates(metric)}
    if not rivals:
        return []
    best = max(rivals, key=lambda name: rivals[name])
    found = []
    for name in target.ours:
        if name in standings and standings[name].rates(metric):
            ratio: Ratio = compare(standings[name].rates(metric), standings[best].rates(metric))
            wanted = target.wanted(limits[standings[name].entrant.bits][metric.name], rivals[best])
            found.append(
                {"metric": metric.name, "ours": name, "theirs": best, "ratio": asdict(ratio), "target": wanted, "met": ratio.median >= wanted}
            )  # fmt: skip
    return found


def document_of(args: argparse.Namespace, standings: Sequence[Standing], metrics: Sequence[Metric], meter: PeakMeter) -> dict[str, Any]:
    """The JSON document."""
    spec = model_spec(f"dummy:{peer_models.MODEL}")
    sizes = {bits: peer_models.weight_bytes(peer_models.gguf_path(kind, say)) for bits, kind in BYTES_OF_BITS.items()}
    sizes[32] = 2 * sizes[16]
    limits = {bits: {metric.name: limit_rate(spec, size, metric, meter) for metric in metrics} for bits, size in sizes.items()}
    by_name = {standing.entrant.name: standing for standing in standings}
    return {
        "schema": 1, "benchmark": "peers", "model": peer_models.MODEL, "threads": args.threads, "rounds": args.rounds, "xllamacpp": peer_models.XLLAMACPP,
        "metrics": [asdict(metric) for metric in metrics],
        "limits": {"read_bytes_per_s": meter.read_bytes_per_s, "flops_per_s": meter.flops_per_s, "samples": meter.num_samples, "tokens_per_s": limits},
        "entrants": {
            standing.entrant.name: {
                "bits": standing.entrant.bits, "reason": standing.reason,
                "tokens_per_s": {m.name: {"median": median(rates), "rounds": rates} for m in metrics if (rates := standing.rates(m))},
            }
            for standing in standings
        },
        "targets": [verdict for target in TARGETS if target.metric in limits[16] for verdict in judge(target, by_name, limits)],
    }  # fmt: skip


def document_text(document: Mapping[str, Any]) -> str:
    """Limits, rates with their share of the limit, and the verdicts."""
    limits, names = document["limits"], [metric["name"] for metric in document["metrics"]]
    lines = [
        f"{document['model']}, {document['threads']} threads, medians of {document['rounds']} rounds in tokens/s (% of the limit for as many bits)",
        f"limits: DRAM read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply-add (fp32) {limits['flops_per_s'] / 1e9:.0f} GFLOP/s",
    ]
    rows = [[f"limit, {bits} bit", *(f"{rates[name]:.1f}" for name in names)] for bits, rates in sorted(limits["tokens_per_s"].items())]
    for name, entrant in document["entrants"].items():
        cells = []
        for metric in names:
            rate = entrant["tokens_per_s"].get(metric)
            cells.append("-" if rate is None else f"{rate['median']:.1f} ({100 * rate['median'] / limits['tokens_per_s'][entrant['bits']][metric]:.0f} %)")
        rows.append([name, *cells])
    lines.append(table(["", *names], rows))
    lines += [f"{name}: {entrant['reason']}" for name, entrant in document["entrants"].items() if entrant["reason"]]
    if document["targets"]:
        lines += ["", table(["target", "ours / theirs", "ratio", "at least (95 %)", "wanted", ""], [_verdict(verdict) for verdict in document["targets"]])]
    return "\n".join(lines)


def _verdict(verdict: Mapping[str, Any]) -> list[str]:
    ratio = verdict["ratio"]
    pair = f"{verdict['ours']} / {verdict['theirs']}"
    return [verdict["metric"], pair, f"{ratio['median']:.2f}", f"{ratio['lower_bound']:.2f}", f"{verdict['target']:.2f}", "met" if verdict["met"] else "MISSED"]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0], allow_abbrev=False)
    entrants, metrics = [entrant.name for entrant in ENTRANTS], [metric.name for metric in METRICS]
    result.add_argument("--engines", default=",".join(entrants), metavar="A,B", help=f"of {', '.join(entrants)} (default: all)")
    result.add_argument("--metrics", default=",".join(metrics), metavar="A,B", help=f"of {', '.join(metrics)} (default: all)")
    cores = len(choose_cores(gpu=False, emulated=False).pilot)
    result.add_argument("--threads", type=positive_int, default=cores, metavar="N", help=f"of every engine (default: {cores}, this machine's cores)")
    result.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="rounds, after one to warm up (default: 5)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return result


def chosen(text: str, known: Sequence[Any], flag: str) -> list[Any]:
    """The named ones, in the order of ``known``. UserError for a name that is none of them."""
    names = text.split(",")
    unknown = [name for name in names if name not in {each.name for each in known}]
    if unknown:
        raise UserError(f"{flag}: unknown {unknown[0]!r}; known: {', '.join(each.name for each in known)}")
    return [each for each in known if each.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """0 when it ran, 2 for bad arguments."""
    args = parser().parse_args(argv)
    try:
        standings = [Standing(entrant) for entrant in chosen(args.engines, ENTRANTS, "--engines")]
        metrics = chosen(args.metrics, METRICS, "--metrics")
    except UserError as error:
        say(f"error: {error}")
        return 2
    with PeakMeter(args.threads, choose_cores(gpu=False, emulated=False).pilot) as meter:
        play(standings, metrics, args, meter)
        document = document_of(args, standings, metrics, meter)
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(document_text(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
