"""The serial reference loop: the same instructions, one after another, give what the pipelined run gives."""

from __future__ import annotations

import numpy as np
import pytest

from tests import zoo
from tests.hand_plans import random_plan
from tests.harness import Rig
from twinpilots.kernels.native import load
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.runtime.serial import SerialGpu

PROMPTS = [[5, 17, 99, 3, 8, 120, 44], [64], [12, 12, 57, 101, 4]]


def run(path, plan, device=None):
    with Rig(path, plan, device=device, runner=device) as rig:
        tokens = rig.generate(PROMPTS, 5)
        return tokens, [np.stack(rig.logits[str(number)]) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("seed", [2, 5])
def test_serial_and_pipelined_runs_give_the_same_bits(family, seed, tmp_path):
    if load() is None:
        pytest.skip("needs the native module: torch and native round differently")
    path = zoo.save(family, 0, tmp_path / "model")
    plan = random_plan(open_checkpoint(path).spec, seed)
    tokens, logits = run(path, plan)
    serial_tokens, serial_logits = run(path, plan, SerialGpu(1 << 24, load()))
    assert tokens == serial_tokens
    for one, other in zip(logits, serial_logits, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_torch_twin_gives_the_same_tokens(tmp_path):
    path = zoo.save("llama", 0, tmp_path / "model")
    plan = random_plan(open_checkpoint(path).spec, 7)
    tokens, logits = run(path, plan)
    twin_tokens, twin_logits = run(path, plan, SerialGpu(1 << 24))
    assert tokens == twin_tokens
    for one, other in zip(logits, twin_logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
