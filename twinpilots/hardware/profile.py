"""Rates of one machine, measured or preset, as data.

Owns: `HardwareProfile` and its JSON form, and the interpolation of a measured curve. Presets are in `presets.py`, the measuring in `measure.py`.
Knows nothing of models, plans or how a rate was measured.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any

from twinpilots.errors import ProfileMissingError

PROFILE_SCHEMA = 2
TOKEN_GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A piecewise-linear function through (x, y), x ascending; constant below the first point, on the last slope (at least 0) above the last."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or not self.x or any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
            raise ValueError(f"curve needs ascending x and as many y, got x={self.x} y={self.y}")

    def __call__(self, x: float) -> float:
        if x <= self.x[0] or len(self.x) == 1:
            return self.y[0]
        i = min(bisect_right(self.x, x), len(self.x) - 1)
        slope = (self.y[i] - self.y[i - 1]) / (self.x[i] - self.x[i - 1])
        if x > self.x[-1]:
            return self.y[-1] + max(slope, 0.0) * (x - self.x[-1])
        return self.y[i - 1] + slope * (x - self.x[i - 1])

    def times(self, factors: Curve) -> Curve:
        """Multiplied at the points of both; the factors beyond theirs are those at their ends."""
        points = sorted({*self.x, *factors.x})
        return Curve(x=tuple(points), y=tuple(self(x) * factors(min(x, factors.x[-1])) for x in points))


@dataclass(frozen=True, kw_only=True)
class AttentionRates:
    """Attention of one sequence and layer takes seq_s + max(KV bytes / bytes_per_s, FLOPs / flops_per_s)."""

    bytes_per_s: float
    flops_per_s: float
    seq_s: float

    def __post_init__(self) -> None:
        _check_numbers(self, "bytes_per_s flops_per_s", above=0)
        _check_numbers(self, "seq_s", least=0)

    def faster(self, read: float, compute: float) -> AttentionRates:
        """Reading ``read`` times as fast, everything else ``compute`` times."""
        return AttentionRates(bytes_per_s=self.bytes_per_s * read, flops_per_s=self.flops_per_s * compute, seq_s=self.seq_s / compute)


@dataclass(frozen=True, kw_only=True)
class ComputeProfile:
    """One processor. ``linear["fp16/out"]`` maps tokens to seconds per weight element (weights out of cache) for ops split along the output,
    ``"fp16/in"`` along the input; ``"q4_1/fast/out"`` where the CPU pilot rounds activations to 8 bits (`OpSpec.rate_key`).

    The ``attention_`` fields are `AttentionRates` over KV of the weights' type; ``kv_attention["int8"]`` over another one, where that was measured (else it
    has the same rates). ``task_s`` is the fixed cost of one task. ``read_bytes_per_s`` and ``flops_per_s`` are the peaks of independent micro-benchmarks: only
    the hardware bound uses them.
    """

    name: str
    linear: Mapping[str, Curve]
    attention_bytes_per_s: float
    attention_flops_per_s: float
    elementwise_bytes_per_s: float
    task_s: float
    read_bytes_per_s: float
    flops_per_s: float
    copy_slowdown: float = 1.0  # factor on this processor's times while the link runs at full rate
    copy_slowdown_computing: float | None = None  # the same where it computes from its caches: no memory to share (None: not known to differ)
    attention_seq_s: float = 0.0  # fixed cost of one sequence in attention: what counts when contexts are short
    kv_attention: Mapping[str, AttentionRates] = field(default_factory=dict)
    peer_slowdown: float = 1.0  # factor on its memory-bound times while the other processor reads the same memory (1 where memories are apart)

    def __post_init__(self) -> None:
        _check_numbers(self, "attention_bytes_per_s attention_flops_per_s elementwise_bytes_per_s read_bytes_per_s flops_per_s", above=0)
        _check_numbers(self, "task_s attention_seq_s", least=0)
        _check_numbers(self, "copy_slowdown peer_slowdown" + (" copy_slowdown_computing" if self.copy_slowdown_computing is not None else ""), least=1)

    @property
    def least_copy_slowdown(self) -> float:
        """Of all work."""
        return self.copy_slowdown if self.copy_slowdown_computing is None else min(self.copy_slowdown, self.copy_slowdown_computing)

    def curve(self, rate_key: str) -> Curve:
        """The curve of one kind of linear. ProfileMissingError for one that was not measured."""
        found = self.linear.get(rate_key)
        if found is None:
            raise ProfileMissingError(
                f"the profile of {self.name} has no times of linears of the kind {rate_key}, only {', '.join(sorted(self.linear))}: measure this model with "
                "`twinpilots profile MODEL`, with the same --quantization"
            )
        return found

    def linear_s(self, rate_key: str, elements: float, tokens: float) -> float:
        """Seconds of a linear of ``elements`` weights at ``tokens`` tokens, without the fixed cost."""
        return elements * self.curve(rate_key)(tokens)

    def attention_s(self, kv_bytes: float, flops: float, num_seqs: float = 1, *, kv_dtype: str = "") -> float:
        """Seconds of attention of ``num_seqs`` sequences that together read ``kv_bytes`` and compute ``flops``, without the task's fixed cost."""
        rates = self.kv_attention.get(kv_dtype)
        if rates is not None:
            return num_seqs * rates.seq_s + max(kv_bytes / rates.bytes_per_s, flops / rates.flops_per_s)
        return num_seqs * self.attention_seq_s + max(kv_bytes / self.attention_bytes_per_s, flops / self.attention_flops_per_s)

    def with_attention(self, read: float, compute: float) -> ComputeProfile:
        """With attention over KV of every type `AttentionRates.faster`."""
        own = AttentionRates(bytes_per_s=self.attention_bytes_per_s, flops_per_s=self.attention_flops_per_s, seq_s=self.attention_seq_s).faster(read, compute)
        return replace(
            self, attention_bytes_per_s=own.bytes_per_s, attention_flops_per_s=own.flops_per_s, attention_seq_s=own.seq_s,
            kv_attention={name: rates.faster(read, compute) for name, rates in self.kv_attention.items()},
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LinkProfile:
    """The link between host and GPU memory: big copies both ways, and the small activation copies of the compute queue."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    packet_s: float  # fixed cost of one weight packet
    copy_s: float  # fixed cost of one activation copy
    handoff_s: float  # from a record on one device to the waiting task's start on the other
    queue_handoff_s: float = 0.0  # the same between the GPU's compute queue and its link queues
    load_kv_s: float = 0.0  # what bringing one layer's host KV takes beyond a packet of that size, beside a GPU that computes
    store_kv_s: float = 0.0  # and taking its new KV back
    kv_copy_token_s: float = 0.0  # both, for every token that the GPU's linears have: an emulated one's copy waits for one of them, whose core it shares
    peer_slowdown: float = 1.0  # factor on the link queues' times while the CPU reads its weights all the time

    def __post_init__(self) -> None:
        _check_numbers(self, "up_bytes_per_s down_bytes_per_s", above=0)
        _check_numbers(self, "packet_s copy_s handoff_s queue_handoff_s load_kv_s store_kv_s kv_copy_token_s", least=0)
        _check_numbers(self, "peer_slowdown", least=1)


@dataclass(frozen=True, kw_only=True)
class AloneProfile:
    """What is different where the CPU computes alone. The driver takes ``call_s`` around every call that runs passes (scheduling, metadata, accounting),
    ``pass_s`` for every pass in it (the next tokens), and something for each sequence. ``linear`` maps tokens to a factor on the CPU's seconds of one kind of
    linear: it has whole ops, and what they need in its caches, where a GPU beside it would leave it slices and keep it waiting."""

    call_s: float
    call_seq_s: float
    pass_s: float
    pass_seq_s: float
    linear: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_numbers(self, "call_s call_seq_s pass_s pass_seq_s", least=0)

    def step_s(self, num_seqs: float, passes: int) -> float:
        """For one of so many passes in a call."""
        return self.pass_s + num_seqs * self.pass_seq_s + (self.call_s + num_seqs * self.call_seq_s) / passes


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Everything that the planner knows about a machine. ``gpu`` and ``link`` are None on a machine without one."""

    name: str
    source: str  # where the figures come from: a measurement with its date, or published sheets
    cpu: ComputeProfile
    gpu: ComputeProfile | None
    link: LinkProfile | None
    host_memory_bytes: int
    gpu_memory_bytes: int  # what one arena may take
    dram_bytes_per_s: float
    cpu_cores: int
    disk_bytes_per_s: float | None = None  # of big reads; None: no disk to plan with
    disk_write_bytes_per_s: float | None = None  # None: as fast as it reads
    disk_read_s: float = 0.0  # fixed cost of one read or write
    gpu_overhead_bytes: int = 0  # what the process takes on the card beside the arena: context, libraries
    emulated: bool = False
    step_overhead_s: float = 0.0  # from a pass's last work to the next one's first: scheduling, metadata, sampling, accounting, waking the queues up
    step_seq_s: float = 0.0  # and what each sequence of a pass adds to it
    alone: AloneProfile | None = None  # None: not known to differ
    notes: Mapping[str, str] = field(default_factory=dict)
    schema: int = PROFILE_SCHEMA

    def __post_init__(self) -> None:
        _check_numbers(self, "host_memory_bytes dram_bytes_per_s cpu_cores", above=0)
        _check_numbers(self, "gpu_memory_bytes step_overhead_s step_seq_s disk_read_s", least=0)
        _check_numbers(self, " ".join(name for name in ("disk_bytes_per_s", "disk_write_bytes_per_s") if getattr(self, name) is not None), above=0)
        if (self.gpu is None) != (self.link is None):
            raise ValueError("HardwareProfile: gpu and link come together; give both or neither")

    def step_s(self, num_seqs: float) -> float:
        """What the driver takes between two passes of so many sequences."""
        return self.step_overhead_s + num_seqs * self.step_seq_s

    @cached_property
    def cpu_alone(self) -> HardwareProfile:
        """This machine without its GPU, at the rates that the CPU then has."""
        cpu, alone = self.cpu, self.alone
        if alone is not None and alone.linear:
            cpu = replace(cpu, linear={key: curve.times(alone.linear[key]) if key in alone.linear else curve for key, curve in cpu.linear.items()})
            alone = replace(alone, linear={})
        return replace(self, cpu=cpu, alone=alone, gpu=None, link=None)

    def with_curves_of(self, earlier: HardwareProfile) -> HardwareProfile:
        """This profile, with the earlier one's curves of kinds of linears that it lacks."""
        cpu = replace(self.cpu, linear={**earlier.cpu.linear, **self.cpu.linear})
        if self.gpu is None or earlier.gpu is None:
            return replace(self, cpu=cpu)
        return replace(self, cpu=cpu, gpu=replace(self.gpu, linear={**earlier.gpu.linear, **self.gpu.linear}))

    def missing(self, rate_keys: Iterable[str]) -> tuple[str, ...]:
        """Those kinds of linears (`OpSpec.rate_key`) that were not measured on every processor."""
        processors = [processor for processor in (self.cpu, self.gpu) if processor is not None]
        return tuple(key for key in rate_keys if any(key not in processor.linear for processor in processors))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> HardwareProfile:
        """Parse `to_json`'s output. Raises ValueError that names what is wrong."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.get("schema") != PROFILE_SCHEMA:
                raise ValueError(f"profile schema is {data.get('schema')!r}, this version reads {PROFILE_SCHEMA}")
            for processor in ("cpu", "gpu"):
                if data[processor] is not None:
                    curves = {key: Curve(x=tuple(c["x"]), y=tuple(c["y"])) for key, c in data[processor]["linear"].items()}
                    rates = {key: AttentionRates(**each) for key, each in data[processor].get("kv_attention", {}).items()}
                    data[processor] = ComputeProfile(**{**data[processor], "linear": curves, "kv_attention": rates})
            if data.get("alone") is not None:
                factors = {key: Curve(x=tuple(c["x"]), y=tuple(c["y"])) for key, c in data["alone"]["linear"].items()}
                data["alone"] = AloneProfile(**{**data["alone"], "linear": factors})
            if data["link"] is not None:
                data["link"] = LinkProfile(**data["link"])
            return HardwareProfile(**data)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a hardware profile: {error!r}") from error


def _check_numbers(profile: object, names: str, *, above: float | None = None, least: float = 0.0) -> None:
    """ValueError unless every named field is a finite number above ``above``, or at least ``least``."""
    for name in names.split():
        value = getattr(profile, name)
        if not isinstance(value, (int, float)) or not least <= value < inf or (above is not None and value <= above):
            limit = f"above {above}" if above is not None else f"at least {least}"
            raise ValueError(f"{type(profile).__name__}.{name} must be a finite number {limit}, got {value!r}")


def roofline_curve(bytes_per_element: float, read_bytes_per_s: float, flops_per_s: float, tokens: Sequence[float] = TOKEN_GRID) -> Curve:
    """Seconds per weight element when a linear runs at the roofline: max(read, compute) at each token count."""
    return Curve(x=tuple(tokens), y=tuple(max(bytes_per_element / read_bytes_per_s, 2.0 * t / flops_per_s) for t in tokens))
