"""Two hundred passes under random plan switches, arrivals, aborts and preemptions: every request still gets the tokens that it would get alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.hand_plans import plan_family
from tests.harness import Rig, SavedModel, ZooModel, assert_same_tokens, greedy_references
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams

pytestmark = pytest.mark.emulated
NUM_PASSES = 200
NUM_PROMPTS = 10
MAX_TOKENS = 14


@dataclass
class Traffic:
    """Requests that come and go at random. ``prompt_of`` and ``length_of`` tell what was asked for."""

    rig: Rig
    rng: random.Random
    prompts: list[list[int]]
    prompt_of: dict[str, int] = field(default_factory=dict)
    length_of: dict[str, int] = field(default_factory=dict)
    finished: dict[str, list[int]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)

    @property
    def live(self) -> list[str]:
        return [name for name in self.prompt_of if name not in self.finished and name not in self.aborted]

    def arrive(self) -> None:
        name = f"r{len(self.prompt_of)}"
        self.prompt_of[name], self.length_of[name] = self.rng.randrange(len(self.prompts)), self.rng.randint(1, MAX_TOKENS)
        params = SamplingParams(temperature=0.0, max_tokens=self.length_of[name], ignore_eos=True)
        self.rig.engine.add_request(name, self.prompts[self.prompt_of[name]], params)

    def abort(self) -> None:
        name = self.rng.choice(self.live)
        self.rig.engine.abort(name)
        self.aborted.add(name)

    def step(self) -> None:
        for output in self.rig.engine.step():
            if output.finished:
                self.finished[output.request_id] = list(output.outputs[0].token_ids)

    def check_tokens(self, references: list[tuple[list[int], np.ndarray]]) -> None:
        for name, tokens in self.finished.items():
            assert len(tokens) == self.length_of[name]
            reference, logits = references[self.prompt_of[name]]
            assert_same_tokens(tokens, reference, logits)


def drive(model: SavedModel, seed: int, adversarial_seed: int = 0, **sizes: int) -> Rig:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, model.spec.vocab_size) for _ in range(rng.choice([1, 2, 5, 9, 17, 21]))] for _ in range(NUM_PROMPTS)]
    plans: list[Plan] = plan_family(model.spec, seed, 12, **sizes)
    with Rig(model.path, plans[0], adversarial_seed=adversarial_seed, growth_tokens=0) as rig:
        traffic = Traffic(rig, rng, prompts)
        for number in range(NUM_PASSES):
            if number % 4 == 3:
                rig.set_plan(rng.choice(plans))
            while len(traffic.live) < 3 or (len(traffic.live) < 9 and rng.random() < 0.4):
                traffic.arrive()
            if rng.random() < 0.08:
                traffic.abort()
            rig.engine.check_integrity()
            traffic.step()
            rig.engine.check_integrity()
        while rig.engine.has_unfinished():
            traffic.step()
            rig.engine.check_integrity()
        assert len(traffic.finished) > 30 and len(traffic.aborted) > 5
        traffic.check_tokens(greedy_references(model.path, prompts, MAX_TOKENS))
        return rig


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("gemma3", 2), ("phi3-longrope", 3), ("opt", 4)])
def test_switches_arrivals_and_aborts_change_no_token(family: str, seed: int, zoo_model: ZooModel) -> None:
    rig = drive(zoo_model(family), seed)
    assert rig.executor.plan_changes >= NUM_PASSES // 4 - 1


@pytest.mark.parametrize(("family", "adversarial_seed"), [("qwen3", 0), ("mistral", 5)])
def test_with_hardly_any_pages_sequences_are_preempted_and_recomputed(family: str, adversarial_seed: int, zoo_model: ZooModel) -> None:
    """The pools hold two or three sequences; queues run as early and as late as the recorded waits allow in the second case."""
    rig = drive(zoo_model(family), 6, adversarial_seed, gpu_pages=12, host_pages=14, kv_staging_pages=14)
    assert rig.scheduler.num_preemptions > 3
