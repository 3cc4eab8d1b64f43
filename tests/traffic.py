"""Traffic that comes and goes at random under plans that change at random: every request must still get the tokens that it would get alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.hand_plans import plan_family
from tests.harness import Rig, SavedModel, assert_same_tokens, greedy_references
from twinpilots.device.base import GpuDevice
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams

NUM_PASSES = 200
SWITCH_EVERY = 4  # passes
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


def drive(
    model: SavedModel, seed: int, adversarial_seed: int = 0, *, num_passes: int = NUM_PASSES, device: GpuDevice | None = None,
    after_pass: Callable[[int], None] = lambda number: None, **sizes: int,
) -> Rig:  # fmt: skip
    """``num_passes`` passes, and those that finish what is left; the closed rig. AssertionError for a wrong token. ``sizes`` as `plan_family`'s."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, model.spec.vocab_size) for _ in range(rng.choice([1, 2, 5, 9, 17, 21]))] for _ in range(NUM_PROMPTS)]
    plans: list[Plan] = plan_family(model.spec, seed, 12, **sizes)
    with Rig(model.path, plans[0], adversarial_seed=adversarial_seed, device=device, growth_tokens=0) as rig:
        traffic = Traffic(rig, rng, prompts)
        for number in range(num_passes):
            if number % SWITCH_EVERY == SWITCH_EVERY - 1:
                rig.set_plan(rng.choice(plans))
            while len(traffic.live) < 3 or (len(traffic.live) < 9 and rng.random() < 0.4):
                traffic.arrive()
            if rng.random() < 0.08:
                traffic.abort()
            rig.engine.check_integrity()
            traffic.step()
            rig.engine.check_integrity()
            after_pass(number)
        while rig.engine.has_unfinished():
            traffic.step()
            rig.engine.check_integrity()
        assert len(traffic.finished) > 30 and len(traffic.aborted) > 5
        traffic.check_tokens(greedy_references(model.path, prompts, MAX_TOKENS))
        return rig
