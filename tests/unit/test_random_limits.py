"""Random models, limits and lengths: plans keep every limit, refusals are true. The whole is `python -m benchmarks.limits`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.limits import Case, Outcome, named_limits, outcome, outcomes, random_case, report, told, untruth
from twinpilots.plan.draft import limit_step
from twinpilots.plan.plan import POLICIES
from twinpilots.plan.workload import Limits, Workload

NAMED = [policy for policy in POLICIES if policy != "auto"]


def small_case(number: int, policy: str) -> Case:
    """A random case that plans in milliseconds: short, and of a policy that does not search."""
    case = random_case(1, number)
    while case.spec.name != "random":
        number += 1000
        case = random_case(1, number)
    work = replace(case.workload, num_requests=min(8, case.workload.num_requests), max_num_seqs=4)
    return replace(case, workload=work, policy=policy)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(number=st.integers(0, 999), policy=st.sampled_from(NAMED))
def test_no_limit_is_exceeded_and_every_refusal_is_true(number: int, policy: str) -> None:
    case = small_case(number, policy)
    refusal = case.plans(case.limits)
    assert refusal is None or not untruth(case, refusal)


def test_auto_refuses_truly() -> None:
    case = replace(small_case(5, "auto"), workload=Workload(num_requests=2, input_len=20, output_len=4, max_num_seqs=2))
    short = replace(case, limits=Limits(gpu_bytes=2000, host_bytes=1 << 20))
    refusal = short.plans(short.limits)
    assert refusal is not None and named_limits(refusal) and not untruth(short, refusal)


def test_a_chunk_that_is_not_the_smallest_may_need_least() -> None:
    case = replace(random_case(7, 304), policy="layer-split")
    refusal = case.plans(case.limits)
    assert refusal is not None and not untruth(case, refusal)


def test_a_false_refusal_is_seen() -> None:
    case = replace(small_case(5, "cpu"), limits=Limits(gpu_bytes=0, host_bytes=1 << 20))
    refusal = case.plans(case.limits)
    assert refusal is not None
    (size,) = named_limits(refusal).values()
    generous = refusal.replace(refusal.split("--host-memory to ")[1], f"{(size >> 10) + 64}KiB") if size < 16 << 20 else ""
    assert not generous or "do, too" in untruth(case, generous)
    assert "with the limits that it asks for" in untruth(case, "raise --host-memory to 1KiB")
    assert untruth(case, "no") == "the refusal names no limit"


def test_limits_are_named_in_steps_that_are_printed_exactly() -> None:
    assert limit_step(1 << 20) == 1024 and limit_step(17 << 20) == 1 << 20


def test_an_outcome_is_reproducible() -> None:
    assert outcome(0, 4) == outcome(0, 4) and not outcome(0, 4).wrong


def test_two_processes_give_the_same_outcomes_in_the_same_order() -> None:
    numbers = (7, 12, 16, 17)
    assert list(outcomes(1, numbers, jobs=2)) == list(outcomes(1, numbers, jobs=1)) == [outcome(1, number) for number in numbers]


def test_an_interrupt_leaves_what_is_done_and_every_broken_promise_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    first = outcome(1, 7)

    def until_interrupted() -> Iterator[Outcome]:
        yield first
        yield replace(first, number=8, wrong="too large")
        assert "too large" in capsys.readouterr().err
        raise KeyboardInterrupt

    found, interrupted = told(until_interrupted(), 5)
    assert interrupted and [each.number for each in found] == [7, 8]
    assert report(found, 5).startswith("2 cases of 5, then interrupted: 2 planned, 0 refused; 1 broke a promise\ncase 8")
    assert report(found, 2).startswith("2 cases: ")
