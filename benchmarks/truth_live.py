"""Predicted against measured pass times on this box: emulated GPUs with random links and memory as black boxes, and the CPU pilot beside them.

Owns the random devices and the comparison; `benchmarks.truth --live` is the command. Profiles are measured for each device and kept nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.hidden_devices import ProfileKind
from benchmarks.truth import SEQUENCES, TRACKED, Case, Never, Row
from twinpilots import LLM, SamplingParams
from twinpilots.commands.models import model_spec
from twinpilots.device.cpu import choose_cores
from twinpilots.hardware.peaks import PeakMeter
from twinpilots.hardware.store import profile_key, save_profile
from twinpilots.machine import instruction_set
from twinpilots.model.spec import ModelSpec
from twinpilots.online import OnlinePlanner, PassDone
from twinpilots.plan.plan import Phase
from twinpilots.profiling import measure_machine, measure_scaled_machine

MODELS = ("smollm2-135m", "dummy:smollm2-135m")
INPUT_LEN, AFTER = 32, 20
FIRST = 2  # passes of a run that wake everything up
YARDSTICK_RUNS = 4


class Seen(NamedTuple):
    """A pass, and what it was predicted to take before it became known."""

    done: PassDone
    predicted_s: float


@contextmanager
def own_cache() -> Iterator[Path]:
    """Profiles and history of earlier runs are not seen, and this run's are not kept. Converted models are."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        real = Path(before or Path.home() / ".cache") / "twinpilots"
        (Path(folder) / "twinpilots").mkdir()
        for name in ("converted", "quantized"):
            if (real / name).is_dir():
                (Path(folder) / "twinpilots" / name).symlink_to(real / name)
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


def random_device(folder: Path, seed: int, number: int) -> str:
    """The demo's device first; then links within a factor of 4 of it, memory from a sixth of the model to most of it."""
    if number <= 0:
        return "cpu" if number < 0 else "emulated:demo"
    rng = random.Random(f"device {seed} {number}")
    rate = 2.5e9 * math.exp(rng.uniform(-math.log(4), math.log(2)))
    path = folder / f"random-{number}.json"
    path.write_text(
        json.dumps({
            "memory_bytes": int(rng.uniform(16, 90)) << 20, "up_bytes_per_s": rate, "down_bytes_per_s": rate * rng.uniform(0.6, 1.0),
            "latency_s": rng.uniform(2e-6, 20e-6),
        })
    )  # fmt: skip
    return f"emulated:{path}"


def live_rows(folder: Path, seed: int, number: int, *, kind: ProfileKind, models: Sequence[str] = MODELS) -> list[Row]:
    """One device (number -1: the CPU alone), all models and numbers of sequences."""
    device, rows = random_device(folder, seed, number), []
    for model in models:
        spec, before = model_spec(model), box_speed()
        _store(device, spec, kind)
        at_profile = tuple((a + b) / 2 for a, b in zip(before, box_speed(), strict=True))
        for num_seqs in SEQUENCES:
            rows += _run(model, device, number, num_seqs, at_profile)
    return rows


def box_speed() -> tuple[float, ...]:
    """What all cores read and compute per second just now, by routines that share nothing with our kernels: on a shared box that differs from one quarter of
    a minute to the next."""
    with PeakMeter(len(choose_cores(gpu=False, emulated=False).pilot)) as meter:
        for _ in range(YARDSTICK_RUNS):
            meter.sample()
        return meter.read_bytes_per_s, meter.flops_per_s


def _store(device: str, spec: ModelSpec, kind: ProfileKind) -> None:
    """Makes this the profile that an engine finds."""
    if kind != "scaled":
        measure_machine(device, spec, quick=kind == "quick")
        return
    threads = len(choose_cores(gpu=device != "cpu", emulated=device != "cpu").pilot)
    key = profile_key(device, threads, spec, instruction_set())
    save_profile(key, measure_scaled_machine(device, spec))


def _run(model: str, device: str, number: int, num_seqs: int, at_profile: Sequence[float]) -> list[Row]:
    params = SamplingParams(temperature=0.0, max_tokens=TRACKED + AFTER, ignore_eos=True)
    prompts = [[1 + (7 * i + 13 * j) % 900 for j in range(INPUT_LEN)] for i in range(num_seqs)]
    with LLM(model, device=device, max_num_seqs=num_seqs, max_model_len=INPUT_LEN + TRACKED + AFTER) as llm:
        profile, spec = llm._profile, llm.spec
        online, seen = llm._planner.online, list[Seen]()
        online.witness = lambda done: seen.append(Seen(done, online.predict(done.plan, done.bucket, done.load).seconds))
        before = box_speed()
        llm.generate(prompts, params, use_tqdm=False)
        now = [(a + b) / 2 for a, b in zip(before, box_speed(), strict=True)]
        memory_frac = profile.gpu_memory_bytes / (spec.linear_bytes + spec.embedding_bytes)
    name = model.removeprefix("dummy:")
    box = max((abs(a / b - 1.0) for a, b in zip(now, at_profile, strict=True)), default=0.0)
    case = Case(machine=f"live-{number}", model=name if name == model else f"{name} 16", num_seqs=num_seqs, input_len=INPUT_LEN, memory_frac=memory_frac)
    offline = OnlinePlanner(spec, profile, Never(), adapts=False)
    found: list[Row] = []
    for phase in ("prefill", "decode"):
        passes = [each for each in seen if each.done.bucket.phase == phase]
        if phase == "decode":
            passes = passes[FIRST:]
        if passes:
            found.append(_row(case, phase, passes, offline, box))  # type: ignore[arg-type]
    return found


def _row(case: Case, phase: Phase, passes: Sequence[Seen], offline: OnlinePlanner, box: float) -> Row:
    true_s = [each.done.seconds for each in passes]
    predictions = [offline.predict(each.done.plan, each.done.bucket, each.done.load) for each in passes]
    busy = predictions[0].busy_s
    kinds = [(id(each.done.bucket), each.done.load.num_seqs, each.done.load.tokens()) for each in passes]
    return Row(
        case=case, phase=phase, bound_by=max(("cpu", "gpu", "link"), key=lambda name: getattr(busy, name)),
        predicted_s=median(each.seconds for each in predictions), true_s=median(true_s),
        errors=tuple(p.seconds / t - 1.0 for p, t in zip(predictions, true_s, strict=True)),
        tracked_errors=tuple(each.predicted_s / t - 1.0 for each, t in list(zip(passes, true_s, strict=True))[TRACKED:]) if phase == "decode" else (),
        likeness=tuple(kinds.index(kind) for kind in kinds), box_change=box,
    )  # fmt: skip
