"""Promise: a page belongs to at most one sequence, none is lost, and the books say so."""

from __future__ import annotations

import random

import pytest

from tests.toy import toy_plan
from twinpilots.request import SamplingParams, Sequence
from twinpilots.runtime.kv_cache import KvCache, PagePool


def sequence(arrival: int = 0, tier: str = "gpu") -> Sequence:
    made = Sequence(request_id=str(arrival), index=0, params=SamplingParams(), tokens=[1], arrival=arrival)
    made.tier = tier  # type: ignore[assignment]
    return made


def test_a_pool_gives_low_pages_first_and_reuses_freed_ones() -> None:
    pool = PagePool(6, 4)
    assert pool.take(3) == [0, 1, 2]
    pool.give([1, 2])
    assert pool.take(3) == [1, 2, 3] and pool.num_free == 2
    with pytest.raises(AssertionError, match="3 pages taken, 2 free"):
        pool.take(3)


def test_extend_takes_whole_pages_from_the_sequences_tier_only() -> None:
    kv = KvCache(toy_plan(gpu_pages=3, host_pages=8))
    one = sequence()
    kv.open(one, "gpu")
    assert kv.extend(one, 5) and kv.pages(one, 5).tolist() == [0, 1]
    assert kv.extend(one, 8) and kv.num_held(one) == 2, "page_size 4 holds 8 tokens in two pages"
    assert not kv.extend(one, 13) and kv.num_held(one) == 2, "host pages do not serve a GPU sequence, and a failed extend takes nothing"
    kv.free(one)
    assert kv.pools["gpu"].num_free == 3 and kv.num_held(one) == 0


def test_views_of_a_page_table_stay_true_while_it_grows() -> None:
    kv = KvCache(toy_plan(gpu_pages=64))
    one = sequence()
    kv.open(one, "gpu")
    kv.extend(one, 20)
    early = kv.pages(one, 20)
    kv.extend(one, 200)
    assert early.tolist() == kv.pages(one, 200)[:5].tolist() == [0, 1, 2, 3, 4]


def test_random_use_keeps_the_books() -> None:
    kv, rng = KvCache(toy_plan(gpu_pages=20, host_pages=9)), random.Random(5)
    live: list[Sequence] = []
    for step in range(600):
        if live and rng.random() < 0.3:
            kv.free(live.pop(rng.randrange(len(live))))
        else:
            one = sequence(step, rng.choice(["gpu", "host"]))
            kv.open(one, one.tier)
            live.append(one)
            if kv.extend(one, length := rng.randint(1, 30)):
                one.num_computed = length
        kv.check_integrity()
    for one in live:
        kv.free(one)
    assert (kv.pools["gpu"].num_free, kv.pools["host"].num_free) == (20, 9)


def test_the_integrity_check_states_both_sides() -> None:
    kv = KvCache(toy_plan(gpu_pages=8))
    one, two = sequence(0), sequence(1)
    for each in (one, two):
        kv.open(each, "gpu")
        kv.extend(each, 8)
    kv.check_integrity()
    kv.pools["gpu"].give([0])
    with pytest.raises(AssertionError, match=r"gpu pages: 5 free \+ 4 held = 9, the pool has 8"):
        kv.check_integrity()
    kv.pools["gpu"].take(1)
    kv.pages(two, 8)[0] = 1
    with pytest.raises(AssertionError, match="7 distinct pages are free or held, the pool has 8"):
        kv.check_integrity()
    kv.pages(two, 8)[0] = 2
    one.num_computed = 9
    with pytest.raises(AssertionError, match="9 computed tokens on gpu need 3 pages, its table holds 2 on gpu"):
        kv.check_integrity()
