"""What is asked of a plan: the work to do and the memory it may use. Plain values, validated once.

Knows nothing of models, machines or plans.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``num_requests`` requests of ``input_len`` prompt tokens that generate ``output_len`` tokens each, at most ``max_num_seqs`` at once."""

    num_requests: int
    input_len: int
    output_len: int
    max_num_seqs: int

    def __post_init__(self) -> None:
        for name in ("num_requests", "input_len", "output_len", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"Workload.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def concurrency(self) -> int:
        """Sequences that run at once when memory allows."""
        return min(self.num_requests, self.max_num_seqs)

    @property
    def seq_len(self) -> int:
        """Tokens of one finished sequence."""
        return self.input_len + self.output_len

    @property
    def generated_tokens(self) -> int:
        return self.num_requests * self.output_len


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes that a plan may use of GPU and of host memory: promises, not hints. ``disk_bytes``: of weights and KV that may lie on the disk, in plans that are
    only predicted; 0 lets none."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "host_bytes", "disk_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"Limits.{name} must not be negative, got {getattr(self, name)}")

    @property
    def without_disk(self) -> Limits:
        return replace(self, disk_bytes=0) if self.disk_bytes else self

    def beyond(self, allowed: Limits) -> int:
        """Bytes over what is allowed, of all tiers together."""
        return sum(max(0, getattr(self, tier) - getattr(allowed, tier)) for tier in ("gpu_bytes", "host_bytes", "disk_bytes"))
