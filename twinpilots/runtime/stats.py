"""What `LLM.stats()` returns: sums over all passes since the engine was made, loading excluded.

Owns the accumulation and the shape of the document (docs/cli.md). Knows nothing of how a pass was timed or predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinpilots.plan.tasks import Queue, Schedule

LINK_KINDS = ("link_weights", "link_kv", "link_activations", "disk")
DEVICES = ("cpu", "gpu", "link")


@dataclass(frozen=True, kw_only=True, slots=True)
class BytesMoved:
    link_weights: int = 0
    link_kv: int = 0
    link_activations: int = 0
    disk: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BusySeconds:
    """Time each queue worked, waits excluded."""

    cpu: float = 0.0
    gpu: float = 0.0
    link: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightShares:
    """Bytes of all linears with lm_head by where one pass took them from; only their ratio counts."""

    resident: float
    streamed: float
    cpu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """What one pass did, or several of one program together; ``weights`` are each one's. ``predicted_s`` is None when nothing was predicted: such a pass is
    left out of both rates. ``predicted_busy_s`` goes with it."""

    seconds: float
    predicted_s: float | None
    busy_s: BusySeconds
    bytes: BytesMoved
    weights: WeightShares
    num_prompt_tokens: int
    num_generated: int
    predicted_busy_s: BusySeconds | None = None
    passes: int = 1
    weight_wait_s: float = 0.0  # how long the GPU's linears over streamed weights waited before they began


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueTimes:
    """What one queue did in a pass, task by task in its order. ``times``: int64 [tasks][3] in ns of the monotonic clock: wait began, work began, work
    ended. ``rows``: token or logit rows worked on. ``num_bytes``: moved over the link."""

    times: np.ndarray
    rows: np.ndarray
    num_bytes: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimes:
    """One pass, task by task; `Schedule.queue` gives the tasks in the order of `QueueTimes`."""

    schedule: Schedule
    queues: Mapping[Queue, QueueTimes]


@dataclass(kw_only=True, slots=True)
class PrefixCounts:
    """Tokens that were looked up in the prefix cache, and those that were found there, since the beginning."""

    queried_tokens: int = 0
    hit_tokens: int = 0


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """Sums of `PassReport`s. ``weights`` are the plan's shares, shown until a pass has run."""

    policy: str
    device: str
    emulated: bool
    weights: WeightShares
    plan_changes: int = 0
    prefix: PrefixCounts = field(default_factory=PrefixCounts)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    weight_wait_s: float = 0.0
    _predicted_s: float = 0.0
    _compared_s: float = 0.0  # seconds and tokens of the passes that have a prediction
    _compared_tokens: int = 0
    _bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LINK_KINDS, 0))
    _busy_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DEVICES, 0.0))
    _predicted_busy_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DEVICES, 0.0))
    _weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("resident", "streamed", "cpu"), 0.0))

    def add(self, report: PassReport) -> None:
        self.prompt_tokens += report.num_prompt_tokens
        self.generated_tokens += report.num_generated
        self.seconds += report.seconds
        self.passes += report.passes
        self.weight_wait_s += report.weight_wait_s
        if report.predicted_s is not None:
            self._predicted_s += report.predicted_s
            self._compared_s += report.seconds
            self._compared_tokens += report.num_generated
        for total, part, times in ((self._bytes, report.bytes, 1), (self._busy_s, report.busy_s, 1), (self._weights, report.weights, report.passes)):
            for name in total:
                total[name] += times * getattr(part, name)
        for name in self._predicted_busy_s if report.predicted_busy_s is not None else ():
            self._predicted_busy_s[name] += getattr(report.predicted_busy_s, name)

    def totals(self) -> dict[str, float]:
        """Sums that only grow, for those who look again and again at what has happened since. ``measured_s`` and ``predicted_s`` are of the same passes."""
        return {
            "passes": self.passes, "seconds": self.seconds, "measured_s": self._compared_s, "predicted_s": self._predicted_s,
            "prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens, "weight_wait_s": self.weight_wait_s,
            "cpu_weight_bytes": self._weights["cpu"], "link_bytes": sum(self._bytes.values()), **{f"{name}_busy_s": self._busy_s[name] for name in DEVICES},
        }  # fmt: skip

    def as_dict(
        self, *, peak_gpu_bytes: int, peak_host_bytes: int, plan_bound: float | None = None, hardware_bound: float | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """The document of `LLM.stats()`; bounds in tokens/s, None where unknown."""
        measured = _rate(self._compared_tokens, self._compared_s) if self._compared_s else _rate(self.generated_tokens, self.seconds)
        rates = {"measured": measured, "predicted": _rate(self._compared_tokens, self._predicted_s), "plan_bound": plan_bound, "hardware_bound": hardware_bound}
        shares = self._weights if sum(self._weights.values()) else {name: getattr(self.weights, name) for name in self._weights}
        total = sum(shares.values())
        return {
            "policy": self.policy,
            "device": self.device,
            "emulated": self.emulated,
            "tokens": {"prompt": self.prompt_tokens, "generated": self.generated_tokens},
            "seconds": self.seconds,
            "tokens_per_s": rates,
            "bytes": dict(self._bytes),
            "busy_s": dict(self._busy_s),
            "predicted_busy_s": dict(self._predicted_busy_s),
            "peak_bytes": {"gpu": peak_gpu_bytes, "host": peak_host_bytes},
            "weights_frac": {name: share / total if total else 0.0 for name, share in shares.items()},
            "plan_changes": self.plan_changes,
            "prefix_cache": {"queried_tokens": self.prefix.queried_tokens, "hit_tokens": self.prefix.hit_tokens},
        }


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None
