"""The routes: OpenAI's endpoints, health and metrics, and the page.

Owns which path does what and which needs the key. Everything with a body is read, checked and refused in OpenAI's words; FastAPI's own validation is not
used, so that nothing is ever answered with 422. Knows nothing of how requests run.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from twinpilots import __version__
from twinpilots.errors import RequestError
from twinpilots.openai.fields import Fields, from_json
from twinpilots.openai.messages import read_messages
from twinpilots.openai.responses import response_body
from twinpilots.server import prometheus
from twinpilots.server.chunks import DONE, Chunks, event
from twinpilots.server.clients import Sender
from twinpilots.server.openapi import describe
from twinpilots.server.replies import EventStream, HttpError, ReaderGoneError, error_reply, json_reply, while_connected
from twinpilots.server.service import Prepared, Service
from twinpilots.server.tickets import Ticket

logger = logging.getLogger(__name__)
GUARDED = ("/v1/", "/tokenize", "/detokenize")  # what needs the key, when there is one
KEY_NUMBER = "twinpilots.key"  # in a request's scope: which of the keys it came with
DISCARDED = 4  # a body too large by less than this factor is read to its end, unkept: a client that is still sending sees no answer
OFFLINE = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def create_app(service: Service) -> FastAPI:
    """The application; ``service`` is started and closed by whoever runs it."""
    app = FastAPI(title="TwinPilots", version=__version__, docs_url=None, redoc_url=None)
    app.openapi = lambda: describe(service.settings)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, service=service)
    _add_openai(app, service)
    _add_text(app, service)
    _add_state(app, service)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(service, request, "/v1/completions")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await generate(service, request, "/v1/chat/completions")

    @app.get("/v1/models")
    async def models() -> Response:
        return json_reply({"object": "list", "data": [_model(service, name) for name in service.settings.model_names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            service.check_model(name)
        except RequestError as error:
            return error_reply(error)
        return json_reply(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    longest = None if service.model is None else service.model.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "twinpilots",
        "root": service.settings.model_names[0],
        "max_model_len": longest,
    }


async def generate(service: Service, request: Request, endpoint: str) -> Response:
    """An answer, whole or as a stream."""
    try:
        prepared = await service.prepare(endpoint, await read_body(service, request), _sender(request))
        headers = _headers(prepared)
        ticket = service.submit(prepared)
        try:
            await while_connected(ticket.accepted(), request.receive, service.settings.request_timeout_s)
            if prepared.request.stream:
                return EventStream(ticket, _events(service, prepared, ticket), service.settings.request_timeout_s, headers)
            outputs = await while_connected(ticket.results(), request.receive, service.settings.request_timeout_s)
        except BaseException:
            ticket.close()
            raise
        ticket.close()
        name = prepared.request.model or service.settings.model_names[0]
        body = response_body(prepared.request, outputs, response_id=prepared.response_id, created=prepared.created, model=name, details=True)
        return json_reply(body, headers=headers)
    except ReaderGoneError:
        return Response(status_code=499)  # nobody reads it
    except RequestError as error:
        service.telemetry.rejected["invalid"] += 1
        return error_reply(error)
    except Exception as error:  # noqa: BLE001  every end of a request has a body
        return error_reply(error)


def _sender(request: Request) -> Sender:
    return Sender(key=request.scope.get(KEY_NUMBER), address=request.client.host if request.client else "")


async def _events(service: Service, prepared: Prepared, ticket: Ticket) -> Any:
    name = prepared.request.model or service.settings.model_names[0]
    ids = [job.request_id for job in prepared.jobs]
    chunks = Chunks(prepared.request, ids, response_id=prepared.response_id, created=prepared.created, model=name)
    async for outputs in ticket.updates():
        data = b"".join(event(chunk) for output in outputs for chunk in chunks.of(output))
        if data:
            yield data
    yield b"".join(event(chunk) for chunk in chunks.closing()) + DONE


def _headers(prepared: Prepared) -> dict[str, str]:
    """The request's id, and what it said that nobody knows."""
    headers = {"X-Request-Id": prepared.response_id}
    if prepared.request.warnings:
        names = ", ".join(prepared.request.warnings[:16])
        plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "?" for c in names)[:400]
        logger.warning("request %s: unknown fields ignored: %s", prepared.response_id, plain)
        headers["Warning"] = f'299 twinpilots "unknown fields ignored: {plain}"'
    return headers


async def read_body(service: Service, request: Request) -> bytes:
    """The body, within the limits of size and time. HttpError 413 and 408; ReaderGoneError."""
    most = service.settings.max_body_bytes
    too_large = HttpError(
        413, f"the body is larger than {most} bytes; send less, or raise --max-body-size", code="body_too_large", headers={"Connection": "close"}
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > DISCARDED * most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.settings.body_timeout_s):
            while True:
                part = await request.receive()
                if part["type"] == "http.disconnect":
                    raise ReaderGoneError
                data = part.get("body", b"")
                size += len(data)
                if size <= most:
                    parts.append(data)
                elif size > DISCARDED * most:
                    raise too_large
                if not part.get("more_body"):
                    break
        if size > most:
            raise too_large
        return b"".join(parts)
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {service.settings.body_timeout_s:g} s", kind="timeout_error") from None


# -- text and tokens -----------------------------------------------------------------------------------------------------------------------


def _add_text(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await _converted(service, request, _tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await _converted(service, request, _detokenize)


async def _converted(service: Service, request: Request, convert: Any) -> Response:
    try:
        body = await read_body(service, request)
        return json_reply(await service.in_pool(convert, service, body))
    except ReaderGoneError:
        return Response(status_code=499)
    except Exception as error:  # noqa: BLE001
        return error_reply(error)


def _tokenize(service: Service, body: bytes) -> dict[str, Any]:
    fields = Fields(from_json(body))
    service.check_model(fields.text("model"))
    tokenizer, model = service.tokenizer(), service.loaded
    prompt, messages = fields.text("prompt"), fields.take("messages")
    if (prompt is None) == (messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if prompt is not None:
        service.check_chars(prompt, model)
        ids = tokenizer.encode(prompt, add_special=fields.flag("add_special_tokens") is not False)
    else:
        ids = tokenizer.encode_chat(read_messages(messages), fields.flag("add_generation_prompt") is not False)
    texts = [tokenizer.token(token) for token in ids] if fields.flag("return_token_strs") else None
    return {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": texts}


def _detokenize(service: Service, body: bytes) -> dict[str, Any]:
    fields = Fields(from_json(body))
    service.check_model(fields.text("model"))
    tokens = fields.take("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in tokens):
        raise fields.error("tokens", "must be a list of token ids", tokens)
    return {"prompt": service.tokenizer().decode(tokens, skip_special_tokens=False)}


# -- state ---------------------------------------------------------------------------------------------------------------------------------


def _add_state(app: FastAPI, service: Service) -> None:
    page = files("twinpilots.server").joinpath("page.html").read_bytes()

    @app.get("/health")
    async def health() -> Response:
        return json_reply({"status": service.engine.state}, 200 if service.engine.state == "ready" else 503)

    @app.get("/version")
    async def version() -> Response:
        return json_reply({"version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.telemetry.render(service.snapshot), media_type=prometheus.CONTENT_TYPE)

    @app.get("/live")
    async def live(request: Request) -> Response:
        since_s = _number(request.query_params.get("since", "0"))
        if since_s is None:
            return error_reply(RequestError("since must be a number of seconds since 1970", param="since"))
        snapshot = service.snapshot
        about = {
            "state": service.engine.state, "time": round(time.time(), 3), "model": service.settings.model_names[0], "version": __version__,
            "needs_key": bool(service.settings.api_keys), "accepted": service.engine.num_accepted,
        }  # fmt: skip
        return json_reply({**about, **(snapshot.document(since_s) if snapshot is not None else {})})

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": OFFLINE, "X-Content-Type-Options": "nosniff"})


def _number(text: str) -> float | None:
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# -- at the door ---------------------------------------------------------------------------------------------------------------------------


class Guard:
    """Asks for the key where one is needed, before anything is read, and turns away pages of other sites that a browser runs."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        self._service.telemetry.rejected["unauthorized"] += 1
        await error_reply(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
            return HttpError(403, "requests of other sites' pages are not served", kind="invalid_request_error", code="cross_site")
        if not self._keys or not scope["path"].startswith(GUARDED):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()  # hashed: no lengths to tell apart
        known = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if scheme.lower() == b"bearer" and any(known):
            scope[KEY_NUMBER] = known.index(True)
            return None
        return HttpError(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
        )


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_reply(HttpError(error.status_code, message, headers=error.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    del request
    return error_reply(error)
