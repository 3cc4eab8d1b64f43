"""The surface that others build on: names, signatures and defaults stay as they are published (additions go at the end of these lists)."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import twinpilots
from twinpilots.cli import build_parser

LLM_DEFAULTS = {
    "model": inspect.Parameter.empty, "tokenizer": None, "revision": None, "dtype": "auto", "quantization": None, "device": "auto", "gpu_memory": None,
    "host_memory": None, "max_model_len": None, "max_num_seqs": None, "kv_cache_dtype": "auto", "policy": "auto", "plan": None, "threads": None, "seed": 0,
    "deterministic": False, "unit_rows": None,
}  # fmt: skip
LLM_METHODS = {"generate", "chat", "stats", "close", "plan", "stream", "stream_chat", "get_default_sampling_params", "__enter__", "__exit__"}
SAMPLING_DEFAULTS = {
    "n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    "seed": None, "max_tokens": 16, "min_tokens": 0, "stop": None, "stop_token_ids": None, "ignore_eos": False, "logprobs": None, "prompt_logprobs": None,
    "logit_bias": None, "skip_special_tokens": True, "structured_outputs": None,
}  # fmt: skip
COMMANDS = ["generate", "chat", "plan", "profile", "doctor", "bench", "eval", "run-batch", "serve"]


def test_llm_takes_the_published_arguments() -> None:
    parameters = inspect.signature(twinpilots.LLM).parameters
    assert {name: parameters[name].default for name in LLM_DEFAULTS} == LLM_DEFAULTS
    extra = [name for name in parameters if name not in LLM_DEFAULTS]
    assert all(parameters[name].default is not inspect.Parameter.empty for name in extra), "an addition must have a default"


def test_llm_has_the_published_methods() -> None:
    # `plan` may be an attribute that only instances have.
    assert {name for name in LLM_METHODS - {"plan"} if not callable(getattr(twinpilots.LLM, name, None))} == set()
    generate = inspect.signature(twinpilots.LLM.generate).parameters
    assert list(generate)[1:3] == ["prompts", "sampling_params"]
    assert generate["use_tqdm"].default is True


def test_sampling_params_have_the_published_fields_and_defaults() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(twinpilots.SamplingParams)}
    assert fields == SAMPLING_DEFAULTS
    with pytest.raises(TypeError, match="best_of"):
        twinpilots.SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_balance_is_importable_from_plan() -> None:
    from twinpilots.plan import balance

    result = balance([2.0, 3.0], [3.0, 2.0])
    assert tuple(result.device) == (1, 0)
    assert result.makespan_s == pytest.approx(2.0)


def test_the_command_line_has_the_published_commands() -> None:
    (subparsers,) = (action for action in build_parser()._actions if action.dest == "command")
    assert list(subparsers.choices or ()) == COMMANDS


def test_importing_the_package_does_nothing() -> None:
    code = "import sys, threading; import twinpilots; sys.exit(threading.active_count() - 1 or len({'numpy', 'torch', 'logging'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_attribute_errors_and_the_known_are_listed() -> None:
    with pytest.raises(AttributeError, match="Pilot"):
        twinpilots.Pilot  # noqa: B018
    assert set(twinpilots.__all__) == set(dir(twinpilots))


def test_the_policies_of_the_options_are_those_of_plans() -> None:
    from twinpilots.config import POLICY_NAMES
    from twinpilots.plan.plan import POLICIES

    assert POLICY_NAMES == POLICIES
