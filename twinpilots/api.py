"""`LLM`: the offline interface, shaped like vLLM's.

Owns the way from arguments to a running engine, and when a workload deserves another plan. Everything else is done by the rooms below: models are opened by
`model`, measured by `hardware`, planned by `plan`, run by `runtime` (through `session.Session`).
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from twinpilots.config import EngineConfig
from twinpilots.errors import LimitError, UserError
from twinpilots.expected_work import mean_workload, rounded
from twinpilots.live import LiveEngine
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.model.locate import resolve_model
from twinpilots.model.tokenizer import load_tokenizer
from twinpilots.plan.difference import difference
from twinpilots.plan.plan import Plan
from twinpilots.plan.workload import Workload
from twinpilots.planner import DEFAULT_NUM_SEQS, Planner
from twinpilots.profiling import load_or_measure
from twinpilots.progress import Progress
from twinpilots.request import RequestOutput, SamplingParams
from twinpilots.session import Session
from twinpilots.trace import DEFAULT_PASSES, Recorder, check_writable, trace_events, write_trace

logger = logging.getLogger(__name__)
Prompt = str | Sequence[int]
Message = Mapping[str, Any]
REPLAN_GAIN = 0.97  # another plan must take at most this fraction of the time, its loading included


@dataclass(frozen=True, kw_only=True)
class PromptLogits:
    """Logits [rows, vocab] after the tokens ``first``, ``first`` + 1, ... of prompt number ``prompt``: a view, valid until the next one is drawn."""

    prompt: int
    first: int
    rows: NDArray[np.float32]


class LLM:
    """A model, loaded and planned for this machine. Close it, or use it as a context manager.

    Arguments are those of docs/cli.md; None means: decided by measurement and plan. ``gpu_memory`` and ``host_memory`` are bytes or text
    ("8GiB"). ``plan`` is a `Plan` or the path of its JSON. ``strict`` makes tensors that nothing uses an error instead of a
    warning. ``keep`` names weights that ``quantization`` leaves alone, by patterns such as "lm_head" or "*.down_proj". ``enable_prefix_caching``: prompts that
    begin alike share what was computed of the beginning. ``load=False`` loads the weights when they are first needed: with the plan for the first
    requests, instead of a plan for requests of usual lengths. ``expected``: what will be asked, where that is known before the first prompts: the first
    plan is made for it, its lengths cut to what model and memory allow.
    Raises UserError subclasses for models, devices and limits that cannot be had, ValueError
    for malformed arguments, all before anything runs.
    """

    def __init__(
        self, model: str, tokenizer: str | None = None, revision: str | None = None, dtype: str = "auto", quantization: str | None = None,
        device: str = "auto", gpu_memory: int | str | None = None, host_memory: int | str | None = None, max_model_len: int | None = None,
        max_num_seqs: int | None = None, kv_cache_dtype: str = "auto", policy: str = "auto", plan: Plan | str | Path | None = None,
        threads: int | None = None, seed: int = 0, deterministic: bool = False, unit_rows: int | None = None, strict: bool = False,
        keep: Sequence[str] = (), enable_prefix_caching: bool = True, load: bool = True, expected: Workload | None = None,
    ) -> None:  # fmt: skip
        self.config = EngineConfig.of(
            dtype=dtype, quantization=quantization, device=device, gpu_memory=gpu_memory, host_memory=host_memory, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, kv_cache_dtype=kv_cache_dtype, policy=policy, plan=plan, threads=threads, seed=seed, deterministic=deterministic,
            unit_rows=unit_rows, keep=keep, enable_prefix_caching=enable_prefix_caching,
        )  # fmt: skip
        located = resolve_model(model, revision)
        with Progress("converting", unit="tensors") as bar:  # shown only for a GGUF file's first time
            self._checkpoint = open_checkpoint(
                located, dtype=dtype, quantization=self.config.quantization, keep=self.config.keep, strict=strict, progress=bar.show
            )
        self._session: Session | None = None
        self._is_closed = False
        self._trace: Recorder | None = None
        self._earlier_peak_bytes: dict[Literal["gpu", "host"], int] = {"gpu": 0, "host": 0}
        try:
            self.spec = self._checkpoint.spec
            self.tokenizer = load_tokenizer(located, self._checkpoint, override=tokenizer)
            notices: list[str] = []  # said once there is a plan: a limit that cannot be met is one line, not two
            self._profile = load_or_measure(self.config.device, self.spec, threads=threads, tell=notices.append)
            self._planner = Planner(self.config, self.spec, self._profile, self._checkpoint.fingerprint)
            self._planner.recall_history()
            self._workload, self._first = self._planner.first_plan(expected)
            for notice in notices:
                logger.warning(notice)
            if load:
                self._load(self._first)
        except BaseException:
            self.close()
            raise
        self._num_requests = 0

    # -- what it is ----------------------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._open_session.plan

    @property
    def fingerprint(self) -> str:
        """Changes when the model's weights, its configuration or its tokenizer do."""
        digest = hashlib.sha256(repr((self._checkpoint.fingerprint, sorted(self._checkpoint.generation_config.items()))).encode())
        digest.update(b"" if self.tokenizer is None else self.tokenizer.state())
        return digest.hexdigest()[:32]

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt included, that the model or the user allows."""
        return self.config.max_model_len or self.spec.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (generation_config.json), else vLLM's."""
        known = self._checkpoint.generation_config
        return SamplingParams(**{name: known[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty") if name in known})

    def stats(self) -> dict[str, Any]:
        """Sums over all passes since this LLM was made, loading excluded (docs/cli.md)."""
        session = self._open_session
        plan_bound, hardware_bound = self._planner.bounds(self._workload)
        peaks = self._peak_bytes()
        sums = session.stats.as_dict(peak_gpu_bytes=peaks["gpu"], peak_host_bytes=peaks["host"], plan_bound=plan_bound, hardware_bound=hardware_bound)
        return sums | {"plan_history": [record.as_dict() for record in self._planner.online.adaptation.history]}

    def _peak_bytes(self) -> dict[Literal["gpu", "host"], int]:
        """The most that any plan's session has held, this one's included."""
        return {tier: max(before, self._open_session.executor.ledger.peak(tier)) for tier, before in self._earlier_peak_bytes.items()}

    @contextmanager
    def trace(self, path: str | Path, *, num_passes: int = DEFAULT_PASSES, label: str = "", contender: int = 0) -> Iterator[None]:
        """Inside, passes are recorded; afterwards ``path`` holds their measured and predicted timelines (Chrome trace format: Perfetto, chrome://tracing),
        also after an error. Of more than ``num_passes`` passes the first quarter of them and the last are kept. ``label`` and ``contender`` (0, 1, ...)
        tell several engines' events apart when files are put together. UserError when ``path`` cannot be written, before anything runs."""
        target = Path(path)
        check_writable(target)
        if self._trace is not None:
            raise RuntimeError("this LLM is being traced already; end that trace first")
        recorder = self._trace = Recorder(num_passes=num_passes)
        self._open_session.record_into(recorder)
        try:
            yield
        finally:
            self._trace = None
            if self._session is not None:
                self._session.record_into(None)
            emulated, notes = self._profile.emulated, {"model": self.spec.name, "passes": recorder.num_seen, "passes_kept": len(recorder.passes)}
            write_trace(target, trace_events(self.spec, recorder, label=label, emulated=emulated, contender=contender), notes)

    # -- generating ----------------------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """One `RequestOutput` per prompt, in prompt order. A prompt is text, or token ids (then no tokenizer is needed).

        Raises ValueError for malformed prompts and LimitError for one that is too long, before any work.
        """
        return self._run([self._as_ids(prompt) for prompt in _as_list(prompts)], sampling_params, use_tqdm)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        """Like `generate`, for one conversation (a list of messages) or several, through the model's chat template."""
        if not messages:
            raise ValueError("messages is empty; give at least one message")
        several = not isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], messages if several else [messages])
        return self._run([self._chat_ids(conversation) for conversation in conversations], sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The growing output of one prompt, after every pass, or every few where those are short; closing the iterator aborts the request."""
        return self._stream(self._as_ids(prompt), sampling_params)

    def stream_chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """`stream` for a conversation."""
        return self._stream(self._chat_ids(messages), sampling_params)

    def _stream(self, prompt: tuple[list[int], str | None], params: SamplingParams | None) -> Iterator[RequestOutput]:
        params = params or self.get_default_sampling_params()
        self._fit([prompt[0]], [params])
        request_id = self._add(prompt, params)
        engine = self._open_session.engine
        finished = False
        try:
            while not finished:
                for output in self._open_session.step():
                    finished = output.finished
                    yield output
        finally:
            if not finished:
                engine.abort(request_id)

    def prompt_logits(self, prompts: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> Iterator[PromptLogits]:
        """The raw logits after every token of every prompt, or after those from number ``first[prompt]`` on, in the order of prompts and tokens, as many rows
        at a time as a pass gives."""
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        slots = max(len(prompts), self.config.max_num_seqs or DEFAULT_NUM_SEQS)  # a pass gives no more rows than its plan has sequences
        self._fit([prompts[i % len(prompts)] for i in range(slots)], [params] * slots)
        numbers: dict[str, int] = {}
        engine = self._open_session.engine
        try:
            for number, prompt in enumerate(prompts):
                numbers[self._add((list(prompt), None), params, logits_from=0 if first is None else first[number])] = number
            while engine.has_unfinished():
                self._open_session.step()
                yield from self._last_logits(numbers)
        finally:
            for request_id in numbers:
                engine.abort(request_id)

    def _last_logits(self, numbers: Mapping[str, int]) -> list[PromptLogits]:
        """The last pass's rows by prompt: the older prompt first, whatever micro-batch it was in."""
        assert self._open_session.last_pass is not None
        batch, logits = self._open_session.last_pass
        found, row = [], 0
        for item in batch.items:
            if item.num_logits:
                rows = logits[row : row + item.num_logits]
                found.append(PromptLogits(prompt=numbers[item.sequence.request_id], first=item.end - item.num_logits, rows=rows))
                row += item.num_logits
        return sorted(found, key=lambda part: part.prompt)

    @contextmanager
    def open_engine(self) -> Iterator[LiveEngine]:
        """An engine that requests enter and leave while its passes run; what is in flight at the end is aborted. Meanwhile, use nothing else of this LLM."""
        live = LiveEngine(lambda: self._open_session, self._fit_workload)
        try:
            yield live
        finally:
            if self._session is not None:
                live.close()

    def _run(
        self, prompts: list[tuple[list[int], str | None]], params: SamplingParams | Sequence[SamplingParams] | None, use_tqdm: bool
    ) -> list[RequestOutput]:
        each = self._params_for(prompts, params)
        alone = not self._open_session.engine.has_unfinished()
        self._fit([ids for ids, _ in prompts], each)
        engine, began, before = self._open_session.engine, time.perf_counter(), self._open_session.num_tokens
        order: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                order.append(self._add(prompt, one))
            with _progress(len(prompts), use_tqdm) as bar, self._open_session.driving():
                while engine.has_unfinished():
                    for output in self._open_session.step(partial=False):
                        done[output.request_id] = output
                        bar.update()
        except BaseException:
            for request_id in order:
                engine.abort(request_id)
            raise
        if alone and prompts:
            prompt_tokens, generated = (now - then for now, then in zip(self._open_session.num_tokens, before, strict=True))
            self._planner.note_round(self._workload, time.perf_counter() - began, prompt_tokens, generated)
        return [done[request_id] for request_id in order]

    def _params_for(self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or as many as prompts")
        return list(params)

    def _add(self, prompt: tuple[list[int], str | None], params: SamplingParams, logits_from: int | None = None) -> str:
        request_id = str(self._num_requests)
        self._num_requests += 1
        self._open_session.engine.add_request(request_id, prompt[0], params, prompt[1], logits_from=logits_from)
        return request_id

    def _as_ids(self, prompt: Prompt) -> tuple[list[int], str | None]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt], None
        if self.tokenizer is None:
            raise UserError(f"model {self.spec.name} has no tokenizer; give token ids instead of text, or tokenizer=PATH")
        return self.tokenizer.encode(prompt), prompt

    def _chat_ids(self, messages: Sequence[Message]) -> tuple[list[int], str | None]:
        if self.tokenizer is None or not self.tokenizer.has_chat_template:
            raise UserError(f"model {self.spec.name} has no chat template; use generate with plain prompts")
        return self.tokenizer.encode_chat(messages), None

    # -- planning and loading ------------------------------------------------------------------------------------------------------------

    def _fit(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        """Makes sure that the plan can hold these requests, and changes it when another one would be done sooner, its loading included."""
        if not prompts:
            return
        limit = self.config.max_model_len or self.spec.max_model_len
        if max(len(ids) for ids in prompts) >= limit or self._planner.is_fixed or self._open_session.engine.has_unfinished():
            return  # the scheduler refuses what is too long, with the limit in its message
        # A request that would go beyond the model's limit ends there.
        totals = [limit if one.max_tokens is None else min(limit, len(ids) + one.max_tokens) for ids, one in zip(prompts, params, strict=True)]
        lengths = [(len(ids), total - len(ids), one.n) for ids, total, one in zip(prompts, totals, params, strict=True)]
        num_requests = sum(one.n for one in params)
        workload = mean_workload(lengths, num_requests, limit=limit, max_num_seqs=self.config.max_num_seqs or num_requests)
        longest = max(totals)
        try:
            better = self._planner.better_plan(self.plan, workload, min(limit, rounded(longest)), self._open_session.load_s, REPLAN_GAIN)
        except LimitError:  # the rounding up is our wish, not the user's
            workload = replace(workload, output_len=min(workload.output_len, longest - workload.input_len))
            better = self._planner.better_plan(self.plan, workload, longest, self._open_session.load_s, REPLAN_GAIN)
        if better is not None:
            requests = f"{workload.num_requests} requests of {workload.input_len} + {workload.output_len} tokens"
            what = difference(self.plan, better.plan)
            logger.info("plan changed for %s, %s: %s", requests, better.reason, what)
            self._planner.online.adaptation.note_reload(f"{requests}: {better.reason}", what, better.now_s, better.then_s)
            self._load(better.plan)
        self._workload = workload

    def predicted_rate(self, workload: Workload, longest: int) -> float:
        """Generated tokens/s that the plan for a workload promises, sequences of ``longest`` tokens included. LimitError when there is no such plan."""
        return self._planner.solve(workload, longest=longest).prediction.tokens_per_s

    def _fit_workload(self, workload: Workload, longest: int) -> None:
        """`_fit` for requests that are known only roughly; with nothing loaded yet, nothing has to be better than anything."""
        if self._session is None and not self._is_closed:
            self._load(self._first if self._planner.is_fixed else self._planner.solve(workload, longest=longest).plan)
        elif not self._planner.is_fixed:
            better = self._planner.better_plan(self.plan, workload, longest, self._open_session.load_s, REPLAN_GAIN)
            if better is not None:
                logger.info("plan changed, %s: %s", better.reason, difference(self.plan, better.plan))
                self._load(better.plan)
        self._workload = workload

    def _load(self, plan: Plan) -> None:
        stats = None
        if self._session is not None:
            stats, self._earlier_peak_bytes = self._session.stats, self._peak_bytes()
            stats.plan_changes += 1
            self._session.close()
            self._session = None
        self._session = Session(self.config, self.spec, self._profile, plan, self._checkpoint, self.tokenizer, self._planner, stats=stats)
        self._planner.rounds.loaded(plan)
        self._session.record_into(self._trace)

    @property
    def _open_session(self) -> Session:
        if self._is_closed:
            raise RuntimeError("this LLM is closed")
        if self._session is None:
            self._load(self._first)
        assert self._session is not None
        return self._session

    def close(self) -> None:
        """Stops the devices, frees all memory and keeps what was learned of the machine. Safe to repeat."""
        self._is_closed = True
        if self._session is not None:
            self._session.close()
            self._session = None
            self._planner.close()
        self._checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: Any) -> Literal[False]:
        self.close()
        return False


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and hasattr(prompts[0], "__index__"):  # Python's and numpy's integers
        return [cast(Sequence[int], prompts)]
    return cast(Sequence[Prompt], prompts)


def _progress(total: int, wanted: bool) -> Any:
    from twinpilots.progress import Progress

    return Progress("generating", total=total, unit="requests", enabled=wanted and sys.stderr.isatty())
