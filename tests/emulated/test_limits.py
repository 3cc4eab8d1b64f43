"""Two engines in one process, devices that die, memory that is promised: nothing leaks, nothing is exceeded, one engine's end is not another's."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests import zoo
from tests.hand_plans import random_plan
from tests.harness import NUM_TOKENS, PROMPTS, Rig, SavedModel, ZooModel
from twinpilots import LLM, SamplingParams
from twinpilots.errors import DeviceLostError
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.plan.memory import plan_memory

pytestmark = [pytest.mark.emulated, pytest.mark.usefixtures("balanced_machine")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
LOST_WITHIN_S = 5.0


def open_llm(model: SavedModel, device: str = "emulated:demo", policy: str = "hetegen") -> LLM:
    return LLM(str(model.path), device=device, policy=policy if device != "cpu" else "cpu", unit_rows=8, max_num_seqs=3)


def assert_generates(llm: LLM, model: SavedModel) -> None:
    model.assert_tokens([request.outputs[0].token_ids for request in llm.generate(PROMPTS, GREEDY, use_tqdm=False)])


def holdings() -> tuple[set[str], set[int], set[str]]:
    """(open files by what they are, child processes, threads) of this process."""
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:  # the directory's own
            continue
    children = {int(pid) for task in os.listdir("/proc/self/task") for pid in Path(f"/proc/self/task/{task}/children").read_text().split()}
    return descriptors, children, {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("devices", [("cpu", "emulated:demo"), ("emulated:demo", "emulated:demo")])
def test_two_llms_take_turns_and_one_outlives_the_other(devices: tuple[str, str], zoo_model: ZooModel) -> None:
    first, second = zoo_model("llama"), zoo_model("gemma2")
    with open_llm(first, devices[0]) as one, open_llm(second, devices[1]) as other:
        for _ in range(2):
            assert_generates(one, first)
            assert_generates(other, second)
        one.close()
        assert_generates(other, second)
        with pytest.raises(RuntimeError, match="closed"):
            one.generate([[1]], GREEDY, use_tqdm=False)


def test_two_llms_interleave_pass_by_pass(zoo_model: ZooModel) -> None:
    first, second = zoo_model("qwen3"), zoo_model("opt")
    with open_llm(first) as one, open_llm(second, policy="stream") as other:
        streams = one.stream(PROMPTS[0], GREEDY), other.stream(PROMPTS[0], GREEDY)
        latest = [output for _ in range(NUM_TOKENS) for output in (next(streams[0]), next(streams[1]))][-2:]
    for output, model in zip(latest, (first, second), strict=True):
        assert list(output.outputs[0].token_ids) == model.references[0][0]


def test_closing_leaves_no_process_no_file_and_no_thread(zoo_model: ZooModel) -> None:
    model = zoo_model("llama")
    with open_llm(model) as llm:  # what is loaded once and stays (libraries) is loaded now
        assert_generates(llm, model)
    before = holdings()
    for device in ("emulated:demo", "cpu"):
        llm = open_llm(model, device)
        assert_generates(llm, model)
        assert holdings() != before
        llm.close()
        llm.close()
        assert holdings() == before


def test_a_refused_model_leaves_nothing_either(zoo_model: ZooModel) -> None:
    model = zoo_model("llama")
    before = holdings()
    for options in ({"gpu_memory": 1000, "policy": "stream"}, {"host_memory": 1000}, {"max_model_len": 10_000}):
        with pytest.raises(Exception, match=r"memory|max_model_len"):
            LLM(str(model.path), device="emulated:demo", **options)
        assert holdings() == before


def test_a_killed_device_ends_the_request_at_once_and_closes_cleanly(zoo_model: ZooModel) -> None:
    model = zoo_model("gemma3")
    before = holdings()
    llm = open_llm(model)
    generating = llm.stream(PROMPTS[1], LONG)
    next(generating)
    (child,) = holdings()[1] - before[1]
    began = time.monotonic()
    threading.Timer(0.02, os.kill, (child, signal.SIGKILL)).start()
    with pytest.raises(DeviceLostError, match=r"SIGKILL|abort"):
        for _ in range(10_000):
            list(llm.stream(PROMPTS[1], LONG))
    assert time.monotonic() - began < LOST_WITHIN_S
    llm.close()
    assert holdings() == before
    with open_llm(model) as again:
        assert_generates(again, model)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_allocated_is_what_the_plan_says(seed: int, zoo_model: ZooModel) -> None:
    """Both ledgers and both arenas, for random plans of random families: the planner's formulas and the runtime's layout are two derivations of one number."""
    rng = random.Random(seed)
    path = zoo_model(rng.choice(sorted(zoo.FAMILIES))).path
    with closing(open_checkpoint(path)) as checkpoint:
        spec = checkpoint.spec
    pages = {"gpu_pages": rng.randint(24, 60), "host_pages": rng.randint(24, 60)}
    plan = random_plan(spec, seed, max_pass_tokens=rng.randint(9, 70), unit_rows=rng.choice([8, 16, 64]), **pages)
    use = plan_memory(spec, plan)
    with Rig(path, plan) as rig:
        ledger = rig.executor.ledger
        assert ledger.peak("gpu") == use.gpu.total
        assert rig.executor.host.num_bytes == use.host.total
        assert 0 <= use.host.total - ledger.peak("host") <= 4096, "programs take what is left, but for a rounded end"
        rig.generate(PROMPTS, 2)
        assert (ledger.peak("gpu"), rig.executor.host.num_bytes) == (use.gpu.total, use.host.total), "nothing is allocated in the step loop"
