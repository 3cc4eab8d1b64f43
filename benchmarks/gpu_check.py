"""`make gpu-check`: does TwinPilots work on this GPU, and how close to the hardware does it come? One command, under nine minutes, one verdict.

Owns the order of the steps, the time budget, the verdicts, the table and the result file. Every step runs in a process of its own
(`benchmarks/gpu_steps.py`), so that a crash or a hang costs one case and hides nothing. ``--device emulated:demo`` rehearses the same steps without a GPU.
What a passed check proves, and what it does not, is in docs/gpu-check.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import GraphTask, KernelTask, PointTask, RatesTask, SwitchTask, TokenTask, WaitsTask, token_cases
from benchmarks.gpu_workers import (
    ROOT,
    TimedRun,
    Verdict,
    breaks_promise,
    build_native,
    command_events,
    device_name,
    events_of,
    machine_document,
    mark,
    only_case,
    require_device,
    say,
    slug,
    worker_environment,
    write_document,
)  # fmt: skip
from tests.zoo import FAMILIES
from twinpilots.errors import UserError
from twinpilots.model.dummy import dummy_spec
from twinpilots.plan.plan import POLICIES

STEPS_MODULE = "benchmarks.gpu_steps"
SCHEMA = 1
BUDGET_S = 510.0  # of the nine minutes; starting and ending take the rest
STALL_S = 60.0  # a token case takes a second or two; the first of a worker also starts torch, CUDA and transformers
MAX_DEATHS = 4  # workers that die or hang before the remaining token cases are given up
DEVICE_TESTS_S = 120.0  # some compile kernels
KERNELS_S = 90.0  # the most that kernel cases may take: compiling one takes a second or two
WAITS_S = 60.0
TOKENS_S = 200.0  # the most that token cases may take, so that rates and points get their turn
SWITCHES_S = 60.0
POINT_S = 120.0
SANITIZER_S = 150.0  # each access is checked: a case of a second or two takes tens
SANITIZER_LEAST_S = 45.0  # what the points leave it
HALF_FAMILIES = ("llama", "gemma2", "opt", "qwen3")
HALF_POLICIES = ("auto", "stream")
POINT_POLICIES = ("auto", "stream", "cpu")
SWITCH_FAMILY, SWITCH_PASSES = "llama", 1000
SANITIZED = ("llama/float32/hand-0",)
SANITIZER_EXIT = 86
CUDA_BIN = Path("/usr/local/cuda/bin")


@dataclass(kw_only=True)
class Check(TimedRun):
    """One run: what was asked for, and what was found."""

    model: str
    num_seqs: tuple[int, ...]
    families: tuple[str, ...]
    steps: tuple[str, ...] = ()
    verdicts: list[Verdict] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(verdict.ok is not False for verdict in self.verdicts)

    def judge(self, name: str, ok: bool | None, detail: str) -> None:
        self.verdicts.append(Verdict(name=name, ok=ok, detail=detail))
        say(f"{mark(ok)}  {name}: {detail}")


# -- steps -----------------------------------------------------------------------------------------------------------------------------------


def build_native_library(check: Check) -> None:
    """The CPU pilot's library; without it nothing can be fast, which is judged a failure."""
    reason = build_native()
    check.judge("native library", reason is None, reason or "built with this box's compiler")


def device_tests(check: Check) -> None:
    """tests/gpu, where pytest is: events across streams, pinning, footprint, each instruction against the CPU's."""
    if check.device != "cuda:0" or find_spec("pytest") is None:
        check.judge("device tests", None, "not run: tests/gpu needs cuda:0 and pytest")
        return
    # Not our configuration file: it names options of plug-ins that a bare box lacks.
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, cwd=ROOT, env=worker_environment(), capture_output=True, text=True, check=False, timeout=min(DEVICE_TESTS_S, check.left_s))
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in failures:
        say(f"      {line[:200]}")
    check.judge("device tests", done.returncode == 0, (done.stdout.strip().splitlines() or [f"pytest ended with exit code {done.returncode}"])[-1])


def cases_of(kind: str, task: Any, *, limit_s: float, stall_s: float) -> tuple[list[dict[str, Any]], str | None]:
    """A worker's cases, and why it ended early. What failed, or could not be done, is said as it comes."""
    found: list[dict[str, Any]] = []
    reason = None
    for event in events_of(STEPS_MODULE, kind, task, limit_s=limit_s, stall_s=stall_s):
        if event["event"] == "case":
            found.append(event)
            if not event["ok"]:
                say(f"      {event['case']}: {event['detail']}")
        elif event["event"] == "end":
            reason = event["reason"]
    return found, reason


def kernel_tests(check: Check) -> None:
    """Each Triton kernel, compiled here, against torch. One that is wrong or cannot be built is reported; the latter is left to torch in what follows."""
    if not check.device.startswith("cuda:"):
        check.judge("triton kernels", None, "not run: they need a CUDA device")
        return
    found, reason = cases_of("kernels", KernelTask(device=check.device), limit_s=min(KERNELS_S, check.left_s), stall_s=STALL_S)
    check.kernels = [{name: event[name] for name in ("case", "ok", "detail", "seconds")} for event in found]
    counts = {ok: sum(event["ok"] is ok for event in found) for ok in (True, False, None)}
    text = f"{counts[True]} cases agree with torch, {counts[False]} do not" + (f"; ended early: {reason}" if reason else "")
    if counts[None]:
        check.judge("triton kernels", None, f"torch's operations run instead: {found[0]['detail']}")
    else:
        check.judge("triton kernels", counts[True] > 0 and not counts[False] and (reason is None or reason.endswith("were up")), text)


def graph_tests(check: Check) -> None:
    """Launches captured in graphs and replayed, against the same ones launched one by one: logits bit by bit."""
    if not check.device.startswith("cuda:"):
        check.judge("graphs", None, "not run: they need a CUDA device")
        return
    found, reason = cases_of("graphs", GraphTask(device=check.device), limit_s=min(KERNELS_S, check.left_s), stall_s=KERNELS_S)
    detail = "; ".join(f"{event['case']}: {event['detail']}" for event in found) + (f"; ended early: {reason}" if reason else "")
    infeasible = [event for event in found if event["ok"] is None]
    check.judge("graphs", None if infeasible else bool(found) and all(event["ok"] for event in found) and reason is None, detail)


def wait_tests(check: Check) -> None:
    """Whether the GPU waits for the CPU by itself, and whether data comes before the word that says so, on both sides and either way of waiting."""
    if not check.device.startswith("cuda:"):
        check.judge("device waits", None, "not run: they need a CUDA device")
        return
    found, reason = cases_of("waits", WaitsTask(device=check.device), limit_s=min(WAITS_S, check.left_s), stall_s=STALL_S)
    first = found[0]["ok"] if found else False
    text = "; ".join(f"{event['case']}: {event['detail']}" for event in found) + (f"; ended early: {reason}" if reason else "")
    wrong = reason is not None or len(found) < 2 or any(event["ok"] is False for event in found)
    check.judge("device waits", False if wrong else first, ("yes; " if first else "") + text)


def token_tests(check: Check) -> None:
    """Every case of `gpu_steps.token_cases`. A worker that dies or hangs fails its case; another one goes on behind it."""
    cases = token_cases(check.families, POLICIES, ("float32",))
    half = tuple(family for family in HALF_FAMILIES if family in check.families)
    cases += token_cases(half, HALF_POLICIES, ("bfloat16", "float16"))
    deadline, deaths, todo = time.monotonic() + min(TOKENS_S, check.left_s), 0, list(cases)
    while todo and deaths < MAX_DEATHS and time.monotonic() < deadline:
        deaths += not run_token_worker(check, todo, deadline)
    for dtype in ("float32", "bfloat16", "float16"):
        judge_tokens(check, dtype, [case for case in todo if dtype in case])


def run_token_worker(check: Check, todo: list[str], deadline: float) -> bool:
    """Run the cases of ``todo``, taking the finished ones out. False when the worker did not come to its end."""
    current, task = None, TokenTask(device=check.device, cases=tuple(todo))
    for event in events_of(STEPS_MODULE, "tokens", task, limit_s=max(0.0, deadline - time.monotonic()), stall_s=STALL_S):
        if event["event"] == "begin":
            current = event["case"]
        elif event["event"] == "case":
            record_case(check, event)
            todo.remove(event["case"])
            current = None
        elif event["event"] == "end" and event["reason"] is not None:
            if current is None and todo:
                current = todo[0]  # it died between two cases, or before the first: never try the same thing for ever
            if current is not None:
                record_case(check, {"case": current, "ok": False, "detail": event["reason"], "seconds": 0.0})
                todo.remove(current)
            return False
    return True


def record_case(check: Check, event: Mapping[str, Any]) -> None:
    check.cases.append({name: event[name] for name in ("case", "ok", "detail", "seconds")})
    if event["ok"] is False:
        say(f"      {event['case']}: {event['detail']}")


def judge_tokens(check: Check, dtype: str, left: Sequence[str]) -> None:
    """All cases of a dtype must have run, and none may have failed. A policy that does not fit in a third of the model is no failure (`resident` must not)."""
    of_dtype = [case for case in check.cases if f"/{dtype}/" in case["case"]]
    counts = {ok: sum(case["ok"] is ok for case in of_dtype) for ok in (True, False, None)}
    text = f"{counts[True]} cases agree with transformers, {counts[False]} do not, {counts[None]} do not fit, {len(left)} not run"
    check.judge(f"tokens {dtype}", bool(of_dtype or left) and counts[True] > 0 and not counts[False] and not left if of_dtype or left else None, text)


def switch_tests(check: Check) -> None:
    """A thousand passes under random changes of plan, arrivals and aborts change no token."""
    task = SwitchTask(device=check.device, family=SWITCH_FAMILY, num_passes=SWITCH_PASSES)
    found, reason = cases_of("switches", task, limit_s=min(SWITCHES_S, check.left_s), stall_s=STALL_S)
    ok = bool(found) and bool(found[0]["ok"])
    check.judge("plan switches", ok, found[0]["detail"] if found else reason or "it ended without a result")


def sanitized_tests(check: Check) -> None:
    """Token cases under CUDA's own memory checker, where it is: no access out of bounds or misaligned."""
    program = sanitizer_of(check)
    if program is None:
        check.judge("compute-sanitizer", None, f"not run: it needs a CUDA device, and to be on PATH or in {CUDA_BIN}")
        return
    with tempfile.TemporaryDirectory(prefix="twinpilots-sanitizer-") as folder:
        log = Path(folder) / "log"
        # Errors of calls are left out: that memory cannot be pinned or mapped is asked by trying.
        options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(SANITIZER_EXIT), "--log-file", str(log)]
        worker = [sys.executable, "-m", STEPS_MODULE, json.dumps({"tokens": asdict(TokenTask(device=check.device, cases=SANITIZED))})]
        limit_s = min(SANITIZER_S, check.left_s)
        events = list(command_events([program, *options, *worker], limit_s=limit_s, stall_s=limit_s))
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    judge_sanitized(check, events, lines)


def sanitizer_of(check: Check) -> str | None:
    if not check.device.startswith("cuda:"):
        return None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(CUDA_BIN))


def judge_sanitized(check: Check, events: Sequence[Mapping[str, Any]], log: Sequence[str]) -> None:
    """Clean when its own summary says so and every case passed. What ran out of time is not judged."""
    summary = next((line.strip("= ") for line in reversed(log) if "ERROR SUMMARY" in line), "it wrote no summary")
    cases, reason = [event for event in events if event["event"] == "case"], events[-1]["reason"]
    if reason is not None and reason.endswith("were up"):
        check.judge("compute-sanitizer", None, f"not finished: {reason}; run it alone: GPU_CHECK_FLAGS='--steps sanitized_tests'")
        return
    for line in log[:20] if "ERROR SUMMARY: 0 errors" not in summary else ():
        say(f"      {line[:200]}")
    wrong = [event["detail"] for event in cases if not event["ok"]] or ([] if cases else ["no case was run"])
    clean = "ERROR SUMMARY: 0 errors" in summary and reason is None and not wrong
    check.judge("compute-sanitizer", clean, "; ".join([summary, *wrong, *([reason] if reason else [])]))


def measure_rates(check: Check) -> None:
    """What no plan can beat: link, DRAM, and each processor alone; and the profile that the points plan with."""
    result = only_case(STEPS_MODULE, "rates", RatesTask(device=check.device, model=check.model), min(POINT_S, check.left_s))
    check.rates = {"limits": result.get("rates"), "profile": result.get("profile")}
    rates = result.get("rates") or {}
    bad = [name for name, value in rates.items() if not (isinstance(value, float | int) and 0 < value < 1e18)]
    shown = ", ".join(f"{name.replace('_per_s', '').replace('_', ' ')} {value / 1e9:.3g}G/s" for name, value in rates.items() if value)
    check.judge("rates", bool(result["ok"]) and not bad, shown if result["ok"] and not bad else result["detail"] or f"impossible: {', '.join(bad)}")


def measure_points(check: Check) -> None:
    """Each policy at each number of sequences while time lasts, longest so far reserved; the first number's policies are always tried."""
    longest_s, skipped, failed = 0.0, 0, []
    reserved_s = SANITIZER_LEAST_S if sanitizer_of(check) else 0.0
    for num_seqs in check.num_seqs:
        for policy in POINT_POLICIES:
            if check.left_s - reserved_s < max(1.3 * longest_s, 10.0):
                skipped += 1
                continue
            began = time.monotonic()
            result = only_case(STEPS_MODULE, "point", point_task(check, policy, num_seqs), min(POINT_S, check.left_s))
            longest_s = max(longest_s, time.monotonic() - began)
            if result["ok"]:
                check.points.append(result["point"])
                say(f"      {point_text(result['point'])}")
            else:
                say(f"      {policy} x {num_seqs}: {result['detail']}")
                failed += [f"{policy} x {num_seqs}"] if result["ok"] is False else []
    text = f"{len(check.points)} measured, {len(failed)} failed, {skipped} skipped for want of time"
    check.judge("throughput", bool(check.points) and not failed, text)
    over = [f"{point['policy']} x {point['num_seqs']}: {point['footprint_bytes'] / 2**20:.0f} MiB" for point in check.points if breaks_promise(point)]
    check.judge("memory promise", not over if check.points else None, "; ".join(over) or "no footprint above --gpu-memory")


def point_task(check: Check, policy: str, num_seqs: int) -> PointTask:
    """GPU memory for about a third of the weights, and what the process takes beside its arena."""
    profile = check.rates.get("profile") or {}
    third = dummy_spec(check.model).linear_bytes // 3
    room = int(profile.get("gpu_memory_bytes") or third)
    llm = {
        "model": check.model, "device": check.device, "policy": policy, "max_num_seqs": num_seqs,
        "gpu_memory": min(third, room) + int(profile.get("gpu_overhead_bytes") or 0),
    }  # fmt: skip
    return PointTask(llm=llm, num_seqs=num_seqs, input_len=64, output_len=32)


# -- reports ---------------------------------------------------------------------------------------------------------------------------------


def point_text(point: Mapping[str, Any]) -> str:
    busy = ", ".join(f"{name} {100 * seconds / point['seconds']:.0f} %" for name, seconds in point["busy_s"].items())
    bound, efficiency, predicted = (point[name] for name in ("hardware_bound", "efficiency", "predicted"))
    text = f"{point['policy']:>8} x {point['num_seqs']:<3} {point['tokens_per_s']:9.2f} tokens/s"
    text += f", predicted {predicted:.2f}" if predicted else ""
    text += f", hardware bound {bound:.2f}, efficiency {efficiency:.2f}" if bound else ""
    return f"{text}; busy: {busy}"


def table(check: Check) -> str:
    """The verdicts, one per line, and the last word."""
    lines = [f"{mark(verdict.ok)}  {verdict.name:<16}  {verdict.detail}" for verdict in check.verdicts]
    emulated = " (an emulated GPU: a rehearsal, no proof)" if check.device.startswith("emulated:") else ""
    word = "passed" if check.passed else "FAILED"
    return "\n".join(["", f"gpu-check of {check.commit} on {device_name(check.device)}{emulated}", *lines, f"gpu-check {word}"])


def document(check: Check) -> dict[str, Any]:
    """The result file. Times in seconds, sizes in bytes; ``efficiency`` is achieved / hardware bound."""
    return {
        "schema": SCHEMA, "check": "gpu", "commit": check.commit, "date": date.today().isoformat(), **machine_document(check.device), "model": check.model,
        "passed": check.passed, "seconds": time.monotonic() - check.began, "verdicts": [asdict(verdict) for verdict in check.verdicts],
        "rates": check.rates.get("limits"), "profile": check.rates.get("profile"), "points": check.points,
        "kernels": check.kernels, "cases": check.cases,
    }  # fmt: skip


def write_result(check: Check, folder: Path) -> Path:
    """``<gpu>-<date>.json`` in ``folder``."""
    return write_document(document(check), folder, f"{slug(device_name(check.device))}-{date.today().isoformat()}")


STEPS: Mapping[str, Callable[[Check], None]] = {
    step.__name__: step
    for step in (
        build_native_library, device_tests, kernel_tests, graph_tests, wait_tests, token_tests, switch_tests, measure_rates, measure_points, sanitized_tests,
    )
}  # fmt: skip


# -- the command -----------------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    result.add_argument("--device", default="cuda:0", help="cuda:N, or emulated:PRESET for a rehearsal (default: cuda:0)")
    result.add_argument("--commit", default="unknown", help="what is tested, for the report: such a box may have no .git")
    result.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR", help="where the result goes (default: benchmarks/results)")
    result.add_argument("--model", default="", metavar="NAME", help="dummy:NAME of the throughput points (default: llama-3.2-1b; emulated: smollm2-135m)")
    result.add_argument("--num-seqs", default="8,1,32", metavar="N,N", help="sequences of the points, most wanted first (default: 8,1,32)")
    result.add_argument("--families", default=",".join(FAMILIES), metavar="A,B", help="zoo models of the token tests (default: all)")
    result.add_argument("--steps", default=",".join(STEPS), metavar="A,B", help=f"only these, in this order (default: all: {', '.join(STEPS)})")
    result.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S", help=f"seconds for all steps (default: {BUDGET_S:.0f})")
    return result


def checked(args: argparse.Namespace) -> Check:
    """The run that the arguments describe. UserError for what is not here or not known."""
    families, num_seqs = tuple(args.families.split(",")), args.num_seqs.split(",")
    if unknown := [family for family in families if family not in FAMILIES]:
        raise UserError(f"unknown family {unknown[0]!r}; known: {', '.join(FAMILIES)}")
    if not all(text.isdecimal() and int(text) for text in num_seqs):
        raise UserError(f"--num-seqs {args.num_seqs!r} must be whole numbers of at least 1, separated by commas")
    steps = tuple(args.steps.split(","))
    if unknown := [step for step in steps if step not in STEPS]:
        raise UserError(f"unknown step {unknown[0]!r}; known: {', '.join(STEPS)}")
    require_device(args.device)
    model = args.model or ("dummy:smollm2-135m" if args.device.startswith("emulated:") else "dummy:llama-3.2-1b")
    dummy_spec(model)
    return Check(
        device=args.device, commit=args.commit, model=model, num_seqs=tuple(map(int, num_seqs)), families=families, budget_s=args.budget_s,
        steps=steps,
    )  # fmt: skip


def run_steps(check: Check) -> None:
    """Every step is guarded: what goes wrong inside is its verdict, and the next one has its turn while time is left."""
    for step in check.steps:
        name = step.replace("_", " ")
        if check.left_s <= 0:
            check.judge(name, False, f"not run: the {check.budget_s:.0f} s were up")
            continue
        say(f"{name}, {check.left_s:.0f} s left")
        try:
            STEPS[step](check)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, UserError) as error:
            check.judge(name, False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every verdict passed, 1 when one failed, 2 for bad arguments or no GPU."""
    args = parser().parse_args(argv)
    try:
        check = checked(args)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="twinpilots-cache-") as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # rates are measured anew: no profile of an earlier run, nor one left behind
        run_steps(check)
    say(table(check))
    say(f"written to {write_result(check, args.out)}")
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
