"""The times of a pass are its own, also where its weights were loaded ahead by another bucket's program with the same stream."""

from __future__ import annotations

import pytest

from tests.harness import PROMPTS, Rig, ZooModel
from tests.planning import DEMO, workload
from twinpilots.plan.solver import solve
from twinpilots.plan.workload import Limits
from twinpilots.request import SamplingParams

pytestmark = pytest.mark.emulated


def test_loads_that_ran_ahead_for_another_bucket_are_timed_once(zoo_model: ZooModel) -> None:
    """Policy stream has the same weight stream in every decode bucket; the batch shrinks from 3 sequences to 1 as they end."""
    model = zoo_model("llama")
    limits = Limits(gpu_bytes=model.third_bytes, host_bytes=DEMO.host_memory_bytes)
    plan = solve(model.spec, DEMO, workload(3, 16, 16), limits, policy="stream", unit_rows=8, compare=False).plan
    ended_ns = 0
    buckets: set[int] = set()
    with Rig(model.path, plan, poison=False) as rig:
        for number, prompt in enumerate(PROMPTS):
            rig.engine.add_request(str(number), prompt, SamplingParams(temperature=0.0, max_tokens=3 * (number + 1), ignore_eos=True))
        while rig.engine.has_unfinished():
            rig.engine.step()
            record = rig.executor.last_record
            assert record is not None
            found = rig.executor.pass_times(record)
            loads = found.queues["link_in"]
            assert loads.times[0, 1] >= ended_ns and (loads.times[1:, 1] >= loads.times[:-1, 2]).all(), (
                "one load after another, in this pass and since the last"
            )
            assert loads.num_bytes.sum() == rig.executor.report([record])[0].bytes.link_weights > 0
            ended_ns = int(loads.times[-1, 2])
            buckets.add(found.queues["gpu"].rows.max())
    assert {1, 2} <= buckets, "the batch shrank to where other buckets serve it"
