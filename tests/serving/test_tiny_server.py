"""Promise: clients share a server fairly, each by its own name, and what it says of itself is what its dashboard shows. On a model of a few kilobytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from tests.harness import ZooModel
from tests.serving.process import KEY, ServerProcess, serving

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana.json"
LONG = [(7 * i) % 120 + 3 for i in range(40)]


@pytest.fixture(scope="module")
def server(zoo_model: ZooModel) -> Iterator[ServerProcess]:
    path = str(zoo_model("llama").path)
    with serving(path, "--device", "cpu", "--max-num-seqs", "2", "--served-model-name", "tiny", "--api-key", "another-key") as running:
        yield running


def complete(server: ServerProcess, prompt: list[int], key: str = KEY, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}
    return server.ask("POST", "/v1/completions", body, Authorization=f"Bearer {key}")


def test_every_key_opens_and_no_other(server: ServerProcess) -> None:
    assert [complete(server, [5], key, max_tokens=1).status for key in (KEY, "another-key", "a-test-kez", "")] == [200, 200, 401, 401]


def test_the_tokens_found_in_the_prefix_cache_are_told(server: ServerProcess) -> None:
    found = [complete(server, LONG, max_tokens=2).json["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert found == [0, 32]
    usage = server.events("/v1/completions", {"prompt": LONG, "max_tokens": 2, "stream_options": {"include_usage": True}})[-2]["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}


def test_one_request_of_a_client_passes_by_the_queue_of_another(server: ServerProcess) -> None:
    with ThreadPoolExecutor(max_workers=1) as pool:
        crowd = pool.submit(complete, server, [9, 4], n=128, max_tokens=90, logprobs=1)  # chained passes, which logprobs forbid, would be over too soon
        server.wait_for(lambda: server.live()["waiting"] > 60, "most of them wait")
        assert complete(server, [5, 6], "another-key", max_tokens=5).status == 200
        assert not crowd.done(), "it would have been the last"
        assert crowd.result().status == 200


@pytest.mark.parametrize(("field", "value"), [("priority", "high"), ("priority", 1.5), ("user", 7)])
def test_who_asks_and_how_urgently_is_checked(server: ServerProcess, field: str, value: object) -> None:
    reply = complete(server, [5], **{field: value})
    assert (reply.status, reply.json["error"]["param"]) == (400, field)
    assert complete(server, [5], max_tokens=1, priority=-5, user="me").status == 200


def test_every_metric_of_the_dashboard_is_there(server: ServerProcess) -> None:
    complete(server, [5, 6], max_tokens=4)
    scraped = server.ask("GET", "/metrics").body.decode()
    there = set(re.findall(r"^(twinpilots:\w+)\{", scraped, re.MULTILINE)) | set(re.findall(r"^# TYPE (\S+)", scraped, re.MULTILINE))
    wanted = set(re.findall(r"twinpilots:\w+", json.dumps(json.loads(GRAFANA.read_text()))))
    assert len(wanted) > 10 and wanted <= there, wanted - there
    assert "twinpilots:kv_moves_total" in there


def test_a_penalty_beyond_all_measure_is_no_trouble(server: ServerProcess) -> None:
    reply = complete(server, [5, 6], max_tokens=8, repetition_penalty=1e-45)
    assert reply.status == 200 and not any("Warning" in line for line in server.messages)
