"""The same passes with launches captured in graphs and without, bit for bit: for tests/gpu and gpu-check, and on the stand-in. Needs no pytest."""

from __future__ import annotations

import numpy as np

from tests.hand_plans import random_plan
from tests.planning import llama
from twinpilots.device.cpu import CpuPilot, choose_cores
from twinpilots.device.cuda import CudaGpu, CudaRuntime
from twinpilots.model.dummy import DummyCheckpoint
from twinpilots.request import SamplingParams
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.engine import Engine
from twinpilots.runtime.executor import Executor
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import Scheduler
from twinpilots.session import CheckpointWeights

PLAN_SEEDS = (200, 201)
SPEC = llama(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=130, dtype="bf16", max_model_len=128)
NUM_TOKENS = 12


class Eager(CudaRuntime):
    """The same device without graphs."""

    def graphs(self) -> None:
        return None


class _Keeping:
    """The engine's executor; keeps every pass's logits."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.logits: list[np.ndarray] = []

    def execute(self, batch: StepBatch, *, more: bool) -> np.ndarray:
        self.logits.append(self.executor.execute(batch, more=more).copy())
        return self.logits[-1]


def generated(gpu: CudaGpu, plan_seed: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens, and logits of every pass, of a small random model under a hand-set plan with all three shares."""
    plan, pilot = random_plan(SPEC, plan_seed), CpuPilot(cores=choose_cores(gpu=True, emulated=False).pilot)
    with Executor(SPEC, plan, pilot, gpu, CheckpointWeights(DummyCheckpoint(SPEC))) as executor:
        keeping, kv = _Keeping(executor), KvCache(plan)
        engine = Engine(keeping, Scheduler(plan, kv), kv, vocab_size=SPEC.vocab_size)
        for number in range(3):
            engine.add_request(str(number), [3 + number, 5, 7, 11][: 2 + number], SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True))
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step() if output.finished}
    pilot.close()
    return [outputs[str(number)] for number in range(3)], keeping.logits


def compare(eager: CudaGpu, graphed: CudaGpu, plan_seed: int) -> str:
    """What was replayed; AssertionError where a bit differs, or where nothing was."""
    (wanted_tokens, wanted), (tokens, found) = generated(eager, plan_seed), generated(graphed, plan_seed)
    assert eager.launches["replayed"] == 0 < eager.launches["launched"], "the reference must launch one by one"
    assert graphed.launches["replayed"] > graphed.launches["captured"] > 0, f"hardly anything was replayed: {dict(graphed.launches)}"
    assert tokens == wanted_tokens and len(found) == len(wanted), "other tokens"
    differing = [number for number, (row, reference) in enumerate(zip(found, wanted, strict=True)) if not np.array_equal(row.view("u4"), reference.view("u4"))]
    assert not differing, f"logits of passes {differing} differ"
    replayed, launched = graphed.launches["replayed"], graphed.launches["launched"]
    taken = f"{graphed.launches['captured']} parts captured, which take {graphed.launches['graph_bytes']} bytes of the card"
    return f"{replayed} of {replayed + launched} instructions replayed, {taken}"
