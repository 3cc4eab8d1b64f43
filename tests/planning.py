"""Small models and machines for the planner's tests: built by hand, so that every figure can be checked with pencil and paper."""

from __future__ import annotations

from dataclasses import replace

from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import LayerSpec, ModelSpec, RopeSpec, WeightDtype
from twinpilots.plan.workload import Limits, Workload

DEMO = replace(PRESETS["demo"], gpu_memory_bytes=84 << 20)  # a third of the 16-bit SmolLM2, which these tests plan
RTX_4090 = PRESETS["rtx-4090"]


def llama(
    *, layers: int = 4, hidden: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, intermediate: int = 160, vocab: int = 130,
    tied: bool = False, dtype: WeightDtype = "fp16", max_model_len: int = 4096,
) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        name="small", family="llama", vocab_size=vocab, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=intermediate, layers=(LayerSpec(),) * layers, max_model_len=max_model_len, weight_dtype=dtype, activation="silu", tied=tied,
        ropes=(RopeSpec(rotary_dim=head_dim, inv_freq=(1.0,) * (head_dim // 2)),),
    )  # fmt: skip


def smollm2() -> ModelSpec:
    return llama(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocab=49152, tied=True, max_model_len=8192)


def llama_70b() -> ModelSpec:
    return llama(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, intermediate=28672, vocab=128256, dtype="bf16", max_model_len=8192)


def workload(num: int = 16, input_len: int = 128, output_len: int = 32) -> Workload:
    return Workload(num_requests=num, input_len=input_len, output_len=output_len, max_num_seqs=num)


def memory_of(profile: HardwareProfile) -> Limits:
    return Limits(gpu_bytes=profile.gpu_memory_bytes, host_bytes=profile.host_memory_bytes)
