"""One served model: from a body to a ticket, and the facts that the endpoints tell about it.

Owns the engine thread, the telemetry, the thread pool that parses and tokenises, and the limits of requests. Knows nothing of routes or sockets.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from twinpilots.api import LLM
from twinpilots.errors import RequestError
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.openai.fields import from_json
from twinpilots.openai.prompts import encode_request
from twinpilots.openai.requests import ApiRequest, read_request
from twinpilots.request import SamplingParams
from twinpilots.server.clients import Sender
from twinpilots.server.engine_thread import EngineStoppedError, EngineThread, QueueFullError, Served
from twinpilots.server.replies import HttpError
from twinpilots.server.served import ServedLLM
from twinpilots.server.settings import ServerSettings
from twinpilots.server.telemetry import Telemetry
from twinpilots.server.tickets import Job, Ticket
from twinpilots.server.view import Snapshot, View

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """What does not change while a model is served. ``max_chars``: no prompt of more characters can be short enough in tokens."""

    tokenizer: Tokenizer | None
    defaults: SamplingParams
    max_model_len: int
    max_chars: int
    view: View

    @staticmethod
    def of(llm: LLM, view: View) -> LoadedModel:
        longest = 1
        if llm.tokenizer is not None:
            longest = max((len(token) for token in llm.tokenizer.backend.get_vocab()), default=1)
        return LoadedModel(
            tokenizer=llm.tokenizer, defaults=llm.get_default_sampling_params(), max_model_len=llm.plan.max_model_len,
            max_chars=llm.plan.max_model_len * longest, view=view,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request that is ready for the engine."""

    request: ApiRequest
    jobs: tuple[Job, ...]
    response_id: str
    created: int


class Service:
    """``open_llm`` loads the model, in the engine's thread. ``on_ready`` hears when it is there, ``on_stop`` when the engine has ended, and of what."""

    def __init__(
        self, settings: ServerSettings, open_llm: Callable[[], LLM], *, on_ready: Callable[[Snapshot], None], on_stop: Callable[[BaseException | None], None]
    ) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.telemetry = Telemetry(settings.model_names[0])
        self.model: LoadedModel | None = None
        self._open_llm = open_llm
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="twinpilots-text")
        self.engine = EngineThread(
            self._open_served,
            max_accepted=self._max_accepted,
            on_ready=lambda: on_ready(self.loaded.view.newest),
            on_pass=self.telemetry.on_pass,
            on_stop=on_stop,
        )

    def start(self) -> None:
        """Begin to load."""
        self.engine.start(asyncio.get_running_loop())

    def close(self, timeout_s: float = 30.0) -> None:
        """End the engine and wait for it."""
        self.engine.stop()
        self.engine.join(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def loaded(self) -> LoadedModel:
        """EngineStoppedError while there is none."""
        if self.model is None or self.engine.state == "stopped":
            raise EngineStoppedError(f"the server is {self.engine.state}; try again later")
        return self.model

    @property
    def snapshot(self) -> Snapshot | None:
        return None if self.model is None else self.model.view.newest

    def _open_served(self) -> Served:
        llm = self._open_llm()
        try:
            served = ServedLLM(llm)
            self.model = LoadedModel.of(llm, served.view)
        except BaseException:
            llm.close()
            raise
        return served

    def _max_accepted(self) -> int:
        return self.loaded.view.newest.limits["max_num_seqs"] + self.settings.max_waiting

    # -- requests ------------------------------------------------------------------------------------------------------------------------

    async def in_pool(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function``'s result, from a thread that may take its time."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def prepare(self, endpoint: str, body: bytes, sender: Sender) -> Prepared:
        """Parse, check and tokenise. RequestError names the field at fault."""
        self._check_room(1)
        return await self.in_pool(self._prepare, self.loaded, endpoint, body, sender)

    def _prepare(self, model: LoadedModel, endpoint: str, body: bytes, sender: Sender) -> Prepared:
        request = read_request(endpoint, from_json(body), model.defaults)
        self.check_model(request.model)
        if request.num_choices > self.settings.max_choices:
            raise RequestError(
                f"{request.num_choices} choices are asked for (prompts x n), {self.settings.max_choices} at most; send several requests", param="n"
            )
        for prompt in request.prompts:
            self.check_chars(prompt if isinstance(prompt, str) else "", model)
        name = ("chatcmpl-" if request.is_chat else "cmpl-") + uuid.uuid4().hex
        client = sender.client(len(self.settings.api_keys), request.user)
        jobs = []
        for number, encoded in enumerate(encode_request(request, model.tokenizer)):
            self._check_length(len(encoded.ids), request, model)
            job = Job(
                request_id=f"{name}-{number}", prompt_token_ids=encoded.ids, params=request.params, prompt=encoded.text, stream=request.stream,
                client=client, priority=request.priority,
            )  # fmt: skip
            jobs.append(job)
        return Prepared(request=request, jobs=tuple(jobs), response_id=name, created=int(time.time()))

    def check_model(self, name: str | None) -> None:
        """RequestError unless this is a name that we serve, or none."""
        if name is not None and name not in self.settings.model_names:
            known = ", ".join(self.settings.model_names)
            raise RequestError(f"the model {name!r} does not exist here; this server has {known}", param="model", code="model_not_found")

    @staticmethod
    def check_chars(text: str, model: LoadedModel) -> None:
        """RequestError for a text that no tokenizer could make short enough: tokenising megabytes only to refuse them takes seconds."""
        if len(text) > model.max_chars:
            raise RequestError(
                f"the prompt has {len(text)} characters, too many for {model.max_model_len} tokens; shorten it", param="prompt", code="context_length_exceeded"
            )

    @staticmethod
    def _check_length(num_tokens: int, request: ApiRequest, model: LoadedModel) -> None:
        if num_tokens >= model.max_model_len:
            raise RequestError(
                f"the prompt has {num_tokens} tokens, this server's limit of prompt and output together is {model.max_model_len}; shorten it, or start the "
                "server with a higher --max-model-len", param="messages" if request.is_chat else "prompt", code="context_length_exceeded",
            )  # fmt: skip

    def submit(self, prepared: Prepared) -> Ticket:
        """Hand a request to the engine. EngineStoppedError; HttpError 429 when the queue is full."""
        num_sequences = sum(job.params.n for job in prepared.jobs)
        self._check_room(num_sequences)
        ticket = self.engine.submit(prepared.jobs, self._ended)
        for job in prepared.jobs:
            self.telemetry.arrived(job)
        return ticket

    def _ended(self, ticket: Ticket) -> None:
        for job in ticket.jobs:
            self.telemetry.ended(job.request_id, failed=ticket.error is not None)

    def _check_room(self, num_sequences: int) -> None:
        """What is accepted is bounded; a request that alone is more than the bound still runs on an empty server."""
        try:
            self.engine.check_room(num_sequences)
        except QueueFullError as error:
            self.telemetry.rejected["queue_full"] += 1
            at_once = self.loaded.view.newest.limits["max_num_seqs"]
            retry_after_s = self.telemetry.retry_after_s(self.engine.num_accepted, at_once)
            raise HttpError(429, str(error), kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(retry_after_s)}) from error
        except EngineStoppedError:
            self.telemetry.rejected["not_ready"] += 1
            raise

    # -- text and tokens -----------------------------------------------------------------------------------------------------------------

    def tokenizer(self) -> Tokenizer:
        """RequestError when the model has none."""
        tokenizer = self.loaded.tokenizer
        if tokenizer is None:
            raise RequestError("the model has no tokenizer; there is nothing to convert with")
        return tokenizer
