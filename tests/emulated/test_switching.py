"""Two hundred passes under random plan switches, arrivals, aborts and preemptions: every request still gets the tokens that it would get alone."""

from __future__ import annotations

import pytest

from tests.harness import ZooModel
from tests.traffic import NUM_PASSES, SWITCH_EVERY, drive

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("gemma3", 2), ("phi3-longrope", 3), ("opt", 4)])
def test_switches_arrivals_and_aborts_change_no_token(family: str, seed: int, zoo_model: ZooModel) -> None:
    rig = drive(zoo_model(family), seed)
    assert rig.executor.plan_changes >= NUM_PASSES // SWITCH_EVERY - 1


@pytest.mark.parametrize(("family", "adversarial_seed"), [("qwen3", 0), ("mistral", 5)])
def test_with_hardly_any_pages_sequences_are_preempted_and_recomputed(family: str, adversarial_seed: int, zoo_model: ZooModel) -> None:
    """The pools hold two or three sequences; queues run as early and as late as the recorded waits allow in the second case."""
    rig = drive(zoo_model(family), 6, adversarial_seed, gpu_pages=12, host_pages=14, kv_staging_pages=14)
    assert rig.scheduler.num_preemptions > 3
