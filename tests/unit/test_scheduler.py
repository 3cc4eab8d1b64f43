"""Promise: passes stay within the plan's budgets, first come is first served, and memory is shared without waste or deadlock."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.toy import toy_plan, toy_spec
from twinpilots.errors import LimitError
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams, Sequence
from twinpilots.runtime.batch import StepBatch, metadata_words, write_metadata
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import Scheduler


def make(plan: Plan, **options: int) -> Scheduler:
    return Scheduler(plan, KvCache(plan), growth_tokens=options.get("growth_tokens", 0))


def add(scheduler: Scheduler, length: int, *, max_tokens: int = 8, arrival: int | None = None) -> Sequence:
    arrival = len(scheduler.waiting) + len(scheduler.running) if arrival is None else arrival
    sequence = Sequence(request_id=str(arrival), index=0, params=SamplingParams(max_tokens=max_tokens), tokens=[1] * length, arrival=arrival)
    scheduler.add(sequence)
    return sequence


def run_pass(scheduler: Scheduler) -> StepBatch:
    """Schedule and pretend to run one pass: who reached its last token gets a new one."""
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.check_integrity()
    ended = [item.sequence for item in batch.items if item.is_last]
    scheduler.commit(batch)
    for sequence in ended:
        scheduler.append(sequence, 1)
        if len(sequence.tokens) >= sequence.max_len:
            scheduler.finish(sequence)
    scheduler.check_integrity()
    return batch


def brought(batch: StepBatch) -> dict[str, tuple[int, int]]:
    return {item.sequence.request_id: (item.start, item.num_tokens) for item in batch.items}


def test_prompts_come_in_chunks_beside_decoding_sequences() -> None:
    scheduler = make(toy_plan(max_pass_tokens=10))
    add(scheduler, 4)
    add(scheduler, 25, arrival=1)
    assert brought(run_pass(scheduler)) == {"0": (0, 4), "1": (0, 6)}
    batch = run_pass(scheduler)
    assert brought(batch) == {"0": (4, 1), "1": (6, 9)} and batch.bucket.phase == "prefill" and batch.num_logits == 1
    assert brought(run_pass(scheduler)) == {"0": (5, 1), "1": (15, 9)}
    batch = run_pass(scheduler)
    assert brought(batch) == {"0": (6, 1), "1": (24, 1)}, "one last prompt token costs what a decode token costs"
    assert batch.bucket.phase == "decode" and batch.num_logits == 2


def test_running_sequences_and_logit_rows_stay_within_max_num_seqs() -> None:
    scheduler = make(toy_plan(max_num_seqs=3, max_pass_tokens=20))
    wanting = add(scheduler, 7, arrival=0)
    wanting.logits_from = 0
    for arrival in range(1, 6):
        add(scheduler, 2, arrival=arrival)
    rows = []
    while wanting.num_computed < 7:
        batch = run_pass(scheduler)
        assert len(batch.items) <= 3 and batch.num_logits <= 3
        rows.append(next((item.num_logits for item in batch.items if item.sequence is wanting), 0))
    assert sum(rows) == 7, "one logit row for every prompt position"


def test_several_pending_tokens_of_a_decoding_sequence_get_logits_each() -> None:
    scheduler = make(toy_plan())
    sequence = add(scheduler, 5, max_tokens=20)
    run_pass(scheduler)
    sequence.tokens += [2, 2, 2]
    sequence.logits_from = sequence.num_computed
    batch = run_pass(scheduler)
    assert batch.bucket.phase == "decode" and batch.items[0].num_tokens == 4 == batch.num_logits


def test_gpu_pages_first_then_host_pages_with_room_to_grow() -> None:
    scheduler = make(toy_plan(gpu_pages=6, host_pages=4, max_model_len=32), growth_tokens=256)
    sequences = [add(scheduler, 4, max_tokens=8, arrival=i) for i in range(4)]  # each ends with 11 computed tokens: 3 pages
    run_pass(scheduler)
    assert [sequence.tier for sequence in sequences] == ["gpu", "gpu", "host", None]
    while sequences[0] in scheduler.running:
        run_pass(scheduler)
    run_pass(scheduler)
    assert sequences[3].tier == "gpu", "it came in when others had left"
    assert scheduler.num_preemptions == 0, "head-room was kept for everything that was promised"


def test_the_newest_on_the_tier_gives_way_and_comes_back_first() -> None:
    scheduler = make(toy_plan(gpu_pages=4, host_pages=0, max_model_len=16))
    sequences = [add(scheduler, 4, max_tokens=12, arrival=i) for i in range(3)]
    run_pass(scheduler)
    assert scheduler.running == sequences
    later = add(scheduler, 4, max_tokens=12, arrival=3)
    while not scheduler.num_preemptions:
        run_pass(scheduler)
    newest = sequences[2]
    assert scheduler.running == sequences[:2] and list(scheduler.waiting) == [newest, later]
    assert (newest.num_computed, newest.catch_up, newest.num_seen) == (0, len(newest.tokens), 4), "its tokens stay, only their KV is computed anew"


def test_a_victim_that_was_already_chosen_leaves_the_pass() -> None:
    scheduler = make(toy_plan(gpu_pages=3, host_pages=0, max_model_len=12, max_pass_tokens=8))
    scheduler.recompute_beyond = 8  # only a sequence that is computed anew can be older than a decoding one and yet need pages after it
    old, new = add(scheduler, 7, max_tokens=5), add(scheduler, 1, max_tokens=8, arrival=1)
    assert [brought(run_pass(scheduler)) for _ in range(3)] == [{"0": (0, 7), "1": (0, 1)}, {"0": (7, 1), "1": (1, 1)}, {"0": (0, 7), "1": (2, 1)}]
    assert brought(run_pass(scheduler)) == {"0": (7, 2)}, "the newest had been chosen first and gave its page"
    assert scheduler.running == [old] and list(scheduler.waiting) == [new] and new.num_computed == 0


def test_what_can_never_fit_is_refused_with_value_limit_and_next_action() -> None:
    scheduler = make(toy_plan(gpu_pages=2, host_pages=5, max_model_len=32))
    with pytest.raises(LimitError, match=r"prompt has 32 tokens, max_model_len=32 .* shorten it"):
        add(scheduler, 32)
    with pytest.raises(LimitError, match=r"pages for 21 tokens, the largest tier holds 20; lower max_tokens"):
        add(scheduler, 12, max_tokens=10)
    assert not scheduler.has_unfinished()
    assert add(scheduler, 12, max_tokens=9).max_len == 21, "the last token needs no page"


def test_without_cpu_attention_a_host_sequence_must_fit_the_staging_area() -> None:
    plan = toy_plan(gpu_pages=0, host_pages=40, uses_cpu=False, kv_staging_pages=3, host_attention="gpu", host_prefill_attention="gpu")
    scheduler = make(plan)
    with pytest.raises(LimitError, match="largest tier holds 12"):
        add(scheduler, 8, max_tokens=8)
    sequences = [add(scheduler, 5, max_tokens=4, arrival=i) for i in range(3)]  # two pages each, three in the staging area
    assert list(brought(run_pass(scheduler))) == ["0"], "the others wait for a later pass"
    served = set()
    while scheduler.has_unfinished():
        batch = run_pass(scheduler)
        staged = [sum(len(item.pages) for item in groups[1]) for groups in batch.micro_batches]
        assert max(staged) <= 3 and not any(groups[0] or groups[2] for groups in batch.micro_batches)
        served |= set(brought(batch))
    assert served == {"0", "1", "2"} and all(len(s.tokens) == 9 for s in sequences)


def test_streamed_sequences_beyond_the_staging_area_are_attended_on_the_cpu() -> None:
    scheduler = make(toy_plan(gpu_pages=0, host_attention="gpu", host_prefill_attention="cpu", kv_staging_pages=3, micro_batches=2))
    for arrival in range(5):
        add(scheduler, 5, arrival=arrival)
    assert run_pass(scheduler).shape == ((False, False, True),) * 2, "prompt chunks follow host_prefill_attention"
    batch = run_pass(scheduler)
    assert [[len(group) for group in groups] for groups in batch.micro_batches] == [[0, 1, 2], [0, 1, 1]]


def test_micro_batches_balance_tokens_and_none_is_empty() -> None:
    scheduler = make(toy_plan(micro_batches=3, max_num_seqs=16))
    for arrival, length in enumerate([9, 4, 4, 3, 2, 2, 2]):
        add(scheduler, length, arrival=arrival)
    batch = run_pass(scheduler)
    assert sorted(sum(i.num_tokens for group in groups for i in group) for groups in batch.micro_batches) == [8, 9, 9]
    few = make(toy_plan(micro_batches=4))
    add(few, 3)
    assert len(run_pass(few).micro_batches) == 1, "fewer sequences, fewer micro-batches"


def test_the_next_bucket_is_predicted_from_what_will_be_left() -> None:
    scheduler = make(toy_plan(max_pass_tokens=16))
    add(scheduler, 20, max_tokens=3)
    predicted = []
    ran = []
    while scheduler.has_unfinished():
        batch = scheduler.schedule()
        assert batch is not None
        ran.append(batch.bucket)
        predicted.append(scheduler.predict_next(batch))
        ended = [item.sequence for item in batch.items if item.is_last]
        scheduler.commit(batch)
        for sequence in ended:
            scheduler.append(sequence, 1)
            if len(sequence.tokens) >= sequence.max_len:
                scheduler.finish(sequence)
    assert predicted == [*ran[1:], None]


def test_a_waiting_sequence_that_has_no_room_does_not_fool_the_prediction() -> None:
    scheduler = make(toy_plan(gpu_pages=4, host_pages=0, max_model_len=16), growth_tokens=256)
    add(scheduler, 4, max_tokens=12)
    add(scheduler, 4, max_tokens=12, arrival=1)
    batch = run_pass(scheduler)
    assert len(batch.items) == 1
    batch = scheduler.schedule()
    assert batch is not None
    following = scheduler.predict_next(batch)
    assert following is not None and following.phase == "decode"


def test_a_new_plan_may_move_work_but_not_what_sequences_rely_on() -> None:
    scheduler = make(toy_plan(gpu_pages=0))
    add(scheduler, 4)
    run_pass(scheduler)
    scheduler.set_plan(toy_plan(gpu_pages=0, micro_batches=2, host_attention="cpu"))
    run_pass(scheduler)
    with pytest.raises(ValueError, match="cannot change host_pages from 64 to 65"):
        scheduler.set_plan(toy_plan(gpu_pages=0, host_pages=65))


def test_prompts_that_are_skipped_count_as_computed_as_far_as_there_is_room() -> None:
    scheduler = make(toy_plan(gpu_pages=8, host_pages=5, page_size=4, max_num_seqs=4))  # three pages each: two on the GPU, one on the host
    sequences = [add(scheduler, 9, max_tokens=3, arrival=arrival) for arrival in range(5)]
    assert scheduler.skip_prompts() == 3 and len(scheduler.waiting) == 2
    assert [sequence.tier for sequence in sequences] == ["gpu", "gpu", "host", None, None]
    scheduler.check_integrity()
    batch = run_pass(scheduler)
    assert brought(batch) == {str(arrival): (8, 1) for arrival in range(3)} and batch.bucket.phase == "decode"


def test_planning_a_pass_of_64_decoding_sequences_is_cheap() -> None:
    plan = toy_plan(gpu_pages=64 * 64, max_num_seqs=64, max_pass_tokens=512, max_model_len=1024, page_size=16)
    scheduler = make(plan)
    for arrival in range(64):
        add(scheduler, 500, max_tokens=400, arrival=arrival)
    meta = np.zeros(metadata_words(plan), np.int32)
    while any(s.num_pending > 1 for s in [*scheduler.running, *scheduler.waiting]):
        run_pass(scheduler)
    schedule_s, write_s = [], []
    for _ in range(30):
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter()
        assert batch is not None and len(batch.items) == 64
        write_metadata(batch, meta, toy_spec(), plan)
        write_s.append(time.perf_counter() - scheduled)
        schedule_s.append(scheduled - began)
        scheduler.commit(batch)
        for item in batch.items:
            scheduler.append(item.sequence, 1)
    # The targets are 300 and 200 us; a tenfold and more only stops something of another order, on a machine however busy.
    assert min(schedule_s) < 5e-3 and min(write_s) < 5e-3, f"schedule {min(schedule_s) * 1e6:.0f} us, metadata {min(write_s) * 1e6:.0f} us"
