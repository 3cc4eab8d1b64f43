"""Promise: a page belongs to at most one sequence, none is lost, and the books say so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(AssertionError, match=r"gpu pages: 4 free \+ 3 held = 7, the pool has 8"):
        kv.check_integrity()
    kv.pages(two, 8)[0] = 2
    one.num_computed = 9
    with pytest.raises(AssertionError, match="9 computed tokens on gpu need 3 pages, its table holds 2 on gpu"):
        kv.check_integrity()


@given(st.data())
def test_random_sharing_keeps_the_books_and_never_mixes_up_beginnings(data: st.DataObject) -> None:
    """``written[tier][page]``: the tokens that a real page would hold. Whoever is given pages must find its own beginning there."""
    plan = toy_plan(gpu_pages=data.draw(st.integers(1, 12)), host_pages=data.draw(st.integers(1, 12)))
    kv, live = KvCache(plan), list[Sequence]()
    written: dict[tuple[str, int], list[int]] = {}
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["open", "extend", "extend", "free"]))
        if action == "open":
            one = sequence(number, data.draw(st.sampled_from(["gpu", "host"])))
            one.tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))
            one.num_computed = kv.open(one, one.tier)
            assert one.num_computed < len(one.tokens) and one.num_computed % kv.page_size == 0
            live.append(one)
        elif live:
            one = data.draw(st.sampled_from(live))
            if action == "free":
                live.remove(one)
                kv.free(one)
            elif kv.extend(one, end := data.draw(st.integers(one.num_computed, len(one.tokens)))):
                for position in range(one.num_computed, end):  # a pass writes what it computes
                    page = int(kv.pages(one, end)[position // kv.page_size])
                    written.setdefault((one.tier, page), [-1] * kv.page_size)[position % kv.page_size] = one.tokens[position]
                one.num_computed = end
                kv.computed(one, end)
        kv.check_integrity()
        for each in live:
            held = [written[each.tier, page] for page in kv.pages(each, each.num_computed).tolist()]
            assert [token for page in held for token in page][: each.num_computed] == each.tokens[: each.num_computed]
    for one in live:
        kv.free(one)
    assert (kv.pools["gpu"].num_free, kv.pools["host"].num_free) == (plan.gpu_pages, plan.host_pages)


def test_the_integrity_check_counts_users() -> None:
    kv = KvCache(toy_plan(gpu_pages=8))
    one, two = sequence(0), sequence(1)
    for each, found in ((one, 0), (two, 8)):
        each.tokens = [1] * 9
        assert kv.open(each, "gpu") == found
        kv.extend(each, 9)
        kv.computed(each, 9)
        each.num_computed = 9
    kv.check_integrity()
    kv.pools["gpu"].share(kv._tables[one].digests[0])
    with pytest.raises(AssertionError, match="gpu page 0 is in 2 tables, its count of users says 3"):
        kv.check_integrity()
