"""Runs a hand-set plan through the real engine on real queues and compares its tokens and logits with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests import zoo
from twinpilots.device.base import GpuDevice
from twinpilots.device.cpu import CpuPilot, choose_cores
from twinpilots.device.emulated import EMULATED, EmulatedGpu
from twinpilots.model.checkpoint import Checkpoint, open_checkpoint
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.plan import Plan
from twinpilots.request import SamplingParams
from twinpilots.runtime.engine import Engine
from twinpilots.runtime.executor import Executor
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import GROWTH_TOKENS, Scheduler
from twinpilots.session import CheckpointWeights, longrope_switch

PROMPTS = [[5, 17, 99, 3, 8, 120, 44, 7, 11, 13, 90, 21, 33], [64], [12, 12, 57, 101, 4]]
NUM_TOKENS = 9
MARGIN = 1e-4  # tokens must agree until the reference's own two best logits come closer than this


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A zoo model on disk. ``references[i]``: greedy tokens after ``PROMPTS[i]`` and the logits [tokens, vocab] they were chosen from."""

    path: Path
    spec: ModelSpec
    references: list[tuple[list[int], np.ndarray]]

    @property
    def third_bytes(self) -> int:
        """A third of the model's bytes: GPU memory that every policy must do with."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors")) // 3

    def assert_tokens(self, found: Sequence[Sequence[int]]) -> None:
        """``found[i]`` continues ``PROMPTS[i]`` as the reference does."""
        for tokens, (reference, logits) in zip(found, self.references, strict=True):
            assert_same_tokens(tokens, reference, logits)


ZooModel = Callable[..., SavedModel]  # (family, seed=0, dtype="float32"): the fixture of tests/conftest.py


def save_with_references(family: str, seed: int, dtype: str, path: Path) -> SavedModel:
    zoo.save(family, seed, path, dtype=dtype)
    with closing(open_checkpoint(path)) as checkpoint:
        spec = checkpoint.spec
    return SavedModel(path=path, spec=spec, references=greedy_references(path, PROMPTS, NUM_TOKENS))


def greedy_references(path: Path, prompts: Sequence[list[int]], n: int) -> list[tuple[list[int], np.ndarray]]:
    """`zoo.reference_generate` of every prompt."""
    model = zoo.load_reference(path)
    return [zoo.greedy(model, prompt, n) for prompt in prompts]


class Rig:
    """An engine on a plan; ``logits[request]`` are the rows that its tokens were chosen from, but for chained passes, of which ``most_passes`` may follow
    each other. ``device``: another GPU than the emulated one (gpu_check)."""

    def __init__(
        self, path: Path | Checkpoint, plan: Plan, *, adversarial_seed: int = 0, poison: bool = True, runner: Any = None, device: GpuDevice | None = None,
        growth_tokens: int = GROWTH_TOKENS, pricing: Any = None, most_passes: int = 1,
    ) -> None:  # fmt: skip
        with ExitStack() as stack:
            self.checkpoint = open_checkpoint(path) if isinstance(path, str | Path) else path
            stack.callback(self.checkpoint.close)
            cores = choose_cores(gpu=plan.uses_gpu, emulated=plan.uses_gpu and (device is None or device.emulated))
            pilot = CpuPilot(cores=cores.pilot)
            stack.callback(pilot.close)
            gpu = (device or EmulatedGpu(EMULATED["demo"], cores.device, adversarial_seed=adversarial_seed)) if plan.uses_gpu else None
            spec = self.checkpoint.spec
            self.executor = stack.enter_context(Executor(spec, plan, pilot, gpu, CheckpointWeights(self.checkpoint), poison=poison, runner=runner))
            switch = longrope_switch(spec)
            self.kv = KvCache(plan, share_prefixes=switch is None)
            self.scheduler = Scheduler(plan, self.kv, growth_tokens=growth_tokens, recompute_beyond=switch, pricing=pricing)
            self._most_passes = most_passes
            self.chains: list[int] = []  # the passes of each
            self.engine = Engine(self, self.scheduler, self.kv, vocab_size=spec.vocab_size, chainer=self)
            self.logits: dict[str, list[np.ndarray]] = {}
            self._stack = stack.pop_all()

    def execute(self, batch: Any, *, more: bool) -> np.ndarray:
        logits = self.executor.execute(batch, more=more)
        row = 0
        for item in batch.items:
            row += item.num_logits
            if item.is_last:
                self.logits.setdefault(item.sequence.request_id, []).append(logits[row - 1].copy())
        return logits

    def most_passes(self) -> int:
        return self._most_passes  # whatever passes take

    def execute_chain(self, batch: Any, rules: Any, uniforms: np.ndarray) -> np.ndarray:
        tokens, _ = self.executor.execute_chain(batch, rules, uniforms)
        self.chains.append(len(tokens))
        return tokens

    def set_plan(self, plan: Plan) -> None:
        self.scheduler.set_plan(plan)
        self.executor.set_plan(plan)

    def generate(self, prompts: Sequence[list[int]], n: int) -> list[list[int]]:
        for number, prompt in enumerate(prompts):
            self.engine.add_request(str(number), prompt, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True))
        tokens: dict[str, list[int]] = {}
        while self.engine.has_unfinished():
            for output in self.engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            self.engine.check_integrity()
        return [tokens[str(number)] for number in range(len(prompts))]

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


def assert_same_tokens(found: Sequence[int], reference: Sequence[int], reference_logits: np.ndarray) -> None:
    """Identical until the reference itself is undecided."""
    for position, (token, expected, row) in enumerate(zip(found, reference, reference_logits, strict=False)):
        best = np.sort(row)[-2:]
        if best[1] - best[0] < MARGIN:
            return
        assert token == expected, f"token {position}: {token}, the reference has {expected}: {list(found)} against {list(reference)}"


def log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def relative_rms(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - reference) ** 2) / np.mean(reference**2)))
