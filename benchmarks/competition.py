"""`python -m benchmarks.competition`: how much decoding on the CPU loses while another process burns one of its cores.

Owns the burner, the alternating rounds and the verdict: throughput may fall by that core's share and 15 % more. A pool that waits for its slowest thread at
every step would lose far more. Knows nothing of kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from twinpilots import LLM, SamplingParams
from twinpilots.device.cpu import choose_cores
from twinpilots.hardware.peaks import timed_s

MORE = 0.15  # that may be lost beyond the core's share
TOKENS = 48
BURNER = "import os\nos.sched_setaffinity(0, {%d})\nwhile os.getppid() == %d:\n    for _ in range(100000): pass"


@contextmanager
def burning(core: int) -> Iterator[None]:
    """A process that computes on ``core`` at our own priority, and ends with this one."""
    burner = subprocess.Popen([sys.executable, "-c", BURNER % (core, os.getpid())])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def measure(llm: LLM, num_seqs: int, core: int, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens/s of each round (alone, beside the burner), by turns, after one that warms up."""
    prompts = [[5 + (7 * request + token) % 97 for token in range(8)] for request in range(num_seqs)]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)

    def rate() -> float:
        return num_seqs * TOKENS / timed_s(lambda: llm.generate(prompts, params, use_tqdm=False))

    rate()
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(rate())
        with burning(core):
            beside.append(rate())
    return alone, beside


def row_of(num_seqs: int, alone: Sequence[float], beside: Sequence[float], num_cores: int) -> dict[str, Any]:
    """Medians, what part of the throughput is lost, and what may be."""
    lost, allowed = 1 - median(b / a for a, b in zip(alone, beside, strict=True)), 1 / num_cores + MORE
    return {
        "num_seqs": num_seqs, "alone_tokens_per_s": median(alone), "beside_tokens_per_s": median(beside), "lost_frac": lost, "allowed_frac": allowed,
        "met": lost <= allowed,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per load; 1 where more is lost than may be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.competition", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-seqs", default="1,16", metavar="N,N", help="sequences at once (default: 1,16)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(argv)
    cores = choose_cores(gpu=False, emulated=False).pilot
    rows = []
    for num_seqs in map(int, options.num_seqs.split(",")):
        with LLM(model=options.model, device="cpu", max_num_seqs=num_seqs, max_model_len=128) as llm:
            rows.append(row_of(num_seqs, *measure(llm, num_seqs, cores[-1], options.rounds), len(cores)))
        if not options.json:
            found = rows[-1]
            sys.stdout.write(
                f"{num_seqs} at once on {len(cores)} cores: {found['alone_tokens_per_s']:.1f} tokens/s alone, {found['beside_tokens_per_s']:.1f} with core "
                f"{cores[-1]} burnt: {100 * found['lost_frac']:.0f} % lost, {100 * found['allowed_frac']:.0f} % allowed\n"
            )
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
