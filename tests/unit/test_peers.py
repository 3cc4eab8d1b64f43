"""The side by side run's bookkeeping: what counts as a rate, a limit and a target met; the engines' pipe. No peer runs here."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_engines, peer_models, peers
from benchmarks.peers import ENTRANTS, METRICS, TARGETS, Metric, Standing, Target
from twinpilots.errors import UserError
from twinpilots.model.dummy import dummy_spec

BY_NAME = {metric.name: metric for metric in METRICS}


def meter(read: float, flops: float) -> Any:
    return argparse.Namespace(read_bytes_per_s=read, flops_per_s=flops, num_samples=9)


def test_rates_count_what_is_compared() -> None:
    assert Metric(name="decode-16", sequences=16, input_len=1, output_len=32).rate(2.0) == 256.0, "generated tokens of all sequences"
    assert Metric(name="prefill-512", sequences=1, input_len=512, output_len=1).rate(2.0) == 256.0, "prompt tokens"


def test_limits_are_the_rooflines() -> None:
    spec = dummy_spec("smollm2-135m")
    weights = spec.linear_bytes / 2  # all matrices, the tied head once
    kv = spec.kv_bytes_per_token("bf16")
    assert peers.limit_rate(spec, 10**9, BY_NAME["decode-1"], meter(1e9, 1e18)) == pytest.approx(1 / (1 + 33 * kv / 1e9))
    decode = peers.limit_rate(spec, 1, BY_NAME["decode-16"], meter(1e18, 1e9))
    assert decode == pytest.approx(1e9 / (2 * weights), rel=0.02), "two operations per weight and token, and a little attention"
    prefill = peers.limit_rate(spec, 1, BY_NAME["prefill-512"], meter(1e18, 1e9))
    head = spec.vocab_size * spec.hidden_size
    assert prefill == pytest.approx(1e9 / (2 * (weights - head)), rel=0.1), "one row of the head"
    assert prefill < 1e9 / (2 * (weights - head))


def standing(name: str, **rates: float) -> Standing:
    entrant = next(entrant for entrant in ENTRANTS if entrant.name == name)
    seconds = {metric: [BY_NAME[metric.replace("_", "-")].rate(1.0) / rate] * 3 for metric, rate in rates.items()}  # type: ignore[index]
    return Standing(entrant, seconds={metric.replace("_", "-"): values for metric, values in seconds.items()})  # type: ignore[misc]


def test_a_target_is_against_the_best_rival_and_never_beyond_the_limit() -> None:
    target = Target(metric="decode-16", ours=("twinpilots",), theirs=("transformers-fp32", "transformers-bf16"), factor=4.0, limit_frac=0.75)
    found = {each.entrant.name: each for each in (
        standing("twinpilots", decode_16=300.0), standing("transformers-fp32", decode_16=100.0), standing("transformers-bf16", decode_16=50.0),
    )}  # fmt: skip
    (far,) = peers.judge(target, found, {16: {"decode-16": 1000.0}})
    assert (far["theirs"], far["target"], far["met"]) == ("transformers-fp32", 4.0, False)
    assert far["ratio"]["median"] == pytest.approx(3.0)
    (near,) = peers.judge(target, found, {16: {"decode-16": 380.0}})
    assert (near["target"], near["met"]) == (pytest.approx(0.75 * 380 / 100), True)
    assert peers.judge(target, {"twinpilots": found["twinpilots"]}, {16: {"decode-16": 1.0}}) == [], "no rival ran"


def test_every_target_names_entrants() -> None:
    names = {entrant.name for entrant in ENTRANTS}
    assert len(names) == len(ENTRANTS)
    for target in TARGETS:
        assert {*target.ours, *target.theirs} <= names


def test_the_table_shows_shares_reasons_and_verdicts() -> None:
    document = {
        "model": "toy", "threads": 2, "rounds": 3, "metrics": [{"name": "decode-1"}],
        "limits": {"read_bytes_per_s": 5e10, "flops_per_s": 2e11, "tokens_per_s": {16: {"decode-1": 200.0}}},
        "entrants": {
            "twinpilots": {"bits": 16, "reason": None, "tokens_per_s": {"decode-1": {"median": 150.0, "rounds": [150.0]}}},
            "llama.cpp-f16": {"bits": 16, "reason": "no wheel", "tokens_per_s": {}},
        },
        "targets": [
            {"metric": "decode-1", "ours": "twinpilots", "theirs": "x", "ratio": {"median": 1.5, "lower_bound": 1.4}, "target": 1.6, "met": False},
        ],
    }  # fmt: skip
    text = peers.document_text(document)
    assert "150.0 (75 %)" in text
    assert "llama.cpp-f16: no wheel" in text
    assert text.splitlines()[-1].split()[-4:] == ["1.50", "1.40", "1.60", "MISSED"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--engines", "vllm"]) == 2
    assert "'vllm'" in capsys.readouterr().err
    assert peers.main(["--metrics", "speed"]) == 2
    assert [each.name for each in peers.chosen("decode-16,decode-1", METRICS, "--metrics")] == ["decode-1", "decode-16"]


class Echo:
    def __init__(self, setup: dict[str, Any]) -> None:
        if setup["model"] == "none":
            raise OSError("no such\nmodel")

    def generate(self, prompts: Any, output_len: int) -> int:
        return len(prompts) * output_len


def served(monkeypatch: pytest.MonkeyPatch, model: str, requests: list[dict[str, int]]) -> list[dict[str, Any]]:
    monkeypatch.setitem(peer_engines.ENGINES, "echo", Echo)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in requests)))
    replies = io.StringIO()
    peer_engines.serve({"engine": "echo", "model": model}, replies)
    return [json.loads(line) for line in replies.getvalue().splitlines()]


def test_an_engines_end_of_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"sequences": 3, "input_len": 4, "output_len": 5, "seed": 1}
    loaded, reply = served(monkeypatch, "toy", [request])
    assert loaded["load_s"] >= 0
    assert reply["generated"] == 15
    assert served(monkeypatch, "none", []) == [{"error": "OSError: no such model"}]
    first, again, other = (peer_engines.prompts_of({**request, "seed": seed}) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(prompt) for prompt in first] == [4, 4, 4]


def test_an_engine_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer_models, "gguf_path", lambda kind, tell: tmp_path / "missing.gguf")
    with pytest.raises(UserError, match=r"missing\.gguf"):
        peers.Peer(next(entrant for entrant in ENTRANTS if entrant.name == "twinpilots"), 1)


def test_the_files_hold_the_sources_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name in (peer_models.EMBEDDING, "blk.0.ffn_up.weight"):
        writer.add_tensor(name, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("output_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(peer_models, "resolve_model", lambda name: argparse.Namespace(path=source))
    monkeypatch.setattr(peer_models, "peers_dir", lambda: tmp_path / "made")
    kept = gguf.GGUFReader(source).tensors
    for kind, embedding, size in (("F16", "F16", 2 * 2 * 256), ("Q8_0", "Q8_0", 2 * 272), ("Q4_0", "Q8_0", 272 + 144)):
        path = peer_models.gguf_path(kind, lambda _: None)
        reader = gguf.GGUFReader(path)
        assert reader.fields["llama.block_count"].contents() == 1
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        assert [tensor.tensor_type.name for tensor in reader.tensors] == [embedding, kind, "F32"]
        for tensor, original in zip(reader.tensors, kept, strict=True):
            exact = gguf.quants.dequantize(original.data, original.tensor_type)
            assert gguf.quants.dequantize(tensor.data, tensor.tensor_type) == pytest.approx(exact, abs={"Q4_0": 0.3}.get(kind, 0.02))
        assert peer_models.weight_bytes(path) == size
    assert peer_models.gguf_path("Q4_1", lambda _: None) == source
