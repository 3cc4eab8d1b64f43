"""In what two plans differ, in words: what is logged when a running engine changes its plan. Pure."""

from __future__ import annotations

from twinpilots.plan.plan import BucketPlan, Phase, Plan

PHASES: tuple[Phase, ...] = ("decode", "prefill")


def difference(old: Plan, new: Plan) -> str:
    """The decisions that changed: rows by place in each phase's largest bucket, micro-batches, KV, sizes. "nothing" for equal plans."""
    found = [part for phase in PHASES for part in _bucket_changes(phase, _largest(old, phase), _largest(new, phase))]
    numbers = (
        ("sequences", old.max_num_seqs, new.max_num_seqs), ("tokens a pass", old.max_pass_tokens, new.max_pass_tokens),
        ("KV pages on the GPU", old.gpu_pages, new.gpu_pages), ("KV pages on the host", old.host_pages, new.host_pages),
        ("longest sequence", old.max_model_len, new.max_model_len), ("ring bytes", old.ring_bytes, new.ring_bytes),
    )  # fmt: skip
    found += [f"{name} {before} -> {after}" for name, before, after in numbers if before != after]
    return "; ".join(found) or "nothing"


def _largest(plan: Plan, phase: Phase) -> BucketPlan:
    return plan.bucket_for(phase, plan.max_num_seqs if phase == "decode" else plan.max_pass_tokens)


def _bucket_changes(phase: Phase, old: BucketPlan, new: BucketPlan) -> list[str]:
    before, after = _percent(old), _percent(new)
    found = [f"{phase} rows resident/streamed/CPU {before} -> {after}"] if before != after else []
    if old.micro_batches != new.micro_batches:
        found.append(f"{phase} micro-batches {old.micro_batches} -> {new.micro_batches}")
    where = [bucket.host_attention if phase == "decode" else bucket.host_prefill_attention for bucket in (old, new)]
    if where[0] != where[1]:
        found.append(f"{phase} attention over host KV {where[0]} -> {where[1]}")
    return found


def _percent(bucket: BucketPlan) -> str:
    """Mean shares of all rows, to half a percent."""
    splits = [split for layer in bucket.splits for split in layer.values()]
    total = sum(split.rows for split in splits)
    sums = (sum(split.resident for split in splits), sum(split.streamed for split in splits), sum(split.cpu for split in splits))
    return "/".join(f"{100 * rows / total:.1f}" for rows in sums) + " %"
