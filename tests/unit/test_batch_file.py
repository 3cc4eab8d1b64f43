"""Promise: a batch run's memory does not grow with its file, and its books are right whatever the order of things."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.toy import toy_plan
from twinpilots.batch import source as batch_source
from twinpilots.batch.journal import DoneLines, Journal, Record
from twinpilots.batch.prepare import Preparer, lengths_to_hold, request_seed, workload_of
from twinpilots.batch.run import BatchRun, RunName
from twinpilots.batch.source import Shard, survey
from twinpilots.errors import LimitError, NotFiniteError, RequestError, TwinPilotsError, UserError
from twinpilots.request import CompletionOutput, RequestOutput, SamplingParams

LIMIT = 64
PREPARER = Preparer(tokenizer=None, defaults=SamplingParams(), limit=LIMIT, seed=0)


class InstantEngine:
    """Answers the oldest requests at once, a few per pass; holds sequences of ``longest`` tokens until it is fitted to more."""

    def __init__(self, *, longest: int = LIMIT, most: int = LIMIT) -> None:
        self.plan = toy_plan(max_num_seqs=4)
        self.longest, self.most = longest, most
        self.queue: list[tuple[str, Sequence[int], SamplingParams]] = []
        self.num_generated = self.num_prompt_tokens = 0
        self.fitted: list[int] = []
        self.workloads: list[Any] = []

    num_running = 0
    num_waiting = property(lambda self: len(self.queue))
    num_unfinished = property(lambda self: len(self.queue))

    def fits(self, num_prompt_tokens: int, max_tokens: int | None) -> bool:
        return num_prompt_tokens + (max_tokens or 1) <= self.longest

    def fit(self, workload: Any, longest: int) -> None:
        assert not self.queue, "the plan changes only when nothing is in flight"
        if longest > self.most:
            raise LimitError(f"no plan holds {longest}")
        self.longest = max(self.longest, longest)
        self.fitted.append(longest)
        self.workloads.append(workload)

    def add(self, request_id: str, ids: Sequence[int], params: SamplingParams, prompt: str | None = None) -> None:
        if len(ids) + (params.max_tokens or 1) > self.longest:
            raise LimitError("too long for the plan")
        self.queue.append((request_id, ids, params))

    def abort(self, request_id: str) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != request_id]

    def step(self, *, partial: bool) -> list[RequestOutput]:
        broken = next((name for name, ids, _ in self.queue[:3] if 99 in ids), None)
        if broken is not None:
            raise NotFiniteError("not finite", request_id=broken)
        done, self.queue = self.queue[:3], self.queue[3:]
        self.num_generated += len(done)
        one = CompletionOutput(index=0, text="x", token_ids=(1,), finish_reason="stop")
        return [RequestOutput(request_id=name, prompt=None, prompt_token_ids=tuple(ids), outputs=(one,), finished=True) for name, ids, _ in done]


def fake_llm(engine: InstantEngine) -> Any:
    @contextmanager
    def open_engine() -> Iterator[InstantEngine]:
        yield engine

    config = SimpleNamespace(seed=0, max_num_seqs=None)

    def predicted_rate(workload: Any, longest: int) -> float:
        return workload.max_num_seqs / (workload.max_num_seqs + 2.0)  # nothing is gained beyond a few dozen at once

    return SimpleNamespace(
        predicted_rate=predicted_rate, tokenizer=None, get_default_sampling_params=SamplingParams, max_model_len=LIMIT, config=config, open_engine=open_engine
    )


def write_lines(path: Path, bodies: Sequence[dict[str, Any]], repeat: int = 1) -> None:
    with path.open("w") as stream:
        for number in range(repeat * len(bodies)):
            body = bodies[number % len(bodies)]
            stream.write(json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}) + "\n")


def run_all(engine: InstantEngine, path: Path, output: Path, *, stop_after: int | None = None) -> Journal:
    found = survey(path, Shard(), compare_ids=True)
    with Journal(output) as journal:
        if journal.is_empty:
            journal.begin(found.num_lines)
        else:
            journal.resume(found.num_lines, "run")
        run = BatchRun(fake_llm(engine), path, Shard(), journal, RunName(model="m", run_id="run", created=1), num_requests=found.num_requests)
        run.run(lambda done, generated: None, lambda: stop_after is not None and len(journal.done) >= stop_after)
    return journal


def test_memory_stays_the_same_whatever_the_files_size(tmp_path: Path) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(path, [{"prompt": list(range(40)), "metadata": {"note": "n" * 12000}, "max_tokens": 4}], repeat=2000)
    tracemalloc.start()
    try:
        run_all(InstantEngine(), path, output, stop_after=1000)
        journal = run_all(InstantEngine(), path, output)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(journal.done) == 2000 == output.read_bytes().count(b"\n")
    assert path.stat().st_size > 20e6 and peak < 6e6, f"{peak / 1e6:.1f} MB at most for a file of {path.stat().st_size / 1e6:.0f} MB"


def test_a_line_too_long_is_one_error_record_and_the_next_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_source, "MAX_LINE_BYTES", 256)
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(path, [{"prompt": [1], "user": "u" * size} for size in (10, 1000, 10, 5)])
    length = len(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + " " * (256 - length - 1) + path.read_text().splitlines()[0])  # without a newline, and as long as a read
    journal = run_all(InstantEngine(), path, output)
    records = {record["line"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert len(records) == 5 and journal.num_failed == 1 and "longer than" in records[2]["error"]["message"]


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30), most=st.integers(8, LIMIT), chat=st.booleans())
def test_every_line_is_answered_or_refused_whatever_its_length_and_the_memory(lengths: list[int], most: int, chat: bool, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("lengths")
    write_lines(folder / "in", [{"prompt": [1] * max(1, length // 2), "max_tokens": max(1, length - length // 2)} for length in lengths])
    engine = InstantEngine(longest=8, most=most)
    try:
        journal = run_all(engine, folder / "in", folder / "out")
    except LimitError:
        assert min(min(LIMIT, max(1, length // 2) + max(1, length - length // 2)) for length in lengths) > most, "some of it could have been run"
        return
    assert len(journal.done) == len(lengths)
    possible = sum(max(1, length // 2) + max(1, length - length // 2) <= most for length in lengths)
    assert len(lengths) - journal.num_failed == possible


def test_no_more_is_under_way_than_pays(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [{"prompt": [1]}], repeat=400)
    engine = InstantEngine()
    run_all(engine, tmp_path / "in", tmp_path / "out")
    assert [workload.max_num_seqs for workload in engine.workloads] == [64], "256 are 3 % quicker than 64, and those 8 % quicker than 16"


def test_a_line_on_which_the_model_breaks_down_is_an_error_record(tmp_path: Path) -> None:
    write_lines(tmp_path / "in", [{"prompt": [1]}, {"prompt": [[2], [99]]}, {"prompt": [3]}], repeat=20)
    journal = run_all(InstantEngine(), tmp_path / "in", tmp_path / "out")
    assert len(journal.done) == 60 and journal.num_failed == 20
    write_lines(tmp_path / "broken", [{"prompt": [99]}], repeat=20)
    with pytest.raises(NotFiniteError):  # a model that does nothing else: no record says that this is the lines' fault
        run_all(InstantEngine(), tmp_path / "broken", tmp_path / "none")
    assert len((tmp_path / "none").read_text().splitlines()) < 8


def test_a_survey_counts_hashes_and_finds_what_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"custom_id": name}) for name in "abcad"]
    path.write_text("\n".join([lines[0], "", *lines[1:], "junk", "junk"]))
    found = survey(path, Shard(), compare_ids=True)
    assert (found.num_lines, found.num_requests, found.duplicate, found.num_duplicates) == (8, 7, "a", 1)
    half = survey(path, Shard(index=2, count=2), compare_ids=True)
    assert (half.num_lines, half.num_requests, half.sha256) == (8, 3, found.sha256)
    path.write_bytes(path.read_bytes() + b" ")
    assert survey(path, Shard(), compare_ids=False).sha256 != found.sha256


def test_lines_are_counted_once_each() -> None:
    done = DoneLines(9)
    for line in (1, 9, 8):
        done.add(line)
    assert [line for line in range(12) if line in done] == [1, 8, 9] and len(done) == 3
    for line, message in ((8, "twice"), (0, "does not exist"), (10, "does not exist")):
        with pytest.raises(ValueError, match=message):
            done.add(line)


def test_a_failed_write_leaves_whole_records_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = [Record(line, b'{"id":"run","line":%d,"error":null}' % line, False) for line in range(1, 4)]
    with Journal(tmp_path / "out") as journal:
        journal.begin(3)
        journal.append(record[:1])

        def half(fd: int, data: Any) -> int:
            if len(data) < 30:
                raise OSError(28, "No space left on device")
            return real(fd, data[: len(data) // 2])

        import os

        real = os.write
        monkeypatch.setattr("os.write", half)
        with pytest.raises(TwinPilotsError, match=r"No space left on device; its 1 records are safe: make room and run the same command again"):
            journal.append(record[1:])
        monkeypatch.undo()
        assert len(journal.done) == 1 and (tmp_path / "out").read_bytes() == record[0].data + b"\n"
        journal.append(record[1:])
    with Journal(tmp_path / "out") as journal:
        journal.resume(3, "run")
        assert len(journal.done) == 3
        with pytest.raises(UserError, match="written by another run"):
            Journal(tmp_path / "out")


def test_seeds_come_from_the_place_in_the_file() -> None:
    body = {"prompt": [[1], [2]], "temperature": 1.0}

    def seeds(line: int, **changes: Any) -> list[int | None]:
        data = json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {**body, **changes}}).encode()
        return [params.seed for params in PREPARER.ready(line, data).params]

    assert seeds(1) == seeds(1) == [request_seed(0, 1, 0), request_seed(0, 1, 1)] and len({*seeds(1), *seeds(2)}) == 4
    assert seeds(1, seed=7) == [7, 7] and seeds(1, temperature=0) == [None, None] and seeds(1, seed=-1) == seeds(1)
    with pytest.raises(RequestError, match="asks for 8192 outputs, 4096 are allowed"):
        PREPARER.ready(1, json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [[1]] * 64, "n": 128}}).encode())


def test_the_workload_is_the_mean_of_the_sample() -> None:
    def ready(prompt: int, max_tokens: int | None, n: int = 1) -> Any:
        url, body = "/v1/completions", {"prompt": [1] * prompt, "max_tokens": max_tokens, "n": n}
        return PREPARER.ready(1, json.dumps({"custom_id": "a", "url": url, "body": body}).encode())

    workload = workload_of([ready(10, 20), ready(20, 30, n=2), ready(10, 20)], 90, None, LIMIT)
    assert (workload.num_requests, workload.input_len, workload.output_len, workload.max_num_seqs) == (120, 15, 49, 120)
    assert workload_of([ready(10, 20)], 1000, 8, LIMIT).max_num_seqs == 8 and workload_of([ready(10, 20)], 1000, None, LIMIT).max_num_seqs == 256
    assert lengths_to_hold([ready(2, 3), ready(2, 40), ready(30, 60)], LIMIT) == [64, 42, 32, 5]
