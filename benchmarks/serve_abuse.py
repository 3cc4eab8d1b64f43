"""Thousands of requests, most of them bad: does the server stay up, forget everybody who left, and give nobody another's text?

    python -m benchmarks.serve_abuse --requests 5000 [--model smollm2-135m] [--seed 0] [--json]

Starts a server of its own, remembers what some prompts are answered with, and then sends a random mix from many connections at once: good requests
(their text must be what it was), streams that are dropped half-way, connections closed in the middle of a body, malformed and huge bodies,
wrong keys, unknown paths, raw rubbish. Afterwards KV pages, accepted requests, threads and open files must be back at the start, and memory within a margin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.serving.process import ServerProcess

WORDS = (
    "red", "green", "blue", "cyan", "black", "white", "pink", "grey", "gold", "teal", "lime", "navy", "plum", "rose", "sand", "snow",
)  # fmt: skip
MEMORY_MARGIN_BYTES = 48 << 20
TIMEOUT_S = 300.0


class Abuser:
    """``known`` maps a prompt to its greedy continuation."""

    def __init__(self, server: ServerProcess, known: dict[str, str], seed: int) -> None:
        self.server, self.known = server, known
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def one(self) -> None:
        """One request of a random kind."""
        kinds = {
            self.good: 20, self.good_stream: 20, self.dropped_stream: 15, self.dropped_body: 8, self.malformed: 12, self.huge_prompt: 3, self.huge_body: 2,
            self.wrong_key: 10, self.unknown_path: 5, self.rubbish: 5,
        }  # fmt: skip
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        try:
            outcome = await asyncio.wait_for(kind(), TIMEOUT_S)
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome = type(error).__name__
        except TimeoutError:
            outcome = "timed out"
            self.wrong.append(f"{kind.__name__} got no answer in {TIMEOUT_S} s")
        self.seen[f"{kind.__name__}: {outcome}"] += 1

    # -- kinds ---------------------------------------------------------------------------------------------------------------------------

    async def good(self) -> str:
        prompt = self.random.choice(list(self.known))
        status, body = await self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0})
        if status == 200:
            self._compare(prompt, json.loads(body)["choices"][0]["text"])
        return self._expect(status, 200, 429)

    async def good_stream(self) -> str:
        prompt = self.random.choice(list(self.known))
        status, body = await self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True})
        if status == 200:
            events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
            self._compare(prompt, "".join(json.loads(event)["choices"][0]["text"] for event in events))
        return self._expect(status, 200, 429)

    async def dropped_stream(self) -> str:
        reader, writer = await self._open()
        body = {"prompt": self.random.choice(WORDS), "max_tokens": 400, "ignore_eos": True, "stream": True, "n": self.random.choice((1, 1, 3))}
        writer.write(self._head("/v1/completions", json.dumps(body).encode()))
        with suppress(asyncio.IncompleteReadError):
            await reader.readexactly(self.random.randrange(1, 3000))
        self._drop(writer)
        return "dropped"

    async def dropped_body(self) -> str:
        _, writer = await self._open()
        data = self._head("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode())
        writer.write(data[: self.random.randrange(1, len(data))])
        await writer.drain()
        self._drop(writer)
        return "dropped"

    async def malformed(self) -> str:
        bodies: list[Any] = [
            b"{", b"\xff\xfe", b"null", b"[" * 5000, b'{"prompt":"a","temperature":NaN}', {"prompt": "a", "n": 10**9}, {"prompt": [-1]}, {"prompt": [10**7]},
            {"prompt": {}}, {"prompt": "a", "logit_bias": {"x": 1}}, {"prompt": "a", "stop": [""]}, {"prompt": "a", "max_tokens": "many"}, {"prompt": []},
            {"prompt": "a", "stream": "yes"}, {"messages": 3}, {"prompt": "a", "model": "nobody"}, {"prompt": "a", "top_p": -1}, {"prompt": "a", "seed": 1.5},
        ]  # fmt: skip
        status, _ = await self.ask("/v1/completions", self.random.choice(bodies))
        return self._expect(status, 400, 404, 429)

    async def huge_prompt(self) -> str:
        status, _ = await self.ask("/v1/completions", {"prompt": "word " * self.random.choice((9000, 60000, 400000)), "max_tokens": 1})
        return self._expect(status, 400, 429)

    async def huge_body(self) -> str:
        status, _ = await self.ask("/v1/completions", b'{"prompt":"' + b"a" * (9 << 20) + b'"}')
        return self._expect(status, 413)

    async def wrong_key(self) -> str:
        status, _ = await self.ask("/v1/completions", {"prompt": "a"}, key=self.random.choice(("", "wrong", "a-test-ke", "\u00e9")))
        return self._expect(status, 401)

    async def unknown_path(self) -> str:
        status, _ = await self.ask(self.random.choice(("/v1/embeddings", "/admin", "/v1/", "/..%2f..%2fetc/passwd")), {"a": 1})
        return self._expect(status, 404, 405)

    async def rubbish(self) -> str:
        reader, writer = await self._open()
        writer.write(self.random.randbytes(self.random.randrange(1, 400)) + b"\r\n\r\n")
        await writer.drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(100), 2)
        self._drop(writer)
        return "dropped"

    # -- sockets -------------------------------------------------------------------------------------------------------------------------

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    def _head(self, path: str, body: bytes, key: str | None = None) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", "Content-Type: application/json"]
        lines.append(f"Authorization: Bearer {self.server.key if key is None else key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def ask(self, path: str, body: Any, key: str | None = None) -> tuple[int, bytes]:
        """(status, body) of one request."""
        reader, writer = await self._open()
        try:
            writer.write(self._head(path, body if isinstance(body, bytes) else json.dumps(body).encode(), key))
            with suppress(OSError):  # a refusal may come before the body is through
                await writer.drain()
            answer = await reader.read()
        finally:
            writer.close()
        head, _, rest = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]) if head else 0, _unchunked(rest) if b"chunked" in head.lower() else rest

    @staticmethod
    def _drop(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    def _expect(self, status: int, *allowed: int) -> str:
        if status not in allowed:
            self.wrong.append(f"status {status}, expected one of {allowed}")
        return str(status)

    def _compare(self, prompt: str, text: str) -> None:
        if text != self.known[prompt]:
            self.wrong.append(f"{prompt!r} was answered with {text!r}, at first with {self.known[prompt]!r}")


def _unchunked(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, rest = data.partition(b"\r\n")
        count = int(size, 16)
        parts.append(rest[:count])
        data = rest[count + 2 :]
    return b"".join(parts)


def state_of(server: ServerProcess) -> dict[str, int]:
    """What must be back at the start."""
    process = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    live = server.live()
    return {
        "accepted": live["accepted"], "running": live["running"], "waiting": live["waiting"], "kv_pages": sum(tier["used"] for tier in live["kv"].values()),
        "threads": int(status["Threads"]), "files": len(list((process / "fd").iterdir())), "memory_bytes": int(status["VmRSS"].split()[0]) * 1024,
    }  # fmt: skip


async def abuse(abuser: Abuser, requests: int, concurrency: int) -> None:
    """``requests`` of them, ``concurrency`` at a time."""
    left = iter(range(requests))

    async def work() -> None:
        for _ in left:
            await abuser.one()

    await asyncio.gather(*(work() for _ in range(concurrency)))


def settle(server: ServerProcess) -> dict[str, int]:
    """The state once nothing is left to do."""
    for _ in range(200):
        state = state_of(server)
        if not state["accepted"] and not state["running"]:
            break
        time.sleep(0.1)
    time.sleep(1.0)
    return state_of(server)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole line; the document of ``--json``."""
    server = ServerProcess(arguments.model, "--device", arguments.device, "--max-num-seqs", "8", "--max-waiting", "24")
    try:
        server.wait_until_ready()
        known = {}
        for word in WORDS:
            prompt = f"My favourite colour is {word}, because"
            known[prompt] = server.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0}).json["choices"][0]["text"]
        abuser = Abuser(server, known, arguments.seed)
        asyncio.run(abuse(abuser, arguments.warm_up, arguments.concurrency))
        before, began_s = settle(server), time.monotonic()
        asyncio.run(abuse(abuser, arguments.requests, arguments.concurrency))
        seconds, after = time.monotonic() - began_s, settle(server)
        still_right = server.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0}).json["choices"][0]["text"] == known[prompt]
    finally:
        status = server.stop()
    wrong = [*abuser.wrong, *([] if still_right else ["the last answer differs from the first"]), *([] if status == 0 else [f"exit status {status}"])]
    for name in ("accepted", "running", "waiting", "kv_pages"):
        if after[name]:
            wrong.append(f"{name} is {after[name]} at the end, not 0")
    for name, margin in (("threads", 0), ("files", 1), ("memory_bytes", MEMORY_MARGIN_BYTES)):
        if after[name] > before[name] + margin:
            wrong.append(f"{name} grew from {before[name]} to {after[name]}")
    return {"schema": 1, "requests": arguments.requests, "seconds": seconds, "outcomes": dict(sorted(abuser.seen.items())), "before": before, "after": after,
            "wrong": wrong}  # fmt: skip


def main() -> int:
    """0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--warm-up", type=int, default=200, help="requests before the start is recorded: pools and caches fill first")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    document = run(parser.parse_args())
    if "--json" in sys.argv:
        print(json.dumps(document))
    else:
        for outcome, count in document["outcomes"].items():
            print(f"{count:6d}  {outcome}")
        print(f"{document['requests']} requests in {document['seconds']:.0f} s\nbefore {document['before']}\nafter  {document['after']}")
        print("\n".join(["WRONG:", *document["wrong"][:20]]) if document["wrong"] else "nothing was wrong")
    return 1 if document["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
