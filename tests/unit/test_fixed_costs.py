"""Passes of different sizes tell what a piece of work costs from what it takes in proportion to tokens; and passes that teach change no plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.truth import Never
from tests.planning import llama
from twinpilots.fixed_costs import Point, piece_and_rest, piece_s
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.expected import PassWork
from twinpilots.plan.load import PassLoad, decode_load, prefill_load
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expand
from twinpilots.rehearsal import corrected, short_plan


def point(count: float, rest_s: float, seconds: float) -> Point:
    return Point(count=count, rest_s=rest_s, seconds=seconds, pass_s=1.0)


def test_a_piece_and_the_rest_are_told_apart() -> None:
    assert piece_and_rest([point(10, 1e-3, 10 * 2e-6 + 0.5e-3), point(10, 8e-3, 10 * 2e-6 + 4e-3)]) == pytest.approx((2e-6, 0.5))
    assert piece_and_rest([point(10, 1e-3, 2e-3), point(20, 2e-3, 4e-3)]) is None, "these are alike: it may be the pieces, or the rest"
    assert piece_and_rest([]) is None


def test_a_piece_costs_what_is_left_and_never_less_than_nothing() -> None:
    assert piece_s([point(10, 1e-3, 1.2e-3), point(100, 1e-3, 3e-3)]) == pytest.approx(20e-6)
    assert piece_s([point(10, 1e-3, 0.5e-3)]) == 0.0
    assert piece_s([point(0, 1e-3, 0.5e-3)]) is None


def passes_on(true: HardwareProfile, believed: HardwareProfile) -> list[PassDone]:
    """What some passes of both devices would take on that machine, work that nobody slows down beyond what is believed."""
    spec, found = llama(hidden=512, intermediate=1024), list[PassDone]()
    plan = short_plan(spec, believed)
    assert plan is not None
    online = OnlinePlanner(spec, believed, Never(), adapts=False)

    def add(plan: Plan, bucket: BucketPlan, load: PassLoad) -> None:
        schedule = expand(spec, plan, bucket, load.shape)
        work = {each.kind: each.seconds for each in PassWork(schedule, spec, plan).expected(true, load)}
        done = PassDone(plan=plan, bucket=bucket, load=load, schedule=schedule, work_s={}, seconds=0.02, driver_s=1e-3, remaining=9)
        found.append(replace(done, work_s={kind: seconds * online.slowed(done, kind) for kind, seconds in work.items()}))

    for num_seqs in (1, 4, 16):
        bucket = plan.bucket_for("decode", num_seqs)
        add(plan, bucket, decode_load(1, num_seqs - 1, 40, bucket))
    bucket = plan.bucket_for("prefill", 64)
    add(plan, bucket, prefill_load(1, 1, 32, 0, bucket))
    return found


def test_a_rehearsal_finds_the_fixed_costs_of_a_machine() -> None:
    believed = PRESETS["demo"]
    assert believed.gpu is not None and believed.link is not None
    cpu = replace(believed.cpu, task_s=believed.cpu.task_s + 7e-6, elementwise_bytes_per_s=believed.cpu.elementwise_bytes_per_s / 2, attention_seq_s=9e-6)
    true = replace(
        believed, cpu=cpu,
        gpu=replace(believed.gpu, attention_seq_s=4e-6), link=replace(believed.link, copy_s=believed.link.copy_s + 6e-6),
    )  # fmt: skip
    found = corrected(llama(hidden=512, intermediate=1024), believed, passes_on(true, believed))
    assert found.gpu is not None and found.link is not None and true.gpu is not None and true.link is not None
    assert found.cpu.task_s == pytest.approx(true.cpu.task_s, rel=0.02)
    assert found.cpu.elementwise_bytes_per_s == pytest.approx(true.cpu.elementwise_bytes_per_s, rel=0.02)
    assert found.cpu.attention_seq_s == pytest.approx(9e-6, rel=0.02)
    assert found.gpu.attention_seq_s == pytest.approx(4e-6, rel=0.06), "how others slow it down is itself expected by what they cost"
    assert found.link.copy_s == pytest.approx(true.link.copy_s, rel=0.02)
    assert found.cpu.linear["fp16/out"](4) == pytest.approx(believed.cpu.linear["fp16/out"](4), rel=0.02), "and nothing else has changed"


@pytest.mark.parametrize("alarms", [True, False])
def test_passes_that_teach_change_no_plan_however_long_they_take(alarms: bool) -> None:
    """Of a rehearsal none must be lost: those before a change would be forgotten."""
    believed = PRESETS["demo"]
    done = next(each for each in passes_on(believed, believed) if each.load.num_seqs == 16)
    online = OnlinePlanner(llama(hidden=512, intermediate=1024), believed, Never(), adapts=True, alarms=alarms)
    prediction = online.predict(done.plan, done.bucket, done.load)
    slow = replace(done, seconds=30 * prediction.seconds)
    changes = [online.after_pass(slow, prediction) for _ in range(8)]
    assert any(changes) == alarms
