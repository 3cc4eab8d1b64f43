"""Promise: sampling parameters are vLLM's, checked once, and a bad one is named with its value and range."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from twinpilots.request import SamplingParams, Sequence


def test_names_and_defaults_are_those_of_vllm() -> None:
    found = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert found == {
        "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "seed": None, "stop": None, "stop_token_ids": None, "ignore_eos": False, "max_tokens": 16, "min_tokens": 0, "logprobs": None, "prompt_logprobs": None,
        "skip_special_tokens": True, "logit_bias": None, "structured_outputs": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": True}, "n must be an integer, got True"),
        ({"temperature": -0.1}, r"temperature must be in \[0.0, inf\), got -0.1"),
        ({"temperature": float("nan")}, "temperature must be in"),
        ({"temperature": float("inf")}, "temperature must be in"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"top_p": 0.0}, r"top_p must be in \(0.0, 1.0\], got 0.0"),
        ({"top_p": 1.01}, "top_p must be in"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
        ({"min_p": 1.5}, "min_p must be in"),
        ({"presence_penalty": 2.5}, r"presence_penalty must be in \[-2.0, 2.0\], got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be in"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens=16, got 17"),
        ({"min_tokens": None}, "min_tokens must be an integer, got None"),
        ({"logprobs": -2}, "logprobs must be at least -1"),
        ({"prompt_logprobs": 0.5}, "prompt_logprobs must be an integer or None, got 0.5"),
        ({"seed": "a"}, "seed must be an integer or None"),
        ({"stop": ""}, "stop must be a non-empty string"),
        ({"stop": ["a", ""]}, "stop must be a non-empty string or a list of them"),
        ({"stop": 3}, "stop must be"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids must be at least 0, got -1"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias must map .* got nan for token 1"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_unknown_fields_raise() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_what_vllm_accepts_is_accepted() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=-1, max_tokens=None, min_tokens=99, seed=-1, stop=["x", "yy"], logprobs=-1, n=np.int64(2),
        logit_bias={3: float("-inf")},
    )  # fmt: skip
    assert params.stop_strings == ("x", "yy") and params.n == 2
    assert SamplingParams(stop="x").stop_strings == ("x",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 3  # type: ignore[misc]


def test_computed_tokens_catch_up_with_tokens() -> None:
    sequence = Sequence(request_id="a", index=0, params=SamplingParams(), tokens=[1, 2, 3], arrival=0)
    assert (sequence.num_pending, sequence.is_catching_up, sequence.first_logit) == (3, True, 2)
    sequence.num_computed = 2
    assert (sequence.num_pending, sequence.is_catching_up) == (1, False)
    sequence.num_computed = 3
    sequence.tokens += [4, 5]
    assert (sequence.num_pending, sequence.is_catching_up, sequence.output_ids) == (2, False, [4, 5]), "several pending tokens of a decoding sequence"
    sequence.logits_from = 0
    assert sequence.first_logit == 3, "logits of all pending positions when it asks"
    sequence.restart()
    assert (sequence.num_pending, sequence.is_catching_up, sequence.num_prompt_tokens) == (5, True, 3)
