"""A loaded plan in operation: devices, executor, scheduler and engine of one `LLM`, from loading to closing.

Owns their lives and the timing of passes. Knows nothing of prompts as text, of workloads or of how the plan was found.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np

from twinpilots.config import EngineConfig
from twinpilots.device.memory import Tier
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.kv_pricing import KvPricing
from twinpilots.machine import open_machine
from twinpilots.model.checkpoint import Checkpoint
from twinpilots.model.spec import ModelSpec
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.online import PassDone, PassPrediction
from twinpilots.plan.difference import difference
from twinpilots.plan.expected import WorkKind
from twinpilots.plan.load import PassLoad
from twinpilots.plan.plan import Plan
from twinpilots.planner import Planner, pass_load_of
from twinpilots.progress import Progress
from twinpilots.request import RequestOutput
from twinpilots.runtime.accounts import span_seconds
from twinpilots.runtime.batch import StepBatch
from twinpilots.runtime.chain import Int32, Rule
from twinpilots.runtime.engine import Engine
from twinpilots.runtime.executor import Executor, PassRecord, weight_shares
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import Scheduler
from twinpilots.runtime.stats import DEVICES, BusySeconds, EngineStats, WeightShares
from twinpilots.trace import Recorder, TracedPass

logger = logging.getLogger(__name__)
STORE_PASSES = 5000  # between two times that what was learned is stored: a run that is killed has not learned in vain
ACCOUNT_EVERY_NS = 50_000_000  # of passes: slower passes are accounted for one by one
ACCOUNT_ALONE_NS = 250_000_000  # where no GPU is used, so there is no work to move: nobody is in a hurry to learn
PREPARE_S = 0.6  # what loading may spend on compiling programs ahead,
PRICE_S = 0.4  # and on simulating passes


@dataclass(frozen=True, slots=True)
class _Step:
    """A pass, or a chain of passes, that is not accounted for yet."""

    batch: StepBatch
    records: list[PassRecord]
    began_ns: int
    ended_ns: int
    switch_ns: int = 0  # the part before its first pass that a change of plan took, which says nothing of either plan's passes

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) * 1e-9

    @property
    def bounds_ns(self) -> list[int]:
        """Where each pass began, and the last one ended; what was done before and after the passes is the first one's and the last one's."""
        return [self.began_ns, *[record.ended_ns for record in self.records[:-1]], self.ended_ns]


class CheckpointWeights:
    """A checkpoint's tensors as plain arrays, quantised ones as row blocks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def array(self, tensor_id: str) -> np.ndarray:
        return self._checkpoint.tensor(tensor_id).data

    def blocks(self, tensor_id: str) -> np.ndarray:
        return self._checkpoint.blocks(tensor_id)


class Session:
    """Runs one plan. ``stats`` goes on from an earlier session of the same LLM; ``make_executor`` takes `Executor`'s arguments; ``prepares``: takes time so
    that the first passes need not."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, profile: HardwareProfile, plan: Plan, checkpoint: Checkpoint, tokenizer: Tokenizer | None,
        planner: Planner, *, stats: EngineStats | None = None, make_executor: Callable[..., Executor] = Executor, prepares: bool = True,
    ) -> None:  # fmt: skip
        self.plan, self.profile, self._planner = plan, profile, planner
        began = time.perf_counter()
        with ExitStack() as stack:
            machine = stack.enter_context(open_machine(config.device, config.threads))
            with Progress("loading", total=spec.linear_bytes, unit="bytes") as bar:
                limits: dict[Tier, int] = {"gpu": planner.limits.gpu_bytes, "host": planner.limits.host_bytes}
                self.executor = stack.enter_context(
                    make_executor(spec, plan, machine.pilot, machine.gpu, CheckpointWeights(checkpoint), limits=limits, progress=bar.update)
                )
            self.executor.prepare(PREPARE_S if prepares else 0.0)
            planner.online.prepare(plan, plan.buckets, PRICE_S if prepares else 0.0)
            self._stack = stack.pop_all()
        self.load_s = time.perf_counter() - began
        self._stats = stats or EngineStats(
            policy=config.policy, device=machine.device, emulated=profile.emulated, weights=WeightShares(resident=0, streamed=0, cpu=0)
        )
        switch = longrope_switch(spec)  # such a model's pages depend on more than the tokens before them
        kv = KvCache(plan, share_prefixes=config.enable_prefix_caching and switch is None, counts=self._stats.prefix)
        moves = plan.gpu_pages > 0 and plan.host_pages > 0 and profile.link is not None
        pricing = KvPricing(spec, lambda: self.plan, lambda: planner.online.profile) if moves else None
        self.scheduler = Scheduler(plan, kv, recompute_beyond=switch, pricing=pricing)
        eos = checkpoint.generation_config["eos_token_ids"]
        self.engine = Engine(self, self.scheduler, kv, vocab_size=spec.vocab_size, eos_token_ids=eos, tokenizer=tokenizer, seed=config.seed, chainer=self)
        shares = weight_shares(spec, plan, plan.bucket_for("decode", plan.max_num_seqs))
        self._stats.weights = shares
        self._batch: StepBatch | None = None
        self._records: list[PassRecord] = []  # of the step's passes
        self._unaccounted: list[_Step] = []
        self._unaccounted_ns = 0
        self._account_every_ns = ACCOUNT_EVERY_NS if plan.uses_gpu else ACCOUNT_ALONE_NS
        self._owed_ns = self._charge_ns = 0  # what accounting took and no pass was charged with yet, and what each of the next ones is
        self._moving_ns = 0  # of steps in which nothing but KV moved: the next pass is charged with them
        self._switch_ns = 0  # of a change of plan that accounting has brought: the next pass is charged with it, but the planner does not count it as its
        self.last_pass: tuple[StepBatch, np.ndarray] | None = None  # its logits are a view, valid until the next pass
        self._trace: Recorder | None = None  # takes in every pass while there is one

    def execute(self, batch: StepBatch, *, more: bool) -> np.ndarray:
        """The engine's executor: remembers the batch for the report. One without items only moves KV."""
        self._batch = batch if batch.items else None
        logits = self.executor.execute(batch, more=more)
        self._records = [] if self.executor.last_record is None else [self.executor.last_record]
        self.last_pass = batch, logits
        return logits

    def most_passes(self) -> int:
        """The engine's chainer: a chain's length now."""
        return self.executor.most_passes()

    def execute_chain(self, batch: StepBatch, rules: Sequence[Rule], uniforms: np.ndarray) -> Int32:
        """The engine's chainer: remembers the batch, and each pass's record."""
        tokens, self._records = self.executor.execute_chain(batch, rules, uniforms)
        self._batch = batch
        self.last_pass = batch, self.executor.logits(len(batch.items))
        return tokens

    def hurry(self) -> None:
        """From any thread: somebody wants a word with whoever drives. A chain that runs ends after the pass that it is in."""
        self.executor.hurry()

    @contextmanager
    def driving(self) -> Iterator[None]:
        """For as long as passes follow each other: the calling thread stays on the CPU pilot's core and keeps one handler for Ctrl-C."""
        with self.executor.pilot.caller_pinned(), self.executor.interrupts.listening():
            yield

    def step(self, *, partial: bool | Container[str] = True) -> list[RequestOutput]:
        """One pass, or a chain of passes, timed as the user feels it: scheduling and sampling included. ``partial`` as in `Engine.step`."""
        began_ns = time.perf_counter_ns()
        outputs = self.engine.step(partial=partial)
        ended_ns = time.perf_counter_ns()
        if self._batch is not None and self._records:
            charge_ns = min(self._charge_ns * len(self._records), self._owed_ns)
            self._owed_ns -= charge_ns
            before_ns = charge_ns + self._moving_ns + self._switch_ns
            self._unaccounted.append(_Step(self._batch, self._records, began_ns - before_ns, ended_ns, self._switch_ns))
            self._unaccounted_ns += ended_ns - began_ns
            self._batch, self._records, self._moving_ns, self._switch_ns = None, [], 0, 0
        else:
            self._moving_ns += ended_ns - began_ns
        if self._trace is not None or self._unaccounted_ns >= self._account_every_ns or not self.engine.has_unfinished():
            self.account()
        return outputs

    @property
    def stats(self) -> EngineStats:
        """Sums over all passes so far."""
        self.account()
        return self._stats

    @property
    def num_tokens(self) -> tuple[int, int]:
        """(prompt tokens computed, tokens generated) so far, as `stats` will have it: for those who ask after every pass."""
        records = [record for step in self._unaccounted for record in step.records]
        prompt, generated = sum(record.num_prompt_tokens for record in records), sum(record.num_generated for record in records)
        return self._stats.prompt_tokens + prompt, self._stats.generated_tokens + generated

    def record_into(self, trace: Recorder | None) -> None:
        """Every pass from now on goes into ``trace``; None: no longer. What a traced pass was predicted to take is simulated, however long that takes."""
        self.account()
        self._trace = trace
        self._planner.online.predictions.simulate_at_once(trace is not None)

    def account(self) -> None:
        """What the passes since the last time took goes to the stats, to the trace and to the planner, who may answer with another plan.

        Some at a time, because the first is the dearest (`Executor.report`); what it takes is charged to as many passes that follow.
        """
        began_ns, tracing_ns, switched_ns = time.perf_counter_ns(), 0, self._switch_ns
        steps, self._unaccounted, self._unaccounted_ns = self._unaccounted, [], 0
        plan = self.plan
        for step in steps:
            tracing_ns += self._account(step, plan)
        if steps:
            taken_ns = time.perf_counter_ns() - began_ns - tracing_ns - (self._switch_ns - switched_ns)
            self._owed_ns, self._charge_ns = self._owed_ns + taken_ns, taken_ns // sum([len(step.records) for step in steps])

    def _account(self, step: _Step, plan: Plan) -> int:
        """One step's passes under ``plan``. Returns what the trace's part took (ns)."""
        report, work_s = self.executor.report(step.records)
        if plan is not self.plan:  # a pass before it has changed the plan: what it was predicted to take is forgotten
            self._stats.add(replace(report, seconds=step.seconds))
            return 0
        expected = self._expected(step, plan)  # before the passes' own times become known to the planner
        predicted = [prediction for _, prediction in expected]
        tracing_ns = self._trace_step(step, expected)
        busy_s = BusySeconds(**{name: sum([getattr(prediction.busy_s, name) for prediction in predicted]) for name in DEVICES})
        predicted_s = sum([prediction.seconds for prediction in predicted])
        self._stats.add(replace(report, seconds=step.seconds, predicted_s=predicted_s, predicted_busy_s=busy_s))
        self._teach(step, plan, expected, work_s)
        return tracing_ns

    def _expected(self, step: _Step, plan: Plan) -> list[tuple[PassLoad, PassPrediction]]:
        """Each pass's load, and what it was predicted to take. Most of a chain's passes are alike to the cost model."""
        found: list[tuple[PassLoad, PassPrediction]] = []
        last = pass_load_of(step.batch, len(step.records) - 1)
        while len(found) < len(step.records):
            load = last if found and found[-1][0] == last else pass_load_of(step.batch, len(found))
            alike = bool(found) and found[-1][0] == load
            found.append(found[-1] if alike else (load, self._planner.online.predict(plan, step.batch.bucket, load)))
        return found

    def _teach(
        self, step: _Step, plan: Plan, expected: list[tuple[PassLoad, PassPrediction]], work_s: list[dict[WorkKind, float]]
    ) -> None:  # fmt: skip
        """The planner learns from every pass, and may answer with another plan. What was done around a chain's passes is charged to all of them alike."""
        batch, online = step.batch, self._planner.online
        spans_s = [span_seconds(record.times) for record in step.records]
        driver_s = (step.seconds - step.switch_ns * 1e-9 - sum(spans_s)) / len(spans_s)
        remaining = self.scheduler.passes_left(batch.bucket.phase)
        for record, (load, prediction), work, span_s in zip(step.records, expected, work_s, spans_s, strict=True):
            done = PassDone(
                plan=plan, bucket=batch.bucket, load=load, schedule=record.placed.program.schedule, work_s=work, seconds=span_s + driver_s,
                driver_s=driver_s, remaining=remaining, chained=len(step.records),
            )  # fmt: skip
            change = None if batch.moves else online.after_pass(done, prediction)  # a copy beside it is no part of what the pass was predicted to take
            if online.tracker.num_passes % STORE_PASSES == 0:
                self._planner.store_history()
            if change is not None:
                began_ns = time.perf_counter_ns()
                self.set_plan(change.plan, change.reason)
                self._switch_ns += time.perf_counter_ns() - began_ns
                return

    def _trace_step(self, step: _Step, expected: list[tuple[PassLoad, PassPrediction]]) -> int:
        """Returns what it took (ns)."""
        if self._trace is None:
            return 0
        began_ns, bounds_ns = time.perf_counter_ns(), step.bounds_ns
        for number, (record, (load, prediction)) in enumerate(zip(step.records, expected, strict=True)):
            self._trace.add(functools.partial(self._traced, step.batch, record, load, prediction.seconds, *bounds_ns[number : number + 2]))
        return time.perf_counter_ns() - began_ns

    def _traced(
        self, batch: StepBatch, record: PassRecord, load: PassLoad, predicted_s: float, began_ns: int, ended_ns: int, number: int
    ) -> TracedPass:  # fmt: skip
        return TracedPass(
            number=number, began_ns=began_ns, ended_ns=ended_ns, num_prompt_tokens=record.num_prompt_tokens, num_generated=record.num_generated,
            predicted_s=predicted_s, times=self.executor.pass_times(record), plan=self.plan, bucket=batch.bucket, load=load, profile=self._planner.profile,
        )  # fmt: skip

    def set_plan(self, plan: Plan, reason: str) -> None:
        """Another plan over the same memory, from the next pass on; the change is logged with its reason."""
        logger.info("plan changed, %s: %s", reason, difference(self.plan, plan))
        began = time.perf_counter()
        before = {id(bucket) for bucket in self.plan.buckets}
        self.scheduler.set_plan(plan)
        self.executor.set_plan(plan)
        last = None if self.last_pass is None else self.last_pass[0].bucket
        now = [bucket for bucket in plan.buckets if last is None or (bucket.phase, bucket.max_tokens) == (last.phase, last.max_tokens)]
        for bucket in now:  # others when they come
            if id(bucket) not in before:
                self.executor.compile_bucket(bucket)
        self.plan = plan
        self._stats.plan_changes += 1
        self._planner.online.prepare(plan, now, PRICE_S)
        self._planner.online.switched(plan, time.perf_counter() - began)

    def close(self) -> None:
        self.last_pass = None  # its view would outlive the memory, and so would those of passes that nobody asks about any more
        self._unaccounted.clear()
        self._stack.close()


def longrope_switch(spec: ModelSpec) -> int | None:
    """Tokens beyond which a sequence uses the long rotary table, whose keys differ from those computed before."""
    return next((rope.original_max_position for rope in spec.ropes if rope.long_inv_freq is not None), None)
