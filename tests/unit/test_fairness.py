"""Promise: clients that compete get equal shares, within a bound that does not grow, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy import toy_plan
from twinpilots.errors import RequestError
from twinpilots.openai.requests import read_request
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams, Sequence, Status
from twinpilots.runtime.fairness import OUTPUT_TOKEN, PROMPT_TOKEN
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import Scheduler
from twinpilots.server.clients import Sender

PLAN = toy_plan(gpu_pages=48, host_pages=0, max_num_seqs=4, max_pass_tokens=16, max_model_len=48)


class Bench:
    """A scheduler whose passes run at once, and what every client has got so far."""

    def __init__(self, plan: Plan = PLAN, *, growth_tokens: int = 256) -> None:
        self.scheduler = Scheduler(plan, KvCache(plan, share_prefixes=False), growth_tokens=growth_tokens)
        self.num_arrived = self.num_passes = 0
        self.served: dict[str, int] = {}

    def add(self, client: str, length: int, max_tokens: int, *, priority: int = 0) -> Sequence:
        sequence = Sequence(
            request_id=str(self.num_arrived), index=0, params=SamplingParams(max_tokens=max_tokens), tokens=[1] * length, arrival=self.num_arrived,
            client=client, priority=priority,
        )  # fmt: skip
        self.num_arrived += 1
        self.scheduler.add(sequence)
        return sequence

    def run_pass(self) -> list[Sequence]:
        """Who was in it."""
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        self.num_passes += 1
        for item in batch.items:
            fresh = max(0, item.end - max(item.start, item.sequence.num_seen))
            weight = PROMPT_TOKEN * fresh + (OUTPUT_TOKEN - PROMPT_TOKEN) * item.is_last
            self.served[item.sequence.client] = self.served.get(item.sequence.client, 0) + weight
        ended = [item.sequence for item in batch.items if item.is_last]
        self.scheduler.commit(batch)
        for sequence in ended:
            self.scheduler.append(sequence, 1)
            if len(sequence.tokens) >= sequence.max_len:
                self.scheduler.finish(sequence)
        if self.num_passes % 16 == 0:
            self.scheduler.check_integrity()
        return [item.sequence for item in batch.items]

    def run_until(self, sequence: Sequence, most: int = 100_000) -> int:
        """Passes until it has ended."""
        began = self.num_passes
        while sequence.status is not Status.FINISHED:
            self.run_pass()
            assert self.num_passes - began <= most, f"it has not ended after {most} passes"
        return self.num_passes - began


def test_one_request_does_not_wait_for_another_clients_five_hundred() -> None:
    bench = Bench()
    for _ in range(500):
        bench.add("heavy", 12, 6)
    for _ in range(20):
        bench.run_pass()
    assert bench.run_until(bench.add("light", 12, 6)) < 20, "it waits for a place, not for the queue"
    assert len(bench.scheduler.waiting) > 400


def test_a_short_prompt_does_not_wait_for_another_clients_long_ones_to_be_read() -> None:
    bench = Bench(toy_plan(gpu_pages=48, host_pages=0, max_num_seqs=4, max_pass_tokens=8, max_model_len=48))
    long = [bench.add("heavy", 40, 2) for _ in range(3)]
    bench.run_pass()
    short = bench.add("light", 4, 2)
    assert bench.run_until(short) <= 3
    assert all(sequence.status is not Status.FINISHED for sequence in long), "15 passes of prompt were before it"


def requests(rng: random.Random, kind: str) -> tuple[int, int]:
    """(prompt tokens, new tokens): many small ones against few large ones."""
    return (rng.randint(1, 4), rng.randint(1, 6)) if kind == "small" else (rng.randint(16, 30), rng.randint(2, 16))


@pytest.mark.parametrize(("one", "other"), [("small", "small"), ("small", "large"), ("large", "large")])
def test_two_clients_that_always_wait_are_never_further_apart_than_the_bound(one: str, other: str) -> None:
    """Theorem 4.4 of the paper: twice the larger of a prompt's weight and the weight of all tokens that memory holds, however long it lasts."""
    bound = 2 * max(PROMPT_TOKEN * 30, OUTPUT_TOKEN * PLAN.max_num_seqs * 46)
    bench, rng = Bench(), random.Random(0)
    kinds = {"one": one, "other": other}
    while sum(bench.served.values()) < 20 * bound:
        for client, kind in kinds.items():
            waiting = sum(sequence.client == client for sequence in bench.scheduler.waiting)
            for _ in range(8 - waiting if client == "one" else 60 - waiting):  # the second one has always sent more, and earlier
                bench.add(client, *requests(rng, kind))
        bench.run_pass()
        if len(bench.served) == 2:
            assert abs(bench.served["one"] - bench.served["other"]) <= bound
    assert min(bench.served.values()) > 7 * bound


def test_who_was_away_has_saved_nothing_up() -> None:
    bench = Bench()
    bench.add("late", 4, 4)
    for _ in range(400):
        bench.add("busy", 8, 8)
    while bench.served.get("busy", 0) < 3000:
        bench.run_pass()
    before = dict(bench.served)
    for _ in range(500):
        bench.add("late", 8, 8)
    while bench.served["busy"] + bench.served["late"] < sum(before.values()) + 4000:
        bench.run_pass()
    gained = [bench.served[client] - before[client] for client in ("busy", "late")]
    assert min(gained) > 0.4 * sum(gained), f"from then on they share: {gained}"


def test_one_client_alone_is_served_first_come_first_served_whatever_came_before() -> None:
    bench = Bench()
    order: list[str] = []
    bench.run_until(bench.add("other", 8, 4))
    sequences = [bench.add("only", 1 + number % 13, 1 + number % 7) for number in range(60)]
    while bench.scheduler.has_unfinished():
        order += [sequence.request_id for sequence in bench.run_pass() if sequence.request_id not in order]
    assert order == [sequence.request_id for sequence in sequences]


def test_priority_orders_the_requests_of_one_client_and_not_those_of_others() -> None:
    bench = Bench(toy_plan(gpu_pages=16, host_pages=0, max_num_seqs=1, max_pass_tokens=16, max_model_len=48))
    first = bench.add("a", 4, 4)
    bench.run_pass()
    plain, urgent, theirs = bench.add("a", 4, 4), bench.add("a", 4, 4, priority=-1000), bench.add("b", 4, 4)
    order = [first]
    while bench.scheduler.has_unfinished():
        order += [sequence for sequence in bench.run_pass() if sequence not in order]
    assert order == [first, theirs, urgent, plain]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_pages=st.integers(12, 30), growth=st.sampled_from([0, 256]), newcomers=st.integers(1, 3))
def test_nobody_waits_for_ever_however_many_new_clients_come(seed: int, num_pages: int, growth: int, newcomers: int) -> None:
    """In every pass come more new clients than can be served; whoever had much before still gets on, and so do large requests among small ones."""
    bench = Bench(toy_plan(gpu_pages=num_pages, host_pages=0, max_num_seqs=3, max_pass_tokens=12, max_model_len=48), growth_tokens=growth)
    rng = random.Random(seed)
    for _ in range(4):
        bench.add("old", 12, 8)
    while bench.served.get("old", 0) < 100:
        bench.run_pass()
        if not bench.scheduler.has_unfinished():
            bench.add("old", 12, 8)
    for _ in range(3):
        bench.add("old", 12, 8)
    watched = bench.add("old", 30, 15)
    for number in range(1500):
        for _ in range(newcomers if len(bench.scheduler.waiting) < 10 else 0):
            bench.add(f"new {number}", *requests(rng, rng.choice(["small", "large"])))
        bench.run_pass()
        if watched.status is Status.FINISHED:
            return
    raise AssertionError(f"after 1500 passes it is {watched.status.value} with {len(watched.tokens)} tokens")


def test_a_client_is_its_key_where_there_are_several_else_its_user_else_its_address() -> None:
    sender = Sender(key=1, address="10.0.0.7")
    assert [sender.client(2, None), sender.client(2, "me")] == ["key 1", "key 1"], "nobody gets a second share by another name"
    assert [sender.client(1, "me"), sender.client(1, None)] == ["user me", "address 10.0.0.7"]
    body = {"prompt": "x", "user": "me", "priority": -3}
    request = read_request("/v1/completions", body, SamplingParams())
    assert (request.user, request.priority, request.warnings) == ("me", -3, ())
    assert read_request("/v1/completions", {"prompt": "x", "safety_identifier": "it"}, SamplingParams()).user == "it"
    for field, value in (("priority", "high"), ("priority", 0.5), ("user", 7)):
        with pytest.raises(RequestError, match=field):
            read_request("/v1/completions", {"prompt": "x", field: value}, SamplingParams())


def test_counters_of_clients_that_are_gone_take_no_memory() -> None:
    bench = Bench()
    bench.add("busy", 4, 40)
    for number in range(2500):
        bench.run_until(bench.add(f"passing {number}", 1, 1))
        if not number % 10:
            bench.add("busy", 4, 40)
    assert len(bench.scheduler.waiting._served) < 2100
    while bench.scheduler.has_unfinished():
        bench.run_pass()
    assert not bench.scheduler.waiting._served
