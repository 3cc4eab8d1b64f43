"""How a running plan follows what happens to this very box: a model on an emulated GPU, against the best of many plans measured in the same minute.

Four scenarios: a process competes for the CPU pilot's core and goes; the link's rate halves; KV grows until attention dominates; a batch drains. Owns the
scenarios, the plans to compare with and the arithmetic of the comparison; `benchmarks.adaptation --live` is the command. The adapting plan and the others run
the same sequences over the same memory, by turns; while another plan is measured, the planner neither sees its passes nor decides.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from benchmarks.adaptation_machine import split_cpu
from benchmarks.competition import burning
from benchmarks.truth_live import own_cache
from twinpilots import LLM, SamplingParams
from twinpilots.adaptation import MOST_CREDIT_S
from twinpilots.device.cpu import choose_cores
from twinpilots.device.emulated import EmulatedGpu
from twinpilots.hardware.store import profile_key, save_profile
from twinpilots.live import LiveEngine
from twinpilots.machine import instruction_set
from twinpilots.model.checkpoint import open_checkpoint
from twinpilots.model.locate import resolve_model
from twinpilots.online import PassPrediction
from twinpilots.outcomes import describe
from twinpilots.plan.load import decode_load
from twinpilots.plan.memory import tasks_allowance
from twinpilots.plan.plan import BucketPlan
from twinpilots.plan.rebalance import can_move, options, with_bucket
from twinpilots.plan.workload import Workload
from twinpilots.profiling import measure_machine, stored_profile
from twinpilots.runtime.stats import BusySeconds
from twinpilots.session import Session

DEVICE = "emulated:demo"
MODEL = "smollm2-135m"
WARM_PASSES = 60  # before the first event
SETTLED = 20  # passes after an event by which the plan must have followed
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # CPU's part of the rows that are not resident
SCREENED, ROUNDS, TURN, FRESH = 4, 4, 6, 2  # passes of every plan at first; turns of each of the best; passes of a turn; those that begin one and do not count
FINALISTS = 2  # of the other plans, beside the one in force and the first one
GOOD = 0.88  # of the best plan's throughput
SOLVER_PATIENCE_S = 10.0


# -- the arithmetic ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What was measured after one event: seconds of a pass, adapting and under each of the best other plans, by turns. ``first``: the plan of the start."""

    event: str
    adaptive_s: tuple[float, ...]
    others_s: Mapping[str, tuple[float, ...]]
    first: str

    @property
    def best(self) -> str:
        """The plan of the oracle."""
        return min(self.others_s, key=lambda name: median(self.others_s[name]))

    @property
    def of_oracle(self) -> float:
        """Median throughput, adapting, as a share of the best plan's."""
        return median(self.others_s[self.best]) / median(self.adaptive_s)

    @property
    def first_of_oracle(self) -> float:
        return median(self.others_s[self.best]) / median(self.others_s[self.first])


@dataclass(kw_only=True)
class LiveOutcome:
    """One scenario."""

    scenario: str
    stretches: list[Stretch] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    re_solves: int = 0
    last_solve_s: float = 0.0

    @property
    def worst(self) -> float:
        return min(each.of_oracle for each in self.stretches)

    def as_dict(self) -> dict[str, Any]:
        rows = [
            {
                "event": each.event, "of_oracle": each.of_oracle, "first_plan_of_oracle": each.first_of_oracle, "oracle": each.best,
                "pass_s": {"adaptive": median(each.adaptive_s), **{name: median(times) for name, times in each.others_s.items()}},
            }
            for each in self.stretches
        ]  # fmt: skip
        return {
            "scenario": self.scenario, "worst_of_oracle": self.worst, "good": self.worst >= GOOD, "plan_changes": len(self.changes),
            "re_solves": self.re_solves, "last_solve_s": self.last_solve_s, "stretches": rows, "changes": self.changes,
        }  # fmt: skip


def finalists(screened_s: Mapping[str, Sequence[float]], always: Sequence[str], count: int = FINALISTS) -> list[str]:
    """The names to measure by turns: ``always``, and the ``count`` fastest others."""
    ranked = sorted(set(screened_s) - set(always), key=lambda name: median(screened_s[name]))
    return [*dict.fromkeys(always), *ranked[:count]]


# -- one engine on the box ---------------------------------------------------------------------------------------------------------------------


class _Unseen:
    """The planner's place while another plan is measured: learns nothing, decides nothing, costs nothing."""

    def __init__(self, profile: object) -> None:
        self.profile, self.tracker = profile, SimpleNamespace(num_passes=1)

    def predict(self, *_: object) -> PassPrediction:
        return PassPrediction(seconds=0.0, plain_s=0.0, busy_s=BusySeconds(cpu=0.0, gpu=0.0, link=0.0))

    def after_pass(self, *_: object) -> None:
        return None

    def switched(self, *_: object) -> None:
        return None

    def prepare(self, *_: object) -> None:
        return None


class Box:
    """A model that decodes on the emulated GPU; sequences come and go as a scenario says."""

    def __init__(self, model: str, workload: Workload, settle: int = SETTLED) -> None:
        self._settle = settle
        self._stack = ExitStack()
        self.llm = self._stack.enter_context(LLM(model, device=DEVICE, max_num_seqs=workload.max_num_seqs, max_model_len=workload.seq_len, expected=workload))
        self.live: LiveEngine = self._stack.enter_context(self.llm.open_engine())
        self.first = self.session.plan
        self._running: list[str] = []
        self._max_len, self._made = workload.seq_len, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def session(self) -> Session:
        return self.live.session

    @property
    def num_seqs(self) -> int:
        return len(self._running)

    def fill(self, num_seqs: int, context: int) -> None:
        """These sequences instead of all others, decoding. A longer one begins like a shorter one of the same place, whose KV it takes over."""
        self.drain_to(0)
        for place in range(num_seqs):
            self._made += 1
            self._running.append(str(self._made))
            params = SamplingParams(temperature=0.0, max_tokens=self._max_len - context, ignore_eos=True)
            self.live.add(self._running[-1], [1 + (7 * place + 13 * i + i * i // 5) % 900 for i in range(context)], params)
        self.passes(1)
        while self.live.num_waiting or self.session.executor.last_record.num_prompt_tokens:  # type: ignore[union-attr]
            self.passes(1)

    def warm_up(self) -> None:
        """Until the planner has seen the load, and looked for a better plan once."""
        self.passes(WARM_PASSES // 2)
        self.afford_search()
        self.passes(WARM_PASSES // 2)
        self.await_search()
        self.passes(WARM_PASSES // 2)

    def drain_to(self, num_seqs: int) -> None:
        while len(self._running) > num_seqs:
            self.live.abort(self._running.pop())

    def afford_search(self) -> None:
        """A search may take 1 % of a run's time: what minutes of running pay for is granted at once."""
        self.llm._planner.online.adaptation._credit_s = MOST_CREDIT_S

    def passes(self, count: int) -> list[float]:
        """Seconds of each, as a user feels them."""
        found = []
        for _ in range(count):
            began = time.perf_counter()
            self.live.step(partial=False)
            found.append(time.perf_counter() - began)
        return found

    def slow_link(self, factor: float) -> None:
        gpu = self.session.executor.gpu
        assert isinstance(gpu, EmulatedGpu)
        rates = gpu.preset
        gpu.set_link_rates(up_bytes_per_s=rates.up_bytes_per_s / factor, down_bytes_per_s=rates.down_bytes_per_s / factor)

    def busy_core(self) -> AbstractContextManager[None]:
        """A process that computes on the pilot's core."""
        return burning(self.session.executor.pilot.cores[0])

    # -- the plan that adapts against others -----------------------------------------------------------------------------------------------

    def compare(self, event: str) -> Stretch:
        """Passes of the plan that adapts and of the best others by turns, after it has had its time to follow."""
        self.afford_search()
        self.passes(self._settle)
        others = self._others()
        with self._unseen():
            screened = {name: self._under(bucket, SCREENED)[FRESH - 1 :] for name, bucket in others.items()}
        names = finalists(screened, ["in force", "first"])
        adaptive: list[float] = []
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            adaptive += self.passes(TURN)[FRESH:]
            with self._unseen():
                for name in names:
                    times[name] += self._under(others[name], TURN)[FRESH:]
        return Stretch(event=event, adaptive_s=tuple(adaptive), others_s={name: tuple(each) for name, each in times.items()}, first="first")

    def _others(self) -> dict[str, BucketPlan]:
        """Plans over the same memory: the one in force and the first one, what the planner finds at the rates as it knows them, before and now, and a grid."""
        plan, spec, online = self.session.plan, self.llm.spec, self.llm._planner.online
        bucket = plan.bucket_for("decode", self.num_seqs)
        batch = self.session.last_pass[0]  # type: ignore[index]
        context = max(item.end for item in batch.items)
        on_gpu = sum(item.sequence.tier == "gpu" for item in batch.items)
        load = decode_load(on_gpu, self.num_seqs - on_gpu, context, bucket)
        found = {"in force": bucket, "first": self.first.bucket_for("decode", self.num_seqs)}
        if not can_move(plan):  # the CPU's alone: its memory holds no other plan
            return found
        for rates, profile in (("tracked", online.profile), ("offline", self.llm._profile)):
            found |= {f"{rates} {number}": option.bucket for number, option in enumerate(options(spec, profile, plan, bucket, load))}
        for batches in sorted({1, bucket.micro_batches}):
            for share in SHARES:
                grid = split_cpu(plan, replace(bucket, micro_batches=batches), share, share)
                if tasks_allowance(spec, plan, grid) <= max(tasks_allowance(spec, plan, each) for each in plan.buckets):
                    found[f"CPU {share:.0%}, {batches} micro-batches"] = grid
        return found

    def _under(self, bucket: BucketPlan, count: int) -> list[float]:
        """Passes of another plan, which then stays in force."""
        plan = self.session.plan
        now = plan.bucket_for("decode", self.num_seqs)
        if bucket is not now:
            self.session.set_plan(with_bucket(plan, now, bucket), "measured for comparison")
        return self.passes(count)

    def await_search(self) -> None:
        deadline = time.perf_counter() + SOLVER_PATIENCE_S
        while (search := self.llm._planner._background._thread) is not None and search.is_alive() and time.perf_counter() < deadline:
            time.sleep(0.01)

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """The planner sees nothing; a search that is under way ends first, for it would take the others' time."""
        self.session.account()
        self.await_search()
        planner, plan = self.llm._planner, self.session.plan
        online = planner.online
        planner.online = _Unseen(online.profile)  # type: ignore[assignment]
        try:
            yield
        finally:
            self.session.account()
            if self.session.plan is not plan:
                self.session.set_plan(plan, "measured for comparison")
            planner.online = online


# -- the four scenarios ------------------------------------------------------------------------------------------------------------------------


def _cpu_load(box: Box) -> Iterator[Stretch]:
    box.fill(16, 64)
    box.warm_up()
    with box.busy_core():
        yield box.compare("a process takes half of the pilot's core")
    yield box.compare("it has gone")


def _link_halves(box: Box) -> Iterator[Stretch]:
    box.fill(16, 64)
    box.warm_up()
    box.slow_link(2.0)
    yield box.compare("the link has half its rate")


def _kv_grows(box: Box) -> Iterator[Stretch]:
    box.fill(8, 32)
    box.warm_up()
    for context in (256, 768):
        box.fill(8, context)
        yield box.compare(f"context {context}")


def _drains(box: Box) -> Iterator[Stretch]:
    box.fill(16, 64)
    box.warm_up()
    for num_seqs in (8, 4, 2, 1):
        box.drain_to(num_seqs)
        yield box.compare(f"{num_seqs} sequences left")


def _workload(num_seqs: int, input_len: int, output_len: int) -> Workload:
    return Workload(num_requests=num_seqs, input_len=input_len, output_len=output_len, max_num_seqs=num_seqs)


SCENARIOS: Mapping[str, tuple[Workload, Callable[[Box], Iterator[Stretch]]]] = {
    "cpu-load": (_workload(16, 64, 832), _cpu_load),
    "link-halves": (_workload(16, 64, 512), _link_halves),
    "kv-grows": (_workload(8, 32, 1184), _kv_grows),
    "batch-drains": (_workload(16, 64, 1216), _drains),
}


def run_live(names: Sequence[str], model: str = MODEL, settle: int = SETTLED, tell: Callable[[str], None] = lambda _: None) -> list[LiveOutcome]:
    """The scenarios ``names``, each from the same offline profile, the stored one where there is one, without history."""
    found = []
    with closing(open_checkpoint(resolve_model(model, None))) as checkpoint:
        spec = checkpoint.spec
    profile = stored_profile(DEVICE, spec)
    with own_cache() as folder:
        if profile is None:
            measure_machine(DEVICE, spec)
        else:
            save_profile(profile_key(DEVICE, len(choose_cores(gpu=True, emulated=True).pilot), spec, instruction_set()), profile)
        for name in names:
            shutil.rmtree(folder / "twinpilots" / "history", ignore_errors=True)
            workload, events = SCENARIOS[name]
            outcome = LiveOutcome(scenario=name)
            with Box(model, workload, settle) as box:
                for stretch in events(box):
                    outcome.stretches.append(stretch)
                    tell(f"{name}: {stretch.event}: {stretch.of_oracle:.3f} of {stretch.best}")
                tell(f"{name}: in force at last: {describe(box.session.plan.bucket_for('decode', box.num_seqs))}")
                adaptation = box.llm._planner.online.adaptation
                outcome.last_solve_s = box.llm._planner._background.last_s
                outcome.changes, outcome.re_solves = [record.as_dict() for record in adaptation.history], adaptation.num_asks
            found.append(outcome)
    return found


def report(found: Sequence[LiveOutcome]) -> str:
    lines = ["| scenario | after | of the oracle | first plan kept | ms a pass, adapting / oracle | changes |", "|---|---|---|---|---|---|"]
    for outcome in found:
        for each in outcome.stretches:
            now_ms, best_ms = 1e3 * median(each.adaptive_s), 1e3 * median(each.others_s[each.best])
            shares = f"{each.of_oracle:.3f} | {each.first_of_oracle:.3f} | {now_ms:.1f} / {best_ms:.1f}"
            lines.append(f"| {outcome.scenario} | {each.event} | {shares} | {len(outcome.changes)} |")
    lines += [f"{each.scenario}, pass {change['pass']}: {change['reason']}: {change['change']}" for each in found for change in each.changes]
    return "\n".join(lines)
