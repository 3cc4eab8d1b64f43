"""A plan change is told in the words of its decisions."""

from __future__ import annotations

from dataclasses import replace

from tests.planning import DEMO, llama, memory_of, workload
from twinpilots.plan.difference import difference
from twinpilots.plan.plan import Plan
from twinpilots.plan.solver import solve
from twinpilots.planner import PlanChange


def plan() -> Plan:
    return solve(llama(), DEMO, workload(4, 32, 8), memory_of(DEMO), policy="stream", compare=False).plan


def test_equal_plans_differ_in_nothing() -> None:
    assert difference(plan(), plan()) == "nothing"


def test_every_decision_that_changed_is_named_with_both_values() -> None:
    old = plan()
    buckets = tuple(replace(bucket, micro_batches=2, host_attention="gpu") for bucket in old.buckets)
    new = replace(old, buckets=buckets, host_pages=old.host_pages + 7, max_num_seqs=9)
    words = difference(old, new)
    assert f"KV pages on the host {old.host_pages} -> {old.host_pages + 7}" in words and "sequences 4 -> 9" in words
    assert "decode micro-batches 1 -> 2" in words and "decode attention over host KV cpu -> gpu" in words
    assert "rows" not in words, "the splits are the same"


def test_shares_are_of_all_rows() -> None:
    old = solve(llama(), DEMO, workload(4, 32, 8), memory_of(DEMO), policy="cpu", compare=False).plan
    words = difference(old, plan())
    assert "decode rows resident/streamed/CPU 0.0/0.0/100.0 % -> " in words


def test_a_change_says_what_it_gains_and_what_it_costs() -> None:
    assert PlanChange(plan=plan(), now_s=9.0, then_s=4.0, switch_s=1.5).reason == "predicted 4 s plus 1.5 s of loading, instead of 9 s"
    assert "cannot hold it" in PlanChange(plan=plan(), now_s=None, then_s=4.0, switch_s=1.5).reason
