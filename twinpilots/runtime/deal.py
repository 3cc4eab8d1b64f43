"""Deals the chosen items of a pass into micro-batches and groups (docs/execution.md, "Token groups").

Owns the choice of the bucket, of each item's group, and the balance of the micro-batches. Knows nothing of queues or page pools.
"""

from __future__ import annotations

from collections.abc import Collection

from twinpilots.kernels.abi import MAX_MICRO_BATCHES
from twinpilots.plan.plan import BucketPlan, Phase, Plan
from twinpilots.plan.tasks import GPU_KV, HOST_KV, STREAMED_KV
from twinpilots.runtime.batch import BatchItem, MicroBatch, StepBatch


def deal(plan: Plan, items: list[BatchItem]) -> StepBatch:
    """The pass of ``items``, in their order of precedence. Where the CPU does not attend, items beyond the KV staging area are left out for a later pass."""
    while True:
        bucket = bucket_of(plan, items)
        dealing = _Dealing(plan, bucket, items)
        if not dealing.left_out:
            return StepBatch(bucket=bucket, micro_batches=dealing.micro_batches())
        # Fewer tokens may mean another bucket with other groups, so the rest is dealt afresh. The first item always fits: this ends.
        left_out = {id(item) for item in dealing.left_out}
        items = [item for item in items if id(item) not in left_out]
        assert items, "no sequence fits the KV staging area"


def bucket_of(plan: Plan, items: Collection[BatchItem]) -> BucketPlan:
    """The bucket of a pass of these items: prefill when any brings a prompt chunk, by the number of tokens."""
    phase: Phase = "prefill" if any(item.is_chunk for item in items) else "decode"
    return plan.bucket_for(phase, sum([item.num_tokens for item in items]))


def home_group(plan: Plan, bucket: BucketPlan, item: BatchItem) -> int:
    """The group the plan wants: 0 for GPU pages; for host pages 1 (streamed) or 2 (attended on the CPU), by bucket and kind of tokens."""
    if item.sequence.tier == "gpu":
        return GPU_KV
    if not plan.uses_gpu:
        return HOST_KV
    attention = bucket.host_prefill_attention if item.is_chunk else bucket.host_attention
    return STREAMED_KV if attention == "gpu" or not plan.uses_cpu else HOST_KV


class _Dealing:
    """Longest item first, each to the micro-batch with the fewest tokens: within 4/3 of the best balance, and no micro-batch stays empty."""

    def __init__(self, plan: Plan, bucket: BucketPlan, items: list[BatchItem]) -> None:
        self.plan = plan
        self.left_out: list[BatchItem] = []
        count = min(bucket.micro_batches, len(items), MAX_MICRO_BATCHES)
        self.tokens, self.staged = [0] * count, [0] * count
        self.groups: list[tuple[list[BatchItem], list[BatchItem], list[BatchItem]]] = [([], [], []) for _ in range(count)]
        wanted = [home_group(plan, bucket, item) for item in items]
        pages = [self._num_pages(item) if group == STREAMED_KV else 0 for item, group in zip(items, wanted, strict=True)]
        order = list(range(len(items)))
        if count > 1 and sum(pages) <= plan.kv_staging_pages:  # else precedence decides who gets a staging slot
            order.sort(key=lambda i: -items[i].num_tokens)
        if count == 1 and not any(pages):
            for item, group in zip(items, wanted, strict=True):
                self.groups[0][group].append(item)
            return
        for i in order:
            self._place(items[i], wanted[i], pages[i])

    def _num_pages(self, item: BatchItem) -> int:
        return -(-(item.start + item.num_tokens) // self.plan.page_size)

    def _place(self, item: BatchItem, group: int, pages: int) -> None:
        room = range(len(self.tokens))
        if pages:
            staging = [mb for mb in room if self.staged[mb] + pages <= self.plan.kv_staging_pages]
            if not staging and not self.plan.uses_cpu:
                self.left_out.append(item)
                return
            if staging:
                room = staging  # type: ignore[assignment]
            else:
                group, pages = HOST_KV, 0
        mb = min(room, key=self.tokens.__getitem__)
        self.tokens[mb] += item.num_tokens
        self.staged[mb] += pages
        self.groups[mb][group].append(item)

    def micro_batches(self) -> tuple[MicroBatch, ...]:
        return tuple((tuple(groups[0]), tuple(groups[1]), tuple(groups[2])) for groups in self.groups)
