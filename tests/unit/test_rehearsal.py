"""What real passes make of a profile: the driver's time is found and predicted, rates are corrected where they were seen."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

from benchmarks.adaptation_machine import slower
from benchmarks.hidden_devices import measured
from benchmarks.hidden_machine import random_machine
from benchmarks.hidden_passes import run_passes
from benchmarks.hidden_rehearsal import profiled
from benchmarks.truth import CARD_BYTES, Never
from tests.machines import without_gpu
from tests.planning import llama, smollm2
from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import AloneProfile, Curve, HardwareProfile
from twinpilots.model.dummy import dummy_spec
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.bounds import pass_bound
from twinpilots.plan.driver import most_passes
from twinpilots.plan.estimate import estimate_pass
from twinpilots.plan.load import decode_load, prefill_load
from twinpilots.plan.plan import Plan
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import PassTiming, simulate
from twinpilots.plan.workload import Limits
from twinpilots.rehearsal import alone_driver, alone_plan, driver_time, rehearse, short_model, short_plan
from twinpilots.runtime.accounts import span_seconds
from twinpilots.stats.correction import Medians, WorkTime, corrected


def record(key: str, size: float, ratio: float) -> WorkTime:
    return WorkTime(resource="cpu", key=key, size=size, expected_s=1.0, seconds=ratio)


def test_a_hidden_drivers_time_is_predicted() -> None:
    """5 ms and 100 us a sequence between passes of some 10 ms: the experiments with single instructions cannot see it, passes of a short model do."""
    machine = replace(random_machine(3, 0), driver_s=5e-3, driver_seq_s=100e-6, weather=0.0)
    spec = dummy_spec("smollm2-135m")
    spec = replace(spec, layers=spec.layers[:4])
    blind, profile = (make(machine, spec, CARD_BYTES, 3, "quick") for make in (measured, profiled))
    for num_seqs in (1, 16, 64):
        assert profile.step_s(num_seqs) == pytest.approx(machine.between_s(num_seqs), rel=0.05)
    plan = short_plan(spec, profile)
    assert plan is not None
    bucket = plan.bucket_for("decode", 12)
    load = decode_load(4, 8, 50, bucket)
    true_s = median(found.seconds for found in run_passes(machine, spec, plan, expand(spec, plan, bucket, load.shape), [load] * 8, 3))
    predicted_s, blindly_s = (OnlinePlanner(spec, each, Never(), adapts=False).predict(plan, bucket, load).seconds for each in (profile, blind))
    assert predicted_s == pytest.approx(true_s, rel=0.08)
    assert blindly_s < true_s - 4e-3


def test_the_driver_is_a_line_through_the_medians() -> None:
    found = driver_time({1: [1.1e-3, 1.1e-3, 50e-3], 16: [2.6e-3], 64: [7.4e-3]})
    assert found is not None
    assert (found.step_s, found.seq_s) == (pytest.approx(1e-3), pytest.approx(1e-4))
    falling = driver_time({1: [3e-3], 16: [1e-3]})
    assert falling is not None
    assert (falling.step_s, falling.seq_s) == (pytest.approx(2e-3), 0.0)
    assert driver_time({}) is None


def test_a_pass_is_charged_for_each_of_its_sequences() -> None:
    spec, profile = llama(), replace(PRESETS["t4"], step_overhead_s=0.0, step_seq_s=0.0)
    plan = short_plan(replace(spec, name="rehearsal"), profile)
    assert plan is not None
    bucket = plan.bucket_for("decode", 6)
    load = decode_load(2, 4, 30, bucket)
    schedule = expand(spec, plan, bucket, load.shape)
    free, charged = (simulate(schedule, spec, plan, each, load).seconds for each in (profile, replace(profile, step_overhead_s=2e-3, step_seq_s=1e-3)))
    assert charged == pytest.approx(free + 2e-3 + 6e-3, rel=0.02)


ALONE = AloneProfile(call_s=0.8e-3, call_seq_s=10e-6, pass_s=0.1e-3, pass_seq_s=40e-6, linear={"fp16/out": Curve(x=(1.0, 8.0), y=(0.5, 1.0))})


def test_profiles_with_and_without_optional_fields_load() -> None:
    data = json.loads(PRESETS["t4"].to_json())
    del data["step_seq_s"], data["alone"]
    assert HardwareProfile.from_json(json.dumps(data)) == replace(PRESETS["t4"], step_seq_s=0.0)
    profile = replace(PRESETS["t4"], alone=ALONE)
    assert HardwareProfile.from_json(profile.to_json()) == profile


def alone_pass(num_seqs: int, chained: int, driver_s: float) -> PassDone:
    plan = alone_plan(llama(), without_gpu(PRESETS["t4"]))
    assert plan is not None
    bucket = plan.bucket_for("decode", num_seqs)
    load = decode_load(0, num_seqs, 40, bucket)
    return PassDone(
        plan=plan, bucket=bucket, load=load, schedule=expand(llama(), plan, bucket, load.shape), work_s={}, seconds=1.0, driver_s=driver_s, remaining=1,
        chained=chained,
    )  # fmt: skip


def test_what_chained_passes_share_is_told_apart_from_what_each_takes() -> None:
    true = replace(ALONE, linear={})
    found = alone_driver([alone_pass(num_seqs, chained, true.step_s(num_seqs, chained)) for num_seqs in (1, 4, 16) for chained in (1, 5, 16)])
    assert found is not None
    assert (found.call_s, found.call_seq_s, found.pass_s, found.pass_seq_s) == pytest.approx((0.8e-3, 10e-6, 0.1e-3, 40e-6))
    assert alone_driver([alone_pass(1, 8, 1e-3)]) is None


def test_where_no_pass_is_chained_chains_promise_nothing() -> None:
    found = alone_driver([alone_pass(num_seqs, 1, 1e-3) for num_seqs in (1, 4)])
    assert found is not None
    assert found.step_s(1, 16) == pytest.approx(1e-3)


def test_plans_of_the_cpu_alone_have_its_driver_and_its_rates() -> None:
    """A pass of some ms is one of a chain; a plan that uses the GPU takes what it took before, and a prompt's pass is never chained."""
    spec, plain = llama(hidden=512, intermediate=1024), PRESETS["demo"]
    by_both, by_cpu = short_plan(spec, plain), alone_plan(spec, plain)
    assert by_both is not None and by_cpu is not None
    profile = replace(plain, alone=ALONE)

    def timing(plan: Plan, each: HardwareProfile, prompt: int = 0) -> PassTiming:
        bucket = plan.bucket_for("prefill" if prompt else "decode", prompt or 4)
        load = prefill_load(0, 1, prompt, 0, bucket) if prompt else decode_load(0, 4, 30, bucket)
        return estimate_pass(spec, plan, bucket, each, load)

    assert timing(by_both, profile) == timing(by_both, plain)
    before, found = timing(by_cpu, plain), timing(by_cpu, profile)
    assert found.work_seconds < 0.95 * before.work_seconds
    assert found.driver_s == pytest.approx(ALONE.step_s(4, most_passes(found.work_seconds)))
    assert most_passes(found.work_seconds) > 1
    assert timing(by_cpu, profile, prompt=16).driver_s == pytest.approx(ALONE.step_s(1, 1))
    assert profile.gpu is not None
    profile = replace(profile, gpu=slower(profile.gpu, 1e3))  # so that nobody wants it
    limits, bucket = Limits(gpu_bytes=plain.gpu_memory_bytes, host_bytes=plain.host_memory_bytes), by_cpu.bucket_for("decode", 4)
    bound = pass_bound(spec, profile, limits, decode_load(0, 4, 30, bucket), "plan", kv_dtype="fp32")
    assert 0.5 * found.seconds < bound.seconds <= found.seconds, "no plan beats the bound"


def test_a_deep_models_estimate_is_chained_by_the_whole_passes_length() -> None:
    """Samples of a few layers are short enough for long chains, the whole model is not."""
    spec = llama(hidden=2048, intermediate=4096)
    spec = replace(spec, layers=spec.layers[:1] * 40)
    profile = replace(PRESETS["demo"], alone=ALONE)
    plan = alone_plan(spec, profile)
    assert plan is not None
    bucket = plan.bucket_for("decode", 1)
    load = decode_load(0, 1, 30, bucket)
    whole, about = simulate(expand(spec, plan, bucket, load.shape), spec, plan, profile, load), estimate_pass(spec, plan, bucket, profile, load)
    assert about.driver_s == pytest.approx(whole.driver_s)
    assert about.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_what_was_seen_at_some_sizes_is_taken_over_between_them_and_beyond() -> None:
    found = Medians([record("fp16/in", 1, 2.0), record("fp16/in", 1, 2.2), record("fp16/in", 1, 9.0), record("fp16/in", 16, 1.1), record("fp16/in", 8, 0.0)])
    assert found.factor("cpu", "fp16/in", 1) == pytest.approx(2.2)
    assert found.factor("cpu", "fp16/in", 4) == pytest.approx((2.2 * 1.1) ** 0.5)
    assert found.factor("cpu", "fp16/in", 500) == pytest.approx(1.1)
    assert found.factor("gpu", "fp16/in", 1) == 1.0


def test_a_size_next_to_a_point_of_the_curve_makes_no_slope_of_its_own() -> None:
    profile = replace(PRESETS["t4"], cpu=replace(PRESETS["t4"].cpu, linear={"fp16/in": Curve(x=(1.0, 512.0), y=(1.0, 512.0))}))
    records = [record("fp16/in", 511.0, 1.0), record("fp16/in", 512.0, 1.3)]
    curve = corrected(profile, Medians(records)).cpu.linear["fp16/in"]
    assert curve.x == (1.0, 512.0)
    assert curve(2048) == pytest.approx(1.3 * 2048, rel=0.01)


def test_a_short_model_has_the_widths_of_the_long_one() -> None:
    short = short_model(smollm2())
    assert (short.hidden_size, short.intermediate_size, short.rate_keys) == (576, 1536, smollm2().rate_keys)
    assert 60 << 20 < short.linear_bytes <= 80 << 20, "more than caches hold"
    assert short_model(dummy_spec("opt-30b")).num_layers == 1


def test_the_engine_itself_is_timed() -> None:
    """A profile that knows of no driver comes back with what this box's needs: more than 20 us, less than 50 ms."""
    spec = llama(hidden=128, intermediate=320, vocab=256)
    profile = replace(PRESETS["demo"], gpu=None, link=None, gpu_memory_bytes=0, step_overhead_s=0.0, step_seq_s=0.0)
    for _ in range(3):  # a neighbour may be busy in some of its few passes
        found = rehearse("cpu", 1, spec, profile, quick=True)
        assert found.alone is not None
        if found.alone.step_s(1, 16) < 0.8 * found.alone.step_s(1, 1):
            break
    assert 20e-6 < found.alone.step_s(1, 1) < 50e-3
    assert found.alone.step_s(1, 16) < 0.8 * found.alone.step_s(1, 1), "chained passes share what is around them"
    assert not found.alone.linear, "there is nothing to compare with"
    assert found.cpu.linear["fp16/in"] != profile.cpu.linear["fp16/in"], "work took its time, too"
    assert found.gpu is None


def test_a_passes_span_leaves_out_what_is_loaded_ahead() -> None:
    cpu, gpu, ahead = (np.array(times, np.int64) for times in ([[0, 5, 9], [9, 10, 40]], [[0, 7, 8]], [[0, 0, 90]]))
    assert span_seconds({"cpu": cpu, "gpu": gpu, "link_in": ahead}) == pytest.approx(35e-9)
