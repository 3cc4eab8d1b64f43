"""Promise: a structured output parses, whatever the model would rather say; other requests in the same pass do not notice."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.smollm2 import CONTINUATION, MODEL, PROMPT
from tests.toy import toy_engine
from twinpilots import LLM, SamplingParams
from twinpilots.errors import UserError
from twinpilots.request import StructuredOutputsParams

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b"]}},
    },
}  # fmt: skip
needs_llguidance = pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")


def structured(max_tokens: int = 80, **what: Any) -> SamplingParams:
    rest = {name: what.pop(name) for name in ("temperature", "seed", "min_tokens", "ignore_eos", "logit_bias", "n") if name in what}
    return SamplingParams(**{"temperature": 0.0, **rest}, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**what))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, device="cpu", max_num_seqs=4, max_model_len=256) as opened:
        yield opened


@needs_llguidance
def test_outputs_have_the_structure_and_plain_ones_beside_them_their_own_text(llm: LLM) -> None:
    params = [
        structured(json=SCHEMA), structured(json=json.dumps(SCHEMA), temperature=1.5, seed=1), structured(regex=r"[0-9]{3}-[a-f]{4}"),
        structured(choice=["yes", "no", "perhaps ä"], temperature=1.0, seed=2), structured(grammar='start: "<" /[a-z]{2,5}/ ">"', n=2, seed=5, temperature=1.0),
        structured(json_object=True, max_tokens=60), SamplingParams(temperature=0.0, max_tokens=14),
    ]  # fmt: skip
    outputs = llm.generate(["Describe a person: "] * 6 + [PROMPT], params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    for text in texts[:2]:
        person = json.loads(text)
        assert set(person) == {"name", "age", "tags"} and 0 <= person["age"] <= 150 and len(person["name"]) <= 12 and set(person["tags"]) <= {"a", "b"}
    assert re.fullmatch(r"[0-9]{3}-[a-f]{4}", texts[2]) and texts[3] in ("yes", "no", "perhaps ä")
    assert all(re.fullmatch(r"<[a-z]{2,5}>", one.text) for one in outputs[4].outputs)
    assert texts[5].startswith("{") and CONTINUATION.startswith(texts[6][:20])
    assert {one.finish_reason for output in outputs[:5] for one in output.outputs} == {"stop"}


@needs_llguidance
def test_the_structure_wins_over_min_tokens_biases_and_ignore_eos(llm: LLM) -> None:
    all_down = dict.fromkeys(range(49152), float("-inf"))
    params = [
        structured(regex="[ab]", min_tokens=5), structured(regex="[ab]{2}", ignore_eos=True), structured(choice=["x"], logit_bias=all_down),
        structured(regex="(ab)*", max_tokens=6, min_tokens=6),
    ]  # fmt: skip
    texts = [output.outputs[0].text for output in llm.generate(["Say "] * 4, params, use_tqdm=False)]
    assert texts[0] in ("a", "b") and re.fullmatch("[ab]{2}", texts[1]) and texts[2] == "x" and re.fullmatch("(ab)+a?", texts[3])


@needs_llguidance
def test_a_malformed_structure_is_refused_before_any_work(llm: LLM) -> None:
    for what in ({"regex": "("}, {"json": "{"}, {"json": {"type": "no such type"}}, {"grammar": "start: nothing"}):
        with pytest.raises(ValueError):
            llm.generate("x", structured(**what), use_tqdm=False)
    assert llm.generate("x", structured(regex="ok"), use_tqdm=False)[0].outputs[0].text == "ok", "a refused request leaves nothing behind"


def test_without_a_tokenizer_or_the_package_it_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        toy_engine().add_request("a", [1], structured(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"install twinpilots\[structured\]"):
        llm.generate("x", structured(regex="never compiled before"), use_tqdm=False)
