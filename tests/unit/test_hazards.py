"""The waits of a task list: enough that nothing races, each one needed, and checked by a method that shares nothing with how they were derived."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings

from tests.dataflow import reference, run_shuffled
from tests.random_plans import Case, cases
from twinpilots.kernels.abi import MAX_WAITS
from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.hazards import find_races, queue_order_is_serial
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.schedule import expand, without_wait
from twinpilots.plan.tasks import Access, Schedule


@settings(max_examples=80, deadline=None)
@given(cases(max_layers=2))
def test_nothing_races_and_no_cycle_of_waits_can_exist(case: Case) -> None:
    for poison in (False, True):
        schedule = expand(case.spec, case.plan, case.bucket, case.shape, poison=poison)
        assert find_races(schedule.tasks) == []
        assert queue_order_is_serial(schedule.tasks)
        assert max(len(task.waits) for task in schedule.tasks) <= MAX_WAITS


@settings(max_examples=80, deadline=None)
@given(cases(max_layers=2))
def test_no_other_queue_writes_an_input_that_linears_share(case: Case) -> None:
    """The native queue rounds the input of quantised linears once, until one of its own instructions may have written it (`Queue::forget_rounded`)."""
    tasks = expand(case.spec, case.plan, case.bucket, case.shape).tasks
    inputs: dict[tuple[str, Access], int] = {}  # by queue: what its linears read, and the first that does
    for task in tasks:
        if task.kind == "linear":
            inputs.setdefault((task.queue, task.reads[0]), task.index)
    for (queue, access), first in inputs.items():
        late = [task.kind for task in tasks[first:] if task.queue != queue and any(access.overlaps(write) for write in task.writes)]
        assert not late, f"{late} of other queues write {access} after a linear of {queue} has read it"


@settings(max_examples=20, deadline=None)
@given(cases(max_layers=1))
def test_every_wait_is_needed(case: Case) -> None:
    """Waits for the previous pass are left out: a streamed KV load before them would be fenced from that pass anyway."""
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    for task in schedule.tasks:
        for number, wait in enumerate(task.waits):
            broken = without_wait(schedule, task.index, number)
            assert wait.previous or find_races(broken.tasks), f"the wait of {task.kind} for {wait.hazard} guards nothing"


def _rich_case() -> Case:
    """Both devices in every op, all three groups of KV, two micro-batches, more than one pass of the ring per layer: every kind of hazard occurs."""
    spec = ModelSpec(
        name="tiny", family="llama", vocab_size=12, hidden_size=6, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=12, layers=(LayerSpec(),) * 2,
        max_model_len=64, weight_dtype="fp32", activation="silu",
    )  # fmt: skip
    splits: list[dict[str, Split]] = [{} for _ in range(3)]
    for op in spec.ops(2):
        units = op.rows // 2
        streamed, cpu = 2 * max(1, units // 3), 2 * max(1, units // 3)
        splits[op.layer][op.name] = Split(resident=op.rows - streamed - cpu, streamed=streamed, cpu=cpu)
    # the MLP pair cut differently, one way in each layer, so that activations cross in both directions
    splits[0]["down_proj"], splits[1]["down_proj"] = Split(resident=2, streamed=2, cpu=8), Split(resident=8, streamed=2, cpu=2)
    bucket = BucketPlan(phase="decode", max_tokens=8, micro_batches=2, splits=tuple(splits))
    plan = Plan(
        model="tiny", policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=2, buckets=(bucket,), ring_bytes=smallest_ring(spec, 2, 192, 2), packet_bytes=192,
        page_size=4, gpu_pages=8, host_pages=8, kv_dtype="fp32", max_num_seqs=8, max_pass_tokens=8, max_model_len=64, kv_staging_pages=4,
    )  # fmt: skip
    plan.check(spec)
    return Case(spec=spec, plan=plan, shape=((True, True, True),) * 2)


RICH = _rich_case()
RICH_SCHEDULE = expand(RICH.spec, RICH.plan, RICH.bucket, RICH.shape)
WAITS = [(task.index, number, wait) for task in RICH_SCHEDULE.tasks for number, wait in enumerate(task.waits)]
HAZARDS = sorted({wait.hazard for _, _, wait in WAITS})


def _without(hazard: str) -> Schedule:
    """The schedule without any wait that names this hazard."""
    schedule = RICH_SCHEDULE
    for index, number, wait in reversed(WAITS):
        if wait.hazard == hazard:
            schedule = without_wait(schedule, index, number)
    return schedule


def test_the_rich_case_meets_every_kind_of_hazard() -> None:
    """Activations in GPU memory need no waits: the compute queue executes all their copies. host.kv is ordered by the staging slots it passes through."""
    by_kind = {kind: {hazard.split()[1] for hazard in HAZARDS if hazard.startswith(kind)} for kind in ("RAW", "WAR", "WAW")}
    staging = {"gpu.staging0", "gpu.staging1"}
    assert by_kind == {
        "RAW": {"gpu.ring", *staging, "host.act", "host.attn", "host.head", "host.part", "host.peer", "host.qkv", "host.x"},
        "WAR": {"gpu.ring", *staging, "host.part", "host.peer"},
        "WAW": staging,
    }


def test_home_pages_written_back_too_early_are_a_race() -> None:
    stores = [task for task in RICH_SCHEDULE.tasks if task.kind == "store_kv"]
    broken = RICH_SCHEDULE
    for task in stores:
        for number in reversed(range(len(task.waits))):
            broken = without_wait(broken, task.index, number)
    assert any(race.startswith("host.kv:") for race in find_races(broken.tasks))


@pytest.mark.parametrize("hazard", HAZARDS)
def test_without_its_waits_the_check_reports_a_race(hazard: str) -> None:
    buffer = hazard.split()[1]
    races = find_races(_without(hazard).tasks)
    assert any(race.startswith(f"{buffer}:") for race in races), races


@pytest.mark.parametrize("hazard", HAZARDS)
def test_without_its_waits_some_order_gives_wrong_logits(hazard: str) -> None:
    broken = _without(hazard)
    expected = reference(RICH, broken, 2)
    for seed in range(60):
        try:
            logits = run_shuffled(RICH, broken, 2, Random(seed))
        except AssertionError:  # a ring slot without its rows
            return
        if not all(np.allclose(got, want, rtol=1e-9) for got, want in zip(logits, expected, strict=True)):
            return
    pytest.fail(f"no order of 60 went wrong without the waits for {hazard}")
