"""What the offline profile of a hidden machine becomes when passes of a short model have been run there, as `twinpilots.rehearsal` does on a real one.

Owns `profiled`. The profile's experiments are `hidden_devices`, the passes `hidden_passes`.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.hidden_devices import ProfileKind, measured
from benchmarks.hidden_machine import HiddenMachine
from benchmarks.hidden_passes import run_passes
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.online import PassDone
from twinpilots.plan.load import PassLoad, decode_load, prefill_load
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.schedule import expand
from twinpilots.rehearsal import FULL, corrected, short_model, short_plan

PASSES = 6  # of a stage
ON_GPU = 4  # of so many sequences, all keep their KV there; of more, so many


def profiled(machine: HiddenMachine, spec: ModelSpec, gpu_memory_bytes: int, seed: int, kind: ProfileKind = "full") -> HardwareProfile:
    """What the offline profiler says of the machine; scaled presets as they are."""
    profile = measured(machine, spec, gpu_memory_bytes, seed, kind)
    short = short_model(spec)
    plan = short_plan(short, profile) if kind != "scaled" else None
    return profile if plan is None else corrected(short, profile, list(_rehearsed(machine, short, plan, seed)))


def _rehearsed(machine: HiddenMachine, spec: ModelSpec, plan: Plan, seed: int) -> Iterator[PassDone]:
    before = 0
    for stage in (count for count in FULL.num_seqs if count <= plan.max_num_seqs):
        new = min(stage - before, max(1, plan.max_pass_tokens // FULL.prompt_len))
        bucket = plan.bucket_for("prefill", new * FULL.prompt_len)
        yield from _passes(machine, spec, plan, bucket, prefill_load(*_sides(new), FULL.prompt_len, 0, bucket), 1, seed)
        bucket = plan.bucket_for("decode", stage)
        yield from _passes(machine, spec, plan, bucket, decode_load(*_sides(stage), FULL.prompt_len + stage, bucket), PASSES, seed)
        before = stage


def _sides(num_seqs: int) -> tuple[int, int]:
    """(with KV on the GPU, on the host)."""
    return min(num_seqs, ON_GPU), max(0, num_seqs - ON_GPU)


def _passes(machine: HiddenMachine, spec: ModelSpec, plan: Plan, bucket: BucketPlan, load: PassLoad, count: int, seed: int) -> Iterator[PassDone]:
    schedule = expand(spec, plan, bucket, load.shape)
    for found in run_passes(machine, spec, plan, schedule, [load] * count, seed):
        yield PassDone(
            plan=plan, bucket=bucket, load=load, schedule=schedule, work_s=found.work_s, seconds=found.seconds, driver_s=machine.between_s(load.num_seqs),
            remaining=count,
        )  # fmt: skip
