"""Pictures of a plan: they can be opened, an html page needs nothing else and names every task, deep models show their first layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.planning import DEMO, RTX_4090, llama, llama_70b, memory_of, workload
from twinpilots.errors import UserError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.figures import SHOWN_LAYERS, batch_figures, batch_points, pass_figures
from twinpilots.plan.picture import COLOURS, category, plot
from twinpilots.plan.plan import POLICIES
from twinpilots.plan.report import plan_document
from twinpilots.plan.solver import solve
from twinpilots.plan.tasks import QUEUES


def pictured(spec: ModelSpec, profile: HardwareProfile, counts: tuple[int, ...]) -> dict[str, Any]:
    limits = memory_of(profile)
    solutions = [(count, solve(spec, profile, workload(count, 64, 8), limits)) for count in counts]
    count, last = solutions[-1]
    document = plan_document(last, spec, profile, workload(count, 64, 8), limits)
    return {**document, **pass_figures(spec, profile, last), **batch_figures(solutions)}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return pictured(llama(), DEMO, (1, 2, 3))


@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_pictures_can_be_opened(document: dict[str, Any], ending: str, begin: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(document, tmp_path / f"plan.{ending}")
    data = (tmp_path / f"plan.{ending}").read_bytes()
    assert data.startswith(begin) and (ending == "png" or b"</svg>" in data)


def test_a_page_stands_alone_and_every_task_has_a_title(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(document, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    tasks = [group for group in drawing.iter() if re.fullmatch(r"task\d+", group.get("id", ""))]
    assert len(tasks) == len(document["pass"]["tasks"]) and all(group[0].tag.endswith("title") for group in tasks)
    assert all(re.search(r"(layer \d+|head).*: [\d.]+ to [\d.]+ ms", group[0].text or "") for group in tasks)
    links = {element.get(name, "") for element in drawing.iter() for name in ("href", "{http://www.w3.org/1999/xlink}href", "src")}
    assert all(link == "" or link.startswith("#") for link in links), "nothing is fetched"
    assert "<script" not in page and "@import" not in page
    words = "".join(drawing.itertext())
    assert all(policy in words for policy in POLICIES) and "hardware bound" in words and "plan bound" in words and "emulated" in words


def test_every_task_has_a_place_a_colour_and_a_load(document: dict[str, Any]) -> None:
    tasks = document["pass"]["tasks"]
    assert {task["queue"] for task in tasks} <= set(QUEUES)
    assert all(category(task) in COLOURS and 0 <= task["start_s"] <= task["end_s"] and task["dram_frac"] >= 0 for task in tasks)
    assert {task["layer"] for task in tasks if task["queue"] in ("cpu", "gpu")} == {-1, 0, 1, 2, 3}, "a shallow model is shown whole, with its head"
    assert sum(task["dram_frac"] * (task["end_s"] - task["start_s"]) for task in tasks) > 0


def test_a_deep_model_shows_its_first_layers(tmp_path: Path) -> None:
    document = pictured(llama_70b(), RTX_4090, (2,))
    tasks = document["pass"]["tasks"]
    computed = {task["layer"] for task in tasks if task["queue"] in ("cpu", "gpu")}
    assert set(range(SHOWN_LAYERS)) <= computed <= set(range(SHOWN_LAYERS + 1))
    assert (document["pass"]["shown_layers"], document["pass"]["num_layers"]) == (SHOWN_LAYERS, 80)
    assert max(task["end_s"] for task in tasks) < document["pass"]["seconds"] / 10
    pytest.importorskip("matplotlib")
    plot(document, tmp_path / "deep.svg")


def test_batches_are_powers_of_two_and_the_workloads_own() -> None:
    assert batch_points(1) == [1] and batch_points(16) == [1, 2, 4, 8, 16] and batch_points(12) == [1, 2, 4, 8, 12]


def test_the_curve_has_every_policy_and_both_bounds(document: dict[str, Any]) -> None:
    assert [batch["max_num_seqs"] for batch in document["batches"]] == [1, 2, 3]
    for batch in document["batches"]:
        rates = [rate for rate in batch["policies"].values() if rate is not None]
        assert set(batch["policies"]) == set(POLICIES) and max(rates) <= batch["plan_bound"] * 1.0001 <= batch["hardware_bound"] * 1.0002


def test_a_picture_of_an_unknown_kind_or_place_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.png, \.svg, \.html"):
        plot(document, tmp_path / "plan.docx")
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="cannot write"):
        plot(document, tmp_path / "nowhere" / "plan.png")
