"""`twinpilots bench serve`: what serving costs beside the offline engine, and what a long prompt does to those who are being answered.

Owns the measurement: a server process of its own with the same flags, a plain client over real sockets, and the offline engine in another process, in turns.
Knows nothing of the server's inside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from twinpilots.errors import TwinPilotsError

START_S = 600.0
OFFLINE = """
import sys, time
from dataclasses import replace
from twinpilots import SamplingParams
from twinpilots.cli import build_parser
from twinpilots.commands import options
from twinpilots.server.served import EXPECTED

concurrency, each, input_len, output_len = map(int, sys.argv[1:5])
num_requests = concurrency * each
expected = replace(EXPECTED, num_requests=num_requests, max_num_seqs=concurrency)
with options.open_llm(build_parser().parse_args(["serve", *sys.argv[5:]]), expected=expected) as llm:
    rounds = [[[100 + (17 * number + 7 * request + 3 * token) % 900 for token in range(input_len)] for request in range(num_requests)] for number in range(3)]
    llm.generate(rounds[0][:concurrency], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    best = 0.0
    for prompts in rounds[1:]:
        began_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        best = max(best, num_requests * output_len / (time.perf_counter() - began_s))
print(best)
"""


def run(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any] | None:
    """Measure; print the table or return the document."""
    offline = _offline(args, flags)
    process = subprocess.Popen(
        [sys.executable, "-m", "twinpilots", "serve", args.model, "--port", "0", "--max-num-seqs", str(args.concurrency), *flags],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        port = _port(process)
        served, latency = asyncio.run(_measure(args, port))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    document = {"schema": 1, "model": args.model, "offline_tokens_per_s": offline, "served_tokens_per_s": served, "ratio": served / offline, **latency}
    if args.json:
        return document
    load = f"{args.concurrency} at once, {args.concurrency * args.each} requests of {args.input_len} + {args.output_len} tokens"
    print(f"offline engine   {offline:.1f} tokens/s, {load}")
    print(f"served           {served:.1f} tokens/s, streamed to {args.concurrency} clients: {document['ratio']:.2f}x")
    print(
        f"while a prompt of {latency['prompt_tokens']} tokens is prefilled ({latency['prefill_s']:.1f} s): inter-token median "
        f"{latency['itl_median_s'] * 1e3:.1f} ms, 99th percentile {latency['itl_p99_s'] * 1e3:.1f} ms, {latency['itl_p99_s'] / latency['itl_median_s']:.2f}x "
        f"(undisturbed median {latency['itl_alone_s'] * 1e3:.1f} ms)"
    )
    return None


def _offline(args: argparse.Namespace, flags: Sequence[str]) -> float:
    """The offline engine's tokens/s on the same requests: the best of two rounds, in a process of its own."""
    sizes = [str(size) for size in (args.concurrency, args.each, args.input_len, args.output_len)]
    command = [sys.executable, "-c", OFFLINE, *sizes, args.model, "--max-num-seqs", str(args.concurrency), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        raise TwinPilotsError(f"the offline engine failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    found = 0
    for line in process.stderr:
        if line.startswith("listening on"):
            found = int(line.rsplit(":", 1)[1])
        if line.startswith("ready"):
            return found
    raise TwinPilotsError("the server did not start; try `twinpilots serve` with the same flags")


async def _measure(args: argparse.Namespace, port: int) -> tuple[float, dict[str, Any]]:
    total = args.concurrency * args.each

    def prompt(number: int, request: int) -> list[int]:
        """Another one in every round: what a prefix cache saves is not the server's merit."""
        return [100 + (17 * number + 7 * request + 3 * token) % 900 for token in range(args.input_len)]

    async def client(number: int, first: int, output_len: int) -> None:
        for request in range(first, total, args.concurrency):
            await _stream(port, prompt(number, request), output_len)

    best = 0.0
    for number in range(3):  # the first warms up
        began_s = time.perf_counter()
        await asyncio.gather(*(client(number, first, args.output_len if number else 4) for first in range(args.concurrency)))
        if number:
            best = max(best, total * args.output_len / (time.perf_counter() - began_s))
    return best, await _latency(args, port)


async def _latency(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Inter-token times of a few streams, before and while a long prompt is prefilled."""
    streams = [asyncio.create_task(_stream(port, [100 + i, 200, 300], args.long_output_len)) for i in range(args.streams)]
    await asyncio.sleep(1.5)
    began_s = time.perf_counter()
    long_prompt = [100 + (11 * token) % 900 for token in range(args.long_prompt)]
    first = await _stream(port, long_prompt, 1)
    ended_s = first[-1]
    arrivals = await asyncio.gather(*streams)
    pairs = [pair for times in arrivals for pair in zip(times, times[1:], strict=False)]
    before = [later - earlier for earlier, later in pairs if later < began_s]
    during = sorted(later - earlier for earlier, later in pairs if began_s <= earlier and later <= ended_s)
    return {
        "prompt_tokens": args.long_prompt, "prefill_s": ended_s - began_s, "itl_median_s": statistics.median(during), "itl_samples": len(during),
        "itl_p99_s": during[min(len(during) - 1, int(0.99 * len(during)))], "itl_max_s": during[-1], "itl_alone_s": statistics.median(before),
    }  # fmt: skip


async def _stream(port: int, prompt: Sequence[int], output_len: int) -> list[float]:
    """When each chunk of one streamed completion came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": prompt, "max_tokens": output_len, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    arrivals: list[float] = []
    line = b"nothing"
    while following := await reader.readline():
        line = following
        if line.startswith(b"data: {"):
            arrivals.append(time.perf_counter())
    writer.close()
    if not arrivals:
        raise TwinPilotsError(f"a request was refused: {line.decode(errors='replace').strip()}")
    return arrivals
