"""Promise: an OpenAI body means what OpenAI says it means, or is refused by the name of the field at fault; nothing is silently left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from twinpilots.errors import RequestError
from twinpilots.openai.fields import from_json, to_json
from twinpilots.openai.requests import HARMLESS, REFUSED, ApiRequest, read_request
from twinpilots.openai.responses import chat_logprobs, error_of, response_body
from twinpilots.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, StructuredOutputsParams

DEFAULTS = SamplingParams(temperature=0.7, top_k=40)
HELLO = [{"role": "user", "content": "hello"}]


def completion(**body: Any) -> ApiRequest:
    return read_request("/v1/completions", {"model": "m", "prompt": "hi", **body}, DEFAULTS)


def chat(**body: Any) -> ApiRequest:
    return read_request("/v1/chat/completions", {"model": "m", "messages": HELLO, **body}, DEFAULTS)


def test_defaults_are_the_models_for_sampling_and_openais_for_length() -> None:
    assert completion().params == SamplingParams(temperature=0.7, top_k=40, max_tokens=16)
    assert chat().params == SamplingParams(temperature=0.7, top_k=40, max_tokens=None)
    assert completion(temperature=None, n=None).params == completion().params, "null is an absent field"


def test_every_sampling_field_arrives() -> None:
    given = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
        "seed": 3,
        "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 2, "max_tokens": 9, "logprobs": 4, "skip_special_tokens": False,
    }  # fmt: skip
    request = completion(**given, logit_bias={"12": -100}, best_of=2)
    assert request.params == SamplingParams(**given, logit_bias={12: -100.0}) and request.num_choices == 2
    assert completion(echo=True, logprobs=0).params.prompt_logprobs == 0 and completion(echo=True).params.prompt_logprobs is None
    assert completion(top_p=0).params.top_p == pytest.approx(0, abs=1e-5)
    request = chat(logprobs=True, top_logprobs=20, max_completion_tokens=5, stream=True, stream_options={"include_usage": True})
    assert (request.params.logprobs, request.params.max_tokens, request.stream, request.include_usage) == (20, 5, True, True)
    assert chat(logprobs=True).params.logprobs == 0


@pytest.mark.parametrize(
    "body, field",
    [
        ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"), ({"n": 1.0}, "n"), ({"n": True}, "n"), ({"n": 129}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"presence_penalty": 3},
        "presence_penalty"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias.1"), ({"logit_bias": [1]}, "logit_bias"), ({"stop": [""]},
        "stop"),
        ({"stop": 3}, "stop"), ({"seed": 2**63}, "seed"), ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"), ({"model": 3}, "model"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"top_k": -2},
        "top_k"),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml"), ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"ignore_eos": 1}, "ignore_eos"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ask", [completion, chat])
def test_a_value_out_of_range_is_refused_by_name(ask: Any, body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**body)
    assert caught.value.param == field and str(caught.value).startswith(field.split(".")[0])


@pytest.mark.parametrize(
    "body, field",
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [1, -1]}, "prompt"), ({"prompt": ["a", [1]]}, "prompt"), ({"prompt": [[]]},
        "prompt"),
        ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [True]}, "prompt"), ({"logprobs": 6}, "logprobs"), ({"logprobs": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"), ({"best_of": 3}, "best_of"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_a_completion_cannot_be(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**body)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "body, field",
    [
        ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": ["hello"]}, "messages[0]"), ({"echo": True}, "echo"),
        ({"messages": [{"role": "pilot", "content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"logprobs": 3}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"tool_choice": "required"}, "tool_choice"), ({"tools": [{"type": "x"}]},
        "tools[0].type"),
        ({"tools": {}}, "tools"), ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"), ({"modalities": ["audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format.type"), ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        ({"functions": [{"name": "f"}]}, "functions"), ({"reasoning_effort": "high"}, "reasoning_effort"), ({"parallel_tool_calls": False},
        "parallel_tool_calls"),
    ],
)  # fmt: skip
def test_what_a_chat_cannot_be(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**body)
    assert caught.value.param == field


def test_what_changes_nothing_is_taken_and_what_nobody_knows_is_told() -> None:
    body: dict[str, Any] = dict.fromkeys(HARMLESS, "x") | {field: values[0] for field, values in REFUSED.items() if values}
    body |= {"store": True, "metadata": {"a": "b"}, "best_of": 1, "stream": False}
    assert completion(**body) == completion() and completion(**body).warnings == ()
    assert completion(tempreature=1, nothing=None).warnings == ("tempreature",)
    with pytest.raises(RequestError, match="no endpoint '/v1/embeddings'"):
        read_request("/v1/embeddings", {}, DEFAULTS)
    with pytest.raises(RequestError, match="must be a JSON object"):
        read_request("/v1/completions", [], DEFAULTS)


def test_prompts_of_every_kind() -> None:
    assert completion(prompt="a").prompts == ("a",) and completion(prompt=["a", "b"], n=2).num_choices == 4
    assert completion(prompt=[1, 2]).prompts == ((1, 2),) and completion(prompt=[[1], [2, 3]]).prompts == ((1,), (2, 3))


def test_messages_become_what_templates_expect() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
        ],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
    )
    assert request.messages[0] == {"role": "system", "content": "be\nbrief"}
    assert request.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}} and request.messages[1]["content"] == ""
    assert request.messages[2] == {"role": "tool", "content": "1", "tool_call_id": "c1"} and len(request.tools) == 1
    assert chat(tools=list(request.tools), tool_choice="none").tools == ()


def test_response_formats_become_structured_outputs() -> None:
    schema = {"type": "object"}
    assert chat(response_format={"type": "text"}).params.structured_outputs is None
    assert chat(response_format={"type": "json_object"}).params.structured_outputs == StructuredOutputsParams(json_object=True)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert chat(response_format=form).params.structured_outputs == StructuredOutputsParams(json=schema)
    assert completion(structured_outputs={"choice": ["a", "b"]}).params.structured_outputs == StructuredOutputsParams(choice=["a", "b"])
    with pytest.raises(ValueError, match="exactly one of"):
        StructuredOutputsParams()


def output_of(ids: list[int], text: str, names: dict[int, str], *, prompt: str = "", prompt_ids: tuple[int, ...] = (9,), top: int = 0) -> RequestOutput:
    def step(token: int) -> dict[int, Logprob]:
        best = {other: Logprob(logprob=-float(rank), rank=rank, decoded_token=names[other]) for rank, other in enumerate(sorted(names)[:top], 1)}
        return {token: Logprob(logprob=-0.5, rank=token, decoded_token=names[token])} | {k: v for k, v in best.items() if k != token}

    one = CompletionOutput(index=0, text=text, token_ids=tuple(ids), finish_reason="stop", logprobs=[step(token) for token in ids])
    known = [None, *[step(token) for token in prompt_ids[1:]]]
    return RequestOutput(request_id="r", prompt=prompt, prompt_token_ids=prompt_ids, outputs=(one,), finished=True, prompt_logprobs=known)


def test_a_completion_with_echo_and_logprobs() -> None:
    names = {1: "a", 2: "b", 3: "c"}
    whole = output_of([2, 3], "bc", names, prompt="xa", prompt_ids=(9, 1), top=1)
    body = response_body(completion(echo=True, logprobs=1), [whole], response_id="cmpl-1", created=5, model="m")
    choice = body["choices"][0]
    assert (body["object"], body["usage"], choice["text"]) == ("text_completion", {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}, "xabc")
    assert choice["logprobs"]["tokens"] == ["x", "a", "b", "c"] and choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -0.5}, {"a": -1.0, "b": -0.5}, {"a": -1.0, "c": -0.5}]
    assert "token_ids" not in choice
    detailed = response_body(completion(), [replace(whole, num_cached_tokens=16)], response_id="cmpl-1", created=5, model="m", details=True)
    assert detailed["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    with_ids = response_body(completion(return_token_ids=True), [whole], response_id="c", created=5, model="m")["choices"][0]
    assert (with_ids["prompt_token_ids"], with_ids["token_ids"]) == ([9, 1], [2, 3])
    assert response_body(completion(prompt=["a", "b"]), [whole, whole], response_id="c", created=5, model="m")["choices"][1]["index"] == 1


def test_a_chat_answer_and_its_logprobs() -> None:
    whole = output_of([1], "ä", {1: "ä", 2: "b"}, top=2)
    body = response_body(chat(logprobs=True, top_logprobs=2), [whole], response_id="chatcmpl-1", created=5, model="m")
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and choice["message"] == {"role": "assistant", "content": "ä", "refusal": None}
    entry = choice["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"], [other["token"] for other in entry["top_logprobs"]]) == ("ä", [195, 164], ["ä", "b"])
    unnamed = chat_logprobs([4], [{4: Logprob(logprob=-1e300, rank=1)}], 0)["content"][0]
    assert (unnamed["token"], unnamed["logprob"], unnamed["top_logprobs"]) == ("token_id:4", -9999.0, [])


def test_json_is_compact_and_strict() -> None:
    assert to_json({"a": [1, "ä b"]}) == '{"a":[1,"ä b"]}'.encode()
    assert to_json("\ud800") == b'"\\ud800"'
    for bad in (b"{", b'{"a": NaN}', b"\xff", b"[" * 100000, b"1" * 5000, b""):
        with pytest.raises(RequestError):
            from_json(bad)
    error = error_of(RequestError("no", param="n"))
    assert error == {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}}
