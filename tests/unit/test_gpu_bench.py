"""gpu-bench's own promises: slices cover the points once, verdicts follow from figures, a worker's death costs one case, peers that are not here say why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_peers
from benchmarks.gpu_cases import num_runs
from benchmarks.gpu_gguf import tensors, write_random_gguf
from benchmarks.gpu_judge import best_bound, judge, merged, roofline_ratio
from benchmarks.gpu_points import CARD_POINTS, EMULATED_POINTS, GIB, Point, Slice, by_family
from benchmarks.gpu_stock import fill, random_block
from tests.planning import llama
from twinpilots.commands.models import model_spec
from twinpilots.errors import LimitError, UserError
from twinpilots.model.spec import RopeSpec
from twinpilots.model.tensors import to_float32

POINT = Point(model="dummy:llama-3-8b", quantization=None, kind="decode", gpu_memory=8 * GIB, num_seqs=1, context=512, against_peers=True)
SMALL = replace(
    llama(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=128, dtype="bf16", max_model_len=64),
    ropes=(RopeSpec(rotary_dim=16, inv_freq=tuple(10_000.0 ** (-i / 8) for i in range(8))),),
)


# -- points and slices -----------------------------------------------------------------------------------------------------------------------


def test_the_points_are_those_that_were_asked_for() -> None:
    assert 16 <= len(CARD_POINTS) <= 24
    assert {point.gpu_memory for point in CARD_POINTS} == {8 * GIB, 16 * GIB, 24 * GIB}
    assert {point.family for point in CARD_POINTS} == {
        ("dummy:opt-30b", None), ("dummy:qwen2.5-32b", None), ("dummy:llama-3-8b", None), ("dummy:llama-3-70b", "int4"),
    }  # fmt: skip
    assert (min(point.num_seqs for point in CARD_POINTS), max(point.num_seqs for point in CARD_POINTS)) == (1, 256)
    assert len({point.name for point in CARD_POINTS}) == len(CARD_POINTS), "results are kept by name"
    for point in CARD_POINTS:
        spec, workload = point.spec, point.workload
        assert workload.seq_len <= spec.max_model_len
        kv_bytes = point.num_seqs * workload.seq_len * spec.kv_bytes_per_token(spec.weight_dtype)
        assert spec.linear_bytes + spec.embedding_bytes + kv_bytes < 108 * GIB, f"{point.name}: a host of 128 GiB keeps some for itself"


@pytest.mark.parametrize("count", range(1, 9))
def test_slices_are_all_points_each_once_and_about_alike(count: int) -> None:
    parts = [Slice(number=number, count=count).take(CARD_POINTS) for number in range(1, count + 1)]
    assert [point for part in parts for point in part] == list(CARD_POINTS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_slice_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="1 <= i <= n"):
        Slice.of(text)


def test_a_decode_point_is_planned_for_decoding_and_holds_its_passes() -> None:
    assert POINT.workload.seq_len == 512 + 64 and POINT.workload.output_len > POINT.workload.input_len
    assert replace(POINT, kind="prefill").workload.output_len == 1


def test_points_of_one_model_are_measured_together() -> None:
    assert [len(points) for points in by_family(EMULATED_POINTS)] == [3, 1]


# -- passes and weights ----------------------------------------------------------------------------------------------------------------------


def test_as_many_passes_as_the_time_allows_and_never_too_few() -> None:
    assert num_runs("auto", 0.05, 60.0) == (3, 16)
    assert num_runs("stream", 1.0, 60.0) == (2, 8)
    assert num_runs("stream", 1.0, 7.0) == (2, 5)
    assert num_runs("flexgen", 1.0, 60.0) == (2, 4)
    with pytest.raises(LimitError, match=r"5 passes of 10 s \(predicted\)"):
        num_runs("auto", 10.0, 49.0)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_whatever_a_layout_finds_in_the_stock_is_finite(quantization: Any) -> None:
    spec = model_spec("dummy:smollm2-135m", quantization=quantization)
    block = random_block(spec)
    for shift in (0, 1) if quantization else (0,):  # a block of quantised weights may begin anywhere
        raw = block[shift : len(block) - shift]
        assert np.isfinite(raw.view(np.float16)).all()
        assert np.isfinite(to_float32(raw.view(np.uint16), "bf16")).all()
        assert np.isfinite(raw[: len(raw) // 4 * 4].view(np.float32)).all(), "and so is what lies in a buffer before its first use"
    assert len(np.unique(block)) > 16


def test_memory_is_filled_to_the_last_byte_by_several_threads() -> None:
    target, block = np.zeros(10_001, np.uint8), np.arange(1, 100, dtype=np.uint8)
    fill(target, block, 3)
    assert np.array_equal(target, np.resize(block, len(target)))


# -- verdicts --------------------------------------------------------------------------------------------------------------------------------


def figures(rate: float, **changes: Any) -> dict[str, Any]:
    values = {
        "tokens_per_s": rate, "predicted": rate * 1.02, "plan_bound": 10.0, "hardware_bound": 10.0, "efficiency": rate / 10.0, "driver_frac": 0.01,
        "footprint_bytes": 8 * GIB, "gpu_memory": 8 * GIB, "finite": True, "weights_frac": {"resident": 0.4, "streamed": 0.3, "cpu": 0.3},
        "launches": {"launched": 10, "captured": 5, "replayed": 90, "host_ns": 100_000_000, "waits_on_device": 40, "waits_by_polling": 2},
        "device_waits": "yes",
        "seconds": 1.0, "busy_s": {"cpu": 0.5, "gpu": 0.2, "link": 0.9},
    }  # fmt: skip
    return values | changes


def result(**changes: Any) -> dict[str, Any]:
    return {"ok": True, "detail": "", "seconds": 1.0, "figures": figures(**changes)}


def document(auto: Mapping[str, Any] | None = None, stream: Mapping[str, Any] | None = None, *, point: Point = POINT, **changes: Any) -> dict[str, Any]:
    """One point, at which everything is as it should be."""
    results = {"auto": result(**({"rate": 9.0} | dict(auto or {}))), "stream": result(**({"rate": 3.0} | dict(stream or {})))}
    rates = {"link_up_bytes_per_s": 50e9, "cpu_read_bytes_per_s": 100e9, "dram_bytes_per_s": 120e9}
    values = {
        "schema": 1, "benchmark": "gpu", "commit": "abc", "gpu": "H100", "emulated": False, "slice": "1/2", "seconds": 10.0, "date": "2026-01-01",
        "families": [{"model": point.model, "quantization": point.quantization, "rates": rates}],
        "points": [{**asdict(point), "name": point.name, "results": results, "peers": {}}],
    }  # fmt: skip
    return values | changes


def verdicts(found: Mapping[str, Any]) -> dict[str, bool | None]:
    return {verdict.name: verdict.ok for verdict in judge(found)}


def test_good_figures_pass_every_verdict_that_they_bear_on() -> None:
    found = verdicts(document())
    assert {name for name, ok in found.items() if ok is None} == {
        "prefill / hardware bound", "fits entirely", "auto / llama.cpp", "auto / accelerate", "auto / FlexTensor", "auto / FreeToken",
        "device waits",
    }  # fmt: skip
    assert False not in found.values(), found


@pytest.mark.parametrize(
    ("auto", "stream", "broken"),
    [
        ({"rate": 8.4}, {}, "decode / hardware bound"),
        ({"predicted": 9.8}, {"predicted": 2.79}, "auto / stream, of the simulated"),
        ({"rate": 9.0, "predicted": 9.0}, {"rate": 4.4, "predicted": 4.4}, "auto / stream at 1 to 4 sequences"),
        ({"predicted": 7.0}, {"predicted": 2.3}, "prediction"),
        ({"driver_frac": 0.031}, {}, "step loop"),
        ({"footprint_bytes": 8 * GIB + (2 << 20)}, {}, "memory promise"),
        ({}, {"finite": False}, "finite logits"),
        ({"launches": {"launched": 100}}, {}, "graphs"),
    ],
)
def test_each_threshold_fails_its_own_verdict(auto: dict[str, Any], stream: dict[str, Any], broken: str) -> None:
    found = verdicts(document(auto, stream))
    assert [name for name, ok in found.items() if ok is False] == [broken]


def test_how_the_card_waits_is_shown_with_the_reason() -> None:
    def shown(**changes: Any) -> str:
        return next(verdict.detail for verdict in judge(document(changes)) if verdict.name == "device waits")

    assert shown() == "yes: auto's passes made 40 waits for the CPU on the card, and polled 2 times for launches of its other queues"
    assert shown(device_waits="no: host memory is not mapped") == "no: host memory is not mapped"
    assert shown(launches={}, device_waits=None) == "no instructions on a card"


def test_the_roofline_ratio_is_dram_bound_where_both_together_ask_for_more() -> None:
    rates = {"link_up_bytes_per_s": 50e9, "cpu_read_bytes_per_s": 100e9, "dram_bytes_per_s": 120e9}
    assert roofline_ratio(rates) == pytest.approx(2.4)
    assert roofline_ratio(rates | {"dram_bytes_per_s": 300e9}) == pytest.approx(3.0)


def test_what_fits_entirely_must_be_resident() -> None:
    found = document()
    found["points"][0]["results"]["resident"] = result(rate=9.0)
    assert verdicts(found)["fits entirely"] is False
    found["points"][0]["results"]["auto"]["figures"]["weights_frac"] = {"resident": 1.0, "streamed": 0.0, "cpu": 0.0}
    assert verdicts(found)["fits entirely"] is True


def test_the_bound_of_a_point_is_the_best_that_any_policys_passes_allow() -> None:
    found = document(stream={"hardware_bound": 12.0})
    assert best_bound(found["points"][0]) == 12.0 and verdicts(found)["decode / hardware bound"] is False


@pytest.mark.parametrize(("num_seqs", "theirs", "ok"), [(1, 9.0, True), (1, 9.1, False), (8, 6.0, True), (8, 6.1, False), (32, 3.0, True), (32, 3.1, False)])
def test_llama_cpp_is_beaten_by_as_much_as_was_promised(num_seqs: int, theirs: float, ok: bool) -> None:
    found = document(point=replace(POINT, num_seqs=num_seqs))
    found["points"][0]["peers"] = {"llama.cpp": {"tokens_per_s": theirs, "reason": None}, "accelerate": {"tokens_per_s": None, "reason": "not here"}}
    assert verdicts(found)["auto / llama.cpp"] is ok
    assert {verdict.name: verdict.detail for verdict in judge(found)}["auto / accelerate"] == "not here"


def test_peers_against_which_nothing_was_promised_are_shown_and_not_judged() -> None:
    found = document()
    found["points"][0]["peers"] = {"FlexTensor": {"tokens_per_s": 90.0, "reason": None}, "FreeToken": {"tokens_per_s": None, "reason": "it offloads experts"}}
    details = {verdict.name: verdict.detail for verdict in judge(found)}
    assert verdicts(found)["auto / FlexTensor"] is None and details["auto / FlexTensor"] == f"0.10 ({POINT.name})"
    assert details["auto / FreeToken"] == "it offloads experts"


def test_a_failed_case_fails_the_run_and_an_infeasible_one_does_not() -> None:
    found = document()
    found["points"][0]["results"]["resident"] = {"ok": None, "detail": "resident needs at least 16 GiB", "figures": None, "seconds": 0.1}
    assert verdicts(found)["cases"] is True
    found["points"][0]["results"]["flexgen"] = {"ok": False, "detail": "CUDA error", "figures": None, "seconds": 0.1}
    assert verdicts(found)["cases"] is False


def test_an_emulated_gpus_speed_is_shown_and_not_judged() -> None:
    found = verdicts(document({"rate": 1.0, "finite": False}, emulated=True))
    assert found["decode / hardware bound"] is None and found["finite logits"] is False


def test_slices_are_merged_and_judged_as_a_whole(tmp_path: Path) -> None:
    other = document({"rate": 8.0}, point=replace(POINT, num_seqs=2), slice="2/2")
    whole = merged([document(), other])
    assert (whole["slice"], whole["seconds"], len(whole["points"]), len(whole["families"])) == ("1/2, 2/2", 20.0, 2, 1)
    assert verdicts(whole)["decode / hardware bound"] is False
    with pytest.raises(UserError, match="differ in commit: abc, def"):
        merged([document(), document(commit="def")])
    with pytest.raises(UserError, match="no result"):
        merged([])


def test_results_are_drawn_as_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    found = document()
    found["points"].append({**found["points"][0], "name": "out of time", "results": {"auto": {"ok": None, "detail": "not run", "figures": None}}})
    path, picture = tmp_path / "one.json", tmp_path / "points.png"
    path.write_text(json.dumps(found))
    assert gpu.main(["--plot", str(picture), str(path)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "drawn to" in capsys.readouterr().out
    assert gpu.main(["--plot", str(tmp_path / "points.svg"), str(path)]) == 2
    assert gpu.main(["--plot", str(picture), str(tmp_path / "none.json")]) == 2


# -- the run ---------------------------------------------------------------------------------------------------------------------------------


def a_run(points: tuple[Point, ...] = (POINT,), policies: tuple[str, ...] = ("auto", "stream", "cpu")) -> gpu.Run:
    return gpu.Run(
        device="emulated:demo", commit="abc", part=Slice(number=1, count=1), points=points, policies=policies, peers_at=gpu_peers.Where(device="emulated:demo"),
        budget_s=60.0,
    )  # fmt: skip


def test_urgent_policies_come_first_and_a_worker_that_dies_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, str]]] = []

    def events(_module: str, _kind: str, task: Any, **_limits: float) -> Iterator[dict[str, Any]]:
        seen.append(list(task.cases))
        yield {"event": "rates", "rates": {"link_up_bytes_per_s": 1e9}, "profile": {}}
        for index, policy in task.cases:
            yield {"event": "begin", "point": index, "policy": policy}
            if (index, policy) == (0, "stream"):
                yield {"event": "end", "reason": "its process ended with exit code -11"}
                return
            yield {"event": "case", "point": index, "policy": policy, "ok": None, "detail": "too small", "figures": None, "seconds": 0.1}
        yield {"event": "end", "reason": None}

    monkeypatch.setattr(gpu, "events_of", events)
    run = a_run((POINT, replace(POINT, num_seqs=2)))
    gpu.measure_families(run)
    assert seen[0] == [(0, "auto"), (0, "stream"), (1, "auto"), (1, "stream"), (0, "cpu"), (1, "cpu")]
    assert seen[1:] == [[(1, "auto"), (1, "stream"), (0, "cpu"), (1, "cpu")]] and len(run.families) == 1
    results = run.results[POINT]
    assert {policy: results[policy]["ok"] for policy in results} == {"auto": None, "stream": False, "cpu": None}
    assert "-11" in results["stream"]["detail"] and set(run.results[run.points[1]]) == {"auto", "stream", "cpu"}


def test_a_worker_that_can_never_start_is_given_up_and_every_case_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "events_of", lambda *_, **__: iter([{"event": "end", "reason": "its process ended with exit code 1"}]))
    run = a_run(policies=("auto", "stream", "cpu", "flexgen"))
    gpu.measure_families(run)
    assert [result["ok"] for result in run.results[POINT].values()] == [False, False, False, None]
    assert all("exit code 1" in result["detail"] for result in run.results[POINT].values())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "tpu"], ["--device=emulated:demo", "--policies=fast"], ["--device=emulated:demo", "--points=gpt-5"], ["a.json"],
        ["--device=emulated:demo", "--peers=/no/such/folder"],
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        gpu.checked(gpu.parser().parse_args(arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_no_gpu_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--slice", "1/3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- llama.cpp's file ------------------------------------------------------------------------------------------------------------------------


def test_the_gguf_for_llama_cpp_holds_the_models_shapes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    write_random_gguf(SMALL, path)
    reader = gguf.GGUFReader(path)
    assert {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors} == dict(tensors(SMALL))
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert np.isfinite(to_float32(np.frombuffer(reader.tensors[3].data.tobytes(), np.uint16), "bf16")).all()
    assert reader.fields["llama.rope.freq_base"].contents() == pytest.approx(10_000.0, rel=1e-4)
    with pytest.raises(UserError, match="no plain llama"):
        write_random_gguf(replace(SMALL, qkv_bias=True), path)
