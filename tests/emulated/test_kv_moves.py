"""Promise: a sequence whose KV changes tiers again and again gets the tokens that it would get alone, on every interpreter, and the copies are counted."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.hand_plans import plan_family, random_plan
from tests.harness import Rig, ZooModel, assert_same_tokens, greedy_references
from tests.traffic import Traffic
from twinpilots.kernels.native import load
from twinpilots.request import SamplingParams, Sequence, Tier
from twinpilots.runtime.layout import page_bytes
from twinpilots.runtime.serial import SerialGpu

pytestmark = pytest.mark.emulated
SMALL = {"gpu_pages": 14, "host_pages": 36, "kv_staging_pages": 14}


PROMPTS = [[11 * i % 120 + 3 for i in range(30 + 2 * n)] for n in range(4)]


class Always:
    """Every move pays, or one in two."""

    def __init__(self, seed: int | None = None) -> None:
        self.rng = None if seed is None else random.Random(seed)

    def pays(self, sequence: Sequence, to: Tier, running: SequenceABC[Sequence]) -> bool:
        return self.rng is None or self.rng.random() < 0.5


@pytest.mark.parametrize(("num_passes", "adversarial_seed"), [(200, 0), (50, 4)])
def test_random_moves_switches_and_aborts_change_no_token(num_passes: int, adversarial_seed: int, zoo_model: ZooModel) -> None:
    """In the second case queues start as late and as early as the recorded waits allow, and what nobody has written is NaN."""
    model, rng, seed = zoo_model("llama", 0), random.Random(3), 3
    prompts = [[rng.randrange(3, model.spec.vocab_size) for _ in range(rng.choice([5, 9, 17, 29]))] for _ in range(8)]
    prompts += [[*prompts[3][:16], 7, 9], [*prompts[3][:12], 8]]
    plans = plan_family(model.spec, seed, 4, **SMALL)
    with Rig(model.path, plans[0], adversarial_seed=adversarial_seed, growth_tokens=0, pricing=Always(seed)) as rig:
        traffic = Traffic(rig, rng, prompts)
        for number in range(num_passes):
            if number % 64 == 63:
                rig.set_plan(rng.choice(plans))
            while len(traffic.live) < 3 or (len(traffic.live) < 6 and rng.random() < 0.4):
                traffic.arrive()
            if rng.random() < 0.05:
                traffic.abort()
            traffic.step()
            rig.engine.check_integrity()
        while traffic.live:
            traffic.step()
        moves = rig.scheduler.num_moves
        assert rig.kv.pools["gpu"].num_free == SMALL["gpu_pages"] and rig.kv.pools["host"].num_free == SMALL["host_pages"]
    assert min(moves["gpu"], moves["host"]) >= num_passes // 40, moves
    traffic.check_tokens(greedy_references(model.path, prompts, 14))


def run(model: Any, plan: Any, device: Any = None) -> tuple[list[list[int]], list[np.ndarray], int]:
    """(tokens, logits, sequences moved)."""
    with Rig(model.path, plan, device=device, runner=device, growth_tokens=0, pricing=Always()) as rig:
        tokens = rig.generate(PROMPTS, 12)
        return tokens, [np.stack(rig.logits[str(number)]) for number in range(len(PROMPTS))], rig.scheduler.num_moves.total()


def test_the_native_and_the_torch_twin_do_the_same_serially(zoo_model: ZooModel) -> None:
    model = zoo_model("llama", 0)
    plan = random_plan(model.spec, 7, **SMALL)
    tokens, logits, moved = run(model, plan)
    assert moved
    for found, (reference, rows) in zip(tokens, greedy_references(model.path, PROMPTS, 12), strict=True):
        assert_same_tokens(found, reference, rows)
    for native in (load(), None):
        found, rows, twin_moved = run(model, plan, SerialGpu(1 << 24, native))
        assert (found, twin_moved) == (tokens, moved)
        for one, other in zip(logits, rows, strict=True):
            np.testing.assert_allclose(one, other, atol=0 if native is not None and load() is not None else 1e-3)


def test_copies_count_as_kv_over_the_link(zoo_model: ZooModel) -> None:
    model = zoo_model("llama", 0)
    plan = random_plan(model.spec, 7, **SMALL)
    plan = replace(plan, buckets=tuple(replace(bucket, host_attention="cpu", host_prefill_attention="cpu") for bucket in plan.buckets))  # nothing else moves KV
    with Rig(model.path, plan, growth_tokens=0, pricing=Always()) as rig:
        counted = moved = 0
        for number in range(4):
            rig.engine.add_request(
                str(number), [(11 + number) * i % 120 + 3 for i in range(20)], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            )
        execute = rig.executor.execute

        def watched(batch: Any, *, more: bool) -> np.ndarray:
            nonlocal counted, moved
            logits = execute(batch, more=more)
            if batch.items and rig.executor.last_record is not None:
                counted += rig.executor.report([rig.executor.last_record])[0].bytes.link_kv
            moved += sum(len(move.source) for move in batch.moves)
            return logits

        rig.executor.execute = watched  # type: ignore[method-assign]
        while rig.engine.has_unfinished():
            rig.engine.step()
    assert moved and counted == moved * model.spec.num_layers * page_bytes(model.spec, plan)
