"""From a problem to the numbers of the linear program: op times, attention times, traffic and hand-offs of the passes of a workload.

Owns `Choice` (a point of the solver's grid), the mean passes of a workload and `planned_phases` (their terms at profiled times, hand-offs estimated).
Knows nothing of how the program is solved; bounds have their own, `bounds.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from twinpilots.hardware.profile import ComputeProfile, HardwareProfile, LinkProfile
from twinpilots.model.spec import OpSpec
from twinpilots.plan.cost import ACTIVATION_BYTES, attention_kv_bytes, attention_s, linear_s, rope_append_bytes, staged_kv_bytes
from twinpilots.plan.draft import PAGE_TOKENS
from twinpilots.plan.load import NO_GROUP, GroupLoad, PassLoad, SeqClass
from twinpilots.plan.pricing import CONTEXTS, PrefillShape, prefill_shape
from twinpilots.plan.problem import Problem
from twinpilots.plan.program import PhaseTerms

LinearTime = Callable[[OpSpec, float], float]  # (op, tokens) -> seconds of one layer's whole op


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point of the solver's grid. ``kv``: where attention over host KV may run in decode and prefill; "none" keeps all KV on the GPU."""

    num_seqs: int
    chunk: int
    micro_batches: int
    decode_kv: str = "none"  # none | cpu | gpu
    prefill_kv: str = "none"


@dataclass(frozen=True, kw_only=True)
class MeanPass:
    """``passes`` alike passes: ``tokens`` tokens of ``sequences``, with ``logit_rows`` rows for the head."""

    passes: float
    tokens: int
    logit_rows: int
    sequences: tuple[SeqClass, ...]  # each stands for an equal part of the passes

    def loads(self) -> tuple[PassLoad, ...]:
        """One load per class, all in one group: what the bounds ask for."""
        return tuple(PassLoad(((GroupLoad((c,)), NO_GROUP, NO_GROUP),), self.logit_rows) for c in self.sequences)


def prefill_pass(problem: Problem, num_seqs: int, chunk: int) -> MeanPass:
    shape: PrefillShape = prefill_shape(problem.workload, num_seqs, chunk)
    tokens = shape.num_seqs * shape.query_tokens
    return MeanPass(passes=shape.count, tokens=tokens, logit_rows=shape.logit_rows, sequences=shape.classes(shape.num_seqs))


def decode_pass(problem: Problem, num_seqs: int, contexts: tuple[float, ...] = CONTEXTS) -> MeanPass:
    workload = problem.workload
    lengths = [workload.input_len + round(workload.output_len * at) for at in contexts]
    sequences = tuple(SeqClass(num_seqs, 1, length + 1) for length in lengths)
    return MeanPass(passes=max(workload.output_len - 1, 1e-9), tokens=num_seqs, logit_rows=num_seqs, sequences=sequences)


# -- profiled times ------------------------------------------------------------------------------------------------------------------------


def planned_phases(problem: Problem, choice: Choice) -> tuple[PhaseTerms, PhaseTerms]:
    """(prefill, decode) of one wave at profiled times, hand-offs estimated; what the simulator prices exactly afterwards."""
    prefill = prefill_pass(problem, choice.num_seqs, choice.chunk)
    batches = min(choice.micro_batches, prefill.sequences[0].num_seqs)
    return (
        planned_terms(problem, prefill, batches, choice.prefill_kv),
        planned_terms(problem, decode_pass(problem, choice.num_seqs), min(choice.micro_batches, choice.num_seqs), choice.decode_kv),
    )


def planned_terms(problem: Problem, each: MeanPass, batches: int, host_kv: str) -> PhaseTerms:
    gpu, link = _gpu(problem.profile), _link(problem.profile)
    cpu_fixed_s, gpu_fixed_s = (_elementwise_s(problem, each.tokens, batches, processor) for processor in (problem.profile.cpu, gpu))
    crossing = _attention_crossing_s(problem, link, each.tokens, batches) if host_kv == "cpu" else 0.0
    return PhaseTerms(
        passes=each.passes,
        cpu_s=_linears(problem, each, _profiled(problem, problem.profile.cpu, batches)),
        gpu_s=_linears(problem, each, _profiled(problem, gpu, batches)),
        **_attention_terms(problem, each, extra_s=batches * problem.spec.num_layers),
        fixed_gpu_s=gpu_fixed_s + crossing,
        handoff_s=_handoffs(problem, link, each, batches, cpu_fixed_s),
        cpu_attention=host_kv == "cpu", streamed_kv=host_kv == "gpu", micro_batches=batches,
    )  # fmt: skip


def _gpu(profile: HardwareProfile) -> ComputeProfile:
    assert profile.gpu is not None, "a program of two devices needs a GPU"
    return profile.gpu


def _link(profile: HardwareProfile) -> LinkProfile:
    assert profile.link is not None, "a program of two devices needs a link"
    return profile.link


def _profiled(problem: Problem, processor: ComputeProfile, batches: int) -> LinearTime:
    def seconds(op: OpSpec, tokens: float) -> float:
        parts = 1 if op.layer < 0 else batches  # the head takes the rows of all micro-batches at once
        return parts * (processor.task_s + problem.mean(op.name, lambda each: linear_s(each, each.rows, tokens / parts, processor)))

    return seconds


def _linears(problem: Problem, each: MeanPass, seconds: LinearTime) -> dict[str, float]:
    """Seconds of every op over all its layers."""
    layers = problem.spec.num_layers
    return {name: seconds(op, each.tokens) * layers if op.layer >= 0 else seconds(op, each.logit_rows) for name, op in problem.ops.items()}


def _attention_terms(problem: Problem, each: MeanPass, extra_s: float) -> dict[str, float]:
    """Attention of all sequences and layers on either device (with ``extra_s`` tasks' fixed cost), KV bytes read, streamed and new: means over the classes."""
    spec, kv_dtype = problem.spec, problem.kv_dtype
    windows = Counter(layer.window for layer in spec.layers)
    found = dict.fromkeys(("attention_cpu_s", "attention_gpu_s", "kv_bytes", "streamed_kv_bytes"), 0.0)
    for c in each.sequences:
        for window, count in windows.items():
            found["kv_bytes"] += count * c.num_seqs * attention_kv_bytes(spec, c, window, kv_dtype)
            found["attention_cpu_s"] += count * attention_s(spec, c, window, kv_dtype, problem.profile.cpu)
            found["attention_gpu_s"] += count * attention_s(spec, c, window, kv_dtype, _gpu(problem.profile))
        found["streamed_kv_bytes"] += spec.num_layers * staged_kv_bytes(spec, c, PAGE_TOKENS, kv_dtype)
    mean = {name: value / len(each.sequences) for name, value in found.items()}
    mean["attention_cpu_s"] += extra_s * problem.profile.cpu.task_s
    mean["attention_gpu_s"] += extra_s * _gpu(problem.profile).task_s
    mean["new_kv_bytes"] = each.tokens * spec.kv_bytes_per_token(kv_dtype)
    return mean


def _elementwise_s(problem: Problem, tokens: int, batches: int, processor: ComputeProfile) -> float:
    """Norms, residual adds and rotary of all layers: five tasks per layer and micro-batch."""
    spec = problem.spec
    per_layer = tokens * spec.hidden_size * ACTIVATION_BYTES * (2 * 2 + 2 * 4) + rope_append_bytes(spec, tokens, problem.kv_dtype)
    return spec.num_layers * (5 * batches * processor.task_s + per_layer / processor.elementwise_bytes_per_s)


def _attention_crossing_s(problem: Problem, link: LinkProfile, tokens: int, batches: int) -> float:
    """q, k, v down to the CPU's attention and its output back, in every layer."""
    spec = problem.spec
    moved = tokens * ACTIVATION_BYTES
    down_s, up_s = moved * (spec.q_size + 2 * spec.kv_size) / link.down_bytes_per_s, moved * spec.q_size / link.up_bytes_per_s
    return spec.num_layers * (batches * (2 * link.copy_s + 2 * link.handoff_s) + down_s + up_s)


def _handoffs(problem: Problem, link: LinkProfile, each: MeanPass, batches: int, cpu_fixed_s: float) -> dict[str, float]:
    """What the CPU's part in a block adds to a pass: partial sums both ways; in attention its q, k, v up and the attention output down; its own norms."""
    spec = problem.spec
    activations = each.tokens * ACTIVATION_BYTES
    partials_s = activations * spec.hidden_size * (1 / link.up_bytes_per_s + 1 / link.down_bytes_per_s)
    mlp_s = batches * (2 * link.copy_s + 2 * link.handoff_s) + partials_s
    attention_s = mlp_s + batches * (4 * link.copy_s + 2 * link.handoff_s) + activations * spec.q_size / link.down_bytes_per_s
    head_s = 2 * link.copy_s + 2 * link.handoff_s + each.logit_rows * ACTIVATION_BYTES * spec.hidden_size / link.down_bytes_per_s
    return {"attention": spec.num_layers * attention_s + cpu_fixed_s / 2, "mlp": spec.num_layers * mlp_s + cpu_fixed_s / 2, "head": head_s}
