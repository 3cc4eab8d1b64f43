"""The figures that the picture of a plan draws: the tasks of one pass, and tokens/s of every policy against the batch.

Owns `pass_figures`, `batch_figures` and `batch_points`: more keys for the document of `report.py`. Everything is simulated. Knows nothing of drawing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import CostModel
from twinpilots.plan.schedule import expand
from twinpilots.plan.simulate import simulate
from twinpilots.plan.solver import Solution
from twinpilots.plan.tasks import Task

WHOLE_LAYERS = 6  # a model of more layers is shown by
SHOWN_LAYERS = 4  # its first ones: what follows looks the same
TASK_FIELDS = ("kind", "op", "layer", "mb")


def pass_figures(spec: ModelSpec, profile: HardwareProfile, solution: Solution) -> dict[str, Any]:
    """One pass in steady state, of decode where there is one: its tasks in seconds since the previous pass ended, and what share of host memory's
    bandwidth each uses. The whole model is simulated; of a deep one the first layers are told."""
    plan, one = solution.plan, solution.price.passes[-1]
    schedule = expand(spec, plan, one.bucket, one.load.shape)
    timing = simulate(schedule, spec, plan, profile, one.load, keep_timeline=True)
    shown = spec.num_layers if spec.num_layers <= WHOLE_LAYERS else SHOWN_LAYERS
    until_s = max(entry.end_s for entry in timing.timeline if _within(schedule.tasks[entry.task], shown, spec.num_layers))
    model = CostModel(spec, plan, profile, one.load)
    tasks = []
    for entry in timing.timeline:
        if entry.end_s > 0 and entry.start_s < until_s:
            task = schedule.tasks[entry.task]
            dram_s = model.cost(task).dram_bytes / profile.dram_bytes_per_s
            start_s, end_s = max(0.0, entry.start_s), min(until_s, entry.end_s)
            tasks.append(
                {
                    "queue": entry.queue, **{name: getattr(task, name) for name in TASK_FIELDS}, "start_s": start_s, "end_s": end_s,
                    "dram_frac": dram_s / max(entry.end_s - entry.start_s, 1e-12),
                }
            )  # fmt: skip
    return {"pass": {"phase": one.phase, "seconds": timing.seconds, "shown_layers": shown, "num_layers": spec.num_layers, "tasks": tasks}}


def _within(task: Task, shown: int, num_layers: int) -> bool:
    """Whether the compute queues work on one of the layers shown; on the head, too, when all are."""
    return task.queue in ("cpu", "gpu") and (task.layer < shown if task.layer >= 0 else shown == num_layers)


def batch_points(most: int) -> list[int]:
    """Numbers of sequences to compare policies at: powers of two, and the workload's own, which is the last."""
    return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})


def batch_figures(solutions: Iterable[tuple[int, Solution]]) -> dict[str, Any]:
    """Tokens/s at every number of sequences; None where a policy cannot run."""
    points = []
    for num_seqs, solution in solutions:
        prediction = solution.prediction
        policies = {name: each.tokens_per_s for name, each in solution.candidates.items()}
        points.append(
            {"max_num_seqs": num_seqs, "plan_bound": prediction.plan_bound, "hardware_bound": prediction.hardware_bound, "policies": policies}
        )  # fmt: skip
    return {"batches": points}
