"""Prices a plan for a workload: which passes it takes, and how long the simulator says they last.

Owns `Price` and the list of passes: waves of sequences, prefill chunk by chunk, decode at a few context lengths. Knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from twinpilots.errors import LimitError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.draft import pages_of
from twinpilots.plan.estimate import PassEstimator
from twinpilots.plan.load import PassLoad, SeqClass, decode_load, pass_load
from twinpilots.plan.memory import streamed_bytes
from twinpilots.plan.plan import BucketPlan, Phase, Plan
from twinpilots.plan.reads import STAGING_DEPTH
from twinpilots.plan.simulate import PassTiming
from twinpilots.plan.tasks import QUEUES, PassShape, Queue
from twinpilots.plan.workload import Workload

CONTEXTS = (0.25, 0.75)  # where in the output decode is priced: the mid-points of its halves
QUICK_CONTEXTS = (0.5,)
SAMPLES, QUICK_SAMPLES = (6, 3), (3, 2)  # layers that the estimator simulates
PACKETS_PER_LAYER = 6  # more of them change the simulated time by less than a percent
BOTTLENECKS: dict[str, Queue] = {"cpu": "cpu", "gpu": "gpu", "link": "link_in", "disk": "disk"}
BUSY_ENOUGH = 0.6  # a queue that works less than this share of a step is not what holds it up


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPass:
    """``count`` alike passes of one phase, with the simulator's timing of one."""

    phase: Phase
    bucket: BucketPlan
    load: PassLoad
    count: float
    timing: PassTiming

    @property
    def seconds(self) -> float:
        return self.count * self.timing.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What the workload takes under a plan. ``prefill_s`` and ``decode_s`` cover all waves; ``step_s`` is the mean decode step."""

    prefill_s: float
    decode_s: float
    step_s: float
    tokens_per_s: float
    num_waves: int
    passes: tuple[PricedPass, ...]

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def busy_frac(self) -> Mapping[str, float]:
        """Share of the whole time that each queue works."""
        total = sum(p.seconds for p in self.passes)
        return {queue: sum(p.count * p.timing.busy_s[queue] for p in self.passes) / total for queue in QUEUES}

    @property
    def bottleneck(self) -> str:
        """The queue that is busiest in decode (in prefill when there is no decode): "cpu", "gpu", "link", "disk", or "hand-offs" when none is busy
        enough."""
        shown = [p for p in self.passes if p.phase == "decode"] or list(self.passes)
        seconds = sum(p.seconds for p in shown)
        busy = {name: sum(p.count * p.timing.busy_s[queue] for p in shown) / seconds for name, queue in BOTTLENECKS.items()}
        name = max(busy, key=lambda key: busy[key])
        return name if busy[name] >= BUSY_ENOUGH else "hand-offs"


def sequences_at_once(plan: Plan, workload: Workload) -> tuple[int, int]:
    """(sequences with KV on the GPU, with KV on the host) that run at once. Raises LimitError when the plan's pages hold not even one."""
    per_seq = pages_of(workload.seq_len)
    most = min(workload.concurrency, plan.max_num_seqs)
    on_gpu = min(most, plan.gpu_pages // per_seq)
    on_host = min(most - on_gpu, plan.host_pages // per_seq)
    if not on_gpu + on_host:
        pages = f"{plan.gpu_pages} pages on the GPU and {plan.host_pages} on the host"
        raise LimitError(f"a sequence of {workload.seq_len} tokens needs {per_seq} KV pages, the plan has {pages}; lower the lengths or raise the limits")
    return on_gpu, on_host


def waves_of(plan: Plan, workload: Workload) -> tuple[int, int, int]:
    """(number of waves, GPU sequences, host sequences of one): requests that do not fit at once are dealt evenly to waves that run one after another."""
    on_gpu, on_host = sequences_at_once(plan, workload)
    waves = -(-workload.num_requests // (on_gpu + on_host))
    per_wave = -(-workload.num_requests // waves)
    on_gpu = min(on_gpu, per_wave)
    return waves, on_gpu, per_wave - on_gpu


def price_plan(spec: ModelSpec, profile: HardwareProfile, workload: Workload, plan: Plan, *, quick: bool = False) -> Price:
    """Simulated seconds of the whole workload. ``quick`` prices decode at one context length instead of two: enough to rank plans."""
    waves = waves_of(plan, workload)[0]
    passes = (*price_phase(spec, profile, workload, plan, "prefill"), *price_phase(spec, profile, workload, plan, "decode", quick=quick))
    prefill_s = waves * sum(p.seconds for p in passes if p.phase == "prefill")
    decode_s = waves * sum(p.seconds for p in passes if p.phase == "decode")
    steps = waves * (workload.output_len - 1)
    return Price(
        prefill_s=prefill_s, decode_s=decode_s, step_s=decode_s / steps if steps else 0.0,
        tokens_per_s=workload.generated_tokens / (prefill_s + decode_s), num_waves=waves, passes=passes,
    )  # fmt: skip


def price_phase(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload, plan: Plan, phase: Phase, *, quick: bool = False
) -> tuple[PricedPass, ...]:  # fmt: skip
    """The passes of one phase of one wave."""
    pricer = _Pricer(spec, profile, plan, QUICK_SAMPLES if quick else SAMPLES)
    return tuple(
        PricedPass(phase=phase, bucket=bucket, load=load, count=count, timing=pricer.timing(bucket, load))
        for bucket, load, count in phase_loads(workload, plan, phase, QUICK_CONTEXTS if quick else CONTEXTS)
    )


def phase_loads(workload: Workload, plan: Plan, phase: Phase, contexts: Sequence[float] = CONTEXTS) -> list[tuple[BucketPlan, PassLoad, float]]:
    """(bucket, load, number of such passes) of one phase of one wave; decode at these places of the output."""
    _, on_gpu, on_host = waves_of(plan, workload)
    if phase == "prefill":
        return [_prefill(workload, plan, on_gpu, on_host)]
    bucket, steps = plan.bucket_for("decode", on_gpu + on_host), (workload.output_len - 1) / len(contexts)
    lengths = [workload.input_len + round(workload.output_len * at) for at in contexts if steps]
    return [(bucket, decode_load(on_gpu, on_host, length, bucket), steps) for length in lengths]


def used_bucket(workload: Workload, plan: Plan, phase: Phase) -> BucketPlan:
    """The bucket that the workload's passes of this phase take."""
    found = phase_loads(workload, plan, phase)
    return found[0][0] if found else plan.bucket_for(phase, plan.max_num_seqs)


def _prefill(workload: Workload, plan: Plan, on_gpu: int, on_host: int) -> tuple[BucketPlan, PassLoad, float]:
    shape = prefill_shape(workload, on_gpu + on_host, plan.max_pass_tokens)
    bucket = plan.bucket_for("prefill", shape.num_seqs * shape.query_tokens)
    host = round(shape.num_seqs * on_host / (on_gpu + on_host))
    load = pass_load(bucket, shape.classes(shape.num_seqs - host), shape.classes(host), prompt=True, logit_rows=shape.logit_rows)
    return bucket, load, shape.count


def bucket_seconds(spec: ModelSpec, profile: HardwareProfile, workload: Workload, plan: Plan, bucket: BucketPlan) -> float:
    """Seconds of one full pass of ``bucket`` (which may be another than the plan's own), at the workload's mean context."""
    per_seq = pages_of(workload.seq_len)
    pricer = _Pricer(spec, profile, plan)
    if bucket.phase == "decode":
        on_gpu = min(bucket.max_tokens, plan.gpu_pages // per_seq) if plan.host_pages else bucket.max_tokens
        context = workload.input_len + workload.output_len // 2
        return pricer.timing(bucket, decode_load(on_gpu, bucket.max_tokens - on_gpu, context, bucket)).seconds
    shape = prefill_shape(workload, max(1, bucket.max_tokens // workload.input_len), bucket.max_tokens)
    host = round(shape.num_seqs * plan.host_pages / max(1, plan.host_pages + plan.gpu_pages))
    return pricer.timing(bucket, pass_load(bucket, shape.classes(shape.num_seqs - host), shape.classes(host), prompt=True)).seconds


class _Pricer:
    """Builds an estimator once per bucket and shape, with packets made as coarse as tells no difference: they set the number of tasks to simulate."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, plan: Plan, samples: tuple[int, int] = SAMPLES) -> None:
        self.spec, self.profile, self.plan, self.samples = spec, profile, plan, samples
        self.known: dict[tuple[int, PassShape], PassEstimator] = {}

    def timing(self, bucket: BucketPlan, load: PassLoad) -> PassTiming:
        key = (id(bucket), load.shape)
        if key not in self.known:
            plan = replace(self.plan, packet_bytes=coarse_packet_bytes(self.spec, self.plan, bucket))
            self.known[key] = PassEstimator(self.spec, plan, bucket, self.profile, load.shape, self.samples)
        return self.known[key].timing(load)


def coarse_packet_bytes(spec: ModelSpec, plan: Plan, bucket: BucketPlan) -> int:
    """The plan's packet, or a larger one that still cuts a mean layer's streamed rows in ``PACKETS_PER_LAYER`` and leaves four to the rings."""
    per_layer, most = streamed_bytes(spec, plan, bucket) // (spec.num_layers * PACKETS_PER_LAYER), plan.ring_bytes // 4
    if plan.disk_rows:
        most = min(most, plan.staging_bytes // STAGING_DEPTH)
    return max(plan.packet_bytes, min(per_layer, most))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillShape:
    """The mean prefill pass of one wave: ``num_seqs`` sequences bring ``query_tokens`` each and then hold ``kv_len``; ``count`` such passes."""

    num_seqs: int
    query_tokens: int
    kv_len: int
    logit_rows: int
    count: float

    def classes(self, num_seqs: int) -> tuple[SeqClass, ...]:
        return (SeqClass(num_seqs, self.query_tokens, self.kv_len),) if num_seqs else ()


def prompts_at_once(workload: Workload, num_seqs: int, chunk: int) -> int:
    """The most sequences that one prefill pass touches: whole prompts, or the end of one and the begin of the next."""
    return prefill_shape(workload, num_seqs, chunk).num_seqs + 1


def prefill_shape(workload: Workload, num_seqs: int, chunk: int) -> PrefillShape:
    """Whole prompts side by side when they fit the chunk, else one prompt's chunk after another, at its mean context."""
    length = workload.input_len
    if length <= chunk:
        together = min(num_seqs, chunk // length)
        passes = -(-num_seqs // together)
        together = -(-num_seqs // passes)
        return PrefillShape(num_seqs=together, query_tokens=length, kv_len=length, logit_rows=together, count=num_seqs / together)
    pieces = -(-length // chunk)
    query = -(-length // pieces)
    return PrefillShape(num_seqs=1, query_tokens=query, kv_len=(length + query) // 2, logit_rows=1, count=num_seqs * length / query)
