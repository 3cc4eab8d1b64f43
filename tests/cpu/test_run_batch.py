"""Promise: every line of a batch file gets exactly one record, whatever is in the line and whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.batch_kills import answers, command, count_lines, measure, write_requests
from tests.harness import SavedModel
from twinpilots.cli import main

NUM_REQUESTS = 24
FLAGS = ("--max-num-seqs", "4")


@pytest.fixture(scope="module")
def model(zoo_model: Any) -> SavedModel:
    saved: SavedModel = zoo_model("llama")
    return saved


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "requests.jsonl"
    write_requests(path, NUM_REQUESTS, seed=3, vocab=131, longest=12, most_tokens=40)
    return path


@pytest.fixture(scope="module")
def reference(model: SavedModel, source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What a run without interruption says."""
    output = tmp_path_factory.mktemp("reference") / "out.jsonl"
    assert run(model, source, output) == 0
    return answers(output)


def run(model: SavedModel, source: Path, output: Path, *flags: str) -> int:
    return main(["run-batch", "-i", str(source), "-o", str(output), "--model", str(model.path), "--device", "cpu", *FLAGS, *flags])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def line(**changes: Any) -> str:
    body = {"model": "m", "prompt": [5, 6], "max_tokens": 3, "temperature": 0}
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body} | changes)


def test_every_request_is_answered_once_under_its_custom_id(model: SavedModel, source: Path, reference: dict[int, Any]) -> None:
    asked = [json.loads(text) for text in source.read_text().splitlines()]
    assert {number: entry[1] for number, entry in reference.items()} == {number: one["custom_id"] for number, one in enumerate(asked, 1)}
    for number, (_, _, body, error) in reference.items():
        wanted = asked[number - 1]["body"]
        assert [len(choice["token_ids"]) for choice in body["choices"]] == [wanted["max_tokens"]] * wanted.get("n", 1)
        assert error is None and body["model"] == str(model.path) and len(body["choices"]) == wanted.get("n", 1)
        assert body["usage"]["prompt_tokens"] == len(wanted["prompt"]) and body["usage"]["completion_tokens"] == wanted["max_tokens"] * wanted.get("n", 1)


def test_bad_lines_become_error_records_and_stop_nothing(model: SavedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompt = {"prompt": [5], "max_tokens": 2}
    bad = [
        ("not json", None, "not valid JSON"), ('"text"', None, "must be a JSON object"), (line(custom_id=None), None, "custom_id is missing"),
        (line(custom_id=7), None, "custom_id must be a string"), (line(url="/v1/embeddings"), "a", "no endpoint"), (line(method="GET"), "a", "method must be"),
        (line(body=None), "a", "must be a JSON object"), (line(body={**prompt, "temperature": 3}), "a", "temperature must be"),
        (line(body={**prompt, "prompt": [999]}), "a", "outside the vocabulary"), (line(body={**prompt, "prompt": list(range(99))}), "a", "99 tokens"),
        (line(body={**prompt, "stream": True}), "a", "stream is not supported"), (line(body={**prompt, "prompt": "text"}), "a", "no tokenizer"),
        (line(body={**prompt, "prompt": [[5], [999]]}), "a", "outside the vocabulary"), ("\udcff", None, "not UTF-8"), ("[" * 9999, None, "nested too deeply"),
    ]  # fmt: skip
    lines = [text for entry in bad for text in (entry[0], "", line(body={**prompt, "custom": 1}))]
    source.write_text("\ufeff" + "\n".join(lines), errors="surrogateescape")
    assert run(model, source, output, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["requests"] == {"total": 30, "answered": 15, "failed": 15, "left": 0, "this_run": 30}
    assert "unknown fields have no effect: custom" in printed.err and "repeat the custom_id" in printed.err
    found = {record["line"]: record for record in records(output)}
    for number, (_, custom_id, message) in enumerate(bad):
        record = found.pop(1 + 3 * number)
        assert record["custom_id"] == custom_id and message in record["error"]["message"], record
        assert record["response"]["status_code"] == 400 and record["response"]["body"]["error"]["message"] == record["error"]["message"]
    assert {record["response"]["status_code"] for record in found.values()} == {200} and len(found) == 15


def test_a_killed_run_goes_on_where_it_was(model: SavedModel, source: Path, tmp_path: Path) -> None:
    report = measure(source, str(model.path), tmp_path, kills=2, seed=1, most_s=0.02, flags=FLAGS)
    assert report.differences == [] and report.requests == NUM_REQUESTS and report.kills >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_cleanly(model: SavedModel, source: Path, tmp_path: Path, reference: dict[int, Any], number: signal.Signals) -> None:
    output = tmp_path / "out.jsonl"
    with subprocess.Popen(command(source, output, str(model.path), FLAGS), stderr=subprocess.PIPE, start_new_session=True) as process:
        while process.poll() is None and not count_lines(output):
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been that quick
        assert process.returncode == 130 and b"the same command goes on from here" in errors and b"Traceback" not in errors
    assert output.read_bytes().endswith(b"\n")
    assert run(model, source, output) == 0 and answers(output) == reference


def test_a_torn_end_is_cut_off_and_anything_else_refused(
    model: SavedModel, source: Path, tmp_path: Path, reference: dict[int, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert run(model, source, output) == 0
    lines = output.read_bytes().splitlines(keepends=True)
    for tail in (lines[15][:30], b"\0" * 5000, lines[15][:30] + b"\n" + b"\0" * 99):
        output.write_bytes(b"".join(lines[:15]) + tail)
        assert run(model, source, output) == 0 and answers(output) == reference
        assert output.read_bytes().startswith(b"".join(lines[:15]))
    for content, message in (
        (lines[0] + b"torn\n" + lines[1], "good ones follow"), (lines[0] + lines[0], "is there twice"),
        (lines[0] + b'{"id":"batch_req_x-1","line":2}\n', "another run"),
    ):  # fmt: skip
        output.write_bytes(content)
        assert run(model, source, output) == 2 and message in capsys.readouterr().err
        assert output.read_bytes() == content, "a refusal changes nothing"


def test_a_changed_run_is_refused_and_overwrite_begins_anew(
    model: SavedModel, source: Path, tmp_path: Path, reference: dict[int, Any], capsys: pytest.CaptureFixture[str], zoo_model: Any
) -> None:
    output, changed = tmp_path / "out.jsonl", tmp_path / "changed.jsonl"
    assert run(model, source, output) == 0
    before = output.read_bytes()
    changed.write_text(source.read_text() + line() + "\n")
    assert run(model, changed, output) == 2 and "sha256" in capsys.readouterr().err
    assert run(model, source, output, "--seed", "1") == 2 and "made with seed 0, this run has 1" in capsys.readouterr().err
    assert run(model, source, output, "--shard", "1/2") == 2 and "shard" in capsys.readouterr().err
    assert run(zoo_model("llama", 1), source, output) == 2 and "model" in capsys.readouterr().err
    assert run(model, source, output, "--threads", "1") == 0, "how many threads compute it changes nothing"
    assert output.read_bytes() == before
    (tmp_path / "out.jsonl.run.json").unlink()
    assert run(model, source, output) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(model, source, output, "--overwrite", "--seed", "1") == 0
    again = answers(output)
    assert again.keys() == reference.keys() and again != reference


def test_the_models_files_are_part_of_what_was_run(model: SavedModel, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, output = tmp_path / "model", tmp_path / "out.jsonl"
    copy.mkdir()
    for file in model.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    moved = SavedModel(path=copy, spec=model.spec, references=model.references)
    assert run(moved, source, output) == 0
    (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    assert run(moved, source, output) == 2 and "fingerprint" in capsys.readouterr().err


def test_shards_are_the_whole(model: SavedModel, source: Path, tmp_path: Path, reference: dict[int, Any]) -> None:
    found: dict[int, Any] = {}
    for part in (1, 2, 3):
        output = tmp_path / f"{part}.jsonl"
        assert run(model, source, output, "--shard", f"{part}/3") == 0
        answered = answers(output)
        assert not found.keys() & answered.keys()
        found |= answered
    assert found == reference
    for bad in ("0/3", "4/3", "1", "a/b"):
        assert run(model, source, tmp_path / "x", "--shard", bad) == 2


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(model: SavedModel, source: Path, tmp_path: Path, reference: dict[int, Any]) -> None:
    output = tmp_path / "out.jsonl"
    arguments = command(source, output, str(model.path), FLAGS)
    full = subprocess.run(arguments, stderr=subprocess.PIPE, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert full.returncode == 1 and b"run the same command again" in full.stderr and b"Traceback" not in full.stderr
    kept = output.read_bytes()
    assert 0 < len(kept) <= 9000 and kept.endswith(b"\n")
    assert run(model, source, output) == 0 and output.read_bytes().startswith(kept) and answers(output) == reference


def test_what_cannot_be_written_or_read_is_said_before_anything_is_loaded(
    model: SavedModel, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, message in (
        (tmp_path, "cannot be written"), (tmp_path / "no" / "out", "cannot be written"), (Path("/proc/nothing"), "cannot be written"),
        (Path(os.devnull), "not a regular file"), (source, "same file"),
    ):  # fmt: skip
        assert run(model, source, target) == 2 and message in capsys.readouterr().err
    assert run(model, tmp_path / "missing", tmp_path / "out") == 2 and "missing" in capsys.readouterr().err
    output = tmp_path / "locked"
    with subprocess.Popen([sys.executable, "-c", HOLDS_LOCK, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline()
        assert run(model, source, output) == 2 and "another run" in capsys.readouterr().err
        holder.stdin.close()


HOLDS_LOCK = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"


def test_a_long_request_behind_short_ones_brings_another_plan(model: SavedModel, tmp_path: Path, reference: dict[int, Any]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    short, long = {"prompt": [5], "max_tokens": 2}, {"prompt": [5] * 50, "max_tokens": 40, "ignore_eos": True}
    lines = [line(custom_id=str(i), body=short) for i in range(300)] + [line(custom_id="long", body=long)] + [line(custom_id="last", body=short)]
    source.write_text("\n".join(lines))
    assert run(model, source, output) == 0
    found = {record["custom_id"]: record for record in records(output)}
    assert len(found) == 302 and all(record["error"] is None for record in found.values())
    assert found["long"]["response"]["body"]["usage"]["completion_tokens"] == 40
