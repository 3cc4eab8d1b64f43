"""The named policies: each chooses a plan by its own published rule, all within one plan space and one set of memory limits.

Owns one placement or search per policy. Every policy takes as many sequences at once as fit (the rest wait: waves), sizes chunk and ring by the rules of
`draft.py`, and has either a Plan that keeps both limits or a refusal that names the smallest limit that would do. Knows nothing of simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from twinpilots.errors import DeviceUnavailableError, UserError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import disk_rate
from twinpilots.plan.draft import Draft, PlanOptions, everything_resident, most_sequences, nothing_resident, shortage
from twinpilots.plan.makespan import balance
from twinpilots.plan.memory import disk_bytes, gpu_memory, streamed_bytes
from twinpilots.plan.plan import Phase, Plan, Policy
from twinpilots.plan.pricing import prompts_at_once
from twinpilots.plan.problem import (
    Place,
    Problem,
    attention_times,
    best_fit,
    cpu_linear_s,
    fill,
    gpu_linear_s,
    load_s,
    no_cpu,
    one_needs,
    sized,
)
from twinpilots.plan.workload import Limits, Workload

Find = Callable[[Problem], Plan | None]
FLEXGEN_KV_ON_GPU = (1.0, 0.5, 0.0)
FLEXGEN_BATCHES = (1, 2, 4)
FLEXGEN_DISK_BATCHES = (2, 8)  # where KV lies on the disk: its block for OPT-175B has 8
READS_DISK: tuple[Policy, ...] = ("flexgen", "stream", "cpu")


ONE_BATCH: Mapping[Phase, int] = {"prefill": 1, "decode": 1}
RULES: dict[Policy, tuple[tuple[Draft, Place], ...]] = {}  # each policy's base draft and placement; several: the policy takes the better
FINDERS: dict[Policy, Find] = {}  # each policy's way to its plan; None where there is none within the limits


def _rule(
    policy: Policy, *, gpu_seqs: int = 1, uses_gpu: bool = True, uses_cpu: bool = False, streams: bool = True, share_of_rest: bool = False
) -> Callable[[Place], Place]:
    """Registers a placement (problem, draft, number of sequences) -> plan as the policy's."""
    base = Draft(
        policy=policy, num_seqs=1, gpu_seqs=gpu_seqs, pass_tokens=1, micro_batches=ONE_BATCH, uses_gpu=uses_gpu, uses_cpu=uses_cpu, streams=streams,
        share_of_rest=share_of_rest,
    )  # fmt: skip

    def register(place: Place) -> Place:
        RULES[policy], FINDERS[policy] = ((base, place),), lambda problem: best_fit(problem, base, place)
        return place

    return register


@_rule("cpu", gpu_seqs=0, uses_gpu=False, uses_cpu=True, streams=False)
def build_cpu(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """Everything on the CPU; the GPU runs nothing at all. The chunk takes at most a sixteenth of host memory for activations."""
    return problem.plan(sized(draft, count, 0), nothing_resident(problem.spec, problem.ops), no_cpu)


@_rule("resident", streams=False)
def build_resident(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """Everything in GPU memory, nothing streamed, nothing on the CPU: what any engine does with a model that fits. Refuses one that does not."""
    return problem.plan(sized(draft, count, count), everything_resident(problem.spec, problem.ops), no_cpu)


@_rule("stream")
def build_stream(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """The GPU computes everything; what does not fit is streamed each pass (vLLM's prefetch offloading, ZeRO-Inference section 4: full offload plus pinning of
    what fits). KV lies on the GPU: as many sequences at once as fit; then the greatest resident percentage that fits beside ring, KV and activations.
    """
    draft = sized(draft, count, count)
    return problem.plan(draft, fill(problem, draft), no_cpu)


@_rule("layer-split", uses_cpu=True, streams=False)
def build_layer_split(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """llama.cpp's ``--n-gpu-layers``: whole layers in GPU memory, the others wholly on the CPU, KV with its layer; the devices take turns.

    As many as fit, counted from the end, lm_head first (llama.cpp's ``load_tensors``: ``i_gpu_start = n_layer + 1 - n_gpu_layers``;
    the output is layer n_layer). Where lm_head alone does not fit, it stays on the CPU and the layers go first.
    """
    draft = sized(draft, count, count)

    def fit(layers: int, *, head: bool) -> bool:
        return gpu_memory(problem.spec, _layers_on_gpu(problem, draft, layers, head=head)).total <= problem.limits.gpu_bytes

    head = fit(0, head=True)
    layers = most_sequences(problem.spec.num_layers, lambda count: fit(count, head=head))
    return _layers_on_gpu(problem, draft, layers, head=head) if head or layers else None


def _layers_on_gpu(problem: Problem, draft: Draft, layers: int, *, head: bool) -> Plan:
    """The last layers on the GPU, and lm_head if it fits."""
    spec, ops = problem.spec, problem.ops
    nothing, everything = nothing_resident(spec, ops), everything_resident(spec, ops)
    on_cpu = spec.num_layers - layers
    draft = replace(draft, host_kv_layers=tuple(range(on_cpu)), uses_cpu=on_cpu > 0 or not head)
    return problem.plan(draft, (*nothing[:on_cpu], *everything[on_cpu:-1], (everything if head else nothing)[-1]), no_cpu)


@_rule("hetegen", uses_cpu=True, share_of_rest=True)
def build_hetegen(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """HeteGen (MLSys 2024, section 4): one ratio for every linear. The CPU computes the share alpha of what is not resident, the GPU streams and computes the
    rest, so that both take equally long: alpha = t_gpu / (t_cpu + t_gpu), where t_gpu is the slower of copying and computing (they overlap).

    Resident first is what fits; KV lies on the GPU, as in ``stream``. alpha is taken per bucket, because t_cpu grows with the tokens.
    """
    draft = sized(draft, count, count)

    def share(_phase: Phase, tokens: int) -> Mapping[str, float]:
        return dict.fromkeys(problem.ops, hetegen_alpha(problem, tokens))

    return problem.plan(draft, fill(problem, draft), share)


def hetegen_alpha(problem: Problem, tokens: int) -> float:
    """The CPU's share of one layer's streamed weights that makes CPU time and the slower of copy and GPU time equal."""
    layer = [op for op in problem.ops.values() if op.layer >= 0]
    cpu_s = sum(cpu_linear_s(problem, op, tokens) for op in layer)
    gpu_s = max(sum(load_s(problem, op) for op in layer), sum(gpu_linear_s(problem, op, tokens) for op in layer))
    return gpu_s / (cpu_s + gpu_s)


@_rule("twinpilots", gpu_seqs=0, uses_cpu=True)
def build_twinpilots(problem: Problem, draft: Draft, count: int) -> Plan | None:
    """TwinPilots (SYSTOR 2024): each whole op on one device, every layer alike, weights and KV in host memory; `balance` minimises the makespan of
    q, k, v, attention, o, mlp1, mlp2, where the GPU's time includes loading weights or KV. lm_head, not among the seven, runs where it takes less time.

    Only when everything fits in GPU memory do weights stay there, and the plan is ``resident``'s: streaming a model that fits helps no one.
    """
    whole = replace(sized(draft, count, count), streams=False, uses_cpu=False)
    plan = problem.plan(whole, everything_resident(problem.spec, problem.ops), no_cpu)
    return plan if problem.fits(plan) else _whole_ops(problem, sized(draft, count, 0))


def _whole_ops(problem: Problem, draft: Draft) -> Plan:
    """`balance`'s plan for these sequences. Attention keeps to the CPU where a layer's KV does not fit GPU memory twice (two staging slots)."""
    workload = problem.workload
    residency = nothing_resident(problem.spec, problem.ops)
    decode = balanced_ops(problem, draft.num_seqs, draft.num_seqs, workload.input_len + workload.output_len / 2, gpu_attention=True)
    prefill = balanced_ops(problem, draft.pass_tokens, *_prompt_shape(workload, draft.pass_tokens), gpu_attention=True)
    wanted: list[tuple[bool, bool]] = [(decode["attention"] == 0, prefill["attention"] == 0), (False, False)]
    for on_gpu, prefill_on_gpu in wanted:
        placed = replace(
            draft, staging_seqs=draft.num_seqs if on_gpu or prefill_on_gpu else 0,
            host_attention="gpu" if on_gpu else "cpu", host_prefill_attention="gpu" if prefill_on_gpu else "cpu",
        )  # fmt: skip

        def share(phase: Phase, tokens: int, placed: Draft = placed) -> Mapping[str, float]:
            return _whole_op_share(problem, placed, phase, tokens)

        plan = problem.plan(placed, residency, share)
        if problem.fits(plan):
            break
    return plan


def _prompt_shape(workload: Workload, tokens: int) -> tuple[int, float]:
    """(sequences, mean context) of a prefill pass of ``tokens`` tokens."""
    return max(1, round(tokens / workload.input_len)), workload.input_len / 2


def _whole_op_share(problem: Problem, draft: Draft, phase: Phase, tokens: int) -> Mapping[str, float]:
    workload = problem.workload
    if phase == "decode":
        seqs, context, attention = tokens, workload.input_len + workload.output_len / 2, draft.host_attention
    else:
        (seqs, context), attention = _prompt_shape(workload, tokens), draft.host_prefill_attention
    placed = balanced_ops(problem, tokens, seqs, context, gpu_attention=attention == "gpu", cpu_attention=attention == "cpu")
    head = problem.ops["lm_head"]
    on_gpu_s = load_s(problem, head) + gpu_linear_s(problem, head, seqs)
    return {**{name: float(device) for name, device in placed.items()}, "lm_head": float(cpu_linear_s(problem, head, seqs) < on_gpu_s)}


def balanced_ops(
    problem: Problem, tokens: float, seqs: int, context: float, *, gpu_attention: bool = True, cpu_attention: bool = True
) -> dict[str, int]:  # fmt: skip
    """The paper's plan of one layer: device (0 GPU, 1 CPU) by op, "attention" included. With one of the flags off, attention's place is given."""
    ops = [op for op in problem.ops.values() if op.layer >= 0]
    cpu_s = [cpu_linear_s(problem, op, tokens) for op in ops]
    gpu_s = [load_s(problem, op) + gpu_linear_s(problem, op, tokens) for op in ops]
    on_cpu, on_gpu = attention_times(problem, tokens, seqs, context)
    never = 10.0 * (sum(cpu_s) + sum(gpu_s) + on_cpu + on_gpu)  # dearer than any whole layer
    cpu_s.append(on_cpu if cpu_attention else never)
    gpu_s.append(on_gpu if gpu_attention else never)
    device = _balanced(tuple(cpu_s), tuple(gpu_s))
    return {**{op.name: device[i] for i, op in enumerate(ops)}, "attention": device[-1]}


@lru_cache(maxsize=256)
def _balanced(cpu_s: tuple[float, ...], gpu_s: tuple[float, ...]) -> tuple[int, ...]:
    """The same few lists again and again: every size of memory that is tried asks for the plans of the same buckets."""
    return balance(cpu_s, gpu_s).device


def _flexgen_block(kv_on_gpu: float, batches: int, *, kv_on_disk: bool = False) -> tuple[Draft, Place]:
    """KV on the disk comes to the GPU, which attends it."""
    micro_batches: Mapping[Phase, int] = {"prefill": batches, "decode": batches}
    base = Draft(
        policy="flexgen", num_seqs=1, gpu_seqs=0, pass_tokens=1, micro_batches=micro_batches, uses_cpu=True, kv_on_disk=kv_on_disk,
        host_attention="gpu" if kv_on_disk else "cpu",
    )  # fmt: skip

    def place(problem: Problem, draft: Draft, count: int) -> Plan | None:
        draft = sized(draft, count, round(count * kv_on_gpu))
        if draft.gpu_seqs < count:  # prompts of host KV are attended on the GPU, which keeps one layer's KV of a pass at a time
            staged = max(prompts_at_once(problem.workload, count, draft.pass_tokens), -(-count // batches) if kv_on_disk else 0)
            draft = replace(draft, host_prefill_attention="gpu", staging_seqs=min(count, staged))
        return problem.plan(draft, fill(problem, draft), no_cpu)

    return base, place


def find_flexgen(problem: Problem) -> Plan | None:
    """FlexGen (ICML 2023, section 4): percentages of weights and KV on GPU and CPU, CPU attention for host KV, and a zig-zag block of micro-batches.

    Its program picks the percentages for each block shape by T = max(link, GPU, CPU); as many of its variables are fixed here (activations stay, the disk
    takes what nothing else holds), a grid over KV percentage and micro-batches with the rest of GPU memory given to weights is that program's whole search.
    Delegating attention to the CPU is for decoding (section 4.2); prompts are attended on the GPU, and their KV is then stored where it belongs.
    """
    found = [best_fit(problem, *_flexgen_block(kv, batches)) for kv in FLEXGEN_KV_ON_GPU for batches in FLEXGEN_BATCHES]
    if problem.limits.disk_bytes:
        found += [best_fit(problem, *_flexgen_block(0.0, batches, kv_on_disk=True)) for batches in FLEXGEN_DISK_BATCHES]
    return max((plan for plan in found if plan is not None), key=lambda plan: _flexgen_rate(problem, plan), default=None)


RULES["flexgen"] = (*(_flexgen_block(kv, 1) for kv in (0.0, 1.0)), _flexgen_block(0.0, 1, kv_on_disk=True))
FINDERS["flexgen"] = find_flexgen


def needs_of(problem: Problem, policy: Policy) -> list[Limits]:
    """What the policy's plans for one sequence take, whether that is within the limits or not."""
    problem = problem if policy in READS_DISK else problem.without_disk
    rules = [(base, place) for base, place in RULES[policy] if problem.limits.disk_bytes or not base.kv_on_disk]
    return [need for base, place in rules for need in one_needs(problem, base, place)]


def _flexgen_rate(problem: Problem, plan: Plan) -> float:
    """Tokens/s of a decode step by FlexGen's cost model: the slowest of the disk, weights over the link, GPU, and CPU attention; one micro-batch does not
    overlap."""
    spec, workload = problem.spec, problem.workload
    seqs, context = plan.max_num_seqs, workload.input_len + workload.output_len / 2
    on_host = plan.host_pages / max(1, plan.host_pages + plan.gpu_pages)
    streamed = streamed_bytes(spec, plan, plan.buckets[0], problem.templates)
    assert problem.profile.link is not None
    link_s = streamed / problem.profile.link.up_bytes_per_s
    batches = plan.bucket_for("decode", seqs).micro_batches
    gpu_s = sum(gpu_linear_s(problem, op, seqs / batches) * (spec.num_layers if op.layer >= 0 else 1) for op in problem.ops.values()) * batches
    cpu_s = attention_times(problem, seqs, seqs, context)[0] * spec.num_layers * on_host
    kv_read = seqs * context * spec.kv_bytes_per_token(plan.kv_dtype) if plan.kv_on_disk else 0.0
    if plan.kv_on_disk:
        link_s, cpu_s = link_s + kv_read / problem.profile.link.up_bytes_per_s, 0.0
    disk_s = (disk_bytes(spec, plan) + kv_read) / disk_rate(problem.profile) if plan.uses_disk else 0.0
    return seqs / max(disk_s, max(link_s, gpu_s, cpu_s) if batches > 1 else max(link_s, gpu_s + cpu_s))


def find_policy(problem: Problem, policy: Policy) -> Plan | None:
    """The plan of one named policy (``auto`` is the solver's), or None where it has none: `refusal` says why.

    Rows go to the disk only where nothing else lets it run, and where the policy's paper or engine has a disk: FlexGen (section 4.1: percentages of weights on
    GPU, CPU and disk), ``stream`` (ZeRO-Inference section 4: NVMe), ``cpu`` (what an engine that maps its file into memory does, at best).
    """
    if not has_devices(problem, policy):
        return None
    found = FINDERS[policy](problem.without_disk)
    return FINDERS[policy](problem) if found is None and problem.limits.disk_bytes and policy in READS_DISK else found


def refusal(problem: Problem, policy: Policy) -> UserError:
    """Why the policy has no plan: no GPU, or the smallest limit that would do."""
    if not has_devices(problem, policy):
        return DeviceUnavailableError(f"policy {policy} needs a GPU, {problem.profile.name} has none; use policy cpu")
    return shortage(lambda limits: needs_of(problem.within(limits), policy), problem.limits, policy)


def has_devices(problem: Problem, policy: Policy) -> bool:
    return (problem.profile.gpu is not None and problem.profile.link is not None) or not RULES[policy][0][0].uses_gpu


def build_policy(
    policy: Policy, spec: ModelSpec, profile: HardwareProfile, workload: Workload, limits: Limits, options: PlanOptions | None = None
) -> Plan:  # fmt: skip
    """The plan of one named policy. Raises LimitError with the smallest limit that would do, or DeviceUnavailableError."""
    problem = Problem.of(spec, profile, workload, limits, options or PlanOptions())
    plan = find_policy(problem, policy)
    if plan is None:
        raise refusal(problem, policy)
    return plan
