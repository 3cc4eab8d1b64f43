"""Promise: KV changes tiers where that pays, and nobody's tokens, pages or turn are lost on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceABC
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hand_plans import random_plan
from tests.machines import LINK, machine, processor
from tests.planning import llama
from tests.toy import VOCAB, alone, run_all, toy_engine, toy_plan
from twinpilots.kv_pricing import KvPricing
from twinpilots.plan.migration import MARGIN, MovePrices
from twinpilots.plan.plan import Plan, Split
from twinpilots.plan.tasks import Access
from twinpilots.request import SamplingParams, Sequence, Tier
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.engine import Engine
from twinpilots.runtime.kv_moves import accesses
from twinpilots.runtime.layout import page_bytes

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class Whim:
    """Moves pay or do not, at random."""

    def __init__(self, seed: int, chance: float = 0.5) -> None:
        self.rng, self.chance = random.Random(seed), chance

    def pays(self, sequence: Sequence, to: Tier, running: SequenceABC[Sequence]) -> bool:
        assert sequence in running and sequence.tier not in (None, to)
        return self.rng.random() < self.chance


def held_by_the_pass(plan: Plan, batch: StepBatch) -> set[Access]:
    """KV pages that the pass reads or writes, as `accesses` names pages."""
    return {Access(f"{item.sequence.tier}.kv", page, page + 1) for item in batch.items for page in item.pages.tolist()}


def check_no_conflict(plan: Plan, batch: StepBatch) -> None:
    """What a move writes nobody else touches while the pass runs, and what it reads nobody writes."""
    of_pass = held_by_the_pass(plan, batch)
    written = {Access(f"{i.sequence.tier}.kv", page, page + 1) for i in batch.items for page in i.pages[i.start // plan.page_size :].tolist()}
    moves = list(accesses(batch))
    for number, (move, read, write) in enumerate(moves):
        assert all(item.sequence is not move.sequence for item in batch.items)
        assert write not in of_pass and read not in written
        assert all(write not in other[1:] for i, other in enumerate(moves) if i != number)


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, list[int], SamplingParams, int | None]]:
    """Requests: (arrival step, prompt, params, abort step or None); many begin alike."""
    common = draw(st.lists(st.integers(0, VOCAB - 1), min_size=9, max_size=9))
    requests = []
    for number in range(draw(st.integers(2, 7))):
        prompt = common[: draw(st.sampled_from([0, 4, 9]))] + draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7))
        params = SamplingParams(
            n=draw(st.sampled_from([1, 1, 2])), temperature=draw(st.sampled_from([0.0, 0.8])), seed=number, max_tokens=draw(st.integers(4, 16))
        )
        requests.append((draw(st.integers(0, 10)), prompt, params, draw(st.one_of(st.none(), st.none(), st.integers(0, 25)))))
    return requests


@settings(max_examples=30, deadline=None)
@given(workload=workloads(), gpu=st.integers(8, 14), host=st.integers(8, 20), growth=st.sampled_from([0, 3]), seed=st.integers(0, 2**32), data=st.data())
def test_random_moves_aborts_and_failures_never_change_a_token(workload: list, gpu: int, host: int, growth: int, seed: int, data: st.DataObject) -> None:
    attention = data.draw(st.sampled_from(["cpu", "gpu"]))
    plan = toy_plan(
        gpu_pages=gpu, host_pages=host, max_model_len=32, max_num_seqs=5, max_pass_tokens=12, micro_batches=data.draw(st.integers(1, 3)),
        host_attention=attention, kv_staging_pages=8 if attention == "gpu" else 0,
    )  # fmt: skip
    engine = toy_engine(plan, growth_tokens=growth, pricing=Whim(seed, 0.7))
    engine.executor = Watched(engine, seed)
    done, aborted, step = {}, set(), 0
    while step < 30 or engine.has_unfinished():
        for number, (arrives, prompt, params, _) in enumerate(workload):
            if arrives == step:
                engine.add_request(str(number), prompt, params)
        for number, (arrives, _, _, aborts) in enumerate(workload):
            if aborts == step and aborts >= arrives and engine.abort(str(number)) is not None:
                aborted.add(str(number))
        with suppress(InterruptedError):
            done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
        step += 1
        assert step < 3000
    assert set(done) | aborted == {str(number) for number in range(len(workload))}
    assert engine.kv.pools["gpu"].num_free == gpu and engine.kv.pools["host"].num_free == host
    for name, output in done.items():
        _, prompt, params, _ = workload[int(name)]
        expected = alone(prompt, params)
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in expected.outputs]


class Watched:
    """An engine's executor, whose passes are looked at before they run and are lost on the way now and then."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.inner, self.rng, self.num_moves = engine, engine.executor, random.Random(seed), 0

    def execute(self, batch: StepBatch, *, more: bool) -> Any:
        check_no_conflict(self.engine.scheduler.plan, batch)
        self.num_moves += len(batch.moves)
        if self.rng.random() < 0.1:
            raise InterruptedError
        return self.inner.execute(batch, more=more)


def crowded(pricing: object, **changes: int) -> Engine:
    """Three sequences that begin on the GPU and cannot all end there."""
    engine = toy_engine(toy_plan(**{"gpu_pages": 9, "host_pages": 16, "max_model_len": 32, **changes}), pricing=pricing)
    for number in range(3):
        engine.add_request(str(number), [number] * 8, replace(GREEDY, max_tokens=16))
    return engine


def test_the_newest_moves_to_the_host_instead_of_being_computed_anew() -> None:
    engine, other = crowded(Whim(0, chance=1.0)), crowded(None)
    run_all(engine)
    run_all(other)
    assert (engine.scheduler.num_preemptions, engine.scheduler.num_moves) == (0, {"host": 2, "gpu": 1})
    assert (other.scheduler.num_preemptions > 0, other.scheduler.num_moves.total()) == (True, 0)
    computed = [sum(item.num_tokens for batch in each.executor.batches for item in batch.items) for each in (engine, other)]  # type: ignore[attr-defined]
    assert computed[0] == 3 * 23 < computed[1], "every token once: the last one is never computed"


def test_a_sequence_on_the_host_comes_to_the_gpu_when_others_have_left() -> None:
    engine = toy_engine(toy_plan(gpu_pages=6, host_pages=16, max_model_len=32), pricing=Whim(0, chance=1.0), growth_tokens=256)
    engine.add_request("short", [1] * 8, replace(GREEDY, max_tokens=4))
    engine.add_request("long", [2] * 8, replace(GREEDY, max_tokens=16))
    tiers = []
    while engine.has_unfinished():
        engine.step()
        tiers += [sequence.tier for sequence in engine.scheduler.running if sequence.request_id == "long"]
    assert tiers[0] == "host" and tiers[-1] == "gpu" and engine.scheduler.num_moves == {"gpu": 1}


def test_nobody_moves_where_it_does_not_pay() -> None:
    engine = crowded(Whim(0, chance=0.0))
    run_all(engine)
    assert engine.scheduler.num_moves.total() == 0 and engine.scheduler.num_preemptions > 0


def test_shared_pages_are_copied_and_stay_their_other_users() -> None:
    engine = toy_engine(toy_plan(gpu_pages=10, host_pages=16, max_model_len=32), pricing=Whim(0, chance=1.0))
    common = list(range(8))
    engine.add_request("first", [*common, 9], replace(GREEDY, max_tokens=16))
    engine.step()
    for name in ("second", "third"):
        engine.add_request(name, [*common, 10], replace(GREEDY, max_tokens=16))
    outputs = run_all(engine)
    moves = [move for batch in engine.executor.batches for move in batch.moves]  # type: ignore[attr-defined]
    assert [(len(move.source), len(move.pages)) for move in moves][:1] == [(4, 4)], "two of its pages were the others', too"
    for name, prompt in (("first", [*common, 9]), ("second", [*common, 10]), ("third", [*common, 10])):
        assert outputs[name].outputs[0].token_ids == alone(prompt, replace(GREEDY, max_tokens=16)).outputs[0].token_ids


def prices(*, cpu_read: float = 2e6, link: float = 1e6, resident: bool = True) -> MovePrices:
    """All weights in GPU memory (or streamed), attention on a GPU that reads 20 MB/s or on a processor of ``cpu_read``; two layers, 512 bytes of KV a token."""
    spec = llama(layers=2)
    plan = random_plan(spec, 0, cpu=True, gpu_pages=64, host_pages=64, max_num_seqs=8)
    on_gpu = tuple(
        {name: Split(resident=split.resident, streamed=split.streamed + split.cpu, cpu=0) for name, split in layer.items()} for layer in plan.buckets[0].splits
    )
    everything = tuple({name: Split(resident=split.rows, streamed=0, cpu=0) for name, split in layer.items()} for layer in on_gpu)
    buckets = tuple(replace(bucket, splits=everything if resident else on_gpu, micro_batches=1, host_attention="cpu") for bucket in plan.buckets)
    rates = machine(processor(cpu_read, 8e6), link=replace(LINK, up_bytes_per_s=link, down_bytes_per_s=link))
    return MovePrices(spec, replace(plan, buckets=buckets), rates)


def test_a_copy_is_worth_the_attention_that_it_saves_for_as_long_as_the_sequence_lasts() -> None:
    load: dict[str, int] = {"num_gpu": 2, "num_host": 2, "context": 64}
    slow, fast = prices(cpu_read=2e5), prices(cpu_read=2e5, link=1e12)
    saved_s = slow.step_s(2, 2, 64) - slow.step_s(3, 1, 64)
    least = MARGIN * (slow.copy_s(64, up=True) + slow.step_s(2, 2, 64) / 4) / saved_s
    assert saved_s > 0 and not slow.pays_to_gpu(64, int(least), **load) and slow.pays_to_gpu(64, int(least) + 1, **load)
    assert slow.copy_s(64, up=True) - slow.copy_s(48, up=True) == pytest.approx(4 * page_bytes(slow.spec, slow.plan) * 2 / 1e6), "whole pages, both layers"
    assert fast.copy_s(64, up=True) == pytest.approx(LINK.packet_s, rel=1e-3)


def test_nothing_is_simulated_for_a_gain_that_would_not_pay_for_it() -> None:
    """To ask costs more than the last passes of a batch can save; with hours to go it is worth the question."""
    load: dict[str, int] = {"num_gpu": 2, "num_host": 2, "context": 64}
    asked = prices(cpu_read=1e9, link=1e12)
    assert not asked.pays_to_gpu(64, 2, **load) and not asked._steps
    asked.pays_to_gpu(64, 10**6, **load)
    assert asked._steps


def test_what_a_move_can_gain_at_most_is_at_least_what_it_gains() -> None:
    for cpu_read, num_host in ((2e5, 2), (2e6, 1), (2e7, 3)):
        for resident in (True, False):
            asked = prices(cpu_read=cpu_read, resident=resident)
            gained_s = asked.step_s(2, num_host, 64) - asked.step_s(3, num_host - 1, 64)
            assert asked._most_gain_s(64, num_host) >= 0.99 * gained_s


def test_who_must_make_room_goes_to_the_host_unless_attention_there_costs_more_than_its_tokens_are_worth() -> None:
    load = {"num_gpu": 4, "num_host": 0, "context": 64}
    assert prices(cpu_read=2e6, resident=False).pays_to_host(64, 20, **load), "passes wait for weights: another token costs hardly anything"
    assert not prices(cpu_read=2e3).pays_to_host(64, 20, **load), "every pass would wait for the processor"
    assert not prices(cpu_read=2e6, link=1e2).pays_to_host(64, 20, **load), "the copy takes minutes"


def test_the_running_decide_the_price_and_a_new_plan_a_new_one() -> None:
    asked = prices(cpu_read=2e5)
    current = [asked.plan]
    pricing = KvPricing(asked.spec, lambda: current[0], lambda: asked.profile)
    running = [Sequence(request_id=str(n), index=0, params=GREEDY, tokens=[1] * 64, arrival=n, tier="host" if n else "gpu", max_len=90) for n in range(4)]
    for sequence in running:
        sequence.num_computed = 63
    assert pricing.pays(running[1], "gpu", running) == asked.pays_to_gpu(63, 26, num_gpu=1, num_host=3, context=64)
    running[1].max_len = 65
    assert not pricing.pays(running[1], "gpu", running), "it ends with the next token"
    current[0] = replace(current[0])
    pricing.pays(running[1], "gpu", running)
    assert pricing._prices.plan is current[0]
