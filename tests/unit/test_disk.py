"""The disk tier: rows whose home is the disk are read once a pass, in time, through a ring that nothing overwrites too early; predicted, not run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataflow import reference, run_serially, run_shuffled
from tests.machines import machine, processor
from tests.planning import llama
from tests.random_plans import Case, disk_cases
from twinpilots.errors import NotRunnableError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.estimate import estimate_pass, estimate_pass_s
from twinpilots.plan.hazards import find_races, queue_order_is_serial
from twinpilots.plan.load import decode_load
from twinpilots.plan.memory import check_runnable, disk_bytes, host_memory, plan_memory
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.schedule import expand, without_wait
from twinpilots.plan.simulate import simulate
from twinpilots.plan.tasks import Schedule


def _expand(case: Case) -> Schedule:
    return expand(case.spec, case.plan, case.bucket, case.shape)


# -- the task list -------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(disk_cases(max_layers=2), st.randoms(use_true_random=False))
def test_whatever_lies_on_the_disk_the_tasks_compute_the_model(case: Case, random: Random) -> None:
    schedule = _expand(case)
    assert np.allclose(run_serially(case, schedule), reference(case, schedule, 1)[0], rtol=1e-9)
    for got, wanted in zip(run_shuffled(case, schedule, 3, random), reference(case, schedule, 3), strict=True):
        assert np.allclose(got, wanted, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(disk_cases(max_layers=2))
def test_nothing_races_on_the_staging_ring(case: Case) -> None:
    schedule = _expand(case)
    assert find_races(schedule.tasks) == []
    assert queue_order_is_serial(schedule.tasks)


@settings(max_examples=40, deadline=None)
@given(disk_cases())
def test_every_row_on_the_disk_is_read_once_a_pass_and_nothing_else_is(case: Case) -> None:
    schedule = _expand(case)
    assert [task.packet for task in schedule.tasks if task.kind == "read"] == list(range(len(schedule.reads)))
    rows = Counter((s.layer, s.op, row) for read in schedule.reads for s in read.segments for row in range(s.row0, s.row1))
    ops = case.spec.ops(case.plan.unit_rows)
    assert rows == Counter((op.layer, op.name, row) for op in ops for row in range(op.rows - case.plan.on_disk(op.layer, op.name), op.rows))
    for read in schedule.reads:
        assert 0 <= read.ring_lo <= read.ring_lo + read.num_bytes <= case.plan.staging_bytes
        ends = [segment.offset + segment.num_bytes for segment in read.segments]
        assert all(end <= segment.offset for end, segment in zip(ends, read.segments[1:], strict=False)) and ends[-1] <= read.num_bytes


def _plan(spec: ModelSpec, *, staging: int, disk: float, ring: int = 4, resident: float = 0.0, batches: int = 1, unit_rows: int = 4) -> Plan:
    """Of every op an even part is resident, the rest is streamed and the CPU's by halves; ``disk``: the part of the rest that lies on the disk."""
    splits: list[dict[str, Split]] = [{} for _ in range(spec.num_layers + 1)]
    homes: list[dict[str, int]] = [{} for _ in range(spec.num_layers + 1)]
    for op in spec.ops(unit_rows):
        kept = op.round_rows(resident * op.rows)
        edge = max(kept, op.round_rows((kept + op.rows) / 2))
        splits[op.layer][op.name] = Split(resident=kept, streamed=edge - kept, cpu=op.rows - edge)
        homes[op.layer][op.name] = op.rows - max(kept, op.round_rows(op.rows - disk * (op.rows - kept)))
    bucket = BucketPlan(phase="decode", max_tokens=8, micro_batches=batches, splits=tuple(splits))
    packet_bytes = smallest_ring(spec, unit_rows, 1, 1)
    plan = Plan(
        model=spec.name, policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=unit_rows, buckets=(bucket,), ring_bytes=ring * packet_bytes,
        packet_bytes=packet_bytes, page_size=16, gpu_pages=64, host_pages=0, kv_dtype="fp16", max_num_seqs=8, max_pass_tokens=8, max_model_len=64,
        disk_rows=tuple(homes), staging_bytes=staging * packet_bytes,
    )  # fmt: skip
    plan.check(spec)
    return plan


SPEC = llama(layers=2, hidden=16, head_dim=4, intermediate=24, vocab=20)


def test_without_its_waits_the_staging_ring_races() -> None:
    """Rows must be there before they are used, and used before the next read overwrites them: by the link, by the CPU, and by the pass before."""
    plan = _plan(SPEC, staging=3, disk=0.7)
    schedule = expand(SPEC, plan, plan.buckets[0], ((True, False, False),))
    waits = [(task.index, number, wait) for task in schedule.tasks for number, wait in enumerate(task.waits) if wait.hazard.endswith("host.staging")]
    assert {(schedule.tasks[index].queue, wait.hazard.split()[0]) for index, _, wait in waits} >= {("link_in", "RAW"), ("cpu", "RAW"), ("disk", "WAR")}
    assert any(wait.previous for _, _, wait in waits)
    for index, number, wait in waits:
        races = find_races(without_wait(schedule, index, number).tasks)
        assert any(race.startswith("host.staging:") for race in races), (schedule.tasks[index], wait)


def test_without_rows_on_the_disk_there_is_neither_queue_nor_read() -> None:
    plan = replace(_plan(SPEC, staging=3, disk=0.5), disk_rows=(), staging_bytes=0)
    schedule = expand(SPEC, plan, plan.buckets[0], ((True, False, False),))
    assert not schedule.reads and not schedule.queue("disk") and "staged" not in {task.source for task in schedule.tasks}


# -- time ----------------------------------------------------------------------------------------------------------------------------------


def _machine(**changes: object) -> HardwareProfile:
    """Everything but the disk is quick."""
    return machine(
        cpu=processor(1e9, 1e10, task_s=1e-7), gpu=processor(1e10, 1e11, task_s=1e-7),
        link=replace(machine().link, up_bytes_per_s=1e9, down_bytes_per_s=1e9, packet_s=1e-7, copy_s=1e-7), dram_bytes_per_s=1e10, **changes
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("staging", [2, 5, 40])
def test_a_pass_that_waits_for_the_disk_takes_what_the_disk_takes(staging: int, batches: int) -> None:
    spec, profile = llama(layers=12), _machine(disk_bytes_per_s=1e6)
    plan = _plan(spec, staging=staging, disk=0.6, resident=0.25, batches=batches, unit_rows=16)
    bucket = plan.buckets[0]
    load = decode_load(4, 0, 20, bucket)
    expected = disk_bytes(spec, plan) / 1e6
    assert simulate(expand(spec, plan, bucket, load.shape), spec, plan, profile, load).seconds == pytest.approx(expected, rel=0.02)
    assert estimate_pass_s(spec, plan, bucket, profile, load) == pytest.approx(expected, rel=0.02)


def test_the_estimate_knows_of_layers_on_the_disk_that_it_does_not_sample() -> None:
    """One of 24 layers lies on the disk as a whole, the others in a small part; it is not among the few that are simulated."""
    spec, profile = llama(layers=24), _machine(disk_bytes_per_s=1e6)
    plan, whole = (_plan(spec, staging=8, disk=part, unit_rows=16) for part in (0.2, 1.0))
    plan = replace(plan, disk_rows=(*plan.disk_rows[:5], whole.disk_rows[5], *plan.disk_rows[6:]))
    load = decode_load(4, 0, 20, plan.buckets[0])
    busy_s = estimate_pass(spec, plan, plan.buckets[0], profile, load).busy_s["disk"]
    assert busy_s == pytest.approx(disk_bytes(spec, plan) / 1e6, rel=0.03)


def test_a_disk_that_keeps_up_costs_nothing_but_its_writes_to_host_memory() -> None:
    """A disk a thousandth as fast as the link slows the CPU by a thousandth of what copies at the link's rate would; a quick one is never waited for."""
    spec = llama(layers=3)
    profile = _machine(disk_bytes_per_s=1e12)
    plan = _plan(spec, staging=40, disk=0.6, unit_rows=16)
    without = replace(plan, disk_rows=(), staging_bytes=0)
    load = decode_load(4, 0, 20, plan.buckets[0])

    def seconds(one: Plan, on: HardwareProfile) -> float:
        return simulate(expand(spec, one, one.buckets[0], load.shape), spec, one, on, load).seconds

    assert seconds(plan, profile) == pytest.approx(seconds(without, profile), rel=0.05)


def test_reading_from_the_disk_slows_the_cpu_as_far_as_its_rate_goes() -> None:
    """All on the CPU, which copies at the link's rate slow down twofold: beside a disk of half that rate it takes 1.5 times as long, a third of it lost."""
    spec, base = llama(layers=3), _machine(disk_bytes_per_s=5e8)
    profile = replace(base, cpu=replace(base.cpu, copy_slowdown=2.0, linear=processor(1e6, 1e12).linear))
    plan = _plan(spec, staging=4, disk=0.5, unit_rows=16)
    layers = tuple({name: Split(resident=0, streamed=0, cpu=split.rows) for name, split in layer.items()} for layer in plan.buckets[0].splits)
    plan = replace(plan, buckets=(replace(plan.buckets[0], splits=layers),))
    load = decode_load(4, 0, 20, plan.buckets[0])
    timing = simulate(expand(spec, plan, plan.buckets[0], load.shape), spec, plan, profile, load)
    assert timing.busy_s["cpu"] - timing.alone_s["cpu"] == pytest.approx(timing.busy_s["disk"] / 3, rel=0.1)


# -- memory, JSON, checks ------------------------------------------------------------------------------------------------------------------


def test_rows_on_the_disk_leave_host_memory_to_the_staging_ring() -> None:
    plan = _plan(SPEC, staging=3, disk=0.5)
    without = replace(plan, disk_rows=(), staging_bytes=0)
    use, before = plan_memory(SPEC, plan), plan_memory(SPEC, without)
    on_disk = sum(op.row_bytes * plan.on_disk(op.layer, op.name) for op in SPEC.ops(plan.unit_rows))
    assert use.disk.weights == use.disk.total == disk_bytes(SPEC, plan) == on_disk > 0
    slices = len(SPEC.ops(plan.unit_rows))
    assert before.host.weights - use.host.weights == pytest.approx(on_disk, abs=64 * slices)  # every slice is rounded up to 64 bytes
    assert use.host.staging == plan.staging_bytes and use.gpu == before.gpu and before.disk.total == 0


def test_a_plan_with_rows_on_the_disk_survives_json() -> None:
    plan = _plan(SPEC, staging=3, disk=0.5)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {"staging_bytes": 0}, "0 bytes to read them through"),
        (lambda plan: {"disk_rows": plan.disk_rows[1:]}, "2 layers of rows on the disk"),
        (lambda plan: {"disk_rows": ()}, "0 layers of rows on the disk"),
        (lambda plan: {"disk_rows": ({**plan.disk_rows[0], "q_proj": 15}, *plan.disk_rows[1:])}, "begin inside a unit"),
        (lambda plan: {"disk_rows": ({**plan.disk_rows[0], "q_proj": 20}, *plan.disk_rows[1:])}, "20 rows of q_proj of layer 0 on the disk"),
        (lambda plan: {"disk_rows": ({}, *plan.disk_rows[1:])}, "None rows of q_proj"),
    ],
)
def test_a_plan_that_says_nonsense_about_the_disk_is_refused(change: object, message: str) -> None:
    plan = _plan(SPEC, staging=3, disk=0.5)
    with pytest.raises(ValueError, match=message):
        replace(plan, **change(plan)).check(SPEC)  # type: ignore[operator]


def test_a_tied_head_cannot_lie_on_the_disk() -> None:
    plan = _plan(SPEC, staging=3, disk=0.5)
    with pytest.raises(ValueError, match="embedding table"):
        plan.check(replace(SPEC, tied=True))


def test_a_plan_with_rows_on_the_disk_is_not_run() -> None:
    plan = _plan(SPEC, staging=3, disk=0.5)
    with pytest.raises(NotRunnableError, match=r"keeps \d+ bytes .* on the disk.*without --disk"):
        check_runnable(SPEC, plan)
    check_runnable(SPEC, replace(plan, disk_rows=(), staging_bytes=0))
    assert host_memory(SPEC, plan).staging


# -- KV ------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(disk_cases(max_layers=2), st.randoms(use_true_random=False))
def test_kv_on_the_disk_comes_and_goes_in_time(case: Case, random: Random) -> None:
    """Streamed KV passes two slots in host memory on both ways: nothing races there, and the tasks compute the model."""
    if case.plan.host_kv_layers:
        return
    bucket = replace(case.bucket, host_attention="gpu", host_prefill_attention="gpu")
    shape = tuple((one, two or three, False) for one, two, three in case.shape)
    case = replace(case, plan=replace(case.plan, buckets=(bucket,), kv_on_disk=True), shape=shape)
    case.plan.check(case.spec)
    schedule = _expand(case)
    streamed = sum(groups[1] for groups in shape) * case.spec.num_layers
    assert [sum(task.kind == kind for task in schedule.tasks) for kind in ("read_kv", "load_kv", "store_kv", "write_kv")] == [streamed] * 4
    assert find_races(schedule.tasks) == []
    for got, wanted in zip(run_shuffled(case, schedule, 2, random), reference(case, schedule, 2), strict=True):
        assert np.allclose(got, wanted, rtol=1e-9)


def _kv_plan(batches: int) -> Plan:
    bucket = BucketPlan(
        phase="decode", max_tokens=8, micro_batches=batches, host_attention="gpu", host_prefill_attention="gpu",
        splits=_plan(llama(layers=3), staging=4, disk=0.0, unit_rows=16).buckets[0].splits,
    )  # fmt: skip
    plan = replace(_plan(llama(layers=3), staging=4, disk=0.0, unit_rows=16), disk_rows=(), staging_bytes=0, buckets=(bucket,))
    return replace(plan, gpu_pages=0, host_pages=64, kv_staging_pages=64 // batches, kv_on_disk=True)


def test_a_pass_reads_its_kv_from_the_disk_and_writes_the_new() -> None:
    """64 tokens of 4 sequences in 3 layers, 64 bytes of K and V each: 49,152 bytes read at 1 MB/s while 192 tokens' bytes are written."""
    spec, profile = llama(layers=3), _machine(disk_bytes_per_s=1e6, disk_write_bytes_per_s=5e5)
    plan = _kv_plan(batches=4)
    load = decode_load(0, 4, 64, plan.buckets[0])
    timing = simulate(expand(spec, plan, plan.buckets[0], load.shape), spec, plan, profile, load)
    per_token = spec.kv_token_bytes("fp16")
    assert timing.busy_s["disk"] == pytest.approx(3 * 4 * 64 * per_token / 1e6) and timing.busy_s["disk_out"] == pytest.approx(3 * 4 * per_token / 5e5)
    assert timing.busy_s["disk"] <= timing.seconds < 1.1 * timing.busy_s["disk"]


def test_kv_on_the_disk_takes_no_host_memory_but_two_slots() -> None:
    plan = _kv_plan(batches=4)
    spec = llama(layers=3)
    use, before = plan_memory(spec, plan), plan_memory(spec, replace(plan, kv_on_disk=False))
    assert use.disk.kv == before.host.kv > 0 and use.host.kv == 0 and use.host.staging == use.gpu.staging > 0
    with pytest.raises(NotRunnableError, match=rf"and {use.disk.kv} of KV on the disk"):
        check_runnable(spec, plan)
    with pytest.raises(ValueError, match="attended on the GPU"):
        replace(plan, buckets=(replace(plan.buckets[0], host_attention="cpu"),)).check(spec)
    assert Plan.from_json(plan.to_json()) == plan
