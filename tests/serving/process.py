"""A real server process for tests and benchmarks: started on a free port, asked over real sockets, ended by a signal."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

KEY = "a-test-key"
START_S = 120.0


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ServerProcess:
    """``arguments`` are the command line's after ``serve``."""

    def __init__(self, *arguments: str, key: str | None = KEY, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "twinpilots", "serve", *arguments, "--port", "0", *([] if key is None else ["--api-key", key])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
        self.key = key
        self.messages: list[str] = []
        self.port = self._read_port()

    def _read_port(self) -> int:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.messages.append(line)
            if line.startswith("listening on"):
                return int(line.rsplit(":", 1)[1])
        raise AssertionError(f"the server did not start: {''.join(self.messages)}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout_s: float = 60.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def headers(self, **more: str) -> dict[str, str]:
        return {"Content-Type": "application/json", **({} if self.key is None else {"Authorization": f"Bearer {self.key}"}), **more}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own. ``body``: bytes as they are, anything else as JSON."""
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, self.headers(**headers))
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The events of a stream; the last is "[DONE]"."""
        reply = self.ask("POST", path, {**body, "stream": True})
        assert reply.status == 200, reply.body
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in reply.body.decode().split("\n\n") if line]

    def live(self) -> Any:
        return self.ask("GET", "/live").json

    def wait_for(self, condition: Any, what: str, timeout_s: float = 60.0) -> None:
        """Until ``condition()`` holds."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until_s, f"{what} did not happen within {timeout_s} s"
            assert self.process.poll() is None, f"the server ended while waiting until {what}"
            time.sleep(0.05)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.ask("GET", "/health").status == 200, "the server is ready", START_S)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.messages.append(self.process.communicate(timeout=90)[1])
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode


@contextmanager
def serving(*arguments: str, key: str | None = KEY) -> Iterator[ServerProcess]:
    """A server that is ready; it is ended afterwards."""
    server = ServerProcess(*arguments, key=key)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
