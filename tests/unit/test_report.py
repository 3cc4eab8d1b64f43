"""The plan's document has the promised keys and adds up; its text says what is predicted and emulated, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.planning import DEMO, RTX_4090, llama, llama_70b, memory_of, smollm2, workload
from twinpilots.plan.plan import POLICIES, Policy
from twinpilots.plan.report import Document, plan_document, plan_text
from twinpilots.plan.solver import solve


@pytest.fixture(scope="module")
def document() -> Document:
    limits = memory_of(DEMO)
    return plan_document(solve(smollm2(), DEMO, workload(), limits), smollm2(), DEMO, workload(), limits)


def test_the_document_has_the_promised_keys(document: Document) -> None:
    promised = {"schema", "model", "hardware", "workload", "policy", "prediction", "phases", "operations", "kv", "memory", "policies"}
    assert promised <= set(document) and document["schema"] == 1
    assert {"prefill_s", "step_s", "tokens_per_s", "plan_bound", "hardware_bound", "bottleneck"} <= set(document["prediction"])
    assert set(document["phases"]) == {"prefill", "decode"} and all({"tokens_per_pass", "operations"} <= set(p) for p in document["phases"].values())
    assert set(document["kv"]) == {"gpu", "host_cpu", "host_streamed"} and set(document["memory"]) == {"gpu", "host", "disk"}
    assert set(document["policies"]) == set(POLICIES)
    assert json.loads(json.dumps(document)) == document


def test_every_operation_is_there_and_its_fractions_add_up(document: Document) -> None:
    assert document["operations"] == document["phases"]["decode"]["operations"]
    assert len(document["operations"]) == 30 * 6 + 1 and document["operations"][-1]["layer"] == -1
    for operation in document["operations"]:
        assert operation["resident"] + operation["streamed"] + operation["cpu"] == pytest.approx(1.0)
    assert sum(document["kv"].values()) == pytest.approx(1.0)


def test_memory_adds_up_and_keeps_the_limits(document: Document) -> None:
    for tier in document["memory"].values():
        assert tier["total"] == tier["weights"] + tier["kv"] + tier["ring"] + tier["workspace"] <= tier["limit"]
    assert document["memory"]["gpu"]["limit"] == DEMO.gpu_memory_bytes


def test_infeasible_policies_have_a_reason_and_no_rate(document: Document) -> None:
    assert document["policies"]["resident"]["tokens_per_s"] is None and "--gpu-memory" in document["policies"]["resident"]["reason"]
    assert document["policies"]["stream"]["tokens_per_s"] > 0 and document["policies"]["stream"]["reason"] is None


def test_layer_split_reports_its_kv_by_layers() -> None:
    limits = memory_of(DEMO)
    found = solve(smollm2(), DEMO, workload(), limits, policy="layer-split", compare=False)
    kv = plan_document(found, smollm2(), DEMO, workload(), limits)["kv"]
    assert kv["host_cpu"] == pytest.approx(len(found.plan.host_kv_layers) / 30) and kv["gpu"] == pytest.approx(1 - kv["host_cpu"])


def test_the_text_says_predicted_and_emulated_and_names_every_policy(document: Document) -> None:
    text = plan_text(document)
    assert "predicted (emulated)" in text and "demo (emulated)" in text
    assert all(f"  {policy} " in text for policy in POLICIES)
    assert f"bottleneck {document['prediction']['bottleneck']}" in text
    assert max(map(len, text.splitlines())) <= 100, max(text.splitlines(), key=len)
    limits = memory_of(RTX_4090)
    real = plan_document(solve(llama(), RTX_4090, workload(), limits), llama(), RTX_4090, workload(), limits)
    assert "emulated" not in plan_text(real)


def test_a_cpu_only_machine_and_a_single_token_can_be_reported() -> None:
    bare = replace(DEMO, gpu=None, link=None, gpu_memory_bytes=0)
    limits, work = memory_of(bare), workload(2, 20, 1)
    document = plan_document(solve(llama(), bare, work, limits), llama(), bare, work, limits)
    assert document["prediction"]["step_s"] == 0.0 and document["memory"]["gpu"]["limit"] == 0
    assert "predicted" in plan_text(document)


def test_the_text_says_what_limits_why_and_what_more_would_buy(document: Document) -> None:
    text = plan_text(document)
    for phase, limit in document["explanation"]["limits"].items():
        assert f"\n  {phase}:" in text and limit["resource"] in ("cpu", "gpu", "link", "link_out", "dram", "hand-offs")
    assert "why, in decode" in text and "why, in prefill" in text
    for answer in document["explanation"]["what_if"]:
        assert f"{answer['change']:28}{answer['tokens_per_s']:>10.4g} tokens/s{answer['ratio']:>9.3f}x" in text


@pytest.mark.parametrize("policy", ["auto", "layer-split", "cpu"])
def test_the_text_fits_100_columns(policy: Policy) -> None:
    limits = memory_of(RTX_4090)
    found = solve(llama_70b(), RTX_4090, workload(8, 64, 16), limits, policy=policy, compare=policy == "auto")
    text = plan_text(plan_document(found, llama_70b(), RTX_4090, workload(8, 64, 16), limits))
    assert max(map(len, text.splitlines())) <= 100, max(text.splitlines(), key=len)
