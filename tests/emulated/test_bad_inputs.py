"""Bad models, limits and names at the command line: exit code 2, nothing on stdout, one line on stderr that names the cause."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import zoo
from twinpilots import LLM

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama", 0, tmp_path_factory.mktemp("bad") / "model")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "twinpilots", *arguments], capture_output=True, text=True, timeout=60, check=False)


def assert_one_line(done: subprocess.CompletedProcess[str], *names: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for name in names:
        assert name in done.stderr


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def edit_tensors(model: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = dict(load_file(weights(model)))
    change(tensors)
    save_file(tensors, weights(model), metadata={"format": "pt"})


def edit_config(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def with_header(model: Path, header: bytes) -> None:
    weights(model).write_bytes(struct.pack("<Q", len(header)) + header)


def sharded(model: Path, shard: str) -> None:
    weights(model).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": shard}}))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DAMAGED: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty directory": (lambda model: (shutil.rmtree(model), model.mkdir()), ("config.json",)),
    "no weights": (lambda model: weights(model).unlink(), ("safetensors",)),
    "no config": (lambda model: (model / "config.json").unlink(), ("config.json",)),
    "config that is no JSON": (lambda model: (model / "config.json").write_text("{"), ("config.json",)),
    "config that is a list": (lambda model: (model / "config.json").write_text("[]"), ("config.json",)),
    "truncated weights": (lambda model: cut(weights(model), 0.5), ("model.safetensors",)),
    "truncated header": (lambda model: cut(weights(model), 0.002), ("model.safetensors",)),
    "empty weights": (lambda model: cut(weights(model), 0.0), ("model.safetensors",)),
    "missing tensor": (lambda model: edit_tensors(model, lambda tensors: tensors.pop(Q_PROJ)), (Q_PROJ,)),
    "wrong shape": (lambda model: edit_tensors(model, lambda tensors: tensors.update({Q_PROJ: np.zeros((4, 4), np.float32)})), (Q_PROJ, "4")),
    "integers for weights": (lambda model: edit_tensors(model, lambda tensors: tensors.update({Q_PROJ: np.zeros((48, 40), np.int32)})), (Q_PROJ,)),
    "header of garbage": (lambda model: with_header(model, b"\xff" * 64), ("model.safetensors",)),
    "header with control characters": (lambda model: with_header(model, b'{"a\\n\\u001b[31mb": 7}'), ("model.safetensors",)),
    "negative offsets": (lambda model: with_header(model, b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'), ("model.safetensors",)),
    "shard outside": (lambda model: sharded(model, "../../secret.safetensors"), ("secret.safetensors",)),
    "shard missing": (lambda model: sharded(model, "model-00001.safetensors"), ("model-00001.safetensors",)),
    "unknown architecture": (lambda model: edit_config(model, model_type="mamba", architectures=["MambaForCausalLM"]), ("mamba",)),
    "unknown rope": (lambda model: edit_config(model, rope_parameters={"rope_type": "spiral", "rope_theta": 500.0}), ("spiral",)),
    "heads that do not divide": (lambda model: edit_config(model, num_key_value_heads=3), ("3",)),
    "no layers": (lambda model: edit_config(model, num_hidden_layers=0), ("num_hidden_layers",)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_one_line(what: str, sound: Path, tmp_path: Path) -> None:
    damage, names = DAMAGED[what]
    model = Path(shutil.copytree(sound, tmp_path / "model"))
    damage(model)
    assert_one_line(run_cli("generate", str(model), "--prompt", "a", "--device", "cpu"), *names)


def test_a_truncated_gguf_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 5) + b"\x00" * 20)
    assert_one_line(run_cli("generate", str(file), "--prompt", "a", "--device", "cpu"), "model.gguf")


GENERATE = ("--prompts-file", "PROMPTS", "--max-tokens", "4", "--unit-rows", "8", "--device", "emulated:demo")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--max-model-len", "97"), ("97", "96")),
        (("--max-model-len", "0"), ("max-model-len",)),
        (("--gpu-memory", "1GiB"), ("1", "gpu-memory")),
        (("--gpu-memory", "12KiB", "--policy", "stream"), ("--gpu-memory", "stream", "12KiB")),
        (("--gpu-memory", "100KiB", "--policy", "resident"), ("--gpu-memory", "resident", "100KiB")),
        (("--host-memory", "20KiB"), ("--host-memory", "20KiB")),
        (("--gpu-memory", "-1"), ("gpu-memory",)),
        (("--gpu-memory", "much"), ("much",)),
        (("--policy", "fastest"), ("fastest", "auto")),
        (("--device", "emulated:none"), ("none", "demo")),
        (("--device", "tpu"), ("tpu",)),
        (("--device", "cuda:7"), ("cuda:7",)),
        (("--device", "emulated:demo,demo"), ("several GPUs",)),
        (("--device", "cpu", "--policy", "stream"), ("stream", "GPU")),
        (("--quantization", "int4"), ("int4",)),
        (("--plan", "no-such-plan.json"), ("no-such-plan.json",)),
        (("--max-tokens", "0"), ("max", "0")),
        (("--temperature", "-1"), ("temperature",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_impossible_option_is_one_line(arguments: tuple[str, ...], names: tuple[str, ...], sound: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [5, 17, 99]}\n')
    common = [str(prompts) if argument == "PROMPTS" else argument for argument in GENERATE]
    assert_one_line(run_cli("generate", str(sound), *common, *arguments), *names)


BAD_PROMPTS = {"empty": ("[]", "prompt"), "vocabulary": ("[500]", "131"), "long": (str([7] * 96), "96"), "text": ('"text"', "tokenizer")}


@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_an_impossible_prompt_is_one_line(what: str, sound: Path, tmp_path: Path) -> None:
    prompt, name = BAD_PROMPTS[what]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": {prompt}}}\n')
    LLM(str(sound), device="cpu").close()  # measures this machine, and says so
    assert_one_line(run_cli("generate", str(sound), "--prompts-file", str(prompts), "--max-tokens", "4", "--device", "cpu"), name)


def test_a_plan_for_another_model_is_one_line(sound: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    for text in ("{}", '{"schema": 1}', "[1]", "not json"):
        plan.write_text(text)
        assert_one_line(run_cli("generate", str(sound), "--prompt", "a", "--device", "cpu", "--plan", str(plan)), "plan")
