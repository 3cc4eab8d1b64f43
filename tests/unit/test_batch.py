"""Promise: the metadata words say exactly which token, position, page and logit row belongs where (docs/execution.md)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.toy import VOCAB, toy_plan, toy_spec
from twinpilots.kernels.abi import MAX_MICRO_BATCHES, Meta
from twinpilots.request import SamplingParams, Sequence
from twinpilots.runtime.batch import BatchItem, StepBatch, metadata_words, write_metadata
from twinpilots.runtime.deal import deal


def item(
    arrival: int, length: int, start: int, num_tokens: int, pages: list[int], *, tier: str = "gpu", num_logits: int = 1, is_chunk: bool = False
) -> BatchItem:  # fmt: skip
    tokens = [(100 * arrival + i) % VOCAB for i in range(length)]
    sequence = Sequence(request_id=str(arrival), index=0, params=SamplingParams(), tokens=tokens, arrival=arrival)
    sequence.tier = tier  # type: ignore[assignment]
    return BatchItem(sequence, start, num_tokens, num_logits, is_chunk, np.array(pages, np.int32))


def read(meta: np.ndarray, word: Meta, count: int) -> list[int]:
    return meta[meta[word] : meta[word] + count].tolist()


def test_a_hand_made_pass_of_two_micro_batches_and_three_groups() -> None:
    plan = toy_plan(kv_staging_pages=8, max_pass_tokens=32)
    a = item(1, 6, 5, 1, [9, 4])  # decode on the GPU: position 5 lies in the second page
    b = item(2, 9, 2, 6, [3, 1], tier="host", num_logits=0, is_chunk=True)  # an unfinished prompt chunk, streamed
    c = item(3, 8, 7, 1, [20, 21], tier="host")  # streamed as well: its staging pages follow b's
    d = item(4, 3, 0, 3, [2], tier="host", num_logits=2)  # attended on the CPU, logits of two positions
    batch = StepBatch(bucket=plan.buckets[1], micro_batches=(((a,), (b, c), ()), ((), (), (d,))))
    meta = np.full(metadata_words(plan), -7, np.int32)
    write_metadata(batch, meta, toy_spec(), plan)

    assert meta[: Meta.NUM_LOGITS + 1].tolist() == [11, 4, 2, 4]
    assert meta[Meta.ROWS : Meta.ROWS + 8].tolist() == [0, 1, 8, 8, 8, 8, 8, 11]
    assert meta[Meta.SEQS : Meta.SEQS + 8].tolist() == [0, 1, 3, 3, 3, 3, 3, 4]
    assert set(meta[Meta.ROWS + 8 : Meta.SEQS].tolist()) == {11} and set(meta[Meta.SEQS + 8 : Meta.HEADER].tolist()) == {4}
    assert read(meta, Meta.OFF_TOKEN, 11) == [
        t % VOCAB for t in (105, 202, 203, 204, 205, 206, 207, 307, 400, 401, 402)
    ]  # fmt: skip
    assert read(meta, Meta.OFF_POSITION, 11) == [5, 2, 3, 4, 5, 6, 7, 7, 0, 1, 2] == read(meta, Meta.OFF_ROPE_ROW, 11)
    # a: page 4; b: staging pages 0, 1; c: staging pages 2, 3; d: host page 2
    assert read(meta, Meta.OFF_SLOT, 11) == [4 * 4 + 1, 2, 3, 4, 5, 6, 7, 3 * 4 + 3, 8, 9, 10]
    assert read(meta, Meta.OFF_LOGIT_ROW, 4) == [0, 7, 9, 10]
    assert read(meta, Meta.OFF_SEQ_ROW, 4) == [0, 1, 7, 8] and read(meta, Meta.OFF_SEQ_LEN, 4) == [1, 6, 1, 3]
    assert read(meta, Meta.OFF_SEQ_KV, 4) == [6, 8, 8, 3]
    page = meta[meta[Meta.OFF_PAGE] :]
    attended, home = read(meta, Meta.OFF_SEQ_PAGES, 4), read(meta, Meta.OFF_SEQ_HOME, 4)
    assert [page[o : o + n].tolist() for o, n in zip(attended, (2, 2, 2, 1), strict=True)] == [[9, 4], [0, 1], [2, 3], [2]]
    assert [page[o : o + n].tolist() for o, n in zip(home, (2, 2, 2, 1), strict=True)] == [[9, 4], [3, 1], [20, 21], [2]]


def test_every_micro_batch_stages_its_pages_from_zero() -> None:
    plan = toy_plan(kv_staging_pages=8)
    small, large = item(1, 2, 1, 1, [5], tier="host"), item(2, 12, 11, 1, [6, 7, 8], tier="host")
    batch = StepBatch(bucket=plan.buckets[0], micro_batches=(((), (small,), ()), ((), (large,), ())))
    meta = np.zeros(metadata_words(plan), np.int32)
    write_metadata(batch, meta, toy_spec(), plan)
    page, attended = meta[meta[Meta.OFF_PAGE] :], read(meta, Meta.OFF_SEQ_PAGES, 2)
    assert [page[attended[0]], page[attended[1] : attended[1] + 3].tolist()] == [0, [0, 1, 2]]
    assert read(meta, Meta.OFF_SLOT, 2) == [1, 11]


def test_longrope_sequences_beyond_the_switch_read_the_long_table() -> None:
    plan = toy_plan()
    short, long = item(1, 10, 8, 2, [0, 1, 2]), item(2, 11, 8, 2, [3, 4, 5])  # 11 known tokens, though this chunk ends at 10
    meta = np.zeros(metadata_words(plan), np.int32)
    write_metadata(deal(plan, [short, long]), meta, toy_spec(long_after=10), plan)
    assert read(meta, Meta.OFF_ROPE_ROW, 4) == [8, 9, plan.max_model_len + 8, plan.max_model_len + 9]


def test_the_largest_pass_of_a_plan_fits_its_metadata_words_exactly() -> None:
    plan = toy_plan(host_attention="gpu", gpu_pages=0, host_pages=64, kv_staging_pages=64, max_num_seqs=4, max_pass_tokens=4, max_model_len=64)
    items = [item(i, 64, 63, 1, list(range(16 * i, 16 * i + 16)), tier="host") for i in range(4)]
    batch = deal(plan, items)
    meta = np.zeros(metadata_words(plan), np.int32)
    write_metadata(batch, meta, toy_spec(), plan)
    assert meta[Meta.OFF_PAGE] + 2 * 64 == len(meta)
    with pytest.raises(ValueError, match="needs more than the"):
        write_metadata(batch, meta[:-1], toy_spec(), plan)


def test_pages_that_sequences_share_are_listed_for_each_of_them() -> None:
    plan = toy_plan(gpu_pages=17, host_pages=0, max_num_seqs=4, max_pass_tokens=4, max_model_len=64)
    batch = deal(plan, [item(i, 64, 63, 1, [*range(15), 15 + i]) for i in range(2)] + [item(i, 60, 59, 1, list(range(15))) for i in (2, 3)])
    meta = np.zeros(metadata_words(plan), np.int32)
    write_metadata(batch, meta, toy_spec(), plan)
    assert meta[meta[Meta.OFF_PAGE] : meta[Meta.NUM_WORDS]].tolist() == [*range(15), 15, *range(15), 16, *range(15), *range(15)]


def test_counts_of_a_pass() -> None:
    fresh, again = item(1, 6, 0, 4, [0], num_logits=0, is_chunk=True), item(2, 6, 2, 4, [1, 2])
    again.sequence.num_seen = 5  # recomputed after a preemption: only position 5 is new
    batch = deal(toy_plan(), [fresh, again])
    assert (batch.num_tokens, batch.num_logits, batch.num_prompt_tokens, batch.num_generated) == (8, 1, 5, 1)
    assert batch.shape == ((True, False, False),) and len(batch.micro_batches) <= MAX_MICRO_BATCHES
