"""The engine's spine: schedule -> execute -> sample -> postprocess, one pass per `step`.

Owns the requests in flight and when a sequence ends. Knows devices only through the `Executor` protocol, text only through the tokenizer it is given.
"""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from twinpilots.model.tokenizer import Tokenizer
from twinpilots.request import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams, Sequence, Status, TokenLogprobs
from twinpilots.runtime.batch import BatchItem, StepBatch
from twinpilots.runtime.chain import Int32, Rule, rule_of
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.output_text import OutputText
from twinpilots.runtime.sampler import Sampler, token_logprobs
from twinpilots.runtime.scheduler import Scheduler
from twinpilots.runtime.structured import Grammars

Logits = NDArray[np.float32]


class Executor(Protocol):
    """Runs passes on the devices."""

    def execute(self, batch: StepBatch, *, more: bool) -> Logits:
        """Logits [batch.num_logits, vocab], float32: a view, valid until the next call.

        KV that `StepBatch.moves` names is on its new tier when this returns. ``more``: a pass that takes the same weights from the same places will likely
        follow, so that prefetching for it pays.
        """
        ...


class Chainer(Protocol):
    """Runs decoding passes one after another, for executors that can."""

    def most_passes(self) -> int:
        """How many a chain may have now; 1: none."""
        ...

    def execute_chain(self, batch: StepBatch, rules: SequenceABC[Rule], uniforms: NDArray[np.float64]) -> Int32:
        """Tokens [passes, items]: of ``batch.passes`` passes, or of fewer when a token stops its sequence or time was up. None at all when the first pass's
        logits are not finite. ``uniforms`` [passes, items]: what draws are made with."""
        ...


@dataclass(eq=False, slots=True)
class _Output:
    """One sequence's results so far. ``rule``: None when it must not be chained."""

    sequence: Sequence
    text: OutputText | None
    logprobs: list[TokenLogprobs] | None
    rule: Rule | None
    cumulative_logprob: float = 0.0


@dataclass(eq=False, slots=True)
class _Request:
    request_id: str
    prompt: str | None
    prompt_ids: tuple[int, ...]
    outputs: list[_Output]
    prompt_logprobs: list[TokenLogprobs | None] | None
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.outputs)


class Engine:
    """Requests in, outputs out. ``tokenizer`` None: no text, no stop strings. ``chainer`` None: one pass at a time."""

    def __init__(
        self, executor: Executor, scheduler: Scheduler, kv: KvCache, *, vocab_size: int, eos_token_ids: SequenceABC[int] = (),
        tokenizer: Tokenizer | None = None, seed: int = 0, chainer: Chainer | None = None,
    ) -> None:  # fmt: skip
        self.executor = executor
        self.chainer = chainer
        self.scheduler = scheduler
        self.kv = kv
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer, vocab_size, [token for token in self.eos_token_ids if token < vocab_size])
        self.sampler = Sampler(vocab_size, eos_token_ids=tuple(self.eos_token_ids), seed=seed, grammars=self.grammars)
        self._requests: dict[str, _Request] = {}
        self._owner: dict[Sequence, tuple[_Request, _Output]] = {}
        self._num_arrived = 0
        self.last_sampled: tuple[str, ...] = ()  # the requests that got a token in the last pass, once per sequence
        self.last_passes = 0  # of the last step

    # -- requests in -------------------------------------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: SequenceABC[int], params: SamplingParams, prompt: str | None = None, *, client: str = "", priority: int = 0,
        logits_from: int | None = None,
    ) -> None:  # fmt: skip
        """Queue a request. Clients share fairly; among one client's requests, a lower priority goes first. ``logits_from``: passes have a row of logits for
        each of the prompt's tokens from there on, for a caller that reads them. Raises ValueError for bad input and LimitError for a request that can never
        run, both before any work."""
        tokens = [int(token) for token in prompt_token_ids]
        self._check(request_id, tokens, params)
        self.scheduler.length_limit(len(tokens), params.max_tokens)
        outputs = []
        for index in range(params.n):
            sequence = Sequence(
                request_id=request_id, index=index, params=params, tokens=list(tokens), arrival=self._num_arrived, client=client, priority=priority
            )
            self._num_arrived += 1
            if index == 0:
                sequence.logits_from = logits_from if params.prompt_logprobs is None else 0
            text = OutputText(self.tokenizer, params, tokens) if self.tokenizer is not None else None
            outputs.append(_Output(sequence, text, None if params.logprobs is None else [], rule_of(params, self.eos_token_ids)))
        request = _Request(request_id, prompt, tuple(tokens), outputs, None if params.prompt_logprobs is None else [None])
        self._requests[request_id] = request
        for output in outputs:
            self._owner[output.sequence] = (request, output)
            self.scheduler.add(output.sequence)

    def _check(self, request_id: str, tokens: list[int], params: SamplingParams) -> None:
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already in use by an unfinished request")
        if not tokens:
            raise ValueError(f"request {request_id!r} has an empty prompt; give at least one token")
        for name, ids in (("prompt token", tokens), ("logit_bias token", params.logit_bias or ()), ("stop_token_ids token", params.stop_token_ids or ())):
            outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
            if outside is not None:
                raise ValueError(f"{name} {outside} of request {request_id!r} is outside the vocabulary [0, {self.vocab_size})")
        if params.structured_outputs is not None:
            self.grammars.start(params.structured_outputs)  # says what is wrong with it
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(f"request {request_id!r} has stop strings, but there is no tokenizer to make text; use stop_token_ids")

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now, at any point; its output so far with finish_reason "abort", or None when it is not (or no longer) here."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for output in request.outputs:
            if output.sequence.status is not Status.FINISHED:
                self._finish(request, output, "abort", None)
        return self._close(request)

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    # -- one step ------------------------------------------------------------------------------------------------------------------------------

    def step(self, *, partial: bool | Container[str] = True) -> list[RequestOutput]:
        """Run one pass, or a chain of decoding passes; the outputs so far of every request that got a token, in order of arrival; without ``partial``, of
        those that are finished alone, or also of the requests that it names.
        An error leaves the sequences as before the pass."""
        batch = self.scheduler.schedule()
        while batch is not None and not batch.items:  # nobody can run before KV has changed tiers
            self.executor.execute(batch, more=False)
            self.scheduler.commit(batch)
            batch = self.scheduler.schedule()
        if batch is None:
            return []
        touched = self._chain(batch) or self._pass(batch)
        every, some = (partial, ()) if isinstance(partial, bool) else (False, partial)
        wanted = [request for request in touched.values() if every or not request.unfinished or request.request_id in some]
        return [self._snapshot(request) if request.unfinished else self._close(request) for request in wanted]

    def _pass(self, batch: StepBatch) -> dict[str, _Request]:
        """One pass; the requests that got a token."""
        following = self.scheduler.predict_next(batch) if self.scheduler.plan.uses_gpu else None  # without a GPU nothing is loaded ahead
        logits = self.executor.execute(batch, more=following is not None and following.splits == batch.bucket.splits)
        sampled, rows = self._sampled_rows(batch)
        picked = logits if rows == list(range(len(logits))) else logits[rows]
        tokens = self.sampler.sample(picked, [item.sequence for item in sampled])
        self.scheduler.commit(batch)
        self._collect_prompt_logprobs(batch, logits)
        self.last_sampled, self.last_passes = tuple(item.sequence.request_id for item in sampled), 1
        touched: dict[str, _Request] = {}
        for item, token, row in zip(sampled, tokens, picked, strict=True):
            request, output = self._owner[item.sequence]
            self._accept(request, output, token, row)
            touched[request.request_id] = request
        return touched

    def _chain(self, batch: StepBatch) -> dict[str, _Request]:
        """The pass and those that may be chained to it; the requests that got tokens: none when it must run alone."""
        most = 1 if self.chainer is None else self.chainer.most_passes()
        if self.chainer is None or most < 2:
            return {}
        owners = [self._owner[item.sequence] for item in batch.items]
        rules = [output.rule for _, output in owners if output.rule is not None]
        batch = self.scheduler.chained(batch, most) if len(rules) == len(owners) else batch
        if batch.passes < 2:
            return {}
        uniforms = np.array([self.sampler.uniforms(output.sequence, batch.passes) for _, output in owners]).T
        tokens = self.chainer.execute_chain(batch, rules, np.ascontiguousarray(uniforms))
        if not len(tokens):
            return {}  # the pass by itself will say why
        columns: list[list[int]] = tokens.T.tolist()
        self.scheduler.commit_chain(batch, columns)
        self.last_sampled, self.last_passes = tuple([request.request_id for request, _ in owners]), len(tokens)
        for (request, output), new in zip(owners, columns, strict=True):
            self.sampler.used(output.sequence, len(new))
            self._accept_chain(request, output, new)
        return {request.request_id: request for request, _ in owners}

    @staticmethod
    def _sampled_rows(batch: StepBatch) -> tuple[list[BatchItem], list[int]]:
        """The items whose newest token was computed, and the logit row of that token, in order of arrival."""
        found, row = [], 0
        for item in batch.items:
            row += item.num_logits
            if item.is_last:
                found.append((item, row - 1))
        return [item for item, _ in found], [row for _, row in found]

    def _collect_prompt_logprobs(self, batch: StepBatch, logits: Logits) -> None:
        """Row i of a prompt_logprobs sequence says how likely the prompt's next token was."""
        row = 0
        for item in batch.items:
            sequence = item.sequence
            collected = self._owner[sequence][0].prompt_logprobs
            if sequence.logits_from is not None and collected is None:
                sequence.logits_from = max(sequence.logits_from, item.end)  # after a preemption, what was read is not wanted again
            elif sequence.logits_from is not None and collected is not None:
                assert sequence.params.prompt_logprobs is not None
                for offset in range(item.num_logits):
                    following = item.end - item.num_logits + offset + 1
                    if following < sequence.num_prompt_tokens:
                        collected.append(self._named(logits[row + offset], sequence.tokens[following], sequence.params.prompt_logprobs))
                sequence.logits_from = len(collected) - 1 if len(collected) < sequence.num_prompt_tokens else None
            row += item.num_logits

    def _named(self, row: Logits, token: int, count: int) -> TokenLogprobs:
        def text(token: int) -> str | None:
            return None if self.tokenizer is None else self.tokenizer.decode([token], skip_special_tokens=False)

        return {token: Logprob(logprob=value, rank=rank, decoded_token=text(token)) for token, (value, rank) in token_logprobs(row, token, count).items()}

    # -- postprocess -----------------------------------------------------------------------------------------------------------------------------

    def _accept(self, request: _Request, output: _Output, token: int, row: Logits) -> None:
        """A new token: record it, and end the sequence when it is time."""
        sequence = output.sequence
        if output.logprobs is not None:
            named = self._named(row, token, sequence.params.logprobs or 0)
            output.logprobs.append(named)
            output.cumulative_logprob += named[token].logprob
        self.scheduler.append(sequence, token)
        reason, stop = self._why_finished(sequence, token)
        found = None
        # As in vLLM, the token that stops a sequence is in token_ids, its text is not in the text.
        if output.text is not None and reason != "stop":
            found = output.text.add(token, sequence.num_output_tokens)
        if found is not None:
            reason, stop = "stop", found
        if reason != "stop" and sequence.params.structured_outputs is not None and self.sampler.has_ended(sequence):
            reason = "stop"
        if reason is not None:
            self._finish(request, output, reason, stop)

    def _accept_chain(self, request: _Request, output: _Output, tokens: list[int]) -> None:
        """A chain's tokens, of which only the last can end the sequence."""
        reason, stop = self._why_finished(output.sequence, tokens[-1])
        if output.text is not None:
            output.text.add_all(tokens[:-1] if reason == "stop" else tokens)
        if reason is not None:
            self._finish(request, output, reason, stop)

    def _why_finished(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, int | str | None]:
        params = sequence.params
        if sequence.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if params.stop_token_ids and token in params.stop_token_ids:
                return "stop", token
        return ("length", None) if len(sequence.tokens) >= sequence.max_len else (None, None)

    def _finish(self, request: _Request, output: _Output, reason: FinishReason, stop: int | str | None) -> None:
        sequence = output.sequence
        self.scheduler.finish(sequence)
        self.sampler.forget(sequence)
        sequence.finish_reason, sequence.stop_reason = reason, stop
        if output.text is not None and not isinstance(stop, str):
            late = output.text.close()
            if late is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", late
        request.unfinished -= 1
        del self._owner[sequence]

    def _close(self, request: _Request) -> RequestOutput:
        del self._requests[request.request_id]
        return self._snapshot(request)

    @staticmethod
    def _snapshot(request: _Request) -> RequestOutput:
        finished = request.unfinished == 0
        outputs = tuple(
            CompletionOutput(
                index=output.sequence.index, text="" if output.text is None else output.text.visible(output.sequence.status is Status.FINISHED),
                token_ids=tuple(output.sequence.output_ids), finish_reason=output.sequence.finish_reason, logprobs=output.logprobs,
                cumulative_logprob=None if output.logprobs is None else output.cumulative_logprob, stop_reason=output.sequence.stop_reason,
            )
            for output in request.outputs
        )  # fmt: skip
        return RequestOutput(
            request_id=request.request_id, prompt=request.prompt, prompt_token_ids=request.prompt_ids, outputs=outputs, finished=finished,
            prompt_logprobs=request.prompt_logprobs, num_cached_tokens=min(len(request.prompt_ids), request.outputs[0].sequence.num_cached),
        )  # fmt: skip

    def check_integrity(self) -> None:
        """Every live sequence is queued once and every page accounted for. AssertionError states both sides."""
        self.scheduler.check_integrity()
        queued = {*self.scheduler.running, *self.scheduler.waiting}
        if queued != set(self._owner):
            raise AssertionError(f"{len(self._owner)} sequences belong to requests, {len(queued)} are queued")
        unfinished = sum(request.unfinished for request in self._requests.values())
        if unfinished != len(self._owner):
            raise AssertionError(f"requests count {unfinished} unfinished sequences, {len(self._owner)} are live")
        strays = self.sampler.remembered() - set(self._owner)
        if strays:
            raise AssertionError(f"the sampler remembers {len(strays)} sequences beside the {len(self._owner)} live ones")
