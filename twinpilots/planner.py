"""Plans for one loaded model on one measured machine: the bridge from options to the pure planner.

Owns the memory limits in force, the first plan, the memory of workloads already solved, and frozen plans; `online` predicts single passes and learns
from them. Knows nothing of devices.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from twinpilots import history
from twinpilots.background import Background
from twinpilots.config import EngineConfig
from twinpilots.errors import LimitError, UserError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.hardware.store import cache_dir
from twinpilots.model.spec import ModelSpec
from twinpilots.online import OnlinePlanner
from twinpilots.plan.load import GroupLoad, PassLoad
from twinpilots.plan.memory import check_runnable, plan_memory
from twinpilots.plan.plan import Plan, Policy
from twinpilots.plan.pricing import price_plan
from twinpilots.plan.solver import Solution, solve
from twinpilots.plan.workload import Limits, Workload
from twinpilots.rounds import Rounds
from twinpilots.runtime.batch import StepBatch
from twinpilots.units import format_bytes

logger = logging.getLogger(__name__)
DEFAULT_NUM_SEQS = 16  # concurrency that a plan is made for before the first prompts are known
DEFAULT_LEN = 128  # and the prompt and output length (longer requests bring another plan)
SHORTER_LENS = (64, 32, 16, 8)  # what these are cut to where memory is too small
FROZEN_LENS = (8192, 4096, 2048, 1024, 512)  # lengths of one sequence that a frozen plan tries to hold
HOST_SHARE = 0.9  # of the free host memory, when no limit is given: the rest is for the process itself and its neighbours
MOST_GAIN = 0.5  # another plan for the same policy hardly ever saves more than this fraction of the time
AGAIN_GAIN = 0.1  # and this much may be had of work that came before: no more of its time goes into searching
WHOLE_PROMPTS, LEAST_ROUND = 0.9, 0.25  # of a workload's prompt tokens, and of what it generates: less of it says little of the rest
KV_STEP = 32  # predictions are remembered per this many tokens of context, at least: a pass's time changes by a percent or two between them


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """A plan to change to, and why: predicted seconds of the workload now and then, and what switching costs. ``now_s`` is None when the present plan
    cannot hold the workload at all."""

    plan: Plan
    now_s: float | None
    then_s: float
    switch_s: float

    @property
    def reason(self) -> str:
        if self.now_s is None:
            return f"the present plan cannot hold it; predicted {self.then_s:.3g} s after {self.switch_s:.2g} s of loading"
        return f"predicted {self.then_s:.3g} s plus {self.switch_s:.2g} s of loading, instead of {self.now_s:.3g} s"


class Planner:
    """Solves, freezes, compares and prices plans under the limits of ``config``."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, profile: HardwareProfile, fingerprint: str) -> None:
        self.config, self.spec, self.fingerprint = config, spec, fingerprint
        self.limits = limits_of(config, profile)
        # By workload, and whether all policies were compared: the rates that it was solved at, and the solution.
        self._solved: dict[tuple[Workload, int | None, bool], tuple[HardwareProfile, Solution]] = {}
        self._background = Background()
        adapts = config.policy == "auto" and not self.is_fixed
        self.online = OnlinePlanner(spec, profile, self._background, adapts=adapts, at_once=False)
        self._known_plan: Plan | None = None
        self._known_s: dict[Workload, float] = {}  # of the known plan
        self.rounds = Rounds()
        self._solve_s = 0.0  # what the last solve took

    def recall_history(self) -> None:
        """Start from what earlier runs on this machine have taught; a plan that must not change does not ask."""
        if not self.is_fixed and history.recall(self.online.tracker):
            self.online.recalled()

    def close(self) -> None:
        """Keeps what this run has taught, and ends a re-solve that may be under way."""
        self._background.close()
        self.store_history()

    def store_history(self) -> None:
        history.store(self.online.tracker)

    @property
    def profile(self) -> HardwareProfile:
        """The machine's rates, as history corrects them."""
        return self.online.profile

    @property
    def is_fixed(self) -> bool:
        """Whether the plan must not change with the workload: set by hand, or frozen."""
        return self.config.plan is not None or self.config.deterministic

    def plan_for(self, workload: Workload, longest: int | None = None) -> Plan:
        """The plan to load: set by hand, frozen earlier, or solved, then for sequences of up to ``longest`` tokens. Raises UserError subclasses when none can
        be had."""
        if self.config.plan is not None:
            return self._given_plan()
        if self.config.deterministic:
            return self._frozen_plan(workload)
        return self.solve(workload, longest=longest).plan

    def first_plan(self, expected: Workload | None = None) -> tuple[Workload, Plan]:
        """The plan to load before the first prompts are known, and the workload that it is for: ``expected``, if anything is. LimitError when memory does not
        suffice."""
        return self._default_plan() if expected is None else self._expected_plan(expected)

    def _default_plan(self) -> tuple[Workload, Plan]:
        """The plan for a workload of default lengths, or, where memory is too small for those and the user named none, of shorter ones.

        LimitError names what the default lengths would need.
        """
        workload = self._default_workload(DEFAULT_LEN)
        try:
            return workload, self.plan_for(workload)
        except LimitError:
            for length in SHORTER_LENS if self.config.max_model_len is None else ():
                with suppress(LimitError):
                    return self._default_workload(length), self.plan_for(self._default_workload(length))
            raise

    def _expected_plan(self, expected: Workload) -> tuple[Workload, Plan]:
        """The plan for an expected workload. One sequence may take the pages of all, where neither model nor memory say less; then the lengths are halved."""
        limit = self.config.max_model_len or self.spec.max_model_len
        num_seqs = self.config.max_num_seqs or expected.max_num_seqs
        seq_len = min(limit, expected.seq_len)
        while True:
            input_len = max(1, min(expected.input_len * seq_len // expected.seq_len, seq_len - 1))
            workload = Workload(num_requests=num_seqs, input_len=input_len, output_len=max(1, seq_len - input_len), max_num_seqs=num_seqs)
            try:
                return workload, self.plan_for(workload, longest=min(limit, num_seqs * seq_len))
            except LimitError:
                if seq_len // 2 < min(SHORTER_LENS) or self.config.max_model_len is not None:
                    raise
                seq_len //= 2

    def _default_workload(self, length: int) -> Workload:
        longest = self.config.max_model_len or self.spec.max_model_len
        num_seqs = self.config.max_num_seqs or DEFAULT_NUM_SEQS
        input_len = max(1, min(length, longest // 2))
        return Workload(num_requests=num_seqs, input_len=input_len, output_len=max(1, min(length, longest - input_len)), max_num_seqs=num_seqs)

    def solve(self, workload: Workload, *, longest: int | None = None, compare: bool = False, at_present_rates: bool = False) -> Solution:
        """The solution for a workload in which one sequence may reach ``longest`` tokens, remembered, unless ``at_present_rates`` those have changed since.
        ``compare`` prices all other policies too (``auto`` always does): bounds over all their choices need it."""
        longest = self.config.max_model_len or longest
        key = workload, longest, compare or self.config.policy == "auto"
        profile = self.profile
        if key not in self._solved or (at_present_rates and self._solved[key][0] is not profile):
            began = time.perf_counter()
            self._solved[key] = profile, self._solve(*key)
            self._solve_s = time.perf_counter() - began
        return self._solved[key][1]

    def _solve(self, workload: Workload, max_model_len: int | None, compare: bool) -> Solution:
        config = self.config
        return solve(
            self.spec, self.profile, workload, self.limits, policy=cast(Policy, config.policy), unit_rows=config.unit_rows,
            kv_dtype=config.kv_dtype, max_model_len=max_model_len, compare=compare, proportionate=True,
        )  # fmt: skip

    def better_plan(self, current: Plan, workload: Workload, longest: int, load_s: float, gain: float) -> PlanChange | None:
        """Another plan that does ``workload`` in at most ``gain`` of the current one's time, its loading included; or, when the current one cannot
        hold a sequence of ``longest`` tokens, any that can (LimitError when none does). None: stay.

        What came k times under the loaded plan is taken to come k times more, so that a small workload earns its search and loading, too, when it
        comes again and again: the ski-rental rule, by which waiting costs no more than changing (Karlin et al., "Competitive snoopy caching", 1988).
        The search goes by the rates that the rounds have taught.
        What rounds took counts for more than what is predicted: a plan that disappoints is left again for the one that it replaced.
        """
        if self.is_fixed:
            return None
        if not holds(current, longest):
            found = self.solve(workload, longest=longest).plan
            return PlanChange(plan=found, now_s=None, then_s=self._seconds(found, workload), switch_s=load_s)
        rounds = self.rounds.come(workload)
        about_s, cost_s = self._about_s(current, workload), load_s + self._solve_s
        if (about_s * MOST_GAIN < cost_s and rounds * about_s * AGAIN_GAIN < cost_s) or not self.rounds.is_due(workload):
            return None  # not worth the search
        found = self.solve(workload, longest=longest, at_present_rates=True).plan
        changes = [change for plan, seen_s in self.rounds.others(workload, found) if (change := self._change(current, plan, seen_s, workload, load_s))]
        best = min(changes, key=lambda change: change.then_s, default=None)
        if best is None or best.now_s is None or best.then_s + load_s / rounds >= gain * best.now_s:
            return None
        return best

    def _change(self, current: Plan, plan: Plan, seen_s: float | None, workload: Workload, load_s: float) -> PlanChange:
        """Both as seen; or, where ``plan`` never ran, as predicted, but the current one no slower than it was seen: a plan is not left for a prediction that
        only the prediction of the current one made look good."""
        now_seen_s = self.rounds.seen_s(workload)
        if seen_s is not None and now_seen_s is not None:
            return PlanChange(plan=plan, now_s=now_seen_s, then_s=seen_s, switch_s=load_s)
        now_s = self._seconds(current, workload)
        then_s = seen_s if seen_s is not None else self._seconds(plan, workload)
        return PlanChange(plan=plan, now_s=now_s if now_seen_s is None else min(now_s, now_seen_s), then_s=then_s, switch_s=load_s)

    def note_round(self, workload: Workload, seconds: float, prompt_tokens: int, generated: int) -> None:
        """What a round took, as if all of the workload's tokens had been generated (its lengths are rounded up). Nothing is noted where prompts were found in
        the prefix cache, or most sequences ended early."""
        done = generated / workload.generated_tokens
        if done >= LEAST_ROUND and prompt_tokens >= WHOLE_PROMPTS * workload.num_requests * workload.input_len:
            self.rounds.took(workload, seconds / min(1.0, done))

    def _about_s(self, plan: Plan, workload: Workload) -> float:
        """As `_seconds`, by the rates of the first time that this was asked: to price a plan takes tens of milliseconds."""
        if self._known_plan is not plan:
            self._known_plan, self._known_s = plan, {}
        if workload not in self._known_s:
            self._known_s[workload] = self._seconds(plan, workload)
        return self._known_s[workload]

    def _seconds(self, plan: Plan, workload: Workload) -> float:
        return price_plan(self.spec, self.profile, workload, plan).seconds

    def bounds(self, workload: Workload) -> tuple[float | None, float | None]:
        """(plan bound, hardware bound) in tokens/s for a workload under these limits; None where it cannot run at all."""
        try:
            prediction = self.solve(workload, compare=True).prediction
        except LimitError:
            return None, None
        return prediction.plan_bound, prediction.hardware_bound

    # -- fixed plans ---------------------------------------------------------------------------------------------------------------------

    def _given_plan(self) -> Plan:
        plan, text = self.config.plan, self.config.read_plan()
        try:
            plan = plan if text is None else Plan.from_json(text)
            plan.check(self.spec)
        except ValueError as error:
            raise UserError(f"the given plan does not fit {self.spec.name}: {error}") from error
        if self.config.max_num_seqs is not None and self.config.max_num_seqs < plan.max_num_seqs:
            plan = replace(plan, max_num_seqs=self.config.max_num_seqs)
        return self._checked(plan)

    def _checked(self, plan: Plan) -> Plan:
        check_runnable(self.spec, plan)
        use = plan_memory(self.spec, plan)
        for name, needed, limit in (("gpu", use.gpu.total, self.limits.gpu_bytes), ("host", use.host.total, self.limits.host_bytes)):
            if needed > limit:
                raise LimitError(
                    f"the plan needs {format_bytes(needed)} of {name} memory, {format_bytes(limit)} allowed; raise --{name}-memory or change the plan"
                )
        return plan

    def _frozen_plan(self, workload: Workload) -> Plan:
        """One split for every bucket, the same after a restart: kept beside the profiles, keyed by all that it depends on."""
        path = self._frozen_path()
        try:
            plan = Plan.from_json(path.read_text(encoding="utf-8"))
            plan.check(self.spec)
            return self._checked(plan)
        except (OSError, ValueError, LimitError):
            pass
        plan = freeze(self._long_solution(workload).plan)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(plan.to_json(), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"deterministic=True keeps its plan in {path}, which cannot be written: {error}") from error
        return plan

    def _long_solution(self, workload: Workload) -> Solution:
        """The solution for a workload with pages for one much longer sequence where memory has them: a frozen plan cannot grow with its requests."""
        if self.config.max_model_len is None:
            for longest in FROZEN_LENS:
                if workload.seq_len < min(longest, self.spec.max_model_len):
                    with suppress(LimitError):
                        return self._solve(workload, min(longest, self.spec.max_model_len), False)
        return self.solve(workload)

    def _frozen_path(self) -> Path:
        c = self.config
        parts = (
            self.fingerprint,
            self.spec.weight_dtype,
            self.spec.formats,
            c.device,
            c.gpu_bytes,
            c.host_bytes,
            c.max_model_len,
            c.max_num_seqs,
            c.kv_dtype,
            c.policy,
            c.threads,
            c.unit_rows,
        )
        return cache_dir() / "plans" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def limits_of(config: EngineConfig, profile: HardwareProfile) -> Limits:
    """The limits in force. ``gpu_memory`` is the process's whole footprint: what the context takes comes off. LimitError when it is more than there is."""
    overhead = profile.gpu_overhead_bytes
    offered = profile.gpu_memory_bytes + overhead
    if profile.gpu is not None and config.gpu_bytes is not None and config.gpu_bytes > offered:
        raise LimitError(f"--gpu-memory {format_bytes(config.gpu_bytes)} is more than the device offers ({format_bytes(offered)}); lower it")
    gpu_bytes = max(0, (config.gpu_bytes or offered) - overhead) if profile.gpu is not None else 0
    return Limits(gpu_bytes=gpu_bytes, host_bytes=config.host_bytes or int(profile.host_memory_bytes * HOST_SHARE))


def holds(plan: Plan, tokens: int) -> bool:
    """Whether one sequence of so many tokens fits the plan's length limit and one tier's pages."""
    pages = max(plan.gpu_pages, plan.host_pages if plan.uses_cpu else min(plan.host_pages, plan.kv_staging_pages))
    return tokens <= plan.max_model_len and tokens <= pages * plan.page_size


def freeze(plan: Plan) -> Plan:
    """The plan with the largest decode bucket's splits in every bucket, and no micro-batches: who computes a row never depends on the batch."""
    decode = [bucket for bucket in plan.buckets if bucket.phase == "decode"]
    model = (decode or list(plan.buckets))[-1]
    attention = model.host_attention
    buckets = tuple(
        replace(bucket, splits=model.splits, micro_batches=1, host_attention=attention, host_prefill_attention=attention) for bucket in plan.buckets
    )
    return replace(plan, buckets=buckets)


def pass_load_of(batch: StepBatch, number: int = 0) -> PassLoad:
    """The batch as the cost model sees it, in the pass of that number in its chain; sequences of a group with one query token count as alike, at their mean
    context."""
    micro_batches = []
    for groups in batch.micro_batches:
        loads = []
        for group in groups:
            decoding = [item for item in group if item.num_tokens == 1]
            mean = _rounded(number + sum([item.end for item in decoding]) / len(decoding)) if decoding else 0
            loads.append(GroupLoad.of([(1, mean)] * len(decoding) + [(i.num_tokens, max(i.num_tokens, _rounded(i.end))) for i in group if i.num_tokens > 1]))
        micro_batches.append((loads[0], loads[1], loads[2]))
    return PassLoad(tuple(micro_batches), batch.num_logits)


def _rounded(tokens: float) -> int:
    """To `KV_STEP` tokens, or a sixteenth of the power of two below where that is more."""
    step = max(KV_STEP, 1 << max(0, int(tokens).bit_length() - 5))
    return max(1, round(tokens / step) * step)
