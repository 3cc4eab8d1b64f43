"""Re-solving at a glance: quick, nearly as good as a search, and never over another memory layout."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.adaptation_machine import slower
from benchmarks.resolves import slow_link
from tests.planning import DEMO, memory_of, smollm2, workload
from twinpilots.adaptation import Ask
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.online import Resolver
from twinpilots.plan import estimate
from twinpilots.plan.glance import MOST_TASKS, glance
from twinpilots.plan.load import decode_load
from twinpilots.plan.plan import Plan, Split
from twinpilots.plan.priced import Layout
from twinpilots.plan.pricing import SAMPLES
from twinpilots.plan.rebalance import Option, option_of, options
from twinpilots.plan.solver import solve

SPEC = smollm2()
PLAN = solve(SPEC, DEMO, workload(16, 128, 64), memory_of(DEMO), policy="hetegen", compare=False).plan
BUCKET = PLAN.bucket_for("decode", 16)
LOAD = decode_load(0, 16, 200, BUCKET)


def best_of(found: tuple[Option, ...]) -> Option:
    return min(found, key=lambda option: option.seconds)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tasks of every list that is simulated."""
    counts: list[int] = []
    real = estimate.simulate

    def counted(tasks: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(tasks.num_tasks)
        return real(tasks, *arguments, **options)

    monkeypatch.setattr(estimate, "simulate", counted)
    return counts


@pytest.fixture(scope="module")
def searched() -> tuple[Plan, Layout]:
    """The plan that a search finds, and what that leaves behind."""
    layout = Layout(SPEC, PLAN)
    best = best_of(options(SPEC, DEMO, PLAN, BUCKET, LOAD, layout=layout)).bucket
    return replace(PLAN, buckets=tuple(best if bucket is BUCKET else bucket for bucket in PLAN.buckets)), layout


@pytest.mark.parametrize("changed", [lambda p: replace(p, cpu=slower(p.cpu, 1.15)), lambda p: slow_link(p, 1.25)], ids=["cpu", "link"])
def test_a_glance_finds_nearly_what_a_search_finds(
    searched: tuple[Plan, Layout], changed: Callable[[HardwareProfile], HardwareProfile], simulated: list[int]
) -> None:
    (plan, layout), rates = searched, changed(DEMO)
    bucket = plan.bucket_for("decode", 16)
    glanced = glance(SPEC, rates, plan, bucket, LOAD, layout)
    assert glanced[0].bucket is bucket and len(glanced) > 1
    assert sum(simulated) <= MOST_TASKS
    of_glance, found = len(simulated), options(SPEC, rates, plan, bucket, LOAD)
    assert len(simulated) - of_glance > 3 * of_glance, "a search simulates several times as much"
    assert option_of(SPEC, rates, plan, best_of(glanced).bucket, LOAD).seconds <= 1.05 * best_of(found).seconds


def test_a_glance_prices_like_a_search(searched: tuple[Plan, Layout]) -> None:
    plan, layout = searched
    for option in glance(SPEC, DEMO, plan, plan.bucket_for("decode", 16), LOAD, layout):
        assert option.seconds == pytest.approx(option_of(SPEC, DEMO, plan, option.bucket, LOAD).seconds)


def test_what_was_priced_is_known_about_at_other_rates() -> None:
    layout, rates = Layout(SPEC, PLAN), replace(DEMO, cpu=slower(DEMO.cpu, 2.0))
    before_s = layout.seconds(DEMO, BUCKET, LOAD, SAMPLES)
    (kept,) = layout.priced("decode", BUCKET.max_tokens)
    assert kept.about_s(DEMO, LOAD) == pytest.approx(before_s)
    assert kept.about_s(rates, LOAD) == pytest.approx(option_of(SPEC, rates, PLAN, BUCKET, LOAD).seconds, rel=0.15)
    assert layout.priced("prefill", BUCKET.max_tokens) == []


def test_answers_are_bettered_as_the_last_one_was() -> None:
    layout = Layout(SPEC, PLAN)
    assert layout.better(BUCKET, {"q_proj": 0.5}) == {"q_proj": 0.5}
    layout.bettered(BUCKET, {"q_proj": 0.4, "down_proj": 0.5, "o_proj": 0.0}, {"q_proj": 0.0, "down_proj": 0.75, "o_proj": 0.25})
    assert layout.better(BUCKET, {"q_proj": 0.5, "down_proj": 0.4, "o_proj": 0.1}) == pytest.approx({"q_proj": 0.0, "down_proj": 0.6, "o_proj": 0.35})
    assert layout.better(BUCKET, {"down_proj": 0.9}) == {"down_proj": 1.0}, "all of it at most"


def test_a_layout_serves_no_plan_of_other_resident_rows() -> None:
    """Its buckets would ask for weights that do not lie where they say."""
    layout = Layout(SPEC, PLAN)
    other = tuple(
        {name: Split(resident=0, streamed=split.resident + split.streamed, cpu=split.cpu) for name, split in layer.items()} for layer in BUCKET.splits
    )
    assert layout.serves(replace(PLAN, buckets=PLAN.buckets[:2]))
    assert not layout.serves(replace(PLAN, buckets=tuple(replace(bucket, splits=other) for bucket in PLAN.buckets)))
    assert not layout.serves(replace(PLAN, ring_bytes=2 * PLAN.ring_bytes))


def test_a_resolver_in_another_process_remembers_from_ask_to_ask() -> None:
    resolver = Resolver(SPEC)
    there, again = (pickle.loads(pickle.dumps(resolver)) for _ in range(2))
    assert there is again is not resolver
    ask = Ask(profile=DEMO, plan=PLAN, bucket=BUCKET, load=LOAD, kept=(), driver_s=0.5, reason="test", thorough=False)
    assert [option.seconds for option in there(ask)] == pytest.approx(
        [0.5 + each.seconds for each in glance(SPEC, DEMO, PLAN, BUCKET, LOAD, Layout(SPEC, PLAN))]
    )
