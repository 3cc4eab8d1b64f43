"""gpu-check's own promises: a worker that dies costs one case, a failure fails the check, the result file is complete; and the cases, on a stand-in of CUDA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, gpu_steps
from benchmarks.gpu_check import Check, Verdict
from benchmarks.gpu_steps import TokenTask, run_tokens, token_cases
from tests.cpu.async_streams import SlowRuntime
from tests.cpu.test_cuda_standin import FakeRuntime
from twinpilots.device.cuda import CudaGpu
from twinpilots.errors import LimitError, UserError
from twinpilots.plan.plan import POLICIES
from twinpilots.runtime import torch_ops


def check(**changes: Any) -> Check:
    values: dict[str, Any] = {"device": "emulated:demo", "commit": "abc", "model": "dummy:smollm2-135m", "num_seqs": (2,), "families": ("llama",)}
    return Check(**(values | {"budget_s": 60.0} | changes))


def cases_on_the_stand_in(cases: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """The CUDA device's own threads, waits, copies and arithmetic, on host memory."""
    events: list[Mapping[str, Any]] = []
    run_tokens(TokenTask(device="cuda:0", cases=cases), events.append, CudaGpu(0, FakeRuntime()))
    return [event for event in events if event["event"] == "case"]


def test_cases_are_every_policy_and_hand_plans_model_by_model() -> None:
    cases = token_cases(("llama", "opt"), POLICIES, ("float32",))
    assert len(cases) == len(set(cases)) == 2 * (len(POLICIES) + gpu_steps.HAND_PLANS)
    families = [case.split("/")[0] for case in cases]
    assert families == sorted(families)


def test_fp32_cases_pass_on_the_cuda_path() -> None:
    found = cases_on_the_stand_in(("llama/float32/twinpilots", "llama/float32/resident", "llama/float32/hand-0", "gemma2/float32/hand-1"))
    assert [case["ok"] for case in found] == [True, None, True, True], found
    assert "resident needs at least" in found[1]["detail"]


def test_sixteen_bit_cases_pass_with_the_roundings_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.to(w.dtype).float(), w.float())

    monkeypatch.setattr(torch_ops, "multiply", rounded)
    found = cases_on_the_stand_in(tuple(f"{family}/{dtype}/hand-0" for family in ("llama", "gemma2") for dtype in ("bfloat16", "float16")))
    assert all(case["ok"] for case in found), found
    assert all(float(case["detail"].split()[1]) > 1e-5 for case in found), "the roundings must show"


def test_a_wrong_weight_fails_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch_ops.multiply
    monkeypatch.setattr(torch_ops, "multiply", lambda x, w: multiply(x, w) * 1.05)
    (found,) = cases_on_the_stand_in(("llama/float32/hand-0",))
    assert found["ok"] is False
    assert found["detail"].startswith("AssertionError")


def test_outcomes_name_the_cause() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors might be asynchronous")

    def does_not_fit() -> None:
        raise LimitError("needs 9 GiB")

    assert gpu_steps.outcome(fails) == {"ok": False, "detail": "RuntimeError: CUDA error: an illegal memory access"}
    assert gpu_steps.outcome(does_not_fit) == {"ok": None, "detail": "needs 9 GiB"}


def test_a_worker_that_dies_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def events(_module: str, _kind: str, task: TokenTask, **_limits: float) -> Any:
        for case in task.cases:
            yield {"event": "begin", "case": case}
            if case.endswith("cpu"):
                yield {"event": "end", "reason": "its process ended with exit code -11"}
                return
            yield {"event": "case", "case": case, "ok": True, "detail": "", "seconds": 0.1}
        yield {"event": "end", "reason": None}

    monkeypatch.setattr(gpu_check, "events_of", events)
    found = check()
    gpu_check.token_tests(found)
    assert [case["case"] for case in found.cases if not case["ok"]] == ["llama/float32/cpu"]
    assert len(found.cases) == len(POLICIES) + 2 + 2 * 4
    assert [verdict.ok for verdict in found.verdicts] == [False, True, True]


def test_kernels_that_fail_are_reported_and_a_machine_without_them_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*events: tuple[str, bool | None], reason: str | None = None, device: str = "cuda:0") -> tuple[bool | None, str]:
        told = [{"event": "case", "case": name, "ok": ok, "detail": "why", "seconds": 0.1} for name, ok in events]
        monkeypatch.setattr(gpu_check, "events_of", lambda *_, **__: [*told, {"event": "end", "reason": reason}])
        found = check(device=device)
        gpu_check.kernel_tests(found)
        assert len(found.kernels) == (len(events) if device == "cuda:0" else 0)
        return found.verdicts[0].ok, found.verdicts[0].detail

    assert run(("norm", True), ("add", True)) == (True, "2 cases agree with torch, 0 do not")
    assert run(("norm", True), ("add", False))[0] is False
    assert run(("norm", True), reason="its 90 s were up")[0] is True
    assert run(("norm", True), reason="its process ended with exit code -11")[0] is False
    assert run(("kernels", None)) == (None, "torch's operations run instead: why")
    assert run(device="emulated:demo")[0] is None


def test_graphs_are_judged_by_every_plan_and_not_where_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*events: tuple[str, bool | None], reason: str | None = None, device: str = "cuda:0") -> bool | None:
        told = [{"event": "case", "case": name, "ok": ok, "detail": "why", "seconds": 0.1} for name, ok in events]
        monkeypatch.setattr(gpu_check, "events_of", lambda *_, **__: [*told, {"event": "end", "reason": reason}])
        found = check(device=device)
        gpu_check.graph_tests(found)
        return found.verdicts[0].ok

    assert run(("plan 1", True), ("plan 2", True)) is True
    assert run(("plan 1", True), ("plan 2", False)) is False
    assert run(("plan 1", True), reason="its process ended with exit code -11") is False
    assert run() is False
    assert run(("graphs", None)) is None
    assert run(device="emulated:demo") is None


def test_waits_are_judged_by_both_ways_and_a_card_that_has_to_poll_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*events: tuple[str, bool | None], reason: str | None = None, device: str = "cuda:0") -> tuple[bool | None, str]:
        told = [{"event": "case", "case": name, "ok": ok, "detail": "no: why" if ok is None else "40", "seconds": 0.1} for name, ok in events]
        monkeypatch.setattr(gpu_check, "events_of", lambda *_, **__: [*told, {"event": "end", "reason": reason}])
        found = check(device=device)
        gpu_check.wait_tests(found)
        return found.verdicts[0].ok, found.verdicts[0].detail

    assert run(("on the device", True), ("by polling", True)) == (True, "yes; on the device: 40; by polling: 40")
    assert run(("on the device", None), ("by polling", True)) == (None, "on the device: no: why; by polling: 40")
    assert run(("on the device", None), ("by polling", False))[0] is False
    assert run(("on the device", True), ("by polling", False))[0] is False
    assert run(("on the device", True), reason="its process ended with exit code -11")[0] is False
    assert run() == (False, "")
    assert run(device="emulated:demo")[0] is None


def test_both_ways_of_waiting_are_cases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.words_case.Polling", lambda index: index)
    monkeypatch.setattr(gpu_steps, "HAND_OFF_PASSES", 2)
    for fault, ok in (("", True), ("passes", None)):

        def gpu(_index: int, runtime: Any = None, fault: str = fault) -> CudaGpu:
            return CudaGpu(0, FakeRuntime() if runtime is not None else SlowRuntime(fault=fault))

        monkeypatch.setattr("twinpilots.device.cuda.CudaGpu", gpu)
        events: list[Mapping[str, Any]] = []
        gpu_steps.run_waits(gpu_steps.WaitsTask(device="cuda:0"), events.append)
        found = [event for event in events if event["event"] == "case"]
        assert [(event["case"], event["ok"]) for event in found] == [("on the device", ok), ("by polling", True)], found
        assert ("80 hand-offs in order" if ok else "no: a stream did not wait") in found[0]["detail"]


def test_a_worker_that_cannot_start_ends_the_case_with_a_reason() -> None:
    found = gpu_check.only_case(gpu_check.STEPS_MODULE, "rates", gpu_steps.RatesTask(device="emulated:demo", model="dummy:none"), 30.0)
    assert found["ok"] is False
    assert "unknown model" in found["detail"]


def test_a_worker_out_of_time_is_killed() -> None:
    found = gpu_check.only_case(gpu_check.STEPS_MODULE, "rates", gpu_steps.RatesTask(device="emulated:demo", model="dummy:smollm2-135m"), 0.2)
    assert found["ok"] is False
    assert found["detail"] == "its 0.2 s were up"


def test_a_step_that_breaks_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_check: Check) -> None:
        raise OSError("no compiler")

    def fine(found: Check) -> None:
        found.judge("fine", True, "ran")

    steps = {"broken": broken, "fine": fine}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    found = check(steps=tuple(steps))
    gpu_check.run_steps(found)
    assert found.verdicts == [Verdict(name="broken", ok=False, detail="OSError: no compiler"), Verdict(name="fine", ok=True, detail="ran")]
    assert not found.passed
    late = check(steps=tuple(steps), budget_s=0.0)
    gpu_check.run_steps(late)
    assert [verdict.ok for verdict in late.verdicts] == [False, False], "what was not run is not passed"


def test_the_result_file(tmp_path: Path) -> None:
    found = check()
    found.judge("tokens float32", True, "all")
    written = json.loads(gpu_check.write_result(found, tmp_path / "new").read_text())
    assert (written["commit"], written["passed"], written["emulated"], written["gpu"]) == ("abc", True, True, "emulated:demo")
    assert {"rates", "points", "cases", "verdicts", "software", "seconds"} <= set(written)
    assert "a rehearsal, no proof" in gpu_check.table(found)


def test_a_broken_memory_promise_is_seen() -> None:
    assert gpu_check.breaks_promise({"footprint_bytes": 3 << 20, "gpu_memory": 1 << 20})
    assert not gpu_check.breaks_promise({"footprint_bytes": 2 << 20, "gpu_memory": 1 << 20})


FAKE_SANITIZER = """#!/bin/sh
while [ "$1" != "--log-file" ]; do shift; done
echo "========= COMPUTE-SANITIZER" > "$2"; echo "========= ERROR SUMMARY: ERRORS errors" >> "$2"
CHILD
"""
PASSED = json.dumps({"event": "case", "case": "a", "ok": True, "detail": "", "seconds": 0.1})


@pytest.mark.parametrize(
    ("errors", "child", "ok", "words"),
    [
        ("0", "cat events", True, "0 errors"),
        ("3", "cat events; exit 86", False, "3 errors"),
        ("0", "exit 86", False, "no case was run"),
        ("0", "sleep 60 & sleep 60", None, "not finished: its 1 s were up"),
    ],
)
def test_the_sanitizer_is_clean_when_it_says_so_and_its_cases_pass(
    errors: str, child: str, ok: bool | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    program = tmp_path / "compute-sanitizer"
    (tmp_path / "events").write_text(PASSED + "\n")
    program.write_text(FAKE_SANITIZER.replace("ERRORS", errors).replace("CHILD", f"cd {tmp_path}; {child}"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_check, "SANITIZER_S", 1.0 if ok is None else 20.0)
    found = check(device="cuda:0")
    gpu_check.sanitized_tests(found)
    (verdict,) = found.verdicts
    assert verdict.ok is ok and words in verdict.detail, verdict


def test_changes_of_plan_are_judged_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Mapping[str, Any]] = []
    gpu_steps.run_switches(gpu_steps.SwitchTask(device="cuda:0", family="llama", num_passes=120), events.append, CudaGpu(0, FakeRuntime()))
    assert events[-1]["ok"] and events[-1]["detail"].startswith("120 passes, 30 changes of plan"), events[-1]
    for event, ok in ((events[-1], True), ({**events[-1], "ok": False}, False)):
        monkeypatch.setattr(gpu_check, "events_of", lambda *_, event=event, **__: [event, {"event": "end", "reason": None}])
        found = check()
        gpu_check.switch_tests(found)
        assert found.verdicts[0].ok is ok


@pytest.mark.parametrize(
    "arguments", [["--steps", "rates"], ["--device", "tpu"], ["--families", "gpt5"], ["--num-seqs", "0"], ["--device=emulated:demo", "--model=dummy:none"]]
)
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        gpu_check.checked(gpu_check.parser().parse_args(arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_no_gpu_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
