"""What all tests share: one thread per library, a cache directory of their own, marks by folder, zoo models made once, a machine that never changes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.harness import SavedModel, ZooModel

# Before numpy or torch are first imported: the suite's own pilots count their threads, and a library's pool beside them is noise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parent
MARKED_FOLDERS = ("gpu", "emulated", "cpu")

with contextlib.suppress(ImportError):  # a bare GPU box runs tests/gpu without it
    from hypothesis import HealthCheck, settings

    # The box is shared: how long an example takes says nothing about the code.
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from twinpilots.doctor import usable_cuda_device

    without_gpu = pytest.mark.skip(reason="no usable CUDA device")
    has_gpu = usable_cuda_device() is not None
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(without_gpu)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Profiles and converted models of this session only: a test neither sees nor changes the user's."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(path)
    yield path
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def zoo_model(tmp_path_factory: pytest.TempPathFactory) -> ZooModel:
    """zoo_model(family, seed=0, dtype="float32"): a model on disk with its prompts and reference tokens and logits, made once per session."""
    from tests.harness import save_with_references

    made: dict[tuple[str, int, str], SavedModel] = {}
    root = tmp_path_factory.mktemp("zoo")

    def get(family: str, seed: int = 0, dtype: str = "float32") -> SavedModel:
        key = family, seed, dtype
        if key not in made:
            made[key] = save_with_references(family, seed, dtype, root / f"{family}-{seed}-{dtype}")
        return made[key]

    return get


@pytest.fixture
def balanced_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` plans for a slow made-up machine on which neither pilot can be spared: plans of tiny models come out mixed, and the same every time."""
    from tests.machines import machine, processor, without_gpu

    profile = machine(cpu=processor(2e6, 8e6, task_s=0.0), gpu=processor(2e7, 8e7, task_s=0.0), emulated=True)

    def fixed(device: str, *_args: Any, **_options: Any) -> Any:
        return without_gpu(profile) if device == "cpu" else profile

    monkeypatch.setattr("twinpilots.api.load_or_measure", fixed)
    monkeypatch.setattr(
        "twinpilots.plan.solver.SIMULATED_TASKS_PER_S", 100
    )  # its seconds are made up: searching in proportion to them would take longer than the rest
    monkeypatch.setattr("twinpilots.history.recall", lambda tracker: False)  # what this machine has taught one test is no other test's business
