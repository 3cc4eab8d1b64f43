"""Hand-set plans with all three shares, on the emulated GPU: the tokens and logits of transformers in fp32."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.hand_plans import random_plan
from tests.harness import NUM_TOKENS, PROMPTS, Rig, ZooModel, assert_same_tokens, relative_rms

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_every_family_keeps_its_tokens_under_random_three_way_splits(family: str, zoo_model: ZooModel) -> None:
    for seed in (0, 1):
        model = zoo_model(family, seed)
        for plan_seed in (seed, seed + 100):
            with Rig(model.path, random_plan(model.spec, plan_seed)) as rig:
                model.assert_tokens(rig.generate(PROMPTS, NUM_TOKENS))
            for number, (_, logits) in enumerate(model.references):
                assert relative_rms(rig.logits[str(number)][0], logits[0]) < 1e-4


@pytest.mark.parametrize("sides", ["cpu alone", "gpu alone"])
def test_one_device_alone_keeps_the_tokens(sides: str, zoo_model: ZooModel) -> None:
    model = zoo_model("llama", 0)
    with Rig(model.path, random_plan(model.spec, 3, gpu=sides == "gpu alone", cpu=sides == "cpu alone")) as rig:
        model.assert_tokens(rig.generate(PROMPTS, NUM_TOKENS))


@pytest.mark.parametrize("seed", range(4))
def test_adversarial_timing_changes_nothing(seed: int, zoo_model: ZooModel) -> None:
    """Queues start as late and as early as the recorded waits allow, released slots hold NaN: a missing wait would show in the tokens."""
    model = zoo_model(sorted(zoo.FAMILIES)[seed * 3 % len(zoo.FAMILIES)], 0)
    with Rig(model.path, random_plan(model.spec, 50 + seed), adversarial_seed=seed + 1) as rig:
        found = rig.generate(PROMPTS[:2], 4)
    for tokens, (reference, logits) in zip(found, model.references[:2], strict=True):
        assert_same_tokens(tokens, reference[:4], logits)
