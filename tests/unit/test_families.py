"""Configs become the right ModelSpec: parameters as published, every spelling alike, everything unsupported or malformed named."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import numpy as np
import pytest

from twinpilots.errors import CheckpointError, UnsupportedModelError, UserError
from twinpilots.model.dummy import CONFIGS, DummyCheckpoint, dummy_spec
from twinpilots.model.families import FAMILIES, round_to, spec_from_config
from twinpilots.model.quantization import with_formats
from twinpilots.model.spec import ModelSpec
from twinpilots.model.tensor_names import gguf_spelling, hf_spelling, tensor_plan, tensor_shapes
from twinpilots.model.weight_format import FORMATS

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 131, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 1e-6,
}  # fmt: skip
PUBLISHED = {
    "opt-6.7b": 6_658_473_984, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-32b": 32_763_876_352, "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264, "gemma-2-27b": 27_227_128_320,
    "smollm2-135m": 134_515_008, "llama-13b": 13_015_864_320,
}  # fmt: skip


def spec(**changes: Any) -> ModelSpec:
    return spec_from_config({**LLAMA, **changes}, name="test")


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_dummy_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert dummy_spec(name).num_parameters == parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_tensors_add_up_to_its_parameters(name: str) -> None:
    model = dummy_spec(f"dummy:{name}")
    shapes = tensor_shapes(model)
    elements = sum(int(np.prod(shape)) for tensor_id, shape in shapes.items() if not (model.tied and tensor_id == "lm_head"))
    assert elements == model.num_parameters


def test_unknown_dummy_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"dummy:gpt-5.*opt-6\.7b"):
        dummy_spec("dummy:gpt-5")


def test_dummy_weights_are_deterministic_true_to_shape_and_of_sane_size() -> None:
    model = spec_from_config({**LLAMA, "tie_word_embeddings": True}, name="tiny", dtype="bf16")
    one, two, other = DummyCheckpoint(model, 1), DummyCheckpoint(model, 1), DummyCheckpoint(model, 2)
    for tensor_id, shape in tensor_shapes(model).items():
        tensor = one.tensor(tensor_id)
        assert tensor.shape == shape
        np.testing.assert_array_equal(tensor.data, two.tensor(tensor_id).data)
    weights = one.tensor("1.down_proj")
    assert weights.dtype == "bf16" and abs(weights.float32().std() * 72**0.5 - 1) < 0.1
    assert not np.array_equal(weights.data, other.tensor("1.down_proj").data)
    assert not np.array_equal(weights.data, one.tensor("0.down_proj").data)
    np.testing.assert_array_equal(one.tensor("lm_head").data, one.tensor("embed").data)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.is_quantized])
def test_dummy_weights_of_every_quantised_format_are_of_sane_size(name: str) -> None:
    """Also of those that only files have: any model's widths are rehearsed with them."""
    plain = spec_from_config({**LLAMA, "hidden_size": 1280, "intermediate_size": 768}, name="tiny", dtype="bf16")
    checkpoint = DummyCheckpoint(with_formats(plain, {"0.q_proj": name, "1.down_proj": name}, fast=False))
    for tensor_id, fan_in in (("0.q_proj", 1280), ("1.down_proj", 768)):
        weights = checkpoint.tensor(tensor_id).float32() * fan_in**0.5
        assert weights.shape[1] == fan_in and abs(weights.std() - 1) < 0.05 and abs(weights.mean()) < 0.15
    assert not np.array_equal(checkpoint.tensor("0.q_proj").data[:, :256], checkpoint.tensor("0.q_proj").data[:, 256:512])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv7"}, "architecture 'rwkv7'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "swiglu2"}, "activation 'swiglu2'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"dtype": "float8_e4m3fn"}, "weight dtype 'float8_e4m3fn'"),
        ({"model_type": "opt", "ffn_dim": 72, "word_embed_proj_dim": 20}, "word_embed_proj_dim"),
        ({"model_type": "opt", "ffn_dim": 72, "do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_we_do_not_run_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": -40}, "'hidden_size' is -40"),
        ({"hidden_size": "40"}, "'hidden_size' is '40'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"vocab_size": 10**30}, "'vocab_size'"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 40 is not a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps'"),
        ({"rope_theta": "big"}, "'rope_theta'"),
        ({"rope_scaling": "linear"}, "'rope_scaling'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "'factor' is -1"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'short_factor'"),
        ({"head_dim": 7}, "rotary dimension 7"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings'"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "'layer_types'"),
        ({"model_type": "gemma3", "text_config": [1]}, "'text_config'"),
    ],
)
def test_malformed_fields_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec(**config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_corrupted_field_is_an_error_of_ours_or_harmless(family: str) -> None:
    """Whatever one field holds, the reader answers with a spec or one of our errors, never with another exception."""
    base: dict[str, Any] = {**LLAMA, "model_type": family, "ffn_dim": 72, "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}}
    for key in [*base, "head_dim", "sliding_window", "layer_types", "rope_scaling", "partial_rotary_factor", "text_config", "query_pre_attn_scalar"]:
        for bad in (None, -1, 0, 1.5, 2**70, "x", [], [None], {}, {"a": []}, True, float("inf")):
            config = copy.deepcopy(base)
            config[key] = bad
            with contextlib.suppress(CheckpointError, UnsupportedModelError):
                spec_from_config(config, name="fuzzed")


def test_old_and_new_rope_spellings_agree() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = spec(rope_theta=500_000.0, rope_scaling=scaling)
    new = spec(rope_parameters={**scaling, "rope_theta": 500_000.0})
    assert old.ropes == new.ropes and old.ropes != spec().ropes
    typed = spec(rope_scaling={"type": "linear", "factor": 2.0})
    np.testing.assert_allclose(typed.ropes[0].inv_freq, np.array(spec().ropes[0].inv_freq) / 2)
    assert spec(rope_scaling={"type": "dynamic", "factor": 1.0}).ropes == spec().ropes


def test_the_hand_computed_rotary_table() -> None:
    table = spec(rope_theta=10_000.0, head_dim=4).ropes[0]
    np.testing.assert_allclose(table.inv_freq, [1.0, 0.01], rtol=1e-6)


def test_gemma3_reads_nested_text_config_with_two_rotary_bases_in_both_spellings() -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 12, "sliding_window": 7, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    old = spec_from_config({"model_type": "gemma3", "text_config": {**text, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}, name="old")
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    new = spec_from_config({"model_type": "gemma3", "text_config": {**text, "rope_parameters": ropes}}, name="new")
    assert old.ropes == new.ropes and old.layers == new.layers
    assert [layer.window for layer in old.layers] == [7, 7, 7, 7, 7, None, 7]
    assert [layer.rope for layer in old.layers] == [0, 0, 0, 0, 0, 1, 0]
    assert old.tied and old.norm_offset == 1.0 and old.post_norms and old.qk_norm


def test_sliding_windows_of_each_family() -> None:
    assert {layer.window for layer in spec(model_type="mistral", sliding_window=7).layers} == {7}
    assert {layer.window for layer in spec(model_type="mistral", sliding_window=None).layers} == {None}
    assert {layer.window for layer in spec(model_type="qwen2", sliding_window=7).layers} == {None}
    slides = spec(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=2)
    assert [layer.window for layer in slides.layers] == [None, None, 7]
    assert [layer.window for layer in spec(model_type="gemma2", sliding_window=7).layers] == [7, None, 7]


def test_gemmas_embedding_scale_is_rounded_to_the_weights_precision() -> None:
    assert round_to(3072**0.5, "bf16") == 55.5
    gemma = {**LLAMA, "model_type": "gemma2", "hidden_size": 3072, "head_dim": 12}
    assert spec_from_config({**gemma, "dtype": "bfloat16"}, name="g").embed_scale == 55.5
    assert abs(spec_from_config({**gemma, "dtype": "float32"}, name="g").embed_scale - 3072**0.5) < 1e-5


def test_fused_tensors_are_cut_into_rows_that_cover_the_file_once() -> None:
    model = spec_from_config({**LLAMA, "model_type": "phi3"}, name="phi")
    for plan in (tensor_plan(model, hf_spelling(model, ())), tensor_plan(model, gguf_spelling(model), "gguf")):
        rows = [plan[f"1.{name}"].rows for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")]
        assert rows == [(0, 40), (40, 60), (60, 80), (0, 72), (72, 144)]
        assert plan["1.k_proj"].shape == (80, 40) and plan["1.up_proj"].shape == (144, 40)
        assert plan["1.k_proj"].name == plan["1.q_proj"].name != plan["0.q_proj"].name


def test_every_family_has_a_name_for_every_tensor() -> None:
    for model_type in FAMILIES:
        model = spec_from_config({**LLAMA, "model_type": model_type, "ffn_dim": 72, "attention_bias": True}, name=model_type)
        plan = tensor_plan(model, hf_spelling(model, ()))
        assert plan.keys() == tensor_shapes(model).keys()
        assert all("{" not in source.name for source in plan.values())


def test_specs_survive_json_configs_of_transformers() -> None:
    zoo = pytest.importorskip("tests.zoo")
    pytest.importorskip("transformers")
    for family in zoo.FAMILIES:
        config = json.loads(zoo._config(family).to_json_string())
        assert spec_from_config(config, name=family).hidden_size == 40
