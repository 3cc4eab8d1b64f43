"""Weights that are packed in their files, or quantised on load: what comes out is what the tools that packed them say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
from tests import zoo
from tests.quantized import pack_awq, pack_gptq
from twinpilots.errors import CheckpointError, UserError
from twinpilots.kernels.quant_format import dequantize, quantize
from twinpilots.model import quantized
from twinpilots.model.block_cache import BlockCache
from twinpilots.model.checkpoint import Checkpoint, open_checkpoint
from twinpilots.model.safetensors_file import SafetensorsFile
from twinpilots.model.weight_format import FORMATS

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("llama-64", 0, tmp_path_factory.mktemp("zoo") / "llama", dtype="bfloat16")


def formats(checkpoint: Checkpoint) -> dict[str, str]:
    return {f"{op.layer}.{op.name}": op.format.name for op in checkpoint.spec.ops(64)}


# -- on load ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_on_load_are_the_files_own_values_rounded(quantization: Any, llama: Path) -> None:
    native, checkpoint = open_checkpoint(llama), open_checkpoint(llama, quantization=quantization)
    for tensor_id, name in (("0.q_proj", "q8_0" if quantization == "int8" else "q4_1"), ("2.down_proj", None), ("lm_head", "q8_0"), ("embed", "q8_0")):
        chosen = FORMATS[name or ("q8_0" if quantization == "int8" else "q4_1")]
        expected = quantize(native.tensor(tensor_id).float32(), chosen)
        np.testing.assert_array_equal(checkpoint.blocks(tensor_id), expected)
        np.testing.assert_array_equal(checkpoint.tensor(tensor_id).data, dequantize(expected, chosen))
    np.testing.assert_array_equal(checkpoint.tensor("1.attn_norm").data, native.tensor("1.attn_norm").data)


def test_the_second_start_reads_what_the_first_one_made(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_checkpoint(llama, quantization="int4")
    made = {tensor_id: first.blocks(tensor_id).copy() for tensor_id in quantised_tensors(first)}
    first.close()
    monkeypatch.setattr(quantized, "quantize", _never)
    second = open_checkpoint(llama, quantization="int4-fast")  # the same weights, other arithmetic
    for tensor_id, blocks in made.items():
        np.testing.assert_array_equal(second.blocks(tensor_id), blocks)
    second.close()
    with pytest.raises(AssertionError, match="quantised again"):
        open_checkpoint(llama, quantization="int4", keep=["lm_head"]).blocks("0.q_proj")


def test_an_interrupted_first_start_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama, quantization="int8")
    checkpoint.blocks("0.q_proj")
    assert list((tmp_path / "cache/twinpilots/quantized").iterdir()) != []
    checkpoint.close()
    assert list((tmp_path / "cache/twinpilots/quantized").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_warning(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(llama, quantization="int8")
        for tensor_id in quantised_tensors(checkpoint):
            checkpoint.blocks(tensor_id)
    assert len(caplog.records) == 1 and "quantised again at every start" in caplog.text


def test_a_damaged_cache_is_made_again(llama: Path, tmp_path: Path) -> None:
    first = open_checkpoint(llama, quantization="int8")
    before = {tensor_id: first.blocks(tensor_id).copy() for tensor_id in quantised_tensors(first)}
    first.close()
    (file,) = (tmp_path / "cache").rglob("blocks.bin")
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        again = open_checkpoint(llama, quantization="int8")
        for tensor_id, blocks in before.items():
            np.testing.assert_array_equal(again.blocks(tensor_id), blocks)
        again.close()
    assert len(list((tmp_path / "cache").rglob("blocks.bin"))) == 1


def test_two_processes_may_write_the_same_cache(tmp_path: Path) -> None:
    one, other = (BlockCache("key", {"a": (2, 3, 4), "b": (5, 1, 4)}) for _ in range(2))
    a, b = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.full((5, 1, 4), 7, np.uint8)
    for cache in (one, other):
        cache.put("a", a)
    for cache in (one, other):
        cache.put("b", b)
    for cache in (one, other):
        np.testing.assert_array_equal(cache.get("a"), a)
        np.testing.assert_array_equal(cache.get("b"), b)
        cache.close()
    assert len(list((tmp_path / "cache/twinpilots/quantized").iterdir())) == 1


def test_dummy_weights_are_quantised_at_once_and_alike_every_time() -> None:
    one, other = (open_checkpoint("dummy:smollm2-135m", quantization="int4") for _ in range(2))
    blocks = one.blocks("3.down_proj")
    np.testing.assert_array_equal(blocks, other.blocks("3.down_proj"))
    assert not np.array_equal(blocks, one.blocks("4.down_proj")) and len(np.unique(blocks, axis=0)) == 576
    assert abs(one.tensor("3.down_proj").data.std() * 1536**0.5 - 1) < 0.1


def test_infinite_weights_are_not_quantised(tmp_path: Path) -> None:
    path = zoo.save("llama-64", 0, tmp_path / "m", dtype="float16")
    file = SafetensorsFile(path / "model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    head = tensors["lm_head.weight"].data.copy()
    head[3, 5] = np.inf
    rewrite(path, {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head.*infinite"):
        open_checkpoint(path, quantization="int8").blocks("lm_head")


# -- GPTQ and AWQ ----------------------------------------------------------------------------------------------------------------------------


def packed_directory(source: Path, path: Path, method: str, group: int, *, seed: int = 0, **config: Any) -> dict[str, np.ndarray]:
    """The model of ``source`` with random 4-bit linears as ``method`` packs them; returns the weights [out, in] that its tool computes with."""
    rng = np.random.default_rng(seed)
    file = SafetensorsFile(source / "model.safetensors")
    tensors: dict[str, Any] = {name: file.read(name) for name in file.tensors}
    expected = {}
    for name in [name for name in tensors if name.split(".")[-2] in LINEARS]:
        rows, width = tensors.pop(name).shape
        size = width if group == -1 else group
        codes = rng.integers(0, 16, (width, rows), dtype=np.uint8)
        zeros = rng.integers(1, 16, (-(-width // size), rows), dtype=np.uint8)
        scales = rng.uniform(0.002, 0.02, zeros.shape).astype(np.float16)
        less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        qweight, qzeros = pack_gptq(codes, zeros, less) if method == "gptq" else pack_awq(codes, zeros)
        group_of = np.arange(width) // size
        expected[name] = (scales.astype(np.float32)[group_of] * (codes.astype(np.float32) - zeros.astype(np.float32)[group_of])).T
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.qweight": qweight, f"{module}.qzeros": qzeros, f"{module}.scales": scales}
        if method == "gptq":
            tensors[f"{module}.g_idx"] = group_of.astype(np.int32)
    values = json.loads((source / "config.json").read_text())
    path.mkdir()
    values["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": group, **config}
    (path / "config.json").write_text(json.dumps(values))
    rewrite(path, tensors)
    return expected


def rewrite(path: Path, tensors: dict[str, Any]) -> None:
    """A new model.safetensors of numpy arrays, and of our tensors as fp16."""
    import safetensors.numpy

    arrays = {name: np.array(tensor if isinstance(tensor, np.ndarray) else tensor.float32().astype(np.float16)) for name, tensor in tensors.items()}
    (path / "model.safetensors").unlink(missing_ok=True)  # tensors may be views of it
    safetensors.numpy.save_file(arrays, path / "model.safetensors")


PACKINGS = [
    ("gptq", 32, {}, "q4_z32"), ("gptq", 32, {"sym": True, "desc_act": False}, "q4_z32"), ("gptq", -1, {}, "q4_z64"), ("gptq", 64, {}, "q4_z64"),
    ("gptq", 32, {"checkpoint_format": "gptq_v2"}, "q4_z32"), ("awq", 32, {"version": "gemm", "zero_point": True}, "q4_z32"), ("awq", 64, {}, "q4_z64"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "group", "config", "name"), PACKINGS)
def test_packed_weights_are_exactly_what_their_tool_computes_with(method: str, group: int, config: Any, name: str, llama: Path, tmp_path: Path) -> None:
    expected = packed_directory(llama, tmp_path / "m", method, group, **config)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert formats(checkpoint)["0.q_proj"] == name and formats(checkpoint)["-1.lm_head"] == "fp16"
    for layer in range(3):
        for linear in LINEARS:
            block = "self_attn" if linear[0] in "qkvo" else "mlp"
            wanted = expected[f"model.layers.{layer}.{block}.{linear}.weight"]
            np.testing.assert_array_equal(checkpoint.tensor(f"{layer}.{linear}").float32(), wanted)
    assert open_checkpoint(tmp_path / "m", quantization="int4").spec.layers == checkpoint.spec.layers


def test_groups_that_do_not_divide_the_inputs_are_cut_smaller(llama: Path, tmp_path: Path) -> None:
    expected = packed_directory(llama, tmp_path / "m", "gptq", 128)  # down_proj has 160 inputs: a group of 128 and one of 32
    checkpoint = open_checkpoint(tmp_path / "m")
    assert formats(checkpoint)["0.down_proj"] == "q4_z32" and formats(checkpoint)["0.q_proj"] == "q4_z64"
    np.testing.assert_array_equal(checkpoint.tensor("1.down_proj").data, expected["model.layers.1.mlp.down_proj.weight"])


def test_an_explicit_dtype_dequantises(llama: Path, tmp_path: Path) -> None:
    expected = packed_directory(llama, tmp_path / "m", "awq", 32)
    checkpoint = open_checkpoint(tmp_path / "m", dtype="fp32")
    assert set(formats(checkpoint).values()) == {"fp32"}
    np.testing.assert_array_equal(checkpoint.tensor("0.up_proj").data, expected["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*gptq and awq"), ({"bits": 8}, "bits = 8"), ({"bits": 3}, "bits = 3"),
        ({"group_size": 48}, "group_size = 48"), ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"), ({"quant_method": "fp8"}, "'fp8'"),
    ],
)  # fmt: skip
def test_other_packings_are_refused_by_name(config: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    packed_directory(llama, tmp_path / "m", "gptq", 32, **config)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "m")


def test_reordered_inputs_and_misfits_are_refused_by_tensor(llama: Path, tmp_path: Path) -> None:
    packed_directory(llama, tmp_path / "m", "gptq", 32)
    import safetensors.numpy

    path, module = tmp_path / "m" / "model.safetensors", "model.layers.1.self_attn.k_proj"
    whole = safetensors.numpy.load_file(path)
    changes = {
        "g_idx": (whole[f"{module}.g_idx"][::-1].copy(), "desc_act"), "qzeros": (whole[f"{module}.qzeros"][:1].copy(), "shape"),
        "scales": (whole[f"{module}.scales"].astype(np.float32) * np.float32(1.0001), "fp16"), "qweight": (whole[f"{module}.qweight"][:4].copy(), "shape"),
    }  # fmt: skip
    for part, (changed, message) in changes.items():
        safetensors.numpy.save_file({**whole, f"{module}.{part}": changed}, path)
        with pytest.raises(UserError, match=rf"k_proj.*{message}"):
            open_checkpoint(tmp_path / "m").blocks("1.k_proj")
    safetensors.numpy.save_file({name: array for name, array in whole.items() if name != f"{module}.scales"}, path)
    with pytest.raises(CheckpointError, match=r"k_proj\.scales' is missing"):
        open_checkpoint(tmp_path / "m")


def quantised_tensors(checkpoint: Checkpoint) -> list[str]:
    return [name for name in quantized.tensor_shapes(checkpoint.spec) if quantized.tensor_format(checkpoint.spec, name) is not None]


def _never(*_: Any) -> Any:
    raise AssertionError("quantised again")
