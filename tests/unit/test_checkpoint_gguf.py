"""GGUF files: every architecture gives the weights and the logits of the model it was converted from; hostile files are one clear error."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
zoo = pytest.importorskip("tests.zoo")
pytest.importorskip("transformers")

from tests import reference  # noqa: E402
from twinpilots.errors import CheckpointError, UnsupportedModelError  # noqa: E402
from twinpilots.model import convert_cache, gguf_file, quantized  # noqa: E402
from twinpilots.model.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from twinpilots.model.tensor_names import gguf_spelling, hf_spelling, tensor_plan  # noqa: E402

TOKENS = [5, 17, 99, 3, 44, 80, 12, 9, 101, 64, 23, 7, 7, 120, 31, 77, 18, 2, 90, 55]
ARCHS = {
    "llama": "llama", "llama-bias": "llama", "llama-llama3": "llama", "llama-linear": "llama", "llama-yarn": "llama", "qwen2-plain": "qwen2",
    "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "phi3-longrope": "phi3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ARCHS)
def test_gguf_of_every_architecture_gives_the_logits_of_its_original(family: str, tmp_path: Path) -> None:
    directory = zoo.save(family, 3, tmp_path / "model")
    if family.startswith("gemma"):  # GGUF does not store the query's scale: llama.cpp takes head_dim
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": config["head_dim"]}))
    original = open_checkpoint(directory)
    path = write_gguf(tmp_path / "model", tmp_path / "model.gguf", ARCHS[family], original)
    converted = open_checkpoint(path)
    expected = reference.forward(original, TOKENS)
    np.testing.assert_allclose(reference.forward(converted, TOKENS), expected, atol=2e-5 * np.abs(expected).max())
    assert converted.source_dtype == "fp32" and converted.spec.weight_dtype == "fp32"


def test_quantised_gguf_is_kept_converted_and_opens_without_gguf_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantised_llama(tmp_path)
    first = open_checkpoint(path, dtype="fp16")
    assert (first.source_dtype, first.spec.weight_dtype) == ("Q8_0", "fp16")
    values = {name: first.tensor(name).data.copy() for name in ("0.q_proj", "1.down_proj", "embed", "final_norm")}
    monkeypatch.setattr("twinpilots.model.checkpoint.GgufFile", _never)
    second = open_checkpoint(path, dtype="fp16")
    assert (second.source_dtype, second.fingerprint, second.generation_config) == (first.source_dtype, first.fingerprint, first.generation_config)
    for name, value in values.items():
        np.testing.assert_array_equal(second.tensor(name).data, value)
    wide = open_checkpoint(path, dtype="fp32")
    np.testing.assert_array_equal(wide.tensor("0.q_proj").data, values["0.q_proj"].astype(np.float32))


KINDS = {
    "llama-64": {
        "attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q4_1", "attn_output": "IQ4_NL", "ffn_gate": "Q4_0", "ffn_up": "Q4_1", "ffn_down": "Q5_0",
        "output": "Q5_1",
    },
    "llama-256": {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K", "token_embd": "Q4_K", "output": "Q6_K"},
}  # fmt: skip
PACKED = {  # gate and up differ in llama-64, and IQ4_NL is not ours
    "llama-64": {"0.q_proj": "q4_0", "0.k_proj": "q8_0", "0.v_proj": "q4_1", "1.down_proj": "q5_0", "lm_head": "q5_1"},
    "llama-256": {"0.q_proj": "q4_k", "1.k_proj": "q5_k", "2.v_proj": "q6_k", "0.gate_proj": "q4_k", "1.up_proj": "q4_k", "embed": "q4_k", "lm_head": "q6_k"},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(KINDS))
def test_packed_types_stay_packed_and_mean_what_gguf_says(family: str, tmp_path: Path) -> None:
    original = open_checkpoint(zoo.save(family, 0, tmp_path / "model"))
    path = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "llama", original, lambda name: KINDS[family].get(name.split(".")[-2]))
    checkpoint = open_checkpoint(path)
    found = {name: quantized.tensor_format(checkpoint.spec, name) for name in PACKED[family]}
    assert {name: chosen.name for name, chosen in found.items() if chosen} == PACKED[family]
    converted = checkpoint.spec.format_of(0, "gate_up_proj" if family == "llama-64" else "down_proj")
    assert converted.name == checkpoint.spec.format_of(0, "o_proj").name == checkpoint.spec.weight_dtype
    reader = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for tensor_id in PACKED[family]:
        source = tensor_plan(checkpoint.spec, gguf_spelling(checkpoint.spec), "gguf")[tensor_id]
        expected, heads = reader[source.name], source.unpermute_heads
        if heads:
            expected = expected.reshape(heads, -1, 2, expected.shape[-1]).swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_array_equal(checkpoint.tensor(tensor_id).data, expected)
    assert not (tmp_path / "cache").exists(), "nothing was converted"
    assert open_checkpoint(path, dtype="fp16").spec.rate_keys == ("fp16/in", "fp16/out")


def test_a_packed_file_opens_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantised_llama(tmp_path)
    monkeypatch.setattr(gguf_file, "import_gguf", _never)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.spec.rate_keys) == {"q8_0/in", "q8_0/out"} and checkpoint.source_dtype == "Q8_0"
    fast = open_checkpoint(path, quantization="int4-fast")  # an eight-bit file: made smaller
    assert "q4_1/fast/in" in fast.spec.rate_keys and fast.tensor("0.q_proj").shape == (64, 64)


def test_fused_tensors_of_a_quantised_phi3_survive_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantised_llama(tmp_path, "phi3")
    converted = open_checkpoint(path, dtype="fp16")
    monkeypatch.setattr(convert_cache, "write", lambda *_: False)
    monkeypatch.setattr(convert_cache, "is_complete", lambda _: False)
    direct = open_checkpoint(path, dtype="fp16")
    for tensor_id in ("0.q_proj", "1.k_proj", "1.v_proj", "0.gate_proj", "1.up_proj", "lm_head", "1.mlp_norm"):
        np.testing.assert_array_equal(converted.tensor(tensor_id).data, direct.tensor(tensor_id).data)


def test_an_unwritable_cache_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = quantised_llama(tmp_path)
    kept = open_checkpoint(path, dtype="fp16").tensor("0.k_proj").data.copy()
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    checkpoint = open_checkpoint(path, dtype="fp16")
    np.testing.assert_array_equal(checkpoint.tensor("0.k_proj").data, kept)
    assert len(caplog.records) == 1 and "converted" in caplog.text


def test_a_damaged_converted_copy_is_made_again(tmp_path: Path) -> None:
    path = quantised_llama(tmp_path)
    before = open_checkpoint(path, dtype="fp16").tensor("0.q_proj").data.copy()
    weights = convert_cache.directory_for(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    np.testing.assert_array_equal(open_checkpoint(path, dtype="fp16").tensor("0.q_proj").data, before)


def test_another_file_of_the_same_size_has_another_fingerprint(tmp_path: Path) -> None:
    path = quantised_llama(tmp_path)
    old = convert_cache.fingerprint([path])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert convert_cache.fingerprint([path]) != old


def test_truncated_gguf_is_refused_at_every_length(tmp_path: Path) -> None:
    path = quantised_llama(tmp_path)
    whole = path.read_bytes()
    for length in [0, 3, 4, 11, 40, 200, 1000, len(whole) // 2, len(whole) - 64]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            open_checkpoint(path)


def test_random_damage_to_the_header_is_an_error_of_ours_or_harmless(tmp_path: Path) -> None:
    path = quantised_llama(tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, 3000, 3):
            damaged[place] = rng.choice([0, 255, rng.integers(256)])
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError, UnsupportedModelError):
            checkpoint = open_checkpoint(path)
            assert checkpoint.tensor("0.q_proj").shape == (checkpoint.spec.q_size, checkpoint.spec.hidden_size)


def test_infinite_weights_are_refused(tmp_path: Path) -> None:
    path = quantised_llama(tmp_path)
    stored = gguf_file.GgufFile(path).tensors["blk.0.attn_q.weight"]
    damaged = bytearray(path.read_bytes())
    damaged[stored.start : stored.start + 2] = np.float16(np.inf).tobytes()  # the first block's scale
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*infinite"):
        open_checkpoint(path, dtype="fp16")
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*infinite"):
        open_checkpoint(path).blocks("0.q_proj")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1) + bytes(60), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(60), "metadata fields"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99) + bytes(60), "unknown type"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**61) + bytes(60), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**61) + bytes(60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 4_000_000_000) + bytes(60), "dimensions"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0) + bytes(60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 77777, 0) + bytes(60), "unknown tensor type"),
    ],
)
def test_hostile_gguf_headers_are_refused(body: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "rwkv7")
    close(writer)
    with pytest.raises(UnsupportedModelError, match="rwkv7"):
        open_checkpoint(tmp_path / "x.gguf")


# --- writing GGUF files as llama.cpp's converter does ---


def write_gguf(directory: Path, path: Path, arch: str, original: Checkpoint, kind_of: Callable[[str], str | None] = lambda _: None) -> Path:
    """Convert a saved zoo model: llama's q and k permuted, Gemma's gains plus one, rotary factors as tensors. ``kind_of`` names a matrix's quantisation."""
    config = json.loads((directory / "config.json").read_text())
    spec = original.spec
    writer = gguf.GGUFWriter(str(path), arch)
    _write_fields(writer, arch, config, spec)
    ours, theirs = tensor_plan(spec, hf_spelling(spec, _names(directory))), tensor_plan(spec, gguf_spelling(spec), "gguf")
    written: dict[str, np.ndarray] = {}
    for tensor_id, target in theirs.items():
        data = original._read(ours[tensor_id].name).float32()  # type: ignore[attr-defined]
        if target.unpermute_heads:
            heads = data.reshape(target.unpermute_heads, 2, data.shape[0] // target.unpermute_heads // 2, *data.shape[1:])
            data = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(data.shape)
        written[target.name] = data + np.float32(target.subtract)
    for name, factors in _rope_tensors(config, spec).items():
        written[name] = factors
    for name, data in written.items():
        chosen = kind_of(name) if data.ndim == 2 else None
        if chosen is not None:
            kind = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(name, random_blocks(data, kind) if chosen in SCALES else gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    close(writer)
    return path


SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}  # where a block's f16 scales lie


def random_blocks(data: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks of types which the gguf package can read but not make: random codes, and scales that make weights of a sane size."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(data.size)
    blocks = rng.integers(0, 256, (data.shape[0], data.shape[1] // block, block_bytes), dtype=np.uint8)
    scale = np.float16(0.1 / (32 * 64 * data.shape[1] ** 0.5) * 16)
    for place in SCALES[kind.name]:
        blocks[:, :, place : place + 2] = (scale * rng.uniform(0.5, 1.5, blocks.shape[:2]).astype(np.float16))[..., None].view(np.uint8)
    return blocks.reshape(data.shape[0], -1)


def quantised_llama(tmp_path: Path, arch: str = "llama") -> Path:
    """A small model whose rows are whole Q8_0 blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **sizes)).save_pretrained(tmp_path / "source")
    original = open_checkpoint(tmp_path / "source")
    return write_gguf(tmp_path / "source", tmp_path / "model.gguf", arch, original, lambda _: "Q8_0")


def close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_fields(writer: Any, arch: str, config: dict[str, Any], spec: Any) -> None:
    writer.add_context_length(spec.max_model_len)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_vocab_size(spec.vocab_size)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma3":
        writer.add_sliding_window_pattern([layer.window is not None for layer in spec.layers])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(spec.attention_softcap)
        writer.add_final_logit_softcapping(spec.logit_softcap)
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(spec.ropes[0].rotary_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope_tensors(config: dict[str, Any], spec: Any) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
        return {"rope_freqs.weight": (plain / np.array(spec.ropes[0].inv_freq)).astype(np.float32)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("short", "long")}
    return {}


def _names(directory: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "np") as file:
        return set(file.keys())


def _never(*_: Any) -> None:
    raise AssertionError("the GGUF was opened again")
