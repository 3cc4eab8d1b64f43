"""Hand-set plans with all three shares, on the emulated GPU: the tokens and logits of transformers in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.hand_plans import random_plan
from tests.harness import Rig, assert_same_tokens, relative_rms
from twinpilots.model.checkpoint import open_checkpoint

pytestmark = pytest.mark.emulated
PROMPTS = [[5, 17, 99, 3, 8, 120, 44, 7, 11, 13, 90, 21, 33], [64], [12, 12, 57, 101, 4]]
NUM_TOKENS = 9


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, list[tuple[list[int], np.ndarray]]]]:
    """Each zoo model on disk with its references, made once."""
    return {}


def model_with_references(cache: dict, family: str, seed: int, root: Path) -> tuple[Path, list[tuple[list[int], np.ndarray]]]:
    if (family, seed) not in cache:
        path = zoo.save(family, seed, root / f"{family}-{seed}")
        cache[family, seed] = path, [zoo.reference_generate(path, prompt, NUM_TOKENS) for prompt in PROMPTS]
    return cache[family, seed]


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
def test_every_family_keeps_its_tokens_under_random_three_way_splits(family, models, tmp_path_factory):
    for seed in (0, 1):
        path, references = model_with_references(models, family, seed, tmp_path_factory.getbasetemp())
        spec = open_checkpoint(path).spec
        for plan_seed in (seed, seed + 100):
            with Rig(path, random_plan(spec, plan_seed)) as rig:
                found = rig.generate(PROMPTS, NUM_TOKENS)
            for number, (tokens, logits) in enumerate(references):
                assert_same_tokens(found[number], tokens, logits)
                assert relative_rms(rig.logits[str(number)][0], logits[0]) < 1e-4


@pytest.mark.parametrize("sides", ["cpu alone", "gpu alone"])
def test_one_device_alone_keeps_the_tokens(sides, models, tmp_path_factory):
    path, references = model_with_references(models, "llama", 0, tmp_path_factory.getbasetemp())
    plan = random_plan(open_checkpoint(path).spec, 3, gpu=sides == "gpu alone", cpu=sides == "cpu alone")
    with Rig(path, plan) as rig:
        found = rig.generate(PROMPTS, NUM_TOKENS)
    for number, (tokens, logits) in enumerate(references):
        assert_same_tokens(found[number], tokens, logits)


@pytest.mark.parametrize("seed", range(4))
def test_adversarial_timing_changes_nothing(seed, models, tmp_path_factory):
    """Queues start as late and as early as the recorded waits allow, released slots hold NaN: a missing wait would show in the tokens."""
    family = sorted(zoo.FAMILIES)[seed * 3 % len(zoo.FAMILIES)]
    path, references = model_with_references(models, family, 0, tmp_path_factory.getbasetemp())
    plan = random_plan(open_checkpoint(path).spec, 50 + seed)
    with Rig(path, plan, adversarial_seed=seed + 1) as rig:
        found = rig.generate(PROMPTS[:2], 4)
    for number, (tokens, logits) in enumerate(references[:2]):
        assert_same_tokens(found[number], tokens[:4], logits)
