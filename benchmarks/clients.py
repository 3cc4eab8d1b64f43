"""Real clients against a running server: each does what its users do, in an environment of its own.

    twinpilots serve smollm2-135m --api-key KEY &
    python -m benchmarks.clients --url http://127.0.0.1:8000 --key KEY --python /path/to/clients-venv/bin/python [--only openai,llm] [--json]

``--python`` is an environment with any of: openai, litellm, langchain-openai, llm, lm-eval, guidellm, schemathesis. One that is not installed there is
reported as missing, not as failed. The server must have a model with a chat template.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
PROMPT, CONTINUATION = "1, 2, 3, 4, 5,", " 6, 7, 8"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server under test, and the interpreter that has the clients."""

    url: str
    key: str
    model: str
    python: str

    @property
    def bin(self) -> Path:
        return Path(self.python).parent

    def environment(self) -> dict[str, str]:
        """As users set it up, with nothing of ours in the way."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**kept, "OPENAI_API_KEY": self.key, "OPENAI_BASE_URL": f"{self.url}/v1", "OPENAI_API_BASE": f"{self.url}/v1",
                "URL": self.url, "MODEL": self.model,
                "PROMPT": PROMPT, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


OPENAI = """
import asyncio, os, openai
model, prompt = os.environ["MODEL"], os.environ["PROMPT"]
client = openai.OpenAI(max_retries=0)
assert [m.id for m in client.models.list()][0] == model
c = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0, logprobs=2, seed=1)
assert c.choices[0].text.startswith(" 6, 7, 8"), c
assert len(c.choices[0].logprobs.tokens) == c.usage.completion_tokens == 12
pieces = [p for p in client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True})]
assert "".join(p.choices[0].text for p in pieces if p.choices) == c.choices[0].text and pieces[-1].usage == c.usage
m = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
ask = dict(model=model, messages=m, max_completion_tokens=10, temperature=0)
a = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, user="u", metadata={"a": "b"})
assert a.choices[0].message.content and len(a.choices[0].logprobs.content[0].top_logprobs) == 3, a
deltas = [p.choices[0].delta.content or "" for p in client.chat.completions.create(**ask, stream=True)]
assert "".join(deltas) == a.choices[0].message.content
with client.chat.completions.stream(model=model, messages=m, max_completion_tokens=300, temperature=0) as stream:
    assert stream.get_final_completion().choices[0].message.content.startswith(a.choices[0].message.content)
for call, error in ((dict(temperature=3), openai.BadRequestError), (dict(model="nobody"), openai.NotFoundError)):
    try:
        client.completions.create(**{"model": model, "prompt": "a", **call}); raise SystemExit(f"{call} was accepted")
    except error:
        pass
try:
    openai.OpenAI(api_key="wrong", max_retries=0).models.list(); raise SystemExit("a wrong key was accepted")
except openai.AuthenticationError:
    pass
async def many():
    async with openai.AsyncOpenAI(max_retries=0) as client:
        answers = await asyncio.gather(*(client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0) for _ in range(8)))
        assert {x.choices[0].text for x in answers} == {c.choices[0].text}
        stream = await client.chat.completions.create(model=model, messages=m, max_tokens=200, stream=True)
        async for piece in stream:
            break
        await stream.close()
asyncio.run(many())
print(f"openai {openai.__version__}: sync, async, stream, stream helper, logprobs, errors, an early close")
"""
STRUCTURED = """
import json, os, openai
client, model = openai.OpenAI(max_retries=0), os.environ["MODEL"]
properties = {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}}
schema = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
m = [{"role": "user", "content": "Invent a person."}]
text = client.chat.completions.create(model=model, messages=m, max_tokens=100, temperature=0, response_format=form).choices[0].message.content
found = json.loads(text)
assert set(found) == {"name", "age"} and text == json.dumps(found, separators=(",", ":"), ensure_ascii=False), text
print(f"structured: {text}")
"""
LITELLM = """
import asyncio, os, litellm
litellm.telemetry = False
args = dict(model="openai/" + os.environ["MODEL"], api_base=os.environ["OPENAI_API_BASE"], api_key=os.environ["OPENAI_API_KEY"], max_tokens=8, temperature=0)
m = [{"role": "user", "content": "Say hello."}]
whole = litellm.completion(messages=m, **args).choices[0].message.content
assert whole and "".join(c.choices[0].delta.content or "" for c in litellm.completion(messages=m, stream=True, **args)) == whole
assert asyncio.run(litellm.acompletion(messages=m, **args)).choices[0].message.content == whole
text = litellm.text_completion(prompt=os.environ["PROMPT"], **{**args, "model": "text-completion-openai/" + os.environ["MODEL"], "max_tokens": 12})
assert text.choices[0].text.startswith(" 6, 7"), text
print("litellm: chat, stream, async, text completion")
"""
LANGCHAIN = """
import os
from langchain_openai import ChatOpenAI, OpenAI
chat = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=8, max_retries=0)
whole = chat.invoke("Say hello.")
assert whole.content and whole.usage_metadata["output_tokens"] > 0
assert "".join(c.content for c in chat.stream("Say hello.")) == whole.content
assert [a.content for a in chat.batch(["Say hello."] * 3)] == [whole.content] * 3
assert OpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=12, max_retries=0).invoke(os.environ["PROMPT"]).startswith(" 6, 7")
print("langchain-openai: invoke, stream, batch, completions")
"""
Outcome = tuple[bool, str]


def script(text: str) -> Callable[[Target, Path], Outcome]:
    """A client that is driven from Python."""

    def run(target: Target, directory: Path) -> Outcome:
        path = directory / "client.py"
        path.write_text(text)
        return command(target, [target.python, str(path)], directory)

    return run


def command(target: Target, line: list[str], directory: Path, **environment: str) -> Outcome:
    """(whether it went well, the last line it said)."""
    try:
        done = subprocess.run(
            line, cwd=directory, env={**target.environment(), **environment}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"not finished after {TIMEOUT_S} s"
    said = [row.strip() for row in (done.stdout + "\n" + done.stderr).splitlines() if row.strip()]
    wanted = [row.strip() for row in done.stdout.splitlines() if row.strip()] if done.returncode == 0 else said
    return done.returncode == 0, wanted[-1] if wanted else ""


def llm(target: Target, directory: Path) -> Outcome:
    """The `llm` command line with the server as an extra OpenAI model."""
    (directory / "extra-openai-models.yaml").write_text(
        f"- model_id: twin\n  model_name: {target.model}\n  api_base: {target.url}/v1\n  api_key_name: twin\n"
    )  # fmt: skip
    (directory / "keys.json").write_text(json.dumps({"twin": target.key}))
    line = [str(target.bin / "llm"), "-m", "twin", "-o", "max_tokens", "8", "-o", "temperature", "0", "Say hello."]
    results = [command(target, [*line, *more], directory, LLM_USER_PATH=str(directory), LLM_LOAD_PLUGINS="") for more in ([], ["--no-stream"])]
    same = all(good for good, _ in results) and results[0][1] == results[1][1]
    return same, f"llm: streamed and whole: {results[0][1]}" if same else f"{results}"


def lm_eval(target: Target, directory: Path) -> Outcome:
    """`local-completions` on a task of our own: loglikelihoods of token ids, and generation."""
    rows = [{"question": PROMPT, "choices": [" 6", " 9", " cat"], "answer": 0}, {"question": "a, b, c, d,", "choices": [" z", " e", " 7"], "answer": 1}]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "local.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {directory}/rows.jsonl\ntest_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    tokenizer = tokenizer_directory(directory, target.model)
    arguments = f"model={target.model},base_url={target.url}/v1/completions,num_concurrent=2,tokenized_requests=True,tokenizer={tokenizer}"
    line = [target.python, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "local_choice",
            "--include_path", str(directory), "--output_path", str(directory / "out")]  # fmt: skip
    good, last = command(target, line, directory)
    found = sorted((directory / "out").rglob("results*.json"))
    if not good or not found:
        return False, last
    accuracy = json.loads(found[-1].read_text())["results"]["local_choice"]["acc,none"]
    return accuracy == 1.0, f"lm-eval: local-completions, token ids with echo and logprobs, accuracy {accuracy}"


def tokenizer_directory(directory: Path, model: str) -> Path:
    """The served model's tokenizer as Hugging Face knows it, from our converted copy."""
    from twinpilots.model.locate import resolve_model
    from twinpilots.model.tokenizer import load_tokenizer

    place = directory / "tokenizer"
    place.mkdir()
    tokenizer = load_tokenizer(resolve_model(model))
    assert tokenizer is not None
    tokenizer.backend.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}))
    return place


def guidellm(target: Target, directory: Path) -> Outcome:
    """A short run of the load generator (its command line since 0.8)."""
    report = directory / "report.json"
    line = [str(target.bin / "guidellm"), "run", "--backend", f"kind=openai_http,target={target.url},model={target.model},api_key={target.key}",
            "--tokenizer", f"kind=hf_auto,model={tokenizer_directory(directory, target.model)}", "--profile", "kind=concurrent,streams=4",
            "--constraint", "kind=max_requests,count=12", "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--output", f"kind=json,path={report}", "--disable-console"]  # fmt: skip
    good, last = command(target, line, directory, GUIDELLM__LOGGING__DISABLED="true")
    if not good or not report.exists():
        return False, last
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return totals["successful"] >= 12 and not totals["errored"], f"guidellm: 4 at a time, {totals}"


def schemathesis(target: Target, directory: Path) -> Outcome:
    """Generated requests from the OpenAPI document: nothing may answer with a 5xx."""
    line = [str(target.bin / "schemathesis"), "run", f"{target.url}/openapi.json", "--url", target.url, "-H", f"Authorization: Bearer {target.key}", "--checks",
            "not_a_server_error,response_schema_conformance,content_type_conformance", "--max-examples", "12", "--seed", "1", "--request-timeout", "60",
            "--phases", "examples,coverage,fuzzing", "--exclude-path", "/metrics"]  # fmt: skip
    return command(target, line, directory)


CLIENTS: dict[str, tuple[str, Callable[[Target, Path], Outcome]]] = {
    "openai": ("openai", script(OPENAI)), "structured": ("openai", script(STRUCTURED)), "litellm": ("litellm", script(LITELLM)),
    "langchain": ("langchain_openai", script(LANGCHAIN)), "llm": ("llm", llm), "lm-eval": ("lm_eval", lm_eval), "guidellm": ("guidellm", guidellm),
    "schemathesis": ("schemathesis", schemathesis),
}  # fmt: skip


def installed(target: Target, module: str) -> bool:
    """Whether the clients' environment has it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([target.python, "-c", code], check=False).returncode == 0


def run(target: Target, names: list[str]) -> dict[str, Any]:
    """What each client did: "ok", "failed" or "missing", and the line it ended with."""
    results = {}
    for name in names:
        module, drive = CLIENTS[name]
        began_s = time.monotonic()
        if not installed(target, module):
            results[name] = {"outcome": "missing", "said": f"{module} is not installed in {target.python}", "seconds": 0.0}
            continue
        with tempfile.TemporaryDirectory() as directory:
            good, said = drive(target, Path(directory))
        results[name] = {"outcome": "ok" if good else "failed", "said": said[:400], "seconds": round(time.monotonic() - began_s, 1)}
        print(f"{name:13} {results[name]['outcome']:8} {results[name]['seconds']:6.1f} s  {said[:300]}", file=sys.stderr, flush=True)
    return results


def main() -> int:
    """0 when no client failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", default=",".join(CLIENTS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = run(Target(url=args.url.rstrip("/"), key=args.key, model=args.model, python=args.python), args.only.split(","))
    if args.json:
        print(json.dumps({"schema": 1, "clients": results}))
    return 1 if any(result["outcome"] == "failed" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
