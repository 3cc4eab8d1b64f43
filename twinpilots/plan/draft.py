"""From a handful of decisions (a `Draft`) to a complete `Plan`, and the rules by which every policy sizes chunks, packets, buckets and pages.

Owns what all policies share, so that they differ in their decisions only: rounding to units, filling memory with resident rows, buckets, the ring,
and the search for the smallest limit that would do. Knows nothing of time: who computes what is decided in `policies.py` and `solver.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from twinpilots.config import KvDtype
from twinpilots.errors import LimitError
from twinpilots.model.spec import ModelSpec, OpSpec
from twinpilots.plan.memory import Templates, disk_bytes, disk_kv_bytes, gpu_memory, host_memory, layer_template, plan_memory
from twinpilots.plan.packets import align, smallest_ring
from twinpilots.plan.plan import BucketPlan, Phase, Plan, Policy, Split
from twinpilots.plan.workload import Limits, Workload

PAGE_TOKENS = 16
MIN_RING_DEPTH = 4  # one packet in use, two loaded, one loading: a late start on either side costs no bubble
MAX_PACKET_BYTES = 32 << 20
MIN_PACKET_BYTES = 64 << 10
TIGHT_RING_DEPTH = 2  # where memory is short: one packet in use, one loading
RING_SHARE = 32  # at most this fraction of GPU memory goes to the ring: a packet is then still 5 MB on a 640 MB card
CHUNK_SHARE = 8  # and at most this one to activations
CHUNK_TOKENS = (2048, 1024, 512, 256, 128, 64, 32, 16)
DISK_CHUNK_TOKENS, DISK_CHUNK_SHARE = (16384, 8192, 4096), 4  # where passes wait for the disk: the larger the chunk, the fewer they are
TIGHT_CHUNK_TOKENS = (8, 4)  # where even the smallest of these leaves no room
HUGE = 1 << 50  # bytes: more than any memory
MOST_GUESSES = 12  # at the smallest limit that would do, before it is bisected
Attention = Literal["cpu", "gpu"]
Residency = tuple[Mapping[str, int], ...]  # resident rows by op, per layer, the head last (Split's order)
Needs = Callable[[Limits], Sequence[Limits]]
CpuShare = Callable[[Phase, int], Mapping[str, float]]  # (phase, tokens of the bucket) -> fraction of each op's rows that the CPU should compute


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the user may fix. None: the model's own dtype for KV, the workload's sequence length for ``max_model_len``."""

    unit_rows: int = 64
    kv_dtype: KvDtype | None = None
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        if self.unit_rows < 1:
            raise ValueError(f"unit_rows must be at least 1, got {self.unit_rows}")


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A plan without its splits. ``gpu_seqs`` of the ``num_seqs`` sequences keep their KV on the GPU; ``staging_seqs`` fit one staging slot."""

    policy: Policy
    num_seqs: int
    gpu_seqs: int
    pass_tokens: int
    micro_batches: Mapping[Phase, int]
    uses_gpu: bool = True
    uses_cpu: bool = False
    streams: bool = True
    ring_depth: int = MIN_RING_DEPTH
    packet_bytes: int = 1 << 20
    staging_seqs: int = 0
    host_attention: Attention = "cpu"
    host_prefill_attention: Attention = "cpu"
    host_kv_layers: tuple[int, ...] = ()
    kv_on_disk: bool = False  # of the sequences whose KV is not on the GPU
    share_of_rest: bool = False  # CPU shares are fractions of the rows that are not resident, instead of all rows


# -- sizes ---------------------------------------------------------------------------------------------------------------------------------


def ring_rule(gpu_bytes: int) -> tuple[int, int]:
    """(packet bytes, packets in the ring): a ring of a 32nd of GPU memory, so that the link works on while the GPU waits for the CPU, in packets of tens
    of MB where that allows, because a link reaches its rate from 10 MB up. Under 8 MiB packets keep to `MIN_PACKET_BYTES` as long as the
    ring takes no more than a 16th.
    """
    ring_bytes = gpu_bytes // RING_SHARE
    least_bytes = max(1024, min(MIN_PACKET_BYTES, gpu_bytes // (16 * MIN_RING_DEPTH) & -1024))
    packet_bytes = max(least_bytes, min(MAX_PACKET_BYTES, ring_bytes // MIN_RING_DEPTH & -4096))
    return packet_bytes, max(MIN_RING_DEPTH, ring_bytes // packet_bytes)


def tight_ring(spec: ModelSpec, unit_rows: int) -> tuple[int, int]:
    """(packet bytes, packets in the ring) of the smallest ring: packets of one unit, the least that can move."""
    return smallest_ring(spec.one_layer_per_class, unit_rows, 1, 1), TIGHT_RING_DEPTH


def max_model_len(spec: ModelSpec, workload: Workload, options: PlanOptions) -> int:
    """Tokens that one sequence may reach. Raises LimitError when the model's own limit, or the asked-for one, is shorter than the workload needs."""
    allowed = options.max_model_len or min(spec.max_model_len, workload.seq_len)
    if allowed > spec.max_model_len:
        raise LimitError(f"max_model_len {allowed} exceeds the {spec.max_model_len} tokens that {spec.name} was made for; lower max_model_len")
    if workload.seq_len > allowed:
        need = f"{workload.input_len} + {workload.output_len} = {workload.seq_len} tokens"
        raise LimitError(f"a request of {need} exceeds max_model_len {allowed} of {spec.name}; lower the input or output length")
    return allowed


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def buckets_of(max_num_seqs: int, pass_tokens: int) -> Iterator[tuple[Phase, int]]:
    """Decode buckets at powers of two up to all sequences; prefill buckets at the chunk and its quarters, so that a short last chunk has its own splits."""
    size = 1
    while size < max_num_seqs:
        yield "decode", size
        size *= 2
    yield "decode", max_num_seqs
    yield from (("prefill", tokens) for tokens in sorted({pass_tokens, *(pass_tokens // part for part in (4, 16) if pass_tokens // part >= 16)}))


def chunk_choices(spec: ModelSpec, workload: Workload, num_seqs: int, device_bytes: int, *, disk: bool = False) -> list[int]:
    """Prefill chunks to try, the preferred one first: the largest whose activations take at most an eighth of the device (where a ``disk`` is used a quarter),
    then smaller ones.

    Never more than all prompts together (rounded up to a chunk size).
    """
    sizes, share = ((*DISK_CHUNK_TOKENS, *CHUNK_TOKENS), DISK_CHUNK_SHARE) if disk else (CHUNK_TOKENS, CHUNK_SHARE)
    useful = [size for size in sizes if size < 2 * num_seqs * workload.input_len] or [CHUNK_TOKENS[-1]]
    per_token = 4 * (4 * spec.hidden_size + 2 * (spec.q_size + spec.kv_size) + spec.intermediate_size)
    return [size for size in useful if size * per_token * share <= device_bytes] or [useful[-1]]


# -- splits --------------------------------------------------------------------------------------------------------------------------------


def unit_edge(op: OpSpec, rows: float) -> int:
    """The unit boundary in [0, op.rows] that is nearest to ``rows``; the end counts as one even when the last unit is a tail."""
    below = min(op.rows, int(rows // op.unit_rows) * op.unit_rows)
    above = min(op.rows, below + op.unit_rows)
    return max(0, below if rows - below <= above - rows else above)


def split_of(op: OpSpec, resident: int, cpu_frac: float, *, streams: bool, uses_cpu: bool) -> Split:
    """Resident rows are the GPU's; of all rows the CPU takes ``cpu_frac``, if so many are not resident; the rest is streamed (or the CPU's, if nothing is)."""
    if not uses_cpu:
        return Split(resident=resident, streamed=op.rows - resident, cpu=0)
    edge = max(resident, unit_edge(op, op.rows * (1.0 - cpu_frac))) if streams else resident
    return Split(resident=resident, streamed=edge - resident, cpu=op.rows - edge)


def _of_all(op: OpSpec, resident: int, cpu_frac: float, draft: Draft) -> float:
    return cpu_frac * (op.rows - resident) / op.rows if draft.share_of_rest else cpu_frac


def make_plan(spec: ModelSpec, workload: Workload, options: PlanOptions, draft: Draft, residency: Residency, cpu_share: CpuShare) -> Plan:
    """The complete plan. Layers with the same resident rows share one mapping of splits."""
    ops = layer_template(spec, options.unit_rows)
    order = [id(layer) for layer in residency]
    distinct = {id(layer): layer for layer in residency}
    made: dict[tuple[tuple[str, float], ...], tuple[Mapping[str, Split], ...]] = {}  # by the CPU's shares: most buckets of a phase have the same
    buckets = []
    for phase, tokens in buckets_of(draft.num_seqs, draft.pass_tokens) if draft.num_seqs else ():
        share = cpu_share(phase, tokens)
        key = tuple(share.items())
        if key not in made:
            splits = {number: _layer_splits(ops, layer, share, draft) for number, layer in distinct.items()}
            made[key] = tuple(map(splits.__getitem__, order))
        buckets.append(
            BucketPlan(
                phase=phase, max_tokens=tokens, micro_batches=max(1, min(draft.micro_batches[phase], draft.num_seqs, tokens)),
                splits=made[key],
                host_attention=draft.host_attention, host_prefill_attention=draft.host_prefill_attention,
            )
        )  # fmt: skip
    return _with_sizes(spec, workload, options, draft, tuple(buckets))


def _layer_splits(ops: Mapping[str, OpSpec], layer: Mapping[str, int], share: Mapping[str, float], draft: Draft) -> dict[str, Split]:
    return {
        name: split_of(ops[name], rows, _of_all(ops[name], rows, share.get(name, 0.0), draft), streams=draft.streams, uses_cpu=draft.uses_cpu)
        for name, rows in layer.items()
    }


def _with_sizes(spec: ModelSpec, workload: Workload, options: PlanOptions, draft: Draft, buckets: tuple[BucketPlan, ...]) -> Plan:
    longest = max_model_len(spec, workload, options)
    per_seq = pages_of(workload.seq_len)
    gpu_pages, host_pages = draft.gpu_seqs * per_seq, (draft.num_seqs - draft.gpu_seqs) * per_seq
    if gpu_pages >= host_pages:  # one sequence of the greatest length must fit somewhere
        gpu_pages = max(gpu_pages, pages_of(longest))
    else:
        host_pages = max(host_pages, pages_of(longest))
    streams = draft.uses_gpu and draft.streams
    return Plan(
        model=spec.name, policy=draft.policy, uses_gpu=draft.uses_gpu, uses_cpu=draft.uses_cpu, unit_rows=options.unit_rows, buckets=buckets,
        ring_bytes=smallest_ring(spec.one_layer_per_class, options.unit_rows, draft.packet_bytes, draft.ring_depth) if streams else 0,
        packet_bytes=draft.packet_bytes, page_size=PAGE_TOKENS, gpu_pages=gpu_pages, host_pages=host_pages,
        kv_dtype=options.kv_dtype or spec.weight_dtype, max_num_seqs=draft.num_seqs, max_pass_tokens=draft.pass_tokens, max_model_len=longest,
        host_kv_layers=draft.host_kv_layers, kv_staging_pages=min(draft.staging_seqs * per_seq, host_pages),
        kv_on_disk=draft.kv_on_disk and host_pages > 0,
    )  # fmt: skip


# -- residency -----------------------------------------------------------------------------------------------------------------------------


def nothing_resident(spec: ModelSpec, ops: Mapping[str, OpSpec]) -> Residency:
    layer = {name: 0 for name in ops if name != "lm_head"}
    return (layer,) * spec.num_layers + ({"lm_head": 0},)


def everything_resident(spec: ModelSpec, ops: Mapping[str, OpSpec]) -> Residency:
    layer = {name: op.rows for name, op in ops.items() if name != "lm_head"}
    return (layer,) * spec.num_layers + ({"lm_head": ops["lm_head"].rows},)


def residency_bytes(ops: Mapping[str, OpSpec], layer: Mapping[str, int]) -> int:
    return sum(align(rows * ops[name].row_bytes) for name, rows in layer.items())


def fill_resident(spec: ModelSpec, templates: Templates, budget_bytes: int, target: Mapping[str, float] | None = None, *, leftover: bool = True) -> Residency:
    """As many resident rows as fit ``budget_bytes``, evenly over the layers: the greatest common fraction of ``target`` (default: of every op) in whole units.

    What the rounding leaves over makes first layers resident, one after another (``leftover``): also a plan of few distinct layers prices fast.
    """
    ops = templates[0]
    wanted = target or dict.fromkeys(ops, 1.0)
    sizes = _even_sizes(spec, templates, wanted)
    low, high = 0.0, 1.0
    if _even_bytes(sizes, 1.0) <= budget_bytes:
        low = 1.0
    for _ in range(24 if low == 0.0 and budget_bytes > 0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _even_bytes(sizes, middle) <= budget_bytes else (low, middle)
    base, head = _even_rows(ops, wanted, low)
    left = budget_bytes - _even_bytes(sizes, low)
    layers: list[Mapping[str, int]] = []
    if leftover:
        head_rows = dict(head)
        while len(layers) < spec.num_layers:
            grown, used = _grow(templates[spec.format_classes[len(layers)]], base, left)
            if not used:
                break
            left -= used
            layers.append(layers[-1] if layers and layers[-1] == grown else grown)
        head, _ = _grow(ops, head_rows, left)
    return (*layers, *((base,) * (spec.num_layers - len(layers))), head)


def _even_rows(ops: Mapping[str, OpSpec], wanted: Mapping[str, float], frac: float) -> tuple[dict[str, int], dict[str, int]]:
    rows = {name: _floor_edge(op, op.rows * min(1.0, frac * wanted.get(name, 0.0))) for name, op in ops.items()}
    return {name: count for name, count in rows.items() if name != "lm_head"}, {"lm_head": rows["lm_head"]}


_Sizes = list[tuple[OpSpec, float, tuple[tuple[int, int], ...]]]  # of every op: (the op, its target, by format (number of layers, bytes of a row))


def _even_sizes(spec: ModelSpec, templates: Templates, wanted: Mapping[str, float]) -> _Sizes:
    counts = Counter(spec.format_classes)
    return [
        (
            op,
            wanted.get(name, 0.0),
            tuple((count, templates[number][name].row_bytes) for number, count in counts.items()) if op.layer >= 0 else ((1, op.row_bytes),),
        )
        for name, op in templates[0].items()
    ]


def _even_bytes(sizes: _Sizes, frac: float) -> int:
    """Bytes of this fraction of all targets."""
    total = 0
    for op, target, formats in sizes:
        rows = _floor_edge(op, op.rows * min(1.0, frac * target))
        for count, row_bytes in formats:
            total += count * align(rows * row_bytes)
    return total


def _floor_edge(op: OpSpec, rows: float) -> int:
    return op.rows if rows >= op.rows else int(max(0.0, rows) // op.unit_rows) * op.unit_rows  # a solver's zero may be a hair below it


def _grow(ops: Mapping[str, OpSpec], layer: Mapping[str, int], budget_bytes: int) -> tuple[dict[str, int], int]:
    """``layer`` with more resident rows, op by op as long as whole units fit; and the bytes that took."""
    grown, used = dict(layer), 0
    for name, rows in layer.items():
        op = ops[name]
        before = align(rows * op.row_bytes)
        more = _floor_edge(op, rows + max(0, budget_bytes - used) // op.row_bytes)
        while more > rows and align(more * op.row_bytes) - before > budget_bytes - used:
            more = (more - 1) // op.unit_rows * op.unit_rows
        grown[name] = max(rows, more)
        used += align(grown[name] * op.row_bytes) - before
    return grown, used


# -- limits --------------------------------------------------------------------------------------------------------------------------------


def fits(spec: ModelSpec, plan: Plan, limits: Limits) -> bool:
    if plan.uses_disk and disk_bytes(spec, plan) + disk_kv_bytes(spec, plan) > limits.disk_bytes:
        return False
    return gpu_memory(spec, plan).total <= limits.gpu_bytes and host_memory(spec, plan).total <= limits.host_bytes


def most_sequences(cap: int, fits_with: Callable[[int], bool]) -> int:
    """The largest count in [0, cap] for which ``fits_with`` holds, by bisection (fewer sequences never need more)."""
    if fits_with(cap):
        return cap
    if cap <= 1 or not fits_with(1):
        return 0
    low, high = 1, cap
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits_with(middle) else (low, middle)
    return low


def taken(spec: ModelSpec, plan: Plan) -> Limits:
    """The least limits that ``plan`` keeps."""
    use = plan_memory(spec, plan)
    return Limits(gpu_bytes=use.gpu.total, host_bytes=use.host.total, disk_bytes=use.disk.total)


def shortage(needs: Needs, limits: Limits, policy: Policy) -> LimitError:
    """The error that names the smallest GPU limit that will do with this host limit; or else the smallest host limit; or both. Where something may lie on
    the disk, and more of it would do alone, how much. ``needs``: what the plans that may be tried under some limits take, whether these limits allow it or
    not."""
    gpu_need = smallest_limit("gpu_bytes", needs, limits)
    host_need = smallest_limit("host_bytes", needs, limits) if gpu_need is None else None
    for tier, flag, need, given in (("GPU", "--gpu-memory", gpu_need, limits.gpu_bytes), ("host", "--host-memory", host_need, limits.host_bytes)):
        if need is not None:
            size, more = size_text(need), _or_disk(needs, limits)
            return LimitError(f"policy {policy} needs at least {size} of {tier} memory, {size_text(given)} allowed; raise {flag} to {size}{more}")
    host_need = smallest_limit("host_bytes", needs, replace(limits, gpu_bytes=HUGE)) or HUGE
    gpu_need = smallest_limit("gpu_bytes", needs, replace(limits, host_bytes=host_need)) or HUGE
    return LimitError(
        f"policy {policy} needs at least {size_text(gpu_need)} of GPU and {size_text(host_need)} of host memory, {size_text(limits.gpu_bytes)} and "
        f"{size_text(limits.host_bytes)} allowed; raise --gpu-memory to {size_text(gpu_need)} and --host-memory to {size_text(host_need)}"
    )


def _or_disk(needs: Needs, limits: Limits) -> str:
    need = smallest_limit("disk_bytes", needs, limits) if limits.disk_bytes else None
    return f", or --disk to {size_text(need)} ({size_text(limits.disk_bytes)} allowed)" if need is not None else ""


def smallest_limit(tier: str, needs: Needs, limits: Limits) -> int | None:
    """The smallest limit of this tier that will do with the others as they are, in steps of `limit_step`, so that the printed figure is exact; None: none does.

    By bisection, but first where plans that were too large point to: they would do with what they take of this tier and, moved here, what they take too much
    of the others; and from a size that does some steps down.
    """
    low, high = getattr(limits, tier) // 1024 * 1024, HUGE
    if not _pointing(tier, needs, limits, high)[0]:
        return None
    guesses, stride, guesses_left = _pointing(tier, needs, limits, low)[1], 1, MOST_GUESSES
    while high - low > limit_step(high):
        middle = min((size for size in guesses if low < size < high), default=0)
        if not middle or not guesses_left:
            middle = (low + high) // 2 if high < 4 * low else math.isqrt(max(low, 1024) * high)
            middle = max(middle // limit_step(middle) * limit_step(middle), low + 1024)
        guesses_left = max(0, guesses_left - 1)
        does, guesses = _pointing(tier, needs, limits, middle)
        if does:
            high, guesses, stride = middle, [middle - stride * limit_step(middle)], 4 * stride
        else:
            low, stride = middle, 1
    return high


def _pointing(tier: str, needs: Needs, limits: Limits, size: int) -> tuple[bool, list[int]]:
    """Whether this size of the tier does, and which larger ones may."""
    tried = replace(limits, **{tier: size})
    found = needs(tried)
    sizes = [getattr(need, tier) + need.beyond(replace(tried, **{tier: HUGE})) for need in found]
    return any(need.beyond(tried) == 0 for need in found), [-(-each // limit_step(each)) * limit_step(each) for each in sizes]


def limit_step(num_bytes: int) -> int:
    """The step in which the planner names limits of this size."""
    return 1 << 20 if num_bytes > 16 << 20 else 1024


def size_text(num_bytes: int) -> str:
    """Exactly this many bytes in the largest unit that needs no fraction, for sizes that the planner names; else with two decimals."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f}{unit}"
    return f"{num_bytes}B"
