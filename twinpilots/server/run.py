"""A server from its first socket to its last: uvicorn around the application, signals, draining.

Owns the life of the process's server. The socket is bound before the model loads, so that a taken port is an error at once; until the model is ready,
/health answers 503. SIGTERM or Ctrl-C: nothing new is taken, what runs may finish within the drain time; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from twinpilots.api import LLM
from twinpilots.errors import UserError
from twinpilots.server.app import create_app
from twinpilots.server.service import Service
from twinpilots.server.settings import ServerSettings
from twinpilots.server.view import Snapshot

logger = logging.getLogger(__name__)
SWITCH_INTERVAL_S = 5e-4  # how long the engine's thread waits for Python's lock at most, after each native call; Python's default is ten times that
BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `serve` has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    settings: ServerSettings, open_llm: Callable[[], LLM], *, on_listening: Callable[[str], None], on_ready: Callable[[Snapshot], None]
) -> Mapping[str, Any]:  # fmt: skip
    """Serve until a signal comes; the engine's statistics. ``on_listening`` hears the address before the model loads, ``on_ready`` the engine's limits.

    Raises what ended the engine, KeyboardInterrupt after Ctrl-C, UserError when the address cannot be had.
    """
    with _bound(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            error, interrupted, stats = asyncio.run(_serve(settings, open_llm, on_ready, listener))
        finally:
            sys.setswitchinterval(before_s)
    if error is not None:
        raise error
    if interrupted:
        raise KeyboardInterrupt
    return stats


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port") from error


async def _serve(
    settings: ServerSettings, open_llm: Callable[[], LLM], on_ready: Callable[[Snapshot], None], listener: socket.socket
) -> tuple[BaseException | None, bool, Mapping[str, Any]]:  # fmt: skip
    """(what ended the engine, whether Ctrl-C ended it all, the engine's statistics)."""
    loop = asyncio.get_running_loop()
    ended: list[BaseException | None] = []
    signals: list[int] = []

    def on_stop(error: BaseException | None) -> None:
        ended.append(error)
        server.should_exit = True

    def on_signal(number: int) -> None:
        server.force_exit = bool(signals)
        signals.append(number)
        service.engine.drain()
        server.should_exit = True

    service = Service(settings, open_llm, on_ready=on_ready, on_stop=on_stop)
    config = uvicorn.Config(
        create_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        timeout_keep_alive=30, server_header=False, date_header=False, loop="asyncio", http="httptools", ws="none",
    )  # fmt: skip
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    service.start()
    try:
        await server.serve(sockets=[listener])
    finally:
        await asyncio.to_thread(service.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    snapshot = service.snapshot
    return (ended[0] if ended else None), signals[:1] == [signal.SIGINT], {} if snapshot is None else snapshot.stats
