"""The simulator keeps the rules of the queues exactly, and the estimate of deep models stays close to it."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import LINK, machine, processor, without_gpu
from tests.random_plans import Case, cases
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import HardwareProfile, LinkProfile
from twinpilots.model.spec import LayerSpec, ModelSpec
from twinpilots.plan.cost import CostModel
from twinpilots.plan.estimate import EXACT_LAYERS, PassEstimator, estimate_pass, estimate_pass_s, sample_layers
from twinpilots.plan.load import GroupLoad, PassLoad, SeqClass, decode_load
from twinpilots.plan.packets import smallest_ring
from twinpilots.plan.plan import BucketPlan, Plan, Split
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.tasks import Schedule


def _load(case: Case) -> PassLoad:
    group = GroupLoad((SeqClass(1, 1, 5),))
    return PassLoad(tuple(tuple(group if has else GroupLoad() for has in groups) for groups in case.shape), 2)  # type: ignore[misc]


def _costs(case: Case, schedule: Schedule, profile: HardwareProfile) -> list[float]:
    model = CostModel(case.spec, case.plan, profile, _load(case))
    return [model.cost(task).seconds for task in schedule.tasks]


def _longest_paths(schedule: Schedule, seconds: list[float], overhead_s: float, link: LinkProfile, passes: int) -> list[float]:
    """When each pass ends if nothing slows anything down: every task starts when its queue, its waits and the fence let it."""
    count, pass_end, queue_end = len(schedule.tasks), [], {}
    end: list[float] = []
    for number in range(passes):
        for task in schedule.tasks:
            start = queue_end.get(task.queue, 0.0)
            if number and task.kind != "load":
                start = max(start, pass_end[-1] + overhead_s)
            for wait in task.waits:
                target = (number - wait.previous) * count + wait.task
                queues = {task.queue, schedule.tasks[wait.task].queue}
                latency_s = 0.0 if len(queues) == 1 else link.handoff_s if queues == {"cpu", "gpu"} else link.queue_handoff_s
                start = max(start, end[target] + latency_s) if target >= 0 else start
            end.append(start + seconds[task.index])
            queue_end[task.queue] = end[-1]
        pass_end.append(max(end[number * count + task.index] for task in schedule.tasks if task.kind != "load"))
    return pass_end


@settings(max_examples=60, deadline=None)
@given(cases())
def test_without_contention_a_pass_is_the_longest_path_through_its_tasks(case: Case) -> None:
    link = replace(LINK, handoff_s=5e-4, queue_handoff_s=2e-4)
    profile = machine(link=link, step_overhead_s=3e-3)
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    timing = simulate(schedule, case.spec, case.plan, profile, _load(case))
    ends = _longest_paths(schedule, _costs(case, schedule, profile), 3e-3, link, 4)
    assert timing.fill_s == pytest.approx(ends[0] + 3e-3)
    assert any(timing.seconds == pytest.approx(after - before) for before, after in pairwise(ends))


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_contention_stretches_work_while_the_link_runs_and_never_more(case: Case, cpu_slow: float, gpu_slow: float) -> None:
    profile = machine(processor(2e6, 8e6, copy_slowdown=cpu_slow), processor(2e7, 8e7, copy_slowdown=gpu_slow))
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    timing = simulate(schedule, case.spec, case.plan, profile, _load(case), keep_timeline=True)
    alone = _costs(case, schedule, profile)
    link = [(entry.start_s, entry.end_s) for entry in timing.timeline if entry.queue in ("link_in", "link_out")]
    for entry in timing.timeline:
        factor = (entry.end_s - entry.start_s) / alone[entry.task]
        limit = {"cpu": cpu_slow, "gpu": gpu_slow}.get(entry.queue, 1.0)
        assert 1 - 1e-9 <= factor <= limit + 1e-9
        if any(start <= entry.start_s and entry.end_s <= end for start, end in link):  # under one long copy
            assert factor == pytest.approx(limit)


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(1.0, 3.0), st.floats(1.0, 3.0))
def test_two_readers_of_one_memory_slow_each_other_down_only_while_both_run(case: Case, cpu_slow: float, gpu_slow: float) -> None:
    profile = machine(processor(2e6, 8e6, peer_slowdown=cpu_slow), processor(2e7, 8e7, peer_slowdown=gpu_slow))
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    load = _load(case)
    timing = simulate(schedule, case.spec, case.plan, profile, load, keep_timeline=True)
    model = CostModel(case.spec, case.plan, profile, load)
    spans = {side: [(e.start_s, e.end_s) for e in timing.timeline if e.queue == side] for side in ("cpu", "gpu")}
    for entry in timing.timeline:
        cost = model.cost(schedule.tasks[entry.task])
        factor = (entry.end_s - entry.start_s) / cost.seconds
        limit = max(1.0, {"cpu": cpu_slow, "gpu": gpu_slow}.get(entry.queue, 1.0) * cost.memory_frac)
        assert 1 - 1e-9 <= factor <= limit + 1e-9
        others = [e for e in timing.timeline if e.queue in spans and e.queue != entry.queue]
        long = [e for e in others if e.start_s <= entry.start_s and entry.end_s <= e.end_s]
        if entry.queue in spans and long:  # beside one long task
            fracs = {entry.queue: cost.memory_frac, long[0].queue: model.cost(schedule.tasks[long[0].task]).memory_frac}
            traffic = fracs["cpu"] / 11 + fracs["gpu"] * 10 / 11  # the GPU reads ten times as fast
            assert factor == pytest.approx(max(1.0, {"cpu": cpu_slow, "gpu": gpu_slow}[entry.queue] * cost.memory_frac * traffic))


def test_the_link_is_slower_only_while_the_cpu_reads() -> None:
    spec = _model(2)
    plan = _plan(spec, [(0.3, 0.5)] * 2)
    load = decode_load(2, 2, 50, plan.buckets[0])
    slow = machine(link=replace(LINK, peer_slowdown=1.5))
    schedule = expand(spec, plan, plan.buckets[0], load.shape)
    timing = simulate(schedule, spec, plan, slow, load, keep_timeline=True)
    model = CostModel(spec, plan, slow, load)
    reads = [(e.start_s, e.end_s, model.cost(schedule.tasks[e.task]).memory_frac) for e in timing.timeline if e.queue == "cpu"]
    seen = set()
    for entry in (each for each in timing.timeline if each.queue == "link_in" and each.start_s > 0):
        covered = sum(0.5 * frac * max(0.0, min(end, entry.end_s) - max(start, entry.start_s)) / (1 + 0.5 * frac) for start, end, frac in reads)
        alone_s = model.cost(schedule.tasks[entry.task]).seconds
        assert entry.end_s - entry.start_s == pytest.approx(alone_s + covered)
        seen.add(covered > 0)
    assert True in seen
    assert timing.busy_s["link_in"] > 1.05 * timing.alone_s["link_in"]


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_timeline_obeys_queues_and_waits(case: Case) -> None:
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    timing = simulate(schedule, case.spec, case.plan, machine(), _load(case), keep_timeline=True)
    by_task = {entry.task: entry for entry in timing.timeline}
    last_end: dict[str, float] = {}
    for task in schedule.tasks:
        entry = by_task[task.index]
        assert entry.start_s >= last_end.get(task.queue, -1e9) - 1e-12
        assert all(wait.previous or by_task[wait.task].end_s <= entry.start_s + 1e-12 for wait in task.waits)
        assert task.kind == "load" or entry.start_s >= 0
        last_end[task.queue] = entry.end_s
    assert max(entry.end_s for entry in timing.timeline) == pytest.approx(timing.seconds)
    for queue, busy in timing.busy_s.items():
        assert busy <= timing.seconds * (1 + 1e-9) or queue == "link_in"


def _model(num_layers: int) -> ModelSpec:
    return ModelSpec(
        name="mid", family="llama", vocab_size=4096, hidden_size=512, num_heads=8, num_kv_heads=4, head_dim=64, intermediate_size=1536,
        layers=(LayerSpec(),) * num_layers, max_model_len=4096, weight_dtype="bf16", activation="silu",
    )  # fmt: skip


def _plan(spec: ModelSpec, shares: list[tuple[float, float]], *, micro_batches: int = 1, packet_bytes: int = 1 << 18, depth: int = 3) -> Plan:
    """``shares``: (resident, streamed) fractions of each layer; the head is resident."""
    splits: list[dict[str, Split]] = [{} for _ in range(spec.num_layers + 1)]
    for op in spec.ops(64):
        resident, streamed = shares[op.layer] if op.layer >= 0 else (1.0, 0.0)
        low, high = op.round_rows(op.rows * resident), op.round_rows(op.rows * (resident + streamed))
        splits[op.layer][op.name] = Split(resident=low, streamed=high - low, cpu=op.rows - high)
    bucket = BucketPlan(phase="decode", max_tokens=64, micro_batches=micro_batches, splits=tuple(splits))
    plan = Plan(
        model="mid", policy="auto", uses_gpu=True, uses_cpu=True, unit_rows=64, buckets=(bucket,), ring_bytes=smallest_ring(spec, 64, packet_bytes, depth),
        packet_bytes=packet_bytes, page_size=16, gpu_pages=999, host_pages=999, kv_dtype="bf16", max_num_seqs=64, max_pass_tokens=64, max_model_len=4096,
    )  # fmt: skip
    plan.check(spec)
    return plan


def _price(spec: ModelSpec, plan: Plan, profile: HardwareProfile, load: PassLoad):
    return simulate(expand(spec, plan, plan.buckets[0], load.shape), spec, plan, profile, load)


def test_a_cpu_plan_takes_the_sum_of_its_tasks_and_the_drivers_overhead() -> None:
    spec = _model(2)
    plan = replace(_plan(spec, [(0, 0)] * 2), uses_gpu=False)
    head = spec.ops(64)[-1]
    bucket = replace(plan.buckets[0], splits=(*plan.buckets[0].splits[:-1], {"lm_head": Split(resident=0, streamed=0, cpu=head.rows)}))
    profile = without_gpu(machine(step_overhead_s=0.25))
    load = decode_load(0, 4, 100, bucket)
    schedule = expand(spec, plan, bucket, load.shape)
    model = CostModel(spec, plan, profile, load)
    timing = simulate(schedule, spec, plan, profile, load)
    assert timing.seconds == pytest.approx(0.25 + sum(model.cost(task).seconds for task in schedule.tasks))
    assert timing.busy_s["gpu"] == timing.busy_s["link"] == 0
    assert timing.bytes == {"link_weights": 0, "link_kv": 0, "link_activations": 0}


def test_streaming_runs_at_the_links_rate_across_passes() -> None:
    """A pass of streamed weights under a fast GPU lasts as long as its packets, since the next pass's first packets come during this one's end."""
    spec = _model(4)
    plan = _plan(spec, [(0, 1)] * 4)
    profile = replace(PRESETS["t4"], step_overhead_s=0.0, step_seq_s=0.0)
    timing = _price(spec, plan, profile, decode_load(4, 0, 100, plan.buckets[0]))
    assert timing.busy_s["link_in"] == pytest.approx(timing.seconds, rel=0.02)
    assert timing.bytes["link_weights"] == pytest.approx(sum(op.weight_bytes for op in spec.ops(64)[:-1]))
    assert timing.fill_s >= timing.seconds


def test_the_processor_loses_what_contention_takes_while_the_link_runs() -> None:
    """CPU-bound, the link working X seconds: the CPU does X / slowdown of its work in them, so it takes X * (1 - 1 / slowdown) longer."""
    spec = _model(5)
    plan = _plan(spec, [(0.3, 0.1)] * 5)
    load = decode_load(8, 0, 100, plan.buckets[0])
    slow = replace(PRESETS["demo"], cpu=replace(PRESETS["demo"].cpu, copy_slowdown=1.5))
    fast = replace(slow, cpu=replace(slow.cpu, copy_slowdown=1.0))
    link_s = _price(spec, plan, fast, load).busy_s["link_in"]
    lost_s = _price(spec, plan, slow, load).busy_s["cpu"] - _price(spec, plan, fast, load).busy_s["cpu"]
    assert 0 < lost_s <= link_s * (1 - 1 / 1.5) * (1 + 1e-9)


def test_a_load_of_another_shape_is_refused() -> None:
    spec = _model(1)
    plan = _plan(spec, [(0.5, 0)])
    schedule = expand(spec, plan, plan.buckets[0], ((True, False, False),))
    with pytest.raises(ValueError, match="shape"):
        simulate(schedule, spec, plan, PRESETS["t4"], decode_load(0, 1, 10, plan.buckets[0]))


# -- the estimate --------------------------------------------------------------------------------------------------------------------------

SHARES = st.sampled_from([(0.0, 0.0), (0.2, 0.1), (0.3, 0.5), (0.0, 1.0), (0.6, 0.1), (0.1, 0.3)])


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 28), SHARES, st.integers(1, 2), st.integers(1, 40), st.sampled_from([64, 2000]), st.sampled_from(sorted(PRESETS)))
def test_the_estimate_of_like_layers_is_within_two_percent(num_layers, shares, micro_batches, num_seqs, context, preset) -> None:
    spec = _model(num_layers)
    plan = _plan(spec, [shares] * num_layers, micro_batches=micro_batches)
    load = decode_load(num_seqs // 2, num_seqs - num_seqs // 2, context, plan.buckets[0])
    full = _price(spec, plan, PRESETS[preset], load)
    estimate = estimate_pass(spec, plan, plan.buckets[0], PRESETS[preset], load)
    assert estimate.seconds == pytest.approx(full.seconds, rel=0.02)
    for name in ("cpu", "gpu", "link_in"):
        assert estimate.busy_s[name] == pytest.approx(full.busy_s[name], rel=0.02, abs=0.01 * full.seconds)
    for name, num_bytes in full.bytes.items():
        assert estimate.bytes[name] == pytest.approx(num_bytes, rel=0.02)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 24), SHARES, SHARES, st.floats(0.1, 0.9), st.booleans(), st.integers(1, 2), st.sampled_from(sorted(PRESETS)))
def test_the_estimate_of_unlike_layers_is_within_seven_percent(num_layers, first, second, frac, spread, micro_batches, preset) -> None:
    """First layers of one kind and the rest of another, or the two spread evenly."""
    spec = _model(num_layers)
    is_first = [int((i + 1) * frac) > int(i * frac) if spread else i < num_layers * frac for i in range(num_layers)]
    plan = _plan(spec, [first if chosen else second for chosen in is_first], micro_batches=micro_batches)
    load = decode_load(8, 8, 200, plan.buckets[0])
    full = _price(spec, plan, PRESETS[preset], load)
    assert estimate_pass_s(spec, plan, plan.buckets[0], PRESETS[preset], load) == pytest.approx(full.seconds, rel=0.07)


def test_the_estimate_of_a_shallow_model_is_the_simulation() -> None:
    spec = _model(EXACT_LAYERS)
    plan = _plan(spec, [(0.2, 0.3)] * EXACT_LAYERS)
    load = decode_load(3, 4, 50, plan.buckets[0])
    assert estimate_pass(spec, plan, plan.buckets[0], PRESETS["a10g"], load) == _price(spec, plan, PRESETS["a10g"], load)


@pytest.mark.parametrize("ring_share", [0.3, 1.5])
def test_the_estimate_sees_the_head_wait_for_the_link_behind_many_layers(ring_share: float) -> None:
    """All that is streamed is the head's: in a few layers the link is always busy, in many it waits for room in the ring."""
    spec = replace(_model(24), vocab_size=6000)
    plan = _plan(spec, [(0.0, 0.0)] * 24)
    bucket = plan.buckets[0]
    head = bucket.splits[-1]["lm_head"]
    bucket = replace(bucket, splits=(*bucket.splits[:-1], {"lm_head": Split(resident=0, streamed=head.rows, cpu=0)}))
    plan = replace(plan, buckets=(bucket,), packet_bytes=1 << 14, ring_bytes=int(ring_share * head.rows * 2 * spec.hidden_size))
    load = decode_load(4, 4, 50, bucket)
    profile = replace(PRESETS["t4"], link=LinkProfile(up_bytes_per_s=2e9, down_bytes_per_s=2e9, packet_s=0.0, copy_s=1e-6, handoff_s=0.0))
    full = _price(spec, plan, profile, load)
    assert estimate_pass_s(spec, plan, bucket, profile, load) == pytest.approx(full.seconds, rel=0.05)


def test_one_estimator_prices_many_loads_of_its_shape() -> None:
    spec = _model(12)
    plan = _plan(spec, [(0.2, 0.3)] * 12)
    loads = [decode_load(3, 4, context, plan.buckets[0]) for context in (10, 3000)]
    estimator = PassEstimator(spec, plan, plan.buckets[0], PRESETS["a10g"], loads[0].shape)
    short, long = (estimator.timing(load).seconds for load in loads)
    assert short < long == estimate_pass_s(spec, plan, plan.buckets[0], PRESETS["a10g"], loads[1])


def test_samples_keep_the_proportions_of_kinds() -> None:
    kinds = ["a"] * 20 + ["b"] * 10
    assert [kinds[layer] for layer in sample_layers(kinds, 6)] == ["a"] * 4 + ["b"] * 2
    assert [kinds[layer] for layer in sample_layers(kinds, 3)] == ["a"] * 2 + ["b"]
    assert sample_layers("abab", 4) == (0, 1, 2, 3)


def test_an_eighty_layer_model_is_priced_in_milliseconds() -> None:
    spec = _model(80)
    plan = _plan(spec, [(0.2, 0.3)] * 80, packet_bytes=1 << 22)
    load = decode_load(8, 8, 200, plan.buckets[0])
    estimate_pass_s(spec, plan, plan.buckets[0], PRESETS["t4"], load)
    start = time.process_time()
    estimate_pass_s(spec, plan, plan.buckets[0], PRESETS["t4"], load)
    assert time.process_time() - start < 0.1  # about 10 ms; room for a busy machine
