"""The other engines of gpu-bench: who is here, what each is told, and what is said where one has no figure. The engines themselves are stand-ins."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_peer_flextensor, gpu_peer_freetoken, gpu_peer_torch, gpu_peers
from benchmarks.gpu_peers import PEERS, WORKERS, Where
from benchmarks.gpu_points import CARD_POINTS, GIB, MIB, Point
from benchmarks.gpu_workers import events_of
from twinpilots.errors import LimitError
from twinpilots.model.dummy import CONFIGS

POINT = Point(model="dummy:llama-3-8b", quantization=None, kind="decode", gpu_memory=8 * GIB, num_seqs=1, context=512, against_peers=True)
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
TINY_POINT = replace(POINT, model="dummy:tiny", num_seqs=2, context=24, gpu_memory=2 * GIB)
FLEXTENSOR = """
import sys
from types import SimpleNamespace
class OffloadConfig(SimpleNamespace): pass
def offload(model, config):
    sys.stderr.write(repr(config))
    offload.config, offload.passes = config, []
    def proxy(**inputs):
        offload.passes.append(tuple(inputs["input_ids"].shape))
        return model(**inputs)
    return proxy
def get_offload_manager(): return SimpleNamespace(iters_before_inference=11)
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Point:
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    return TINY_POINT


def carried(folder: Path, *modules: str, text: str = "") -> Path:
    for name in modules:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


# -- who is here -----------------------------------------------------------------------------------------------------------------------------


def test_peers_that_are_not_here_say_why(tmp_path: Path) -> None:
    found = {peer: result["reason"] for _, peer, result in gpu_peers.peer_results([POINT], 10.0, Where(device="emulated:demo"))}
    assert set(found) == set(PEERS) == {"llama.cpp", "accelerate", "FlexTensor", "FreeToken"}
    assert all(reason.startswith("not here") for reason in found.values())
    missing = gpu_peers.missing_peers(Where(device="cuda:0"))
    assert "--llama-cpp" in str(missing["llama.cpp"]) and "--peers" in str(missing["FlexTensor"]) and "--peers" in str(missing["FreeToken"])
    assert "has no llama-batched-bench" in str(gpu_peers.missing_peers(Where(device="cuda:0", llama_cpp=tmp_path))["llama.cpp"])
    points = [replace(POINT, against_peers=False)]
    assert list(gpu_peers.peer_results(points, 10.0, Where(device="cuda:0"))) == []


def test_a_carried_folder_makes_a_peer_be_here_and_names_what_it_still_lacks(tmp_path: Path) -> None:
    flextensor, freetoken = (next(worker for worker in WORKERS if worker.name == name) for name in ("FlexTensor", "FreeToken"))
    where = Where(device="cuda:0", packages=carried(tmp_path, *flextensor.needs, "freetoken"))
    missing = gpu_peers.missing_peers(where)
    assert missing["FlexTensor"] is None and "flashlib and tvm_ffi" in str(missing["FreeToken"]) and "freetoken" not in str(missing["FreeToken"])
    carried(tmp_path, *freetoken.needs)
    assert gpu_peers.missing_peers(where)["FreeToken"] is None
    assert "first card only" in str(gpu_peers.missing_peers(replace(where, device="cuda:1"))["FreeToken"])
    assert gpu_peers.set_aside_s([POINT], where) >= 2 * gpu_peers.PEER_S
    assert gpu_peers.set_aside_s([replace(POINT, against_peers=False)], where) == 0.0


def test_each_peer_that_is_here_has_its_part_of_the_time_and_a_dead_one_costs_its_own_points(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, float]] = []

    def events(module: str, _kind: str, task: Any, *, limit_s: float, stall_s: float, packages: Path | None) -> Iterator[dict[str, Any]]:
        assert task.used_bytes == 700 * MIB and packages is None and stall_s == limit_s
        asked.append((module.rpartition("_")[2], len(task.points), limit_s))
        if "accelerate" in module:
            yield {"event": "case", "point": 1, "ok": True, "detail": "", "figures": {"tokens_per_s": 3.0}}
            yield {"event": "end", "reason": "its process ended with exit code -9"}
        elif "flextensor" in module and len(asked) == 2:
            yield {"event": "case", "point": 0, "ok": None, "detail": "KV does not fit", "figures": None}
            yield {"event": "end", "reason": None}
        else:
            yield {"event": "end", "reason": None}

    monkeypatch.setattr(gpu_peers, "events_of", events)
    monkeypatch.setattr(gpu_peers, "card_used_bytes", lambda device: 700 * MIB)
    monkeypatch.setattr(gpu_peers, "missing_peers", lambda where: {peer: "not here" if peer in ("llama.cpp", "FreeToken") else None for peer in PEERS})
    points = [POINT, replace(POINT, num_seqs=8)]
    found = [
        (point.num_seqs, peer, result["tokens_per_s"] or result["reason"])
        for point, peer, result in gpu_peers.peer_results(points, 100.0, Where(device="cuda:0"))
    ]
    assert [(name, count) for name, count, _ in asked] == [("accelerate", 2), ("flextensor", 1), ("flextensor", 1)], "one process per point for FlexTensor"
    assert 49 < asked[0][2] <= 50 and 99 < asked[1][2] <= 100, "what one leaves is the next one's"
    assert found == [
        (1, "llama.cpp", "not here"), (8, "llama.cpp", "not here"),
        (8, "accelerate", 3.0), (1, "accelerate", "its process ended with exit code -9"),
        (1, "FlexTensor", "KV does not fit"), (8, "FlexTensor", "it ended without a result"),
        (1, "FreeToken", "not here"), (8, "FreeToken", "not here"),
    ]  # fmt: skip


# -- llama.cpp -------------------------------------------------------------------------------------------------------------------------------


def test_llama_cpp_gets_the_same_shapes_under_the_same_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / gpu_peers.LLAMA_BENCH
    program.write_text('#!/bin/sh\necho "load: adding tokens"\necho \'{"pp": 512, "pl": 8, "speed_pp": 900.5, "speed_tg": 42.5}\'\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_peers, "write_random_gguf", lambda spec, path: path.write_text(spec.name))
    monkeypatch.setattr(gpu_peers, "card_used_bytes", lambda device: 0)
    point, where = replace(POINT, num_seqs=8), Where(device="cuda:0", llama_cpp=tmp_path)
    found = list(gpu_peers.llama_cpp_results([point, replace(point, kind="prefill")], 20.0, where))
    assert [result["tokens_per_s"] for _, result in found] == [42.5, 900.5]
    command = gpu_peers.llama_cpp_command(program, tmp_path / "m.gguf", point)
    assert command[command.index("-npl") + 1] == "8" and "-pps" in command and int(command[command.index("-c") + 1]) == 8 * (512 + 16)
    layers = gpu_peers.layers_on_card(point)
    assert layers == found[0][1]["layers_on_card"] and 8 < layers < 20, "of 32 layers of 437 MB, in 6.5 GiB"
    program.write_text("#!/bin/sh\necho error: no device; exit 3\n")
    (_, failed), *_ = gpu_peers.llama_cpp_results([point], 20.0, where)
    assert failed["tokens_per_s"] is None and "exit code 3: error: no device" in failed["reason"]


# -- transformers models ---------------------------------------------------------------------------------------------------------------------


def test_a_random_model_has_the_true_shapes_and_real_rotary_frequencies(tiny: Point) -> None:
    pytest.importorskip("transformers")
    model = gpu_peer_torch.host_model(tiny)
    parameters = dict(model.named_parameters())
    assert parameters["model.layers.2.mlp.down_proj.weight"].shape == (64, 128) and {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in (*parameters.values(), *model.buffers()))
    assert model.model.rotary_emb.inv_freq[0] == 1.0
    figures = gpu_peer_torch.measured(model, tiny, "cpu", warm=1)
    assert figures["tokens_per_s"] == pytest.approx(2 * 3 / sum(figures["pass_s"])) and len(figures["pass_s"]) == 3


def test_the_cap_holds_kv_and_reserve_before_weights() -> None:
    assert gpu_peer_torch.room_for_weights(POINT) == 7 * GIB - (512 + 64) * 128 * 1024
    with pytest.raises(LimitError, match=r"KV of \d+ bytes does not fit"):
        gpu_peer_torch.room_for_weights(replace(POINT, num_seqs=128))


def test_flextensor_offloads_layers_within_what_embedding_head_kv_and_reserve_leave(
    tiny: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(carried(tmp_path, "flextensor", text=FLEXTENSOR)))
    monkeypatch.delitem(sys.modules, "flextensor", raising=False)
    caps: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 80 * GIB}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: caps.append(fraction))
    proxy, warm = gpu_peer_flextensor.placed_model(tiny, "cuda:0")
    flextensor = importlib.import_module("flextensor")
    config = flextensor.offload.config
    kv, outside = 2 * (24 + 64) * 3 * 2 * 2 * 16 * 2, (2 * 256 * 64 + 64) * 2  # tokens, layers, k and v, heads, size, bytes; embedding, head, norm
    assert config.max_gpu_mem_fraction * 80 * GIB == pytest.approx(GIB - kv - outside)
    assert config.include_patterns == ["model.layers.*"] and config.gpu_device == 0 and caps == [pytest.approx(1.5 / 80)]
    gpu_peer_torch.measured(proxy, tiny, "cpu", warm)
    assert warm == 12 and flextensor.offload.passes == [(2, 1)] * (12 + 3), "profiled before it is timed"
    with pytest.raises(LimitError, match="embedding and head of"):
        gpu_peer_flextensor.placed_model(replace(tiny, gpu_memory=GIB + kv + outside - 1), "cuda:0")


def test_a_worker_finds_carried_packages_and_only_it_does(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    packages = carried(tmp_path, "flextensor", text="raise RuntimeError('the carried one')\n")
    task = gpu_peer_torch.PeerTask(device="cuda:0", points=[asdict(POINT)])
    case, end = events_of("benchmarks.gpu_peer_flextensor", "peer", task, limit_s=60.0, stall_s=60.0, packages=packages)
    assert case["ok"] is False and case["detail"] == "RuntimeError: the carried one" and end["reason"] is None
    assert str(tmp_path) not in os.environ.get("PYTHONPATH", "")


# -- FreeToken -------------------------------------------------------------------------------------------------------------------------------


def test_freetoken_runs_dense_models_only_where_they_fit_and_says_so() -> None:
    reasons = {point: gpu_peer_freetoken.why_not(point) for point in CARD_POINTS if point.model == "dummy:llama-3-8b"}
    fitting = [point for point, reason in reasons.items() if reason is None]
    assert [(point.gpu_memory, point.num_seqs) for point in fitting] == [(24 * GIB, 16)]
    assert gpu_peer_freetoken.why_not(replace(fitting[0], num_seqs=32)) is not None, "1.5 GiB are for all else"
    assert "offloads experts only" in str(reasons[CARD_POINTS[0]]) and "weights of 15 GiB" in str(reasons[CARD_POINTS[0]])
    assert gpu_peers.compared(CARD_POINTS, "FreeToken") == [point for point in CARD_POINTS if point.against_peers or point in fitting]
    assert gpu_peers.compared(CARD_POINTS, "accelerate") == [point for point in CARD_POINTS if point.against_peers]
    assert gpu_peer_freetoken.why_not(replace(POINT, model="dummy:opt-30b")) == "it runs none of dummy:opt-30b"
    assert gpu_peer_freetoken.why_not(replace(POINT, quantization="int4")) == "it runs none of dummy:llama-3-8b in int4"
    with pytest.raises(LimitError, match="offloads experts only"):
        gpu_peer_freetoken.figures(POINT)


def test_freetoken_gets_a_folder_like_a_checkpoint_and_room_for_the_points_tokens(tiny: Point, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpu_peer_freetoken.write_checkpoint(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_key_value_heads"] == 2 and config["dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 64
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).decode([5, 77]) is not None, "it decodes whatever was generated"
    settings = gpu_peer_freetoken.settings(tiny)
    assert settings["num_token_override"] == 2 * settings["max_seq_len_override"] and settings["max_seq_len_override"] > 24 + gpu_peer_freetoken.GENERATED
    assert settings["use_dummy_weight"] is True and settings["max_running_req"] == settings["cuda_graph_max_bs"] == 2


@pytest.mark.parametrize(("kind", "rate"), [("decode", 2 / 0.5), ("prefill", 2 * 24 / 10.5)])
def test_freetoken_decoding_is_what_more_tokens_take_after_prompts_that_it_knows(
    kind: Any, rate: float, tiny: Point, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """By a stand-in clock: new prompts take 10 s, each token 0.5 s."""
    known: set[str] = set()

    def generate_s(_llm: None, prompts: list[list[int]], num_tokens: int) -> float:
        assert [len(prompt) for prompt in prompts] == [24, 24] and all(3 <= token < 256 for prompt in prompts for token in prompt)
        new = str(prompts) not in known
        known.add(str(prompts))
        return 10.0 * new + 0.5 * num_tokens

    monkeypatch.setattr(gpu_peer_freetoken, "_generate_s", generate_s)
    point = replace(tiny, kind=kind)
    assert gpu_peer_freetoken.measured(None, point)["tokens_per_s"] == pytest.approx(rate)
    monkeypatch.setattr(gpu_peer_freetoken, "_generate_s", lambda *_: 0.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        gpu_peer_freetoken.measured(None, point)
