"""Promise: `twinpilots serve` answers as OpenAI does, refuses in OpenAI's words, forgets clients that leave, and ends without losing an answer."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from tests.serving.process import ServerProcess, serving
from tests.smollm2 import CONTINUATION, MODEL, PROMPT

GREEDY = {"prompt": PROMPT, "max_tokens": 21, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}
FLAGS = (MODEL, "--device", "cpu", "--max-num-seqs", "4", "--max-waiting", "2", "--served-model-name", "smol", "--served-model-name", "other")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*FLAGS) as running:
        yield running


def test_a_completion_is_the_models(server: ServerProcess) -> None:
    reply = server.ask("POST", "/v1/completions", {**GREEDY, "model": "other"})
    answer = reply.json
    assert (reply.status, answer["object"], answer["model"]) == (200, "text_completion", "other")
    assert answer["choices"][0]["text"].startswith(CONTINUATION[:20])
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"].pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert answer["usage"] == {"prompt_tokens": 14, "completion_tokens": 21, "total_tokens": 35}


@pytest.mark.parametrize(
    "path, body", [("/v1/completions", {**GREEDY, "logprobs": 2}), ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})]
)
def test_a_streams_pieces_make_the_whole_answer(server: ServerProcess, path: str, body: dict[str, Any]) -> None:
    whole = server.ask("POST", path, body).json
    *chunks, usage, done = server.events(path, {**body, "stream_options": {"include_usage": True}})
    choices = [chunk["choices"][0] for chunk in chunks]
    if path == "/v1/completions":
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [entry for choice in choices for entry in choice["logprobs"][name]] == whole["choices"][0]["logprobs"][name]
    else:
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["choices"][0]["message"]["content"]
        assert [entry for choice in choices for entry in choice["logprobs"]["content"]] == whole["choices"][0]["logprobs"]["content"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [whole["choices"][0]["finish_reason"]]
    for answer in (usage, whole):
        assert answer["usage"].pop("prompt_tokens_details")["cached_tokens"] % 16 == 0
    assert (usage["usage"], usage["choices"], done) == (whole["usage"], [], "[DONE]")
    assert all(chunk["usage"] is None for chunk in chunks) and len(chunks) > 3


def test_several_prompts_and_choices_keep_their_places(server: ServerProcess) -> None:
    body = {"prompt": [PROMPT, "The sky"], "n": 2, "max_tokens": 4, "temperature": 0}
    whole = server.ask("POST", "/v1/completions", body).json["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    assert whole[0]["text"] == whole[1]["text"] != whole[2]["text"] == whole[3]["text"]
    streamed = dict.fromkeys(range(4), "")
    for chunk in server.events("/v1/completions", body)[:-1]:
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == {choice["index"]: choice["text"] for choice in whole}


def test_echo_gives_the_prompts_logprobs_as_evaluations_need_them(server: ServerProcess) -> None:
    ids = server.ask("POST", "/tokenize", {"prompt": PROMPT}).json["tokens"]
    body = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    choice = server.ask("POST", "/v1/completions", body).json["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1 and choice["logprobs"]["token_logprobs"][0] is None
    assert choice["text"].startswith(PROMPT)
    assert "".join(event["choices"][0]["text"] for event in server.events("/v1/completions", body)[:-1]) == choice["text"]


def test_tokens_come_and_go(server: ServerProcess) -> None:
    tokens = server.ask("POST", "/tokenize", {"prompt": "Grüße, 世界", "return_token_strs": True}).json
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert server.ask("POST", "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "Grüße, 世界"}
    assert server.ask("POST", "/tokenize", {"messages": CHAT["messages"]}).json["count"] > 5


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("/v1/completions", {**GREEDY, "temperature": 2.5}, 400, "temperature"),
        ("/v1/completions", {**GREEDY, "n": 0}, 400, "n"),
        ("/v1/completions", {**GREEDY, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {**GREEDY, "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ("/v1/completions", {**GREEDY, "suffix": "end"}, 400, "suffix"),
        ("/v1/completions", {**GREEDY, "n": 128, "prompt": ["a", "b"]}, 400, "n"),
        ("/v1/completions", {**GREEDY, "prompt": [10**6]}, 400, None),  # outside the vocabulary: the engine's own word
        ("/v1/completions", {**GREEDY, "prompt": "a b " * 20000}, 400, "prompt"),
        ("/v1/completions", {**GREEDY, "model": "gpt-4"}, 404, "model"),
        ("/v1/completions", {}, 400, "prompt"),
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", b"[]", 400, None),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, None),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT, "messages": "hello"}, 400, "messages"),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
    ],
)
def test_bad_input_is_named(server: ServerProcess, path: str, body: Any, status: int, param: str | None) -> None:
    reply = server.ask("POST", path, body)
    error = reply.json["error"]
    assert (reply.status, error["param"], error["type"]) == (status, param, "invalid_request_error"), error
    assert error["message"]


def test_json_has_no_free_white_space(server: ServerProcess) -> None:
    replies = [server.ask("GET", "/v1/models"), server.ask("GET", "/live"), server.ask("POST", "/v1/completions", GREEDY), server.ask("GET", "/nowhere")]
    for reply in replies:
        assert json.dumps(reply.json, separators=(",", ":"), ensure_ascii=False).encode() == reply.body


def test_what_nobody_knows_is_answered_with_a_warning(server: ServerProcess) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False}
    assert "warning" not in server.ask("POST", "/v1/completions", {**GREEDY, **harmless, "max_tokens": 1}).headers
    reply = server.ask("POST", "/v1/completions", {**GREEDY, "max_tokens": 1, "tempratur": 1, 'a"\r\nb': 2})
    assert reply.status == 200 and "tempratur" in reply.headers["warning"]


def test_the_key_guards_what_works_for_others(server: ServerProcess) -> None:
    for given in ("", "Bearer wrong", f"Basic {server.key}", "Bearer", f"Bearer {server.key}x"):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize")):
            reply = server.ask(method, path, GREEDY, Authorization=given)
            assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/health", "/version", "/metrics", "/", "/live"):
        assert server.ask("GET", path, Authorization="").status == 200
    assert server.ask("POST", "/v1/completions", GREEDY, **{"Sec-Fetch-Site": "cross-site"}).status == 403


def test_unknown_places_are_errors_in_the_same_form(server: ServerProcess) -> None:
    assert [server.ask(*request).status for request in (("GET", "/v1/nothing"), ("PUT", "/health"), ("GET", "/v1/completions"))] == [404, 405, 405]
    assert set(server.ask("GET", "/nothing").json["error"]) == {"message", "type", "param", "code"}
    assert [entry["id"] for entry in server.ask("GET", "/v1/models").json["data"]] == ["smol", "other"]
    assert server.ask("GET", "/v1/models/smol").json["max_model_len"] == 3072  # all the pages of four sequences of 768 tokens
    assert server.ask("GET", "/v1/models/nobody").status == 404


def test_a_client_that_leaves_is_forgotten_and_a_full_queue_says_when_to_come_back(server: ServerProcess) -> None:
    long = {**GREEDY, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    connections = [server.connect() for _ in range(6)]
    for connection in connections:
        connection.request("POST", "/v1/completions", json.dumps(long), server.headers())
    server.wait_for(lambda: server.live()["accepted"] == 6, "all are accepted")
    refused = server.ask("POST", "/v1/completions", GREEDY)
    assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json["error"]["type"] == "rate_limit_error"
    server.wait_for(lambda: server.live()["running"] == 4, "four run")
    for connection in connections:
        if connection.sock is not None:
            connection.sock.close()
        connection.close()
    server.wait_for(lambda: server.live()["accepted"] == 0 and server.live()["running"] == 0, "they are forgotten")
    assert all(tier["used"] == 0 for tier in server.live()["kv"].values())
    assert server.ask("POST", "/v1/completions", GREEDY).status == 200


def test_metrics_have_vllms_names_and_our_own(server: ServerProcess) -> None:
    server.ask("POST", "/v1/completions", GREEDY)
    server.wait_for(lambda: server.live()["running"] == 0, "it rests")
    lines = server.ask("GET", "/metrics").body.decode().splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    names = {name.partition("{")[0].removeprefix("twinpilots:") for name in values}
    known = {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "prefix_cache_hits_total",
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_sum", "num_preemptions_total",
    }  # fmt: skip
    ours = {"link_bytes_total", "busy_ratio", "weight_wait_seconds_total", "compared_pass_seconds_total", "plan_info", "plan_changes_total"}
    assert known | ours <= names
    model = '{model_name="smol"}'
    assert values[f"twinpilots:generation_tokens_total{model}"] >= values[f"twinpilots:inter_token_latency_seconds_count{model}"] > 0
    assert values[f"twinpilots:time_to_first_token_seconds_count{model}"] > 0
    assert values['twinpilots:request_success_total{model_name="smol",finished_reason="abort"}'] >= 6


def test_the_document_describes_what_is_there(server: ServerProcess) -> None:
    paths = server.ask("GET", "/openapi.json").json["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/version", "/metrics"} <= set(paths)


def test_sigterm_takes_nothing_new_and_finishes_what_runs() -> None:
    server = ServerProcess(*FLAGS)
    try:
        assert server.ask("GET", "/health").status in (200, 503)  # it listens before the model is there
        server.wait_until_ready()
        found: list[Any] = []
        body = {**GREEDY, "max_tokens": 150, "ignore_eos": True}
        reader = threading.Thread(target=lambda: found.extend(server.events("/v1/completions", body)))
        reader.start()
        server.wait_for(lambda: server.live()["running"] == 1, "it runs")
        server.process.send_signal(signal.SIGTERM)
        reader.join(60)
        assert found[-1] == "[DONE]" and found[-2]["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0
        with pytest.raises(OSError):
            server.ask("GET", "/health")
    finally:
        server.process.kill()


def test_a_taken_port_and_an_empty_key_are_errors_before_anything_loads(server: ServerProcess) -> None:
    from twinpilots.cli import main

    assert main(["serve", MODEL, "--port", str(server.port)]) == 2
    assert main(["serve", MODEL, "--api-key", ""]) == 2
