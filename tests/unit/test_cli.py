"""The terminal's promises: exit codes, one line per error, one JSON document, a quick start. The engine is a fake here; real runs are tested elsewhere."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twinpilots import cli
from twinpilots.commands import generate, options
from twinpilots.errors import CheckpointError, DeviceLostError, UserError
from twinpilots.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

GENERATE = ["generate", "toy"]

STATS: dict[str, Any] = {
    "policy": "auto", "device": "emulated:demo", "emulated": True, "tokens": {"prompt": 5, "generated": 20}, "seconds": 2.0, "plan_changes": 1,
    "tokens_per_s": {"measured": 10.0, "predicted": 12.5, "plan_bound": 20.0, "hardware_bound": None},
    "busy_s": {"cpu": 1.5, "gpu": 0.5, "link": 1.0}, "predicted_busy_s": {"cpu": 1.25, "gpu": 0.75, "link": 0.875},
}  # fmt: skip


class FakeLLM:
    """Echoes prompts in capitals; remembers how it was made and whether it was closed."""

    made: dict[str, Any]
    closed = False
    fail: BaseException | None = None

    def __init__(self, **arguments: Any) -> None:
        if arguments["policy"] == "resident":
            raise ValueError("nothing fits")
        FakeLLM.made, FakeLLM.closed = arguments, False

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_p=0.9)

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[RequestOutput]:
        if "too long" in prompts:
            raise ValueError("prompt has 9 tokens, the limit is 8")
        if FakeLLM.fail is not None:
            raise FakeLLM.fail
        FakeLLM.made["params"] = params
        return [self._output(str(prompt).upper(), params) for prompt in prompts]

    def chat(self, conversations: list[Any], params: SamplingParams) -> list[RequestOutput]:
        return [self._output(f"<{messages[-1]['content']}>", params) for messages in conversations]

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        (whole,) = self.generate([prompt], params)
        text = whole.outputs[0].text
        for end in range(1, len(text) + 1):
            yield replace(whole, outputs=(replace(whole.outputs[0], text=text[:end]),))

    def stream_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[RequestOutput]:
        yield from self.chat([[{"role": "user", "content": f"{len(messages)}:{messages[-1]['content']}"}]], params)

    def stats(self) -> dict[str, Any]:
        return STATS

    @contextmanager
    def trace(self, path: Path, *, num_passes: int) -> Iterator[None]:
        FakeLLM.made["trace"] = (path, num_passes)
        yield

    def close(self) -> None:
        FakeLLM.closed = True

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _output(text: str, params: SamplingParams) -> RequestOutput:
        logprobs = None if params.logprobs is None else [{7: Logprob(logprob=-0.5, rank=1, decoded_token="x")}]
        best = CompletionOutput(index=0, text=text, token_ids=(7,), finish_reason="length", logprobs=logprobs)
        return RequestOutput(request_id="0", prompt=None, prompt_token_ids=(1,), outputs=(best,), finished=True)


@pytest.fixture(autouse=True)
def fake_api(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("twinpilots.api")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "twinpilots.api", module)
    monkeypatch.setattr(FakeLLM, "fail", None)


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line on stderr of a command that must fail with this exit code and print nothing on stdout."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["generate"], "MODEL"),
        (GENERATE, "--prompt"),
        ([*GENERATE, "--prompt", ""], "number 1 is empty"),
        ([*GENERATE, "--prompt", "a", "--max-tokens", "0"], "--max-tokens"),
        ([*GENERATE, "--prompt", "a", "--max-tokens", "-3"], "--max-tokens"),
        ([*GENERATE, "--prompt", "a", "--temperature", "nan"], "--temperature"),
        ([*GENERATE, "--prompt", "a", "--top-p", "1.5"], "--top-p"),
        ([*GENERATE, "--prompt", "a", "--gpu-memory", "8ZiB"], "8ZiB"),
        ([*GENERATE, "--prompt", "a", "--gpu-memory", "-1"], "--gpu-memory"),
        ([*GENERATE, "--prompt", "a", "--policy", "fastest"], "'fastest'"),
        ([*GENERATE, "--prompt", "a", "--dtype", "int9"], "'int9'"),
        ([*GENERATE, "--prompt", "a", "--policy", "resident"], "nothing fits"),
        ([*GENERATE, "--prompt", "too long"], "the limit is 8"),
        ([*GENERATE, "--prompt", "too long", "--prompt", "b"], "the limit is 8"),
        ([*GENERATE, "--prompt", "a", "--max-num-seqs", "none"], "--max-num-seqs"),
        ([*GENERATE, "--prompts-file", "/no/such/file"], "/no/such/file"),
        ([*GENERATE, "--prompts-file", "/"], "/"),
        ([*GENERATE, "--unheard-of"], "--unheard-of"),
        (["plan", "dummy:llama-3-8b", "--plot", "plan.gif"], "plan.gif"),
        (["plan", "dummy:llama-3-8b", "--hardware", "demo", "--quantization", "int4", "--keep", "head"], "--keep head"),
        (["plan", "dummy:llama-3-8b", "--hardware", "demo", "--input-len", "9000"], "9000"),
        (["plan", "dummy:llama-3-8b", "--hardware", "rtx-3060", "--disk", "plenty"], "'plenty'"),
        (["plan", "dummy:llama-3-8b", "--hardware", "rtx-3060", "--disk", "0"], "'0'"),
        (["plan", "dummy:llama-3-8b", "--hardware", "demo", "--disk", "1GB"], "leave --disk away"),
        (["plan", "dummy:llama-3-8b", "--hardware", "demo", "--max-model-len", "9000"], "9000"),
        (["plan", "dummy:nothing", "--hardware", "demo"], "dummy:nothing"),
        (["plan", "/no/such/model", "--hardware", "demo"], "/no/such/model"),
        (["plan", "dummy:llama-3-8b", "--device", "cpu"], "twinpilots profile"),
        (["plan", "dummy:llama-3-8b", "--device", "tpu"], "'tpu'"),
        (["plan", "dummy:llama-3-8b", "--device", "cuda:0,1"], "cuda:0,1"),
        (["profile", "--device", "emulated:rtx-4090"], "rtx-4090"),
        (["bench", "throughput", "toy", "--policies", "auto,fastest"], "'fastest'"),
        (["bench", "throughput", "toy", "--policies", "auto,auto"], "twice"),
        (["bench"], "KIND"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str], names: str) -> None:
    assert names in error_of(capsys, arguments)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("bad"), 2),
        (CheckpointError("bad\nfile"), 2),
        (FileNotFoundError(2, "No such file or directory", "weights.bin"), 2),
        (DeviceLostError("gone"), 1),
        (OSError("disk"), 1),
        (ZeroDivisionError("oops"), 1),
        (MemoryError(), 1),
    ],
)
def test_errors_while_running(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    monkeypatch.setattr(FakeLLM, "fail", error)
    error_of(capsys, [*GENERATE, "--prompt", "a", "--prompt", "b"], code)
    assert FakeLLM.closed


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "fail", ZeroDivisionError("oops"))
    assert cli.main([*GENERATE, "--prompt", "a", "--prompt", "b", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_closes_the_engine_and_exits_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "fail", KeyboardInterrupt())
    assert cli.main([*GENERATE, "--prompt", "a"]) == 130
    assert FakeLLM.closed
    assert capsys.readouterr().err == "interrupted\n"


def test_what_a_run_took_is_said_beside_what_was_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--prompt", "a", "--prompt", "b"]) == 0
    captured = capsys.readouterr()
    assert "10 tokens/s (predicted 12.5)" in captured.err and "an emulated GPU" in captured.err
    assert "CPU 1.5 s (predicted 1.25), GPU 0.5 s (predicted 0.75), link 1 s (predicted 0.875); plan changes: 1" in captured.err
    assert "predicted" not in captured.out


def test_a_trace_is_asked_for_by_a_file_that_can_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main([*GENERATE, "--prompt", "a", "--trace", str(tmp_path / "t.json"), "--trace-passes", "8"]) == 0
    assert FakeLLM.made["trace"] == (tmp_path / "t.json", 8)
    capsys.readouterr()
    FakeLLM.made = {}
    for bad in (tmp_path / "nowhere" / "t.json", tmp_path):
        assert str(bad) in error_of(capsys, [*GENERATE, "--prompt", "a", "--trace", str(bad)])
        assert "--trace" in error_of(capsys, ["bench", "throughput", "toy", "--trace", str(bad)])
    assert FakeLLM.made == {}, "refused before anything was loaded"
    assert list(tmp_path.iterdir()) == [], "and nothing is left behind"


def test_json_is_one_document_and_the_rest_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = FakeLLM.stats
    monkeypatch.setattr(FakeLLM, "stats", lambda self: (print("noise"), chatty(self))[1])
    assert cli.main([*GENERATE, "--prompt", "abc", "--logprobs", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "schema": 1, "model": "toy", "stats": STATS,
        "outputs": [
            {
                "prompt": "abc", "text": "ABC", "token_ids": [7], "finish_reason": "length",
                "logprobs": [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}],
            }
        ],
    }  # fmt: skip
    assert captured.err == "noise\n"


def test_one_prompt_streams_its_text_and_several_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*GENERATE, "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == "ABC\n"
    assert cli.main([*GENERATE, "--prompt", "a", "--prompt", "b", "--chat-template"]) == 0
    assert capsys.readouterr().out == "--- 1: a\n<a>\n--- 2: b\n<b>\n"


def test_every_llm_argument_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--tokenizer", "t", "--revision", "r", "--dtype", "bf16", "--quantization", "int8", "--device", "cpu", "--gpu-memory", "1MiB", "--host-memory", "2GB",
        "--max-model-len", "64", "--max-num-seqs", "4", "--kv-cache-dtype", "fp32", "--policy", "stream", "--plan", "p.json", "--threads", "2", "--seed", "3",
        "--deterministic", "--unit-rows", "8", "--strict", "--keep", "lm_head", "--keep", "0.*",
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    assert cli.main([*GENERATE, "--prompt", "a", "--prompt", "b", "--temperature", "0", "--max-tokens", "5", *flags]) == 0
    params = FakeLLM.made.pop("params")
    assert FakeLLM.made == {
        "model": "toy", "tokenizer": "t", "revision": "r", "dtype": "bf16", "quantization": "int8", "device": "cpu",
        "gpu_memory": 2**20, "host_memory": 2 * 10**9,
        "max_model_len": 64, "max_num_seqs": 4, "kv_cache_dtype": "fp32", "policy": "stream", "plan": Path("p.json"), "threads": 2, "seed": 3,
        "deterministic": True, "unit_rows": 8, "strict": True, "keep": ["lm_head", "0.*"], "enable_prefix_caching": False,
    }  # fmt: skip
    assert set(FakeLLM.made) == set(options.LLM_ARGUMENTS)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 0.9, 5), "flags override the model's defaults, the rest stays"


def test_the_words_of_the_flags_are_those_of_the_code() -> None:
    from twinpilots.model.families import DTYPES
    from twinpilots.plan.plan import POLICIES

    assert options.POLICIES == POLICIES
    assert {name for name in options.DTYPES if name != "auto"} <= set(DTYPES)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\n\n  two \n", ["one", "  two "]),
        ('{"prompt": "a"}\n{"prompt": [1, 2]}\n', ["a", [1, 2]]),
        ("{ not json, a line of code\nx\n", ["{ not json, a line of code", "x"]),
    ],
)
def test_prompts_files(text: str, prompts: list[Any]) -> None:
    assert generate.parse_prompts(text, "f") == prompts


@pytest.mark.parametrize(
    ("text", "place"),
    [("\n \n", "f.jsonl"), ('{"prompt": "a"}\nb\n', "f.jsonl:2"), ('{"prompt": ""}\n', "f.jsonl:1"), ('{"prompt": [true]}', "f.jsonl:1"), ("[1]", "f.jsonl:1")],
)
def test_malformed_prompts_files_name_the_line(text: str, place: str) -> None:
    with pytest.raises(UserError, match=place):
        generate.parse_prompts(text, "f.jsonl")


def test_prompts_come_from_stdin_and_must_be_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ny\n"))
    assert cli.main([*GENERATE, "--prompts-file", "-"]) == 0
    assert capsys.readouterr().out == "--- 1: x\nX\n--- 2: y\nY\n"
    binary = tmp_path / "prompts"
    binary.write_bytes(b"\xff\xfe")
    assert "UTF-8" in error_of(capsys, [*GENERATE, "--prompts-file", str(binary)])


def test_chat_remembers_resets_and_leaves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nagain\n/reset\nnew\n/exit\nnever\n"))
    assert cli.main(["chat", "toy", "--system", "be kind"]) == 0
    assert capsys.readouterr().out == "<2:hi>\n<4:again>\n<2:new>\n"
    assert FakeLLM.closed


def run_cli(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "twinpilots", *arguments], capture_output=True, text=True, timeout=60, check=False, **more)


def fastest_s(command: list[str]) -> float:
    """The least of three runs, in seconds: to compare with another command on the same box, never with a clock."""
    seconds = []
    for _ in range(3):
        began_s = time.monotonic()
        subprocess.run(command, capture_output=True, timeout=120, check=True)
        seconds.append(time.monotonic() - began_s)
    return min(seconds)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    bare, helped = (fastest_s([sys.executable, "-c", "pass"]), fastest_s([sys.executable, "-m", "twinpilots", "--help"]))
    assert helped < 10 * bare  # a quiet box: 0.07 s against 0.02 s
    code = "import sys; from twinpilots.cli import main; main(['--help']); bad = {'numpy', 'torch', 'scipy'} & set(sys.modules); sys.exit(len(bad))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_planning_a_dummy_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys; from twinpilots.cli import main; code = main(['plan', 'dummy:llama-3-70b', '--hardware', 'rtx-4090', '--json']);"
        "sys.exit(code or 10 * ('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == 1
    assert set(document["policies"]) == set(options.POLICIES)
    assert document["prediction"]["tokens_per_s"] > 0
    importing_s = fastest_s([sys.executable, "-c", "import scipy.optimize"])
    assert fastest_s([sys.executable, "-c", code]) < 10 * importing_s  # a quiet box: 1.2 s against 0.3 s; the promise is 2 s


@pytest.mark.parametrize("policy", ["auto", "stream", "cpu"])
def test_plan_prints_text(capsys: pytest.CaptureFixture[str], policy: str) -> None:
    assert cli.main(["plan", "dummy:smollm2-135m", "--hardware", "demo", "--policy", policy]) == 0
    text = capsys.readouterr().out
    assert "predicted" in text
    assert "tokens/s" in text


def test_an_impossible_limit_names_one_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, ["plan", "dummy:smollm2-135m", "--hardware", "demo", "--host-memory", "1MiB"])
    assert "iB" in line
    assert "more than" in error_of(capsys, ["plan", "dummy:smollm2-135m", "--hardware", "demo", "--gpu-memory", "1TiB"])


def test_a_model_that_memory_cannot_hold_is_planned_on_the_disk_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the flag the refusal says how much of the disk would do; with it there is a plan, in text and in JSON, that says that it is not run."""
    command = ["plan", "dummy:llama-3-70b", "--hardware", "rtx-3060", "--policy", "stream", "--max-num-seqs", "1", "--input-len", "32", "--output-len", "4"]
    line = error_of(capsys, command)
    need = line.split("--disk ")[1].split()[0]
    assert cli.main([*command, "--disk", need]) == 0
    assert "this version does not run such plans" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*command, "--disk", "1TB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["memory"]["disk"]["limit"] == 10**12 and document["memory"]["disk"]["weights"] > 0
    assert document["prediction"]["bottleneck"] == "disk"


def test_doctor_finds_and_prices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["python"]["state"] == "ok"
    assert findings["profile"]["state"] == "missing", "the suite's cache is its own, and empty"
    assert "twinpilots profile" in findings["profile"]["cost"]
    assert cli.main(["doctor"]) == 0
    assert "python" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error() -> None:
    child = subprocess.Popen([sys.executable, "-m", "twinpilots", "doctor", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 1


def test_progress_is_for_terminals_only() -> None:
    from twinpilots.progress import Progress

    silent, shown = io.StringIO(), io.StringIO()
    with Progress("work", total=4, stream=silent) as bar:
        bar.update()
    assert silent.getvalue() == ""
    with Progress("work", total=4, unit="steps", enabled=True, stream=shown) as bar:
        bar.update(2, note="halfway")
        assert bar.line().startswith("work: [############............] 2/4 steps")
    assert "halfway" in shown.getvalue()
    assert shown.getvalue().endswith("\r\x1b[K")


def test_numbers_of_the_command_line() -> None:
    assert options.positive_int("3") == 3
    assert options.size("512KiB") == 512 * 1024
    for check, text in [(options.positive_int, "1.5"), (options.non_negative_float, "inf"), (options.fraction, "0"), (options.size, "lots")]:
        with pytest.raises(argparse.ArgumentTypeError):
            check(text)


def test_the_module_and_the_script_are_one_program() -> None:
    assert run_cli("--version", env={**os.environ}).stdout.startswith("twinpilots ")
