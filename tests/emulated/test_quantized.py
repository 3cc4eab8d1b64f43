"""Quantised models on both pilots: the logits of transformers in fp32 on the very weights that the quantised ones stand for, wherever they are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.hand_plans import random_plan
from tests.harness import NUM_TOKENS, PROMPTS, Rig, log_softmax, relative_rms
from tests.planning import llama
from tests.quantized import reference_model
from twinpilots import LLM, SamplingParams
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.model.quantization import quantized_spec
from twinpilots.model.spec import ModelSpec
from twinpilots.profiling import measure_machine
from twinpilots.runtime.serial import SerialGpu

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("balanced_machine")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1)
FAMILIES = ("llama-64", "opt-64")
QUANTIZATIONS = ("int8", "int4", "int4-fast")
# Relative RMS of logits. exact: activations are rounded to 16 bits. fast: to 8 bits, about 0.4 % of their largest value per group of 32, in every linear.
TOLERANCE = {"int8": 1e-3, "int4": 1e-3, "int4-fast": 5e-2}


@dataclass(frozen=True)
class Quantised:
    path: Path
    spec: ModelSpec
    references: list[tuple[list[int], np.ndarray]]  # per prompt: greedy tokens and the logits they were chosen from


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Quantised]:
    root, made = tmp_path_factory.mktemp("quantised"), dict[tuple[str, str], Quantised]()

    def get(family: str, quantization: str) -> Quantised:
        weights = quantization.removesuffix("-fast")  # the same weights
        if (family, weights) not in made:
            path = root / family
            if not path.exists():
                zoo.save(family, 0, path)
            with closing(open_checkpoint(path, quantization=weights)) as checkpoint:  # type: ignore[arg-type]
                model = reference_model(path, checkpoint)
                made[family, weights] = Quantised(path, checkpoint.spec, [zoo.greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS])
        return made[family, weights]

    return get


@pytest.fixture(autouse=True)
def without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpilots.planner.Planner.bounds", lambda _self, _workload: (None, None))


def first_errors(model: Quantised, llm: LLM) -> list[float]:
    """Relative RMS of the first token's logprobs of every prompt."""
    outputs = [request.outputs[0] for request in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    rows = [np.array([output.logprobs[0][token].logprob for token in range(llm.spec.vocab_size)]) for output in outputs if output.logprobs]
    return [relative_rms(row, log_softmax(reference[0])) for row, (_, reference) in zip(rows, model.references, strict=True)]


CASES = [
    *[("emulated:demo", policy, "int8", "llama-64") for policy in ("stream", "layer-split")],
    *[("emulated:demo", policy, "int4", family) for policy in ("stream", "cpu", "auto") for family in FAMILIES],
    *[("emulated:demo", policy, "int4-fast", "llama-64") for policy in ("cpu", "auto", "hetegen")],
    *[("cpu", "cpu", quantization, family) for quantization in QUANTIZATIONS for family in FAMILIES],
]


@pytest.mark.parametrize(("device", "policy", "quantization", "family"), CASES)
def test_logits_of_every_policy(device: str, policy: str, quantization: str, family: str, quantised: Any) -> None:
    model = quantised(family, quantization)
    memory = {} if device == "cpu" else {"gpu_memory": model.spec.linear_bytes // 3 + (48 << 10)}
    with LLM(str(model.path), quantization=quantization, device=device, policy=policy, unit_rows=8, max_num_seqs=3, **memory) as llm:
        errors = first_errors(model, llm)
        shares = llm.stats()["weights_frac"]
    assert max(errors) < TOLERANCE[quantization]
    if policy == "hetegen":
        assert min(shares.values()) > 0


@pytest.mark.parametrize("seed", [1, 4])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_hand_plans_with_all_three_shares(quantization: str, seed: int, quantised: Any) -> None:
    model = quantised("llama-64", quantization)
    checkpoint = open_checkpoint(model.path, quantization=quantization)  # type: ignore[arg-type]
    plan = random_plan(checkpoint.spec, seed)
    splits = [split for layer in plan.buckets[1].splits for split in layer.values()]
    assert all(sum(getattr(split, share) for split in splits) > 0 for share in ("resident", "streamed", "cpu"))
    with Rig(checkpoint, plan, adversarial_seed=seed) as rig:
        tokens = rig.generate(PROMPTS, NUM_TOKENS)
    for number, (reference, logits) in enumerate(model.references):
        found = np.stack(rig.logits[str(number)])
        same = next((i for i, (ours, theirs) in enumerate(zip(tokens[number], reference, strict=True)) if ours != theirs), len(reference))
        assert relative_rms(found[: same + 1], logits[: same + 1]) < TOLERANCE[quantization]
        if quantization != "int4-fast":
            gaps = np.sort(logits, -1)
            assert same == len(reference) or gaps[same, -1] - gaps[same, -2] < 1e-2


def test_the_torch_twin_reads_the_same_weights(quantised: Any) -> None:
    for quantization in QUANTIZATIONS:
        model = quantised("llama-64", quantization)
        checkpoint = open_checkpoint(model.path, quantization=quantization)  # type: ignore[arg-type]
        device = SerialGpu(1 << 24)
        with Rig(checkpoint, random_plan(checkpoint.spec, 1), device=device, runner=device) as rig:
            rig.generate(PROMPTS[:1], 2)
        assert relative_rms(rig.logits["0"][0], model.references[0][1][0]) < TOLERANCE[quantization]


def test_two_pilots_compute_the_same_logits_for_the_same_weights(quantised: Any) -> None:
    """Everything streamed to the GPU against everything on the CPU: both compute with the same integers, and differ by rounding only."""
    model = quantised("llama-64", "int4")
    rows = []
    for device, policy in (("emulated:demo", "stream"), ("cpu", "cpu")):
        with LLM(str(model.path), quantization="int4", device=device, policy=policy, unit_rows=8, max_num_seqs=3) as llm:
            (output,) = llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
        assert output.outputs[0].logprobs
        rows.append(np.array([output.outputs[0].logprobs[0][token].logprob for token in range(model.spec.vocab_size)]))
    assert relative_rms(rows[0], rows[1]) < 1e-5


def test_a_gguf_that_mixes_formats_from_layer_to_layer_runs_packed_on_both_pilots(tmp_path: Path) -> None:
    gguf_files = pytest.importorskip("tests.unit.test_checkpoint_gguf")
    source = zoo.save("llama-256", 0, tmp_path / "source")

    def kind_of(name: str) -> str:
        part, layer = name.split(".")[-2], name.split(".")[1]
        return "Q6_K" if part == "output" or (part in ("attn_v", "ffn_down") and layer != "1") else "Q4_0" if part == "attn_output" else "Q4_K"

    path = gguf_files.write_gguf(source, tmp_path / "model.gguf", "llama", open_checkpoint(source), kind_of)
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec.format_classes == (0, 1, 0)
    assert checkpoint.spec.rate_keys == ("q4_0/in", "q4_k/in", "q4_k/out", "q6_k/in", "q6_k/out")
    reference, logits = zoo.greedy(reference_model(source, checkpoint), PROMPTS[0], 4)
    for plan in (random_plan(checkpoint.spec, 3, kv_dtype="fp32"), random_plan(checkpoint.spec, 5, gpu=False, kv_dtype="fp32")):
        with Rig(open_checkpoint(path), plan) as rig:
            (tokens,) = rig.generate(PROMPTS[:1], 4)
        assert relative_rms(rig.logits["0"][0], logits[0]) < TOLERANCE["int4"]
        assert tokens[0] == reference[0]


def test_a_profile_has_the_formats_of_the_model() -> None:
    spec = quantized_spec(llama(hidden=64, intermediate=160), {}, "int4-fast", ["*.o_proj"])
    profile = measure_machine("cpu", spec, quick=True, store=False)
    assert set(profile.cpu.linear) == set(spec.rate_keys) == {"q4_1/fast/out", "q4_1/fast/in", "q8_0/fast/out", "fp16/in"}
    assert all(0 < curve.y[0] < 1e-6 for curve in profile.cpu.linear.values())
    assert profile.cpu.kv_attention.keys() == {"int8"}, "attention is measured over int8 KV, too"


def test_kept_weights_and_a_second_quantisation_of_the_same_model_are_told_apart(quantised: Any) -> None:
    model = quantised("llama-64", "int4")
    with LLM(str(model.path), quantization="int4", keep="*_proj", device="cpu", unit_rows=8, max_num_seqs=3) as llm:
        errors = first_errors(model, llm)
        assert llm.spec.rate_keys == ("fp32/in", "fp32/out", "q8_0/out")
    assert min(errors) > 10 * TOLERANCE["int4"], "unquantised layers differ from quantised ones by more than rounding"
