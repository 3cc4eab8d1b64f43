"""The Plan: who computes what, as plain data.

Owns: `Split`, `BucketPlan`, `Plan` and their JSON form. A Plan is complete: together with a `ModelSpec` it determines every task of every pass.
Knows nothing of how a plan is found (solver, policies), priced (simulate) or run (runtime).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from twinpilots.config import KvDtype
from twinpilots.model.spec import ModelSpec

Policy = Literal["auto", "twinpilots", "flexgen", "hetegen", "layer-split", "stream", "cpu", "resident"]
POLICIES: tuple[Policy, ...] = ("auto", "twinpilots", "flexgen", "hetegen", "layer-split", "stream", "cpu", "resident")
Phase = Literal["prefill", "decode"]
PLAN_SCHEMA = 2  # 2: the disk tier


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One op's rows, in this order: ``[0, resident)`` in GPU memory | ``[resident, gpu)`` streamed | ``[gpu, rows)`` on the CPU."""

    resident: int
    streamed: int
    cpu: int

    @property
    def gpu(self) -> int:
        """Rows that the GPU computes."""
        return self.resident + self.streamed

    @property
    def rows(self) -> int:
        return self.resident + self.streamed + self.cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPlan:
    """How passes of one kind run: at most ``max_tokens`` tokens, of which ``phase`` says whether any is a prompt's.

    ``splits[layer][op name]``; lm_head is ``splits[-1]["lm_head"]`` (one more entry than layers). ``host_attention`` says which device attends
    the sequences whose KV lies in host memory: "cpu" where it lies, or "gpu", streamed over the link layer by layer.
    Prefill tokens of host sequences follow ``host_prefill_attention``.
    """

    phase: Phase
    max_tokens: int
    micro_batches: int
    splits: tuple[Mapping[str, Split], ...]
    host_attention: Literal["cpu", "gpu"] = "cpu"
    host_prefill_attention: Literal["cpu", "gpu"] = "cpu"

    @property
    def streamed_rows(self) -> int:
        return sum(split.streamed for layer in self.splits for split in layer.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One frozen answer to: who computes what, where does it lie, in what portions does it move.

    Sizes in bytes, KV capacities in pages of ``page_size`` tokens (a page holds K and V of all layers for its tokens).
    The resident rows are the same in all buckets (checked). Buckets are sorted by (phase, max_tokens); look one up with `bucket_for`.
    ``max_pass_tokens`` is the largest number of tokens of one pass: decode tokens plus prefill chunk.

    ``disk_rows[layer][op name]`` (the head last, as in ``splits``): so many of the op's last rows, none of them resident, have their home on the disk; empty
    where nothing lies there. Every pass reads them through the host's staging ring of ``staging_bytes``, whoever computes them. The fact is the plan's, not a
    bucket's: a home does not change from pass to pass. ``kv_on_disk``: so has the KV of ``host_pages``; it passes through two slots of ``kv_staging_pages``
    in host memory on its way to those of the GPU, which attends all of it.
    """

    model: str
    policy: Policy
    uses_gpu: bool
    uses_cpu: bool
    unit_rows: int
    buckets: tuple[BucketPlan, ...]
    ring_bytes: int
    packet_bytes: int
    page_size: int
    gpu_pages: int
    host_pages: int
    kv_dtype: KvDtype
    max_num_seqs: int
    max_pass_tokens: int
    max_model_len: int
    host_kv_layers: tuple[int, ...] = ()  # layers whose KV lies in host memory even for GPU sequences (layer-split); then host_pages is 0
    kv_staging_pages: int = 0  # GPU pages of one staging slot for streamed host KV (two slots are held)
    disk_rows: tuple[Mapping[str, int], ...] = ()
    staging_bytes: int = 0
    kv_on_disk: bool = False
    schema: int = PLAN_SCHEMA

    @property
    def uses_disk(self) -> bool:
        return bool(self.disk_rows) or self.kv_on_disk

    def on_disk(self, layer: int, name: str) -> int:
        """Rows of an op whose home is the disk."""
        return self.disk_rows[layer][name] if self.disk_rows else 0

    def bucket_for(self, phase: Phase, tokens: int) -> BucketPlan:
        """The smallest bucket of this phase that holds ``tokens`` tokens; the largest when none does."""
        of_phase = [bucket for bucket in self.buckets if bucket.phase == phase] or list(self.buckets)
        return next((bucket for bucket in of_phase if bucket.max_tokens >= tokens), of_phase[-1])

    def check(self, spec: ModelSpec) -> None:
        """Raise ValueError unless the plan covers every row of ``spec`` once, on unit boundaries, with one residency in all buckets."""
        if not self.buckets:
            raise ValueError("plan has no buckets")
        if self.host_kv_layers and self.host_pages:
            raise ValueError("a plan with host_kv_layers keeps no sequence's KV wholly in host memory: host_pages must be 0")
        residency = None
        for bucket in self.buckets:
            _check_bucket(self, bucket, spec)
            found = [{name: split.resident for name, split in layer.items()} for layer in bucket.splits]
            if residency is not None and found != residency:
                raise ValueError(f"resident rows of bucket {bucket.phase}/{bucket.max_tokens} differ from the first bucket's")
            residency = found
        if self.disk_rows or self.staging_bytes:
            _check_disk(self, spec)
        if self.kv_on_disk and (not self.kv_staging_pages or any("cpu" in (bucket.host_attention, bucket.host_prefill_attention) for bucket in self.buckets)):
            raise ValueError("KV on the disk is attended on the GPU, through staging slots: kv_staging_pages must be above 0 and both host attentions gpu")

    def with_policy(self, policy: Policy) -> Plan:
        return replace(self, policy=policy)

    def to_json(self) -> str:
        """The plan as one JSON document; `from_json` gives back an equal Plan."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Plan:
        """Parse `to_json`'s output. Raises ValueError that names an unknown, missing or malformed field."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.get("schema") != PLAN_SCHEMA:
                raise ValueError(f"plan schema is {data.get('schema')!r}, this version reads {PLAN_SCHEMA}")
            buckets = tuple(
                BucketPlan(**{**raw, "splits": tuple({name: Split(**split) for name, split in layer.items()} for layer in raw["splits"])})
                for raw in data.pop("buckets")
            )
            data["host_kv_layers"] = tuple(data.get("host_kv_layers", ()))
            data["disk_rows"] = tuple(dict(layer) for layer in data.get("disk_rows", ()))
            return Plan(**data, buckets=buckets)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a plan: {error}") from error


def _check_bucket(plan: Plan, bucket: BucketPlan, spec: ModelSpec) -> None:
    if len(bucket.splits) != spec.num_layers + 1:
        raise ValueError(f"plan has {len(bucket.splits)} layers of splits, model {spec.name} needs {spec.num_layers} and the head")
    for op in spec.ops(plan.unit_rows):
        split = bucket.splits[op.layer].get(op.name)
        if split is None:
            raise ValueError(f"plan lacks a split for {op.name} of layer {op.layer}")
        if split.rows != op.rows or min(split.resident, split.streamed, split.cpu) < 0:
            raise ValueError(f"split of {op.name} of layer {op.layer} covers {split.rows} rows, the op has {op.rows}")
        for edge in (split.resident, split.gpu):
            if edge % op.unit_rows and edge != op.rows:
                raise ValueError(f"split of {op.name} of layer {op.layer} cuts a unit: {edge} is not a multiple of {op.unit_rows}")
        if (split.gpu and not plan.uses_gpu) or (split.cpu and not plan.uses_cpu):
            raise ValueError(f"split of {op.name} of layer {op.layer} uses a device that the plan excludes")


def _check_disk(plan: Plan, spec: ModelSpec) -> None:
    """Homes on the disk are whole units of rows that are not resident; a tied head is the embedding table, which stays in host memory."""
    if not plan.staging_bytes or len(plan.disk_rows) != spec.num_layers + 1:
        raise ValueError(f"plan has {len(plan.disk_rows)} layers of rows on the disk and {plan.staging_bytes} bytes to read them through, model {spec.name} "
                         f"needs {spec.num_layers} and the head, or neither")  # fmt: skip
    for op in spec.ops(plan.unit_rows):
        on_disk, resident = plan.disk_rows[op.layer].get(op.name), plan.buckets[0].splits[op.layer][op.name].resident
        where = f"{op.name} of layer {op.layer}"
        if on_disk is None or not 0 <= on_disk <= op.rows - resident:
            raise ValueError(f"{on_disk} rows of {where} on the disk, of {op.rows - resident} that are not resident")
        if (op.rows - on_disk) % op.unit_rows and on_disk:
            raise ValueError(f"rows of {where} on the disk begin inside a unit: {op.rows - on_disk} is not a multiple of {op.unit_rows}")
        if on_disk and spec.tied and op.layer < 0:
            raise ValueError(f"{where} is also the embedding table: it cannot lie on the disk")
