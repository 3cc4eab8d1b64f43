"""Which weight gets which format, and what plans make of it: bytes, units and times are those of each op's own format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.machines import machine
from tests.planning import DEMO, llama, llama_70b, memory_of, smollm2, workload
from twinpilots.config import EngineConfig
from twinpilots.errors import ProfileMissingError, UserError
from twinpilots.hardware.store import latest_profile, load_profile, profile_key, save_profile
from twinpilots.model.quantization import keeps_stored, quantized_spec, with_formats
from twinpilots.model.spec import ModelSpec
from twinpilots.model.weight_format import FORMATS
from twinpilots.plan.memory import plan_memory, resident_bytes, streamed_bytes
from twinpilots.plan.packets import cut_packets
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits
from twinpilots.planner import Planner

WORK = workload(num=4, input_len=32, output_len=8)


def k_quants(layers: int = 8) -> ModelSpec:
    """As llama.cpp's Q4_K_M: down_proj and v_proj of half of the layers in q6_k, all else in q4_k."""
    spec = llama(layers=layers, hidden=256, heads=4, kv_heads=4, head_dim=64, intermediate=512)
    formats = {f"{i}.{op}": "q4_k" for i in range(layers) for op in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")}
    formats |= {f"{i}.{op}": "q6_k" for i in range(0, layers, 2) for op in ("v_proj", "down_proj")}
    return quantized_spec(spec, formats | {"lm_head": "q6_k", "embed": "q4_k"}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantization", "layers", "ends"), [("int8", "q8_0", "q8_0"), ("int4", "q4_1", "q8_0"), ("int4-fast", "q4_1", "q8_0")])
def test_the_rule(quantization: str, layers: str, ends: str) -> None:
    spec = quantized_spec(llama(), {}, quantization)  # type: ignore[arg-type]
    assert spec.num_kv_heads < spec.num_heads
    shared = ("k_proj", "v_proj")  # by several query heads
    assert {op.format.name for op in spec.ops(64) if op.layer >= 0 and op.name not in shared} == {layers}
    assert {op.format.name for op in spec.ops(64) if op.name in shared} == {"q8_0"}
    alone = quantized_spec(llama(heads=4, kv_heads=4), {}, quantization)  # type: ignore[arg-type]
    assert {op.format.name for op in alone.ops(64) if op.layer >= 0} == {layers}
    assert (spec.format_of(-1, "lm_head").name, spec.table_format.name) == (ends, ends)
    assert spec.weight_dtype == "fp16" and spec.num_parameters == llama().num_parameters
    assert {op.fast for op in spec.ops(64)} == {quantization == "int4-fast"}
    assert sum(spec.rate_keys.count(key) for key in spec.rate_keys if "/fast/" in key) == (3 if quantization == "int4-fast" else 0)


def test_what_has_no_whole_blocks_stays_native_and_nothing_at_all_is_an_error() -> None:
    spec = quantized_spec(llama(intermediate=150), {}, "int4")
    assert spec.format_of(0, "down_proj").name == "fp16" and spec.format_of(0, "gate_up_proj").name == "q4_1"
    with pytest.raises(UserError, match="whole blocks"):
        quantized_spec(llama(hidden=40, heads=4, head_dim=10, kv_heads=4, intermediate=72), {}, "int8")


def test_kept_weights_are_native_and_a_pattern_without_a_match_is_an_error() -> None:
    spec = quantized_spec(llama(), {}, "int4", ["0.*", "*.down_proj", "lm_head"])
    native = {(op.layer, op.name) for op in spec.ops(64) if not op.format.is_quantized}
    assert native == {(op.layer, op.name) for op in spec.ops(64) if op.layer <= 0 or op.name == "down_proj"}
    with pytest.raises(UserError, match=r"--keep head .*0\.q_proj"):
        quantized_spec(llama(), {}, "int4", ["head"])
    with pytest.raises(UserError, match="nothing is quantised"):
        quantized_spec(llama(), {}, None, ["lm_head"])


def test_what_a_file_has_packed_is_kept_where_the_rule_says_so() -> None:
    four = {"0.q_proj": "q4_k", "1.q_proj": "q4_0", "lm_head": "q6_k"}
    assert keeps_stored(four, None) == keeps_stored(four, "int4") == keeps_stored(four, "int4-fast") == {"q4_k", "q4_0", "q6_k"}  # type: ignore[arg-type]
    assert keeps_stored(four, "int8") == frozenset()  # type: ignore[arg-type]
    eight = {"0.q_proj": "q8_0", "1.q_proj": "q8_0", "lm_head": "q4_0"}
    assert keeps_stored(eight, "int8") == {"q8_0"} and keeps_stored(eight, "int4") == frozenset()  # type: ignore[arg-type]


def test_int4_makes_no_weight_anew_that_would_get_no_smaller() -> None:
    """A mix of mostly five bits, as llama.cpp writes for widths that are no multiple of 256."""
    five = dict.fromkeys(("0.q_proj", "0.k_proj", "0.gate_up_proj", "lm_head"), "q5_0")
    stored = {**five, "0.v_proj": "q8_0", "0.o_proj": "q4_0", "0.down_proj": "q6_k"}
    for quantization in ("int4", "int4-fast"):
        made = quantized_spec(llama(), stored, quantization)  # type: ignore[arg-type]
        assert dict(made.layers[0].formats) == {
            "q_proj": "q4_1", "k_proj": "q5_0", "v_proj": "q8_0", "o_proj": "q4_0", "gate_up_proj": "q4_1", "down_proj": "q4_1",
        }  # fmt: skip
        assert made.head_format == "q5_0" and dict(made.layers[1].formats)["o_proj"] == "q4_1"
    eight = quantized_spec(llama(), stored, "int8")  # type: ignore[arg-type]
    assert {chosen for layer in eight.layers for _, chosen in layer.formats} == {"q8_0"} and eight.head_format == "q8_0"


def test_units_are_whole_heads_and_whole_blocks_on_one_grid() -> None:
    for unit_rows in (1, 8, 48, 64, 300):
        ops = {op.name: op for op in k_quants().ops(unit_rows) if op.layer == 0}
        assert ops["o_proj"].unit_rows % 256 == ops["o_proj"].unit_rows % 64 == 0
        assert ops["gate_up_proj"].unit_rows == ops["down_proj"].unit_rows and ops["down_proj"].unit_rows % 256 == 0
        assert ops["q_proj"].unit_rows % 64 == 0
    plain = {op.name: op.unit_rows for op in llama(head_dim=24).ops(64)}
    assert plain == {"q_proj": 48, "k_proj": 48, "v_proj": 48, "o_proj": 48, "gate_up_proj": 64, "down_proj": 64, "lm_head": 64}


def test_cutting_inputs_within_a_block_is_refused() -> None:
    spec = k_quants()
    with pytest.raises(ValueError, match="input_block 32"):
        replace(spec, input_block=32)


def test_bytes_of_known_models() -> None:
    elements = sum(op.rows * op.row_elements for op in llama_70b().ops(64))
    head, shared = 128256 * 8192, 80 * 2 * 8 * 128 * 8192
    assert quantized_spec(llama_70b(), {}, "int8").linear_bytes == elements * 34 // 32
    assert quantized_spec(llama_70b(), {}, "int4").linear_bytes == (elements - head - shared) * 20 // 32 + (head + shared) * 34 // 32
    assert quantized_spec(llama_70b(), {}, "int4").table_bytes == head * 34 // 32


def test_a_file_that_mixes_formats_from_layer_to_layer_is_counted_exactly() -> None:
    spec = k_quants()
    assert spec.format_classes == (0, 1) * 4
    plan = solve(spec, machine(), WORK, Limits(gpu_bytes=2 << 20, host_bytes=1 << 30)).plan
    plan.check(spec)
    bucket = plan.buckets[0]
    ops = {(op.layer, op.name): op for op in spec.ops(plan.unit_rows)}
    splits = [(ops[layer if layer < spec.num_layers else -1, name], split) for layer, each in enumerate(bucket.splits) for name, split in each.items()]
    assert resident_bytes(spec, plan) == sum(-(-split.resident * op.row_bytes // 64) * 64 for op, split in splits) > 0
    assert streamed_bytes(spec, plan, bucket) == sum(split.streamed * op.row_bytes for op, split in splits)
    assert sum(packet.segments[0].num_bytes > 0 for packet in cut_packets(spec, plan, bucket)) == len(cut_packets(spec, plan, bucket))
    assert plan_memory(spec, plan).gpu.total <= 2 << 20


@pytest.mark.parametrize("policy", ["auto", "stream", "layer-split", "hetegen", "twinpilots", "flexgen"])
def test_every_policy_plans_mixed_formats_within_memory(policy: str) -> None:
    spec = k_quants(4)
    limits = Limits(gpu_bytes=1 << 20, host_bytes=1 << 26)
    solution = solve(spec, machine(), WORK, limits, policy=policy, compare=False)  # type: ignore[arg-type]
    solution.plan.check(spec)
    assert solution.memory.gpu.total <= limits.gpu_bytes
    assert 0 < solution.prediction.tokens_per_s <= solution.prediction.plan_bound * 1.001


def test_fewer_bytes_make_a_streamed_model_faster() -> None:
    limits = replace(memory_of(DEMO), gpu_bytes=40 << 20)
    rates = [
        solve(quantized_spec(smollm2(), {}, quantization), DEMO, WORK, limits, policy="stream", compare=False).prediction.tokens_per_s
        for quantization in (None, "int8", "int4")
    ]  # type: ignore[arg-type]
    assert rates[1] > 1.5 * rates[0] and rates[2] > 1.2 * rates[1]


def test_a_profile_without_the_models_format_says_what_to_measure() -> None:
    spec = with_formats(llama(), {"0.q_proj": "q4_0"}, fast=True)
    with pytest.raises(ProfileMissingError, match=r"q4_0/fast/out.*twinpilots profile"):
        solve(spec, machine(), WORK, Limits(gpu_bytes=1 << 20, host_bytes=1 << 26), policy="stream", compare=False)
    assert machine().missing(spec.rate_keys) == ("q4_0/fast/out",)


def test_profiles_of_several_formats_live_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native, small = llama(), quantized_spec(llama(), {}, "int4")
    key = profile_key("emulated:demo", 1, native, "avx2")
    assert key == profile_key("emulated:demo", 1, small, "avx2") != profile_key("emulated:demo", 1, llama(dtype="bf16"), "avx2")
    for spec in (native, small):
        whole = machine()
        assert whole.gpu is not None
        cpu, gpu = (replace(side, linear={name: side.linear[name] for name in spec.rate_keys}) for side in (whole.cpu, whole.gpu))
        save_profile(key, replace(whole, cpu=cpu, gpu=gpu), latest_for="emulated:demo")
    for found in (load_profile(key), latest_profile("emulated:demo")):
        assert found is not None and found.missing((*native.rate_keys, *small.rate_keys)) == ()


def test_the_formats_sizes() -> None:
    bits = {name: 8 * weights.bytes_per_weight for name, weights in FORMATS.items() if weights.is_quantized}
    assert bits == {
        "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q4_z32": 5.0, "q4_z64": 4.5, "q4_z128": 4.25, "q4_k": 4.5, "q5_0": 5.5, "q5_1": 6.0, "q5_k": 5.5,
        "q6_k": 6.5625,
    }  # fmt: skip


def test_a_frozen_plan_belongs_to_the_formats_of_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where as many bytes are quantised, only others: their layouts differ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    variants = (("int4", ()), ("int4-fast", ()), ("int8", ()), ("int4", ("0.q_proj",)), ("int4", ("1.q_proj",)), ("int4", ("embed",)))
    config = EngineConfig.of(
        dtype="auto", quantization=None, device="cpu", gpu_memory=None, host_memory=None, max_model_len=None, max_num_seqs=None, kv_cache_dtype="auto",
        policy="cpu", plan=None, threads=None, seed=0, deterministic=True, unit_rows=None,
    )  # fmt: skip
    for quantization, keep in (*variants, *variants):
        spec = quantized_spec(llama(), {}, quantization, keep)  # type: ignore[arg-type]
        Planner(config, spec, DEMO, "fingerprint").plan_for(WORK)
    assert len(list(tmp_path.rglob("plans/*.json"))) == len(variants)
