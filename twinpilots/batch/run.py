"""One run over a batch file: requests in as the engine has room for them, records out as they finish.

Owns what is in flight, when the plan is fitted to what comes, and the records' form. Knows nothing of the command line.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twinpilots.api import LLM
from twinpilots.batch.journal import Journal, Record
from twinpilots.batch.prepare import Preparer, Ready, lengths_to_hold, workload_of
from twinpilots.batch.source import BatchLine, Shard, read_custom_id, requests_of
from twinpilots.errors import LimitError, NotFiniteError, RequestError
from twinpilots.expected_work import rounded
from twinpilots.live import LiveEngine
from twinpilots.openai.fields import to_json
from twinpilots.openai.responses import error_of, response_body
from twinpilots.plan.workload import Workload
from twinpilots.request import RequestOutput

logger = logging.getLogger(__name__)
SAMPLE_REQUESTS = 256  # what the plan is made for is read off the first requests that are left
ENOUGH_SPEED = 0.95  # of the best tokens/s
LEAST_AT_ONCE = 16
WARNINGS_SHOWN = 5
MOST_BROKEN = 8  # lines on which the model may break down before it has generated anything
Report = Callable[[int, int], None]  # (requests with a record, tokens generated so far)


@dataclass(kw_only=True, slots=True)
class _InFlight:
    """A line in the engine: its prompts' outputs so far."""

    line: BatchLine
    outputs: list[RequestOutput | None]


@dataclass(frozen=True, kw_only=True)
class RunName:
    """What the records say of their run: ``model`` is what they call it, ``run_id`` begins their ids, ``created`` is when the run first started (seconds
    since 1970)."""

    model: str
    run_id: str
    created: int


class BatchRun:
    """Works off the lines that ``journal`` lacks, of the ``num_requests`` in this shard of the file."""

    def __init__(self, llm: LLM, path: Path, shard: Shard, journal: Journal, name: RunName, *, num_requests: int) -> None:
        self._path, self._shard, self._journal, self._name = path, shard, journal, name
        self._num_requests = num_requests
        self._llm = llm
        defaults, limit = llm.get_default_sampling_params(), llm.max_model_len
        self._prepare = Preparer(tokenizer=llm.tokenizer, defaults=defaults, limit=limit, seed=llm.config.seed, created=name.created)
        self._in_flight: dict[int, _InFlight] = {}
        self._held: Ready | None = None  # waits for another plan
        self._cannot_hold = llm.max_model_len + 1  # the least length known to be too much for any plan
        self._workload: Workload | None = None
        self._other_models = 0
        self._num_warnings = self._num_broken = 0
        self._left = self._lines_left()
        self.num_prompt_tokens = self.num_generated = 0  # in this run

    @property
    def is_done(self) -> bool:
        """Whether every request has its record."""
        return len(self._journal.done) >= self._num_requests

    def run(self, report: Report, stop: Callable[[], bool]) -> None:
        """Until every request has its record, or ``stop`` says so (asked between passes)."""
        if self.is_done:
            return
        with self._llm.open_engine() as engine:
            self._first_fit(engine)
            while not self.is_done and not stop():
                self._journal.append(list(self._fill(engine)))
                self._journal.append(list(self._step(engine)))
                self._journal.sync_if_due()
                report(len(self._journal.done), engine.num_generated)
            self.num_prompt_tokens, self.num_generated = engine.num_prompt_tokens, engine.num_generated
        self._journal.sync()

    def _lines_left(self) -> Iterator[tuple[int, bytes | None]]:
        return ((line, data) for line, data in requests_of(self._path, self._shard) if line not in self._journal.done)

    # -- plans -------------------------------------------------------------------------------------------------------------------------------

    def _first_fit(self, engine: LiveEngine) -> None:
        """Loads the model with a plan for what the first lines ask for. LimitError when memory is too small for any of them."""
        sample = []
        for line, data in itertools.islice(self._lines_left(), SAMPLE_REQUESTS):
            with suppress(RequestError):  # it becomes an error record when its turn comes
                sample.append(self._prepare.ready(line, data))
        if not sample:
            return
        limit, left = self._llm.max_model_len, self._num_requests - len(self._journal.done)
        self._workload = workload_of(sample, left, self._llm.config.max_num_seqs, limit)
        lengths = lengths_to_hold(sample, limit)
        if self._llm.config.max_num_seqs is None:
            self._workload = self._with_fewer_at_once(self._workload, lengths[0])
        self._fit_one_of(engine, lengths)

    def _with_fewer_at_once(self, workload: Workload, longest: int) -> Workload:
        """The workload with the fewest sequences at once that cost little speed: what is under way is what an interruption throws away."""
        try:
            wanted = ENOUGH_SPEED * self._llm.predicted_rate(workload, longest)
            while workload.max_num_seqs > LEAST_AT_ONCE:
                fewer = replace(workload, max_num_seqs=max(LEAST_AT_ONCE, workload.max_num_seqs // 4))
                if self._llm.predicted_rate(fewer, longest) < wanted:
                    break
                workload = fewer
        except LimitError:  # memory decides how many
            pass
        return workload

    def _fit_one_of(self, engine: LiveEngine, lengths: Sequence[int]) -> None:
        """A plan that holds sequences of the first of these lengths that any plan can hold."""
        for length in lengths[:-1]:
            with suppress(LimitError):
                self._fit(engine, length)
                return
        self._fit(engine, lengths[-1])

    def _fit(self, engine: LiveEngine, longest: int) -> None:
        assert self._workload is not None
        input_len = max(1, min(self._workload.input_len, longest - 1))
        output_len = max(1, min(self._workload.output_len, longest - input_len))
        try:
            engine.fit(replace(self._workload, input_len=input_len, output_len=output_len), longest)
        except LimitError:
            self._cannot_hold = min(self._cannot_hold, longest)
            raise

    def _must_refit(self, engine: LiveEngine, ready: Ready) -> bool:
        """Whether another plan could hold the request to its end, and this one cannot."""
        return ready.longest < self._cannot_hold and not engine.fits(ready.longest - 1, 1)

    def _refit(self, engine: LiveEngine, ready: Ready) -> None:
        """A plan for longer requests; where there is none, the engine says so of this one."""
        limit = self._llm.max_model_len
        if self._workload is None:
            self._workload = workload_of([ready], self._num_requests - len(self._journal.done), self._llm.config.max_num_seqs, limit)
        with suppress(LimitError):
            self._fit_one_of(engine, [min(limit, rounded(ready.longest)), ready.longest])
        if self._must_refit(engine, ready):  # a plan that must not change
            self._cannot_hold = ready.longest

    # -- requests in -------------------------------------------------------------------------------------------------------------------------

    def _fill(self, engine: LiveEngine) -> Iterator[Record]:
        """Queue requests until as many wait as run; records of those that cannot be served."""
        while engine.num_running + engine.num_waiting < 2 * engine.plan.max_num_seqs:
            ready, self._held = self._held, None
            if ready is None:
                line, data = next(self._left, (0, None))
                if not line:
                    return
                try:
                    ready = self._prepare.ready(line, data)
                except RequestError as error:
                    yield self._error_record(line, read_custom_id(data), error)
                    continue
            if self._must_refit(engine, ready):
                if engine.num_unfinished:
                    self._held = ready
                    return
                self._refit(engine, ready)
            try:
                self._add(engine, ready)
            except (LimitError, ValueError) as error:
                yield self._error_record(ready.line.line, ready.line.custom_id, error)

    def _add(self, engine: LiveEngine, ready: Ready) -> None:
        line = ready.line.line
        try:
            for number, (prompt, params) in enumerate(zip(ready.prompts, ready.params, strict=True)):
                engine.add(f"{line}.{number}", prompt.ids, params, prompt.text)
        except (LimitError, ValueError):
            for number in range(len(ready.prompts)):
                engine.abort(f"{line}.{number}")
            raise
        self._in_flight[line] = _InFlight(line=ready.line, outputs=[None] * len(ready.prompts))
        self._warn(ready.line)

    def _warn(self, line: BatchLine) -> None:
        """Say what of a line had no effect: the first few times."""
        if line.request.model not in (None, self._name.model):
            self._other_models += 1
            if self._other_models == 1:
                logger.warning(f"line {line.line} asks for model {line.request.model!r}; all lines are answered by {self._name.model}")
        if line.request.warnings:
            self._num_warnings += 1
            if self._num_warnings <= WARNINGS_SHOWN:
                more = "; further lines like it are not shown" if self._num_warnings == WARNINGS_SHOWN else ""
                logger.warning(f"line {line.line}: unknown fields have no effect: {', '.join(line.request.warnings)}{more}")

    def _step(self, engine: LiveEngine) -> Iterator[Record]:
        """One pass: the records of the lines that it completes. A line on which the model breaks down gets an error record; a model that does nothing else
        is the run's problem, not the lines'."""
        try:
            finished = engine.step(partial=False)
        except NotFiniteError as error:
            self._num_broken += 1
            if self._num_broken >= MOST_BROKEN and not engine.num_generated:
                raise
            entry = self._in_flight.pop(int(error.request_id.partition(".")[0]))
            for number in range(len(entry.outputs)):
                engine.abort(f"{entry.line.line}.{number}")
            yield self._error_record(entry.line.line, entry.line.custom_id, error)
            return
        for output in finished:
            yield from self._finish(output)

    # -- records out -------------------------------------------------------------------------------------------------------------------------

    def _finish(self, output: RequestOutput) -> Iterator[Record]:
        """The record of the line that this output completes, if it does."""
        line, _, number = output.request_id.partition(".")
        entry = self._in_flight[int(line)]
        entry.outputs[int(number)] = output
        outputs = [one for one in entry.outputs if one is not None]
        if len(outputs) == len(entry.outputs):
            del self._in_flight[int(line)]
            yield self._answer(entry.line, outputs)

    def _answer(self, line: BatchLine, outputs: Sequence[RequestOutput]) -> Record:
        name = self._name
        prefix = "chatcmpl" if line.request.is_chat else "cmpl"
        body = response_body(line.request, outputs, response_id=f"{prefix}-{name.run_id}-{line.line}", created=name.created, model=name.model)
        return self._record(line.line, line.custom_id, 200, body, None)

    def _error_record(self, line: int, custom_id: str | None, error: Exception) -> Record:
        body, status = error_of(error), 500 if isinstance(error, NotFiniteError) else 400
        found = body["error"]
        return self._record(line, custom_id, status, body, {"code": found["code"] or found["type"], "message": found["message"], "param": found["param"]})

    def _record(self, line: int, custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> Record:
        """OpenAI's batch output record, with the line beside it: the key of requests without a custom_id, and of those that share one."""
        record_id = f"{self._name.run_id}-{line}"
        response = {"status_code": status, "request_id": record_id, "body": body}
        data = to_json({"id": record_id, "custom_id": custom_id, "line": line, "response": response, "error": error})
        return Record(line, data, error is not None)
