"""`twinpilots run-batch`: a file of requests in OpenAI's batch format, answered into another, through any interruption."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options
from twinpilots.errors import UserError

if TYPE_CHECKING:
    from twinpilots.batch.journal import Journal
    from twinpilots.batch.source import Shard, Survey
    from twinpilots.progress import Progress

HEARTBEAT_S = 30.0  # where nobody watches, one line as often as this
# Arguments that change what is generated; those that only say where it is computed may differ when a run goes on, unless it is --deterministic.
CHANGES_OUTPUT = (
    "model",
    "tokenizer",
    "revision",
    "dtype",
    "quantization",
    "keep",
    "kv_cache_dtype",
    "max_model_len",
    "seed",
    "deterministic",
    "device",
    "policy",
)
CHANGES_BITS = ("gpu_memory", "host_memory", "max_num_seqs", "threads", "unit_rows")


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "Answer a file of requests in OpenAI's batch format. The same command goes on where an earlier run stopped."
    parser = subparsers.add_parser("run-batch", help="answer a file of requests (OpenAI batch JSONL)", description=text, allow_abbrev=False)
    parser.add_argument("-i", "--input", "--input-file", dest="input", type=Path, required=True, metavar="FILE", help="requests, one JSON object per line")
    parser.add_argument("-o", "--output", "--output-file", dest="output", type=Path, required=True, metavar="FILE", help="answers, in the order they finish")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--shard", type=_shard, default=None, metavar="I/N", help="answer only every Nth line, the Ith part of N (from 1)")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever the output holds")
    options.add_llm_flags(parser)
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def _shard(text: str) -> Shard:
    from twinpilots.batch.source import Shard

    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Answer what is left of the file; the summary, or the document of ``--json``."""
    from twinpilots.batch.journal import Journal
    from twinpilots.batch.run import BatchRun, RunName
    from twinpilots.batch.source import Shard, survey
    from twinpilots.batch.state import check_same, state_path, write_state

    shard = args.shard or Shard()
    _check_paths(args)
    with Journal(args.output) as journal:
        fresh = args.overwrite or journal.is_empty
        found = survey(args.input, shard, compare_ids=fresh)
        now = {"input": {"sha256": found.sha256}, "shard": str(shard), "parameters": _parameters(args)}
        kept = None if fresh else _kept_state(args.output)
        if kept is not None:
            check_same(args.output, kept, now)
        with options.open_llm(args, load=False) as llm:
            now["model"] = {"fingerprint": llm.fingerprint}
            run_id = f"batch_req_{found.sha256[:12]}"
            if kept is None:
                kept = {**now, "created": int(time.time())}
                journal.begin(found.num_lines)
                write_state(args.output, kept)
            else:
                check_same(args.output, kept, now)
                journal.resume(found.num_lines, run_id)
            _tell_start(found, journal)
            name = RunName(model=args.model, run_id=run_id, created=int(kept["created"]))
            before = len(journal.done)
            batch = BatchRun(llm, args.input, shard, journal, name, num_requests=found.num_requests)
            with _stopping() as stop, _reporting(found.num_requests, before) as report:
                batch.run(report, stop.is_set)
            stats = llm.stats() if args.json and batch.num_generated else None
        summary = _summary(args, found, journal, before, stats)
        done = _line(summary, batch.num_prompt_tokens, batch.num_generated, report.seconds)
        if not batch.is_done:
            _say(f"stopped: {done}; the same command goes on from here ({state_path(args.output)} says how it was started)")
            raise KeyboardInterrupt
    _say(done)
    return summary if args.json else None


def _check_paths(args: argparse.Namespace) -> None:
    from twinpilots.batch.source import open_input

    open_input(args.input).close()
    if args.output.exists() and args.output.samefile(args.input):
        raise UserError(f"input and output are the same file {args.input}; give another -o")


def _kept_state(output: Path) -> dict[str, Any]:
    from twinpilots.batch.state import read_state, state_path

    state = read_state(output)
    if state is None:
        raise UserError(f"output {output} exists, but not {state_path(output)}, which says how it was made; move it away, or pass --overwrite to begin anew")
    return state


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that the answers depend on, as JSON values."""
    names = CHANGES_OUTPUT + (CHANGES_BITS if args.deterministic else ())
    found = {name: getattr(args, name) for name in names}
    if args.plan is not None:
        try:
            found["plan"] = args.plan.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"plan {args.plan} cannot be read: {error}") from error
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell_start(found: Survey, journal: Journal) -> None:
    if found.duplicate is not None:
        _say(f'warning: {found.num_duplicates} lines repeat the custom_id of another, e.g. {found.duplicate!r}; each gets its own record, told apart by "line"')
    if len(journal.done):
        _say(f"going on: {len(journal.done)} of {found.num_requests} requests are done")


class _Stop:
    """Set by SIGINT or SIGTERM; asked between passes."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def is_set(self) -> bool:
        return self._signal is not None

    def handle(self, number: int, _frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # somebody who asks twice does not want to wait for the pass
        self._signal = number
        _say("stopping after this pass; once more stops at once")


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Inside, SIGINT and SIGTERM ask for a stop between passes. Signals are the main thread's business: elsewhere nothing changes."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Reporter:
    """Progress with tokens/s and the time left: a line that is redrawn on a terminal, else a line every `HEARTBEAT_S`."""

    def __init__(self, bar: Progress, total: int, done_before: int) -> None:
        self._bar, self._total, self._done_before = bar, total, done_before
        self._began_s = self._told_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the first report was possible."""
        return time.monotonic() - self._began_s

    def __call__(self, done: int, generated: int) -> None:
        now_s = time.monotonic()
        note = _rates(done - self._done_before, self._total - done, generated, self.seconds)
        self._bar.update(done - self._bar.done, note=note)
        if not self._bar.enabled and now_s - self._told_s >= HEARTBEAT_S:
            self._told_s = now_s
            _say(self._bar.line())


def _rates(done: int, left: int, generated: int, seconds: float) -> str:
    if not done or seconds <= 0:
        return ""
    return f"{generated / seconds:.4g} tokens/s, {_duration(left * seconds / done)} left"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if hours < 1.5 else f"{hours:.1f} h"


@contextmanager
def _reporting(total: int, done: int) -> Iterator[_Reporter]:
    from twinpilots.progress import Progress

    with Progress("run-batch", total=total, unit="requests") as bar:
        bar.done = done
        yield _Reporter(bar, total, done)


def _summary(args: argparse.Namespace, found: Survey, journal: Journal, before: int, stats: dict[str, Any] | None) -> dict[str, Any]:
    done = len(journal.done)
    requests = {
        "total": found.num_requests, "answered": done - journal.num_failed, "failed": journal.num_failed, "left": found.num_requests - done,
        "this_run": done - before,
    }  # fmt: skip
    return {"schema": 1, "model": args.model, "input": str(args.input), "output": str(args.output), "requests": requests, "stats": stats}


def _line(summary: Mapping[str, Any], prompt_tokens: int, generated: int, seconds: float) -> str:
    requests = summary["requests"]
    text = f"{requests['total']} requests: {requests['answered']} answered, {requests['failed']} error records, {requests['left']} left"
    if not requests["this_run"]:
        return f"{text}; nothing done in this run"
    speed = f", {generated / seconds:.4g} tokens/s" if seconds > 0 else ""
    return f"{text}; {prompt_tokens} + {generated} tokens in {_duration(seconds)}{speed}"
