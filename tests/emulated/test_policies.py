"""Every policy, through the public interface, on a GPU with room for a third of the model: the tokens of transformers, and a policy is what it says it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.harness import NUM_TOKENS, PROMPTS, SavedModel, ZooModel, log_softmax, relative_rms
from twinpilots import LLM, SamplingParams
from twinpilots.errors import LimitError
from twinpilots.plan.memory import plan_memory
from twinpilots.plan.plan import POLICIES, Plan
from twinpilots.session import Session
from twinpilots.units import parse_bytes

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("balanced_machine")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1)
UNIT_ROWS = 8
ROUNDING_BYTES = 4096  # of the host arena, left at the end of its program area


def open_llm(model: SavedModel, policy: str, gpu_memory: int | str | None = None, **options: Any) -> LLM:
    given = {"device": "emulated:demo", "unit_rows": UNIT_ROWS, "max_num_seqs": 3} | options
    return LLM(str(model.path), policy=policy, gpu_memory=model.third_bytes if gpu_memory is None else gpu_memory, **given)


def generate(llm: LLM) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """(token ids, logprobs [tokens, vocab]) of every prompt."""
    outputs = [request.outputs[0] for request in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    rows = [np.array([[named[token].logprob for token in range(llm.spec.vocab_size)] for named in output.logprobs or ()]) for output in outputs]
    return [output.token_ids for output in outputs], rows


def assert_as_reference(model: SavedModel, llm: LLM, tolerance: float = 1e-4) -> None:
    tokens, logprobs = generate(llm)
    if tolerance <= 1e-4:
        model.assert_tokens(tokens)
    for found, (_, reference) in zip(logprobs, model.references, strict=True):
        assert relative_rms(found[0], log_softmax(reference[0])) < tolerance


@pytest.fixture(autouse=True)
def without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`stats` prices every policy for its two bounds; here that would cost more than everything else."""
    monkeypatch.setattr("twinpilots.planner.Planner.bounds", lambda _self, _workload: (None, None))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plan of every pass that ran."""
    seen: list[Plan] = []
    execute = Session.execute

    def counted(self: Session, batch: Any, *, more: bool) -> np.ndarray:
        seen.append(self.plan)
        return execute(self, batch, more=more)

    monkeypatch.setattr(Session, "execute", counted)
    return seen


def not_resident_bytes(model: SavedModel, plan: Plan) -> int:
    splits = plan.buckets[0].splits
    return sum((op.rows - splits[op.layer][op.name].resident) * op.row_bytes for op in model.spec.ops(plan.unit_rows))


def assert_is_what_it_says(policy: str, model: SavedModel, llm: LLM, passes: list[Plan]) -> None:
    stats, plan = llm.stats(), llm.plan
    frac, busy, moved = stats["weights_frac"], stats["busy_s"], stats["bytes"]
    splits = [split for bucket in plan.buckets for layer in bucket.splits for split in layer.values()]
    assert sum(frac.values()) == pytest.approx(1.0)
    assert (stats["policy"], stats["emulated"]) == (policy, True)
    if policy == "stream":
        assert frac["cpu"] == busy["cpu"] == 0
        assert moved["link_weights"] == sum(not_resident_bytes(model, each) for each in passes) > 0
    if policy == "cpu":
        assert frac["cpu"] == 1
        assert busy["gpu"] == busy["link"] == sum(moved.values()) == stats["peak_bytes"]["gpu"] == 0
    if policy == "layer-split":
        assert moved["link_weights"] == frac["streamed"] == 0
        for bucket in plan.buckets:
            for layer in bucket.splits:
                assert len({(split.resident == split.rows, split.cpu == split.rows) for split in layer.values()}) == 1, "whole layers"
    if policy == "twinpilots":
        assert all(split.rows in (split.resident, split.streamed, split.cpu) for split in splits), "whole ops"
    if policy == "flexgen":
        assert frac["cpu"] == 0
    if policy == "hetegen":
        assert min(frac["streamed"], frac["cpu"], busy["cpu"], busy["gpu"]) > 0
    if policy == "resident":
        assert (frac["resident"], moved["link_weights"], busy["cpu"]) == (1.0, 0, 0.0)


def assert_memory_as_planned(model: SavedModel, llm: LLM, limit_bytes: int) -> None:
    stats = llm.stats()
    use, peak = plan_memory(model.spec, llm.plan), stats["peak_bytes"]
    assert use.gpu.total <= peak["gpu"] <= limit_bytes
    if stats["plan_changes"] == 0:
        assert peak["gpu"] == use.gpu.total
        assert 0 <= use.host.total - peak["host"] <= ROUNDING_BYTES


def named_limit(error: LimitError, memory: str = "gpu_memory") -> str:
    """The size that the message says would do."""
    message = str(error)
    assert "\n" not in message
    found = re.search(rf"--{memory.replace('_', '-')} to (\d+[KMG]iB)", message)
    assert found, message
    return found.group(1)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "resident"])
@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_tokens_and_nature_of_every_policy(family: str, policy: str, zoo_model: ZooModel, passes: list[Plan]) -> None:
    model = zoo_model(family, seed=0)
    with open_llm(model, policy) as llm:
        assert_as_reference(model, llm)
        assert_is_what_it_says(policy, model, llm, passes)
        assert_memory_as_planned(model, llm, model.third_bytes)


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_resident_refuses_what_does_not_fit_and_names_what_would(family: str, zoo_model: ZooModel, passes: list[Plan]) -> None:
    model = zoo_model(family, seed=0)
    with pytest.raises(LimitError, match="policy resident needs at least") as refused:
        open_llm(model, "resident").close()
    enough = named_limit(refused.value)
    with open_llm(model, "resident", enough) as llm:
        assert_as_reference(model, llm)
        assert_is_what_it_says("resident", model, llm, passes)


@pytest.mark.parametrize("policy", ["auto", "stream", "hetegen"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_other_weights_of_the_same_family(family: str, policy: str, zoo_model: ZooModel) -> None:
    model = zoo_model(family, seed=1)
    with open_llm(model, policy) as llm:
        assert_as_reference(model, llm)


# The reference computes in fp32 with the same stored weights. With fp32 pages only the order of sums differs; 16-bit pages round every key and value
# once, by 2^-9 (bf16) or 2^-12 (fp16) relative.
@pytest.mark.parametrize(
    ("dtype", "pages", "tolerance"), [("bfloat16", "fp32", 1e-4), ("float16", "fp32", 1e-4), ("bfloat16", "auto", 2e-2), ("float16", "auto", 3e-3)]
)
@pytest.mark.parametrize("family", ["llama-yarn", "gemma2", "opt"])
def test_sixteen_bit_weights_compute_in_fp32(family: str, dtype: str, pages: str, tolerance: float, zoo_model: ZooModel) -> None:
    model = zoo_model(family, seed=0, dtype=dtype)
    for policy in ("hetegen", "cpu"):
        with open_llm(model, policy, model.third_bytes * 2, kv_cache_dtype=pages) as llm:
            assert llm.spec.weight_dtype == {"bfloat16": "bf16", "float16": "fp16"}[dtype]
            assert_as_reference(model, llm, tolerance)


def test_without_a_profile_the_machine_is_measured_first(
    zoo_model: ZooModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:  # fmt: skip
    monkeypatch.undo()  # the real measurement
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = zoo_model("llama", seed=0)
    with caplog.at_level("WARNING"), open_llm(model, "auto") as llm:
        assert_as_reference(model, llm)
    assert "twinpilots profile" in caplog.text


@pytest.mark.parametrize("as_file", [False, True])
def test_a_plan_can_be_taken_from_one_llm_edited_and_given_to_another(as_file: bool, zoo_model: ZooModel, tmp_path: Path) -> None:
    model = zoo_model("qwen3", seed=0)
    with open_llm(model, "hetegen") as llm:
        generate(llm)
        plan = llm.plan
    plan = replace(plan, policy="auto", buckets=tuple(replace(bucket, micro_batches=2) for bucket in plan.buckets))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    with open_llm(model, "auto", plan=file if as_file else plan) as llm:
        assert llm.plan == plan
        assert_as_reference(model, llm)
        assert llm.plan == plan, "a plan set by hand stays"


@pytest.mark.parametrize("memory", ["gpu_memory", "host_memory"])
@pytest.mark.parametrize("policy", ["auto", "stream", "flexgen", "hetegen", "layer-split", "twinpilots", "resident"])
def test_a_limit_too_small_names_one_that_works(policy: str, memory: str, zoo_model: ZooModel) -> None:
    """Refused in one line before anything runs; with exactly the size that the line names, it runs and keeps to it."""
    model = zoo_model("llama", seed=0)
    limits: dict[str, Any] = {"gpu_memory": "8MiB", "host_memory": None} | {memory: 4096}
    if policy == "auto" and memory == "gpu_memory":
        with open_llm(model, policy, **limits) as llm:  # the CPU alone can always do it
            assert_as_reference(model, llm)
            return
    with pytest.raises(LimitError, match=rf"policy {policy} needs at least") as refused:
        open_llm(model, policy, **limits).close()
    limits[memory] = named_limit(refused.value, memory)
    with open_llm(model, policy, **limits) as llm:
        assert_as_reference(model, llm)
        assert llm.stats()["peak_bytes"]["gpu" if memory == "gpu_memory" else "host"] <= parse_bytes(limits[memory])
