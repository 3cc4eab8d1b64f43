"""Kills a batch run again and again, and checks that nothing shows: `python -m benchmarks.batch_kills --kills 30 --requests 500`.

Owns the made-up requests, the killing and the comparison. A run without interruption is the reference. Every record must be there once, none that was
written may be computed again, and every answer must equal the reference's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WAIT_S = 600.0
POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class KillReport:
    """``lost_s``: what the kills cost in all, beside the uninterrupted run. ``goodput_10min``: the useful share of time with a kill every ten minutes."""

    requests: int
    kills: int
    reference_s: float
    killed_s: float
    lost_s: float
    goodput_10min: float
    differences: list[str]


def write_requests(path: Path, count: int, *, seed: int, vocab: int, longest: int, most_tokens: int) -> None:
    """Greedy, seeded and unseeded requests of both endpoints' sampling kinds, as token ids: they need no tokenizer."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            prompt = [rng.randrange(3, vocab) for _ in range(rng.randint(1, longest))]
            body: dict[str, Any] = {"model": "any", "prompt": prompt, "max_tokens": rng.randint(1, most_tokens), "ignore_eos": True, "return_token_ids": True}
            body |= rng.choice([{"temperature": 0}, {"temperature": 0.8, "seed": number}, {"temperature": 1.0}, {"temperature": 1.0, "n": 2, "logprobs": 1}])
            stream.write(json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")


def command(source: Path, output: Path, model: str, flags: Sequence[str] = ()) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "twinpilots", "run-batch", "-i", str(source), "-o", str(output), "--model", model, "--device", "cpu", *flags]


def answers(output: Path) -> dict[int, Any]:
    """By line, what must be the same in every run. AssertionError when a line is there twice."""
    found: dict[int, Any] = {}
    for text in output.read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        assert record["line"] not in found, f"line {record['line']} is answered twice"
        body = {name: value for name, value in record["response"]["body"].items() if name != "created"}
        found[record["line"]] = (record["id"], record["custom_id"], body, record["error"])
    return found


def count_lines(output: Path) -> int:
    """Whole lines written so far."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


def run_and_kill(arguments: Sequence[str], output: Path, rng: random.Random, most_s: float) -> bool:
    """Start the run, kill it a random while after it wrote at least one new line; False when it was done before. AssertionError when it lost anything."""
    before = output.read_bytes() if output.exists() else b""
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + WAIT_S
            while process.poll() is None and count_lines(output) <= before.count(b"\n"):
                assert time.monotonic() < deadline, "no new line in time"
                time.sleep(POLL_S)
            time.sleep(rng.random() * most_s)
            done = process.poll() is not None
        finally:
            process.kill()
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert done or process.returncode == -signal.SIGKILL, errors
    assert not done or process.returncode == 0, errors
    whole = before[: before.rfind(b"\n") + 1]
    assert output.read_bytes().startswith(whole), "a finished record was changed or computed again"
    return not done


def measure(source: Path, model: str, folder: Path, *, kills: int, seed: int, most_s: float, flags: Sequence[str] = ()) -> KillReport:
    """The whole experiment."""
    rng = random.Random(seed)
    reference, output = folder / "reference.jsonl", folder / "killed.jsonl"
    began = time.monotonic()
    subprocess.run(command(source, reference, model, flags), check=True, stderr=subprocess.PIPE, timeout=WAIT_S)
    reference_s = time.monotonic() - began
    began, done_kills = time.monotonic(), 0
    while done_kills < kills and run_and_kill(command(source, output, model, flags), output, rng, most_s):
        done_kills += 1
    subprocess.run(command(source, output, model, flags), check=True, stderr=subprocess.PIPE, timeout=WAIT_S)
    killed_s = time.monotonic() - began
    expected, found = answers(reference), answers(output)
    wrong = [f"line {line}" for line in sorted(expected.keys() | found.keys()) if expected.get(line) != found.get(line)]
    lost_s = max(0.0, killed_s - reference_s)
    goodput = 1 - lost_s / max(1, done_kills) / 600
    return KillReport(
        requests=len(expected), kills=done_kills, reference_s=reference_s, killed_s=killed_s, lost_s=lost_s, goodput_10min=goodput, differences=wrong
    )  # fmt: skip


def described(report: KillReport) -> str:
    """The report in words."""
    lines = [f"{report.requests} requests, {report.kills} kills: {len(report.differences)} differences", *report.differences[:20]]
    lines.append(f"{report.reference_s:.1f} s without kills, {report.killed_s:.1f} s with them: {report.lost_s / max(1, report.kills):.1f} s lost per kill")
    return "\n".join([*lines, f"a kill every 10 minutes would leave a goodput of {report.goodput_10min:.3f}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--max-prompt", type=int, default=24, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--delay", type=float, default=1.0, help="kill within so many seconds of the first new line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "requests.jsonl"
        write_requests(source, args.requests, seed=args.seed, vocab=args.vocab, longest=args.max_prompt, most_tokens=args.max_tokens)
        report = measure(source, args.model, Path(name), kills=args.kills, seed=args.seed, most_s=args.delay, flags=("--max-num-seqs", "16"))
    sys.stdout.write((json.dumps(asdict(report)) if args.json else described(report)) + "\n")
    return 1 if report.differences or report.kills < args.kills else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
