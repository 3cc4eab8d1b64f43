"""Passes are priced at once: what is simulated is simulated before they follow each other."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from tests.planning import DEMO, smollm2
from twinpilots.plan.estimate import PassEstimator, estimate_pass_s
from twinpilots.plan.load import decode_load
from twinpilots.plan.plan import Plan
from twinpilots.plan.policies import build_policy
from twinpilots.plan.workload import Limits, Workload
from twinpilots.predictions import Predictions

SPEC = smollm2()
LOADS = [(num_seqs, context) for num_seqs in (64, 50, 40, 30, 17, 9, 5, 3, 2, 1) for context in (40, 200)]


def plan() -> Plan:
    workload = Workload(num_requests=64, input_len=64, output_len=192, max_num_seqs=64)
    return build_policy("flexgen", SPEC, DEMO, workload, Limits(gpu_bytes=84 << 20, host_bytes=8 << 30))


def test_nothing_is_simulated_while_passes_follow_each_other_and_predictions_stay_near() -> None:
    made = plan()
    predictions = Predictions(SPEC, DEMO, at_once=False)
    predictions.prepare(made, made.buckets, budget_s=60.0)
    simulated, errors = predictions.num_simulated, []
    for num_seqs, context in LOADS:
        bucket = made.bucket_for("decode", num_seqs)
        on_gpu = min(num_seqs, made.gpu_pages // 16)
        load = decode_load(on_gpu, num_seqs - on_gpu, context, bucket)
        exact_s = estimate_pass_s(SPEC, made, bucket, DEMO, load)
        errors.append(abs(predictions.timing(made, bucket, load).seconds / exact_s - 1.0))
    assert predictions.num_simulated == simulated
    assert median(errors) < 0.04
    assert max(errors) < 0.25


def test_rates_that_change_are_followed_without_a_simulation() -> None:
    made = plan()
    predictions = Predictions(SPEC, DEMO, at_once=False)
    predictions.prepare(made, made.buckets, budget_s=60.0)
    simulated = predictions.num_simulated
    assert DEMO.link is not None
    slow = replace(DEMO, link=replace(DEMO.link, up_bytes_per_s=DEMO.link.up_bytes_per_s / 3, down_bytes_per_s=DEMO.link.down_bytes_per_s / 3))
    predictions.renew(slow)
    bucket = made.bucket_for("decode", 64)
    load = decode_load(made.gpu_pages // 16, 64 - made.gpu_pages // 16, 100, bucket)
    assert abs(predictions.timing(made, bucket, load).seconds / estimate_pass_s(SPEC, made, bucket, slow, load) - 1.0) < 0.15
    assert predictions.num_simulated == simulated


def test_a_bucket_that_was_not_prepared_is_priced_by_its_relatives() -> None:
    made = plan()
    predictions = Predictions(SPEC, DEMO, at_once=False)
    predictions.prepare(made, made.buckets, budget_s=0.0)
    assert predictions.num_simulated == 1
    bucket = made.bucket_for("decode", 4)
    assert predictions.timing(made, bucket, decode_load(1, 3, 100, bucket)).seconds > 0
    assert predictions.num_simulated == 1


def test_what_is_asked_outside_a_run_is_simulated() -> None:
    made = plan()
    predictions = Predictions(SPEC, DEMO, at_once=True)
    bucket = made.bucket_for("decode", 64)
    load = decode_load(0, 64, 100, bucket)
    assert predictions.timing(made, bucket, load).seconds == estimate_pass_s(SPEC, made, bucket, DEMO, load)
    assert predictions.num_simulated == 1


def test_work_that_the_stand_in_did_not_have_counts_as_it_is() -> None:
    """A bucket whose relatives leave everything to the CPU, itself streams and computes on the GPU."""
    made = plan()
    used = made.bucket_for("decode", 4)
    alone = replace(
        made.bucket_for("decode", 64), host_attention="cpu",
        splits=tuple({name: replace(split, streamed=0, cpu=split.streamed + split.cpu) for name, split in layer.items()} for layer in used.splits),
    )  # fmt: skip
    other = replace(made, buckets=(used, alone))
    predictions = Predictions(SPEC, DEMO, at_once=False)
    predictions.prepare(other, [alone], budget_s=0.0)
    load = decode_load(1, 3, 100, used)
    found, exact = predictions.timing(other, used, load), PassEstimator(SPEC, other, used, DEMO, load.shape).timing(load)
    assert predictions.num_simulated == 1 and exact.busy_s["link_in"] > 0
    for queue in ("gpu", "link_in"):
        assert 0.6 < found.busy_s[queue] / exact.busy_s[queue] < 1.3
    assert found.seconds >= max(found.busy_s.values())


def test_a_trace_that_begins_in_the_middle_is_predicted_by_simulation_too() -> None:
    made = plan()
    predictions = Predictions(SPEC, DEMO, at_once=False)
    predictions.prepare(made, [made.bucket_for("decode", 64)], budget_s=0.0)
    bucket = made.bucket_for("decode", 4)
    load = decode_load(1, 3, 100, bucket)
    predictions.timing(made, bucket, load)
    predictions.simulate_at_once(True)
    assert predictions.timing(made, bucket, load).seconds == estimate_pass_s(SPEC, made, bucket, DEMO, load)
