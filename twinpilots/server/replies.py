"""HTTP's side of answers: compact JSON, OpenAI's error bodies with the right status, and responses that end when their reader leaves.

Owns which exception is which status. Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twinpilots.errors import LimitError, RequestError, UserError
from twinpilots.openai.fields import to_json
from twinpilots.openai.responses import error_body, error_of
from twinpilots.server.chunks import DONE, event
from twinpilots.server.engine_thread import EngineStoppedError, QueueFullError, RequestFailedError
from twinpilots.server.tickets import Ticket

logger = logging.getLogger(__name__)
Headers = Mapping[str, str]


class HttpError(Exception):
    """A refusal with a status of its own."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None, headers: Headers | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.headers = status, kind, code, dict(headers or {})


class ReaderGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


def json_reply(value: Any, status: int = 200, headers: Headers | None = None) -> Response:
    """JSON without any free white space."""
    return Response(to_json(value), status, headers, media_type="application/json")


def described(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, body, headers) of what a request ended with."""
    if isinstance(error, HttpError):
        return error.status, error_body(str(error), kind=error.kind, code=error.code), error.headers
    if isinstance(error, RequestError):
        return 404 if error.code == "model_not_found" else 400, error_of(error), {}
    if isinstance(error, LimitError):
        return 400, error_body(str(error), code="context_length_exceeded"), {}
    if isinstance(error, UserError | ValueError):
        return 400, error_body(str(error)), {}
    if isinstance(error, EngineStoppedError):
        return 503, error_body(str(error), kind="server_error", code="not_ready"), {"Retry-After": "5"}
    if isinstance(error, QueueFullError):
        return 429, error_body(str(error), kind="rate_limit_error", code="queue_full"), {"Retry-After": "1"}
    if isinstance(error, RequestFailedError):
        return 500, error_body(str(error), kind="server_error"), {}
    logger.error("internal error: %s", error, exc_info=error)
    return 500, error_body("internal error; the server's log has more", kind="server_error"), {}


def error_reply(error: Exception) -> Response:
    status, body, headers = described(error)
    return json_reply(body, status, headers)


async def while_connected(work: Coroutine[Any, Any, Any], receive: Callable[[], Awaitable[Any]], timeout_s: float) -> Any:
    """The result of ``work``, which is given up when the client leaves (ReaderGoneError) or the time is over (HttpError 504)."""
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        done, _ = await asyncio.wait((task, watcher), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if not done:
            raise HttpError(504, f"the request took longer than {timeout_s:g} s; ask for fewer tokens, or raise --request-timeout", kind="timeout_error")
        raise ReaderGoneError
    finally:
        for one in (task, watcher):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of a ticket; however it ends, the ticket is closed."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes], timeout_s: float, headers: Headers) -> None:
        super().__init__(None, headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._ticket, self._events, self._timeout_s = ticket, events, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  ASGI's three
        with self._ticket:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await while_connected(self._send_events(send), receive, self._timeout_s)
            except ReaderGoneError:
                return
            except Exception as error:  # noqa: BLE001  the status is sent: the error can only be an event
                await _send(send, event(described(error)[1]) + DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        async for data in self._events:
            await _send(send, data)


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
