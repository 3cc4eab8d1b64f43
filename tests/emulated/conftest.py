"""Fixtures of the emulated tests: zoo models with their references, made once per session, and a fixed profile instead of a measured one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import SavedModel, save_with_references
from tests.machines import machine, processor, without_gpu

ZooModel = Callable[..., SavedModel]


@pytest.fixture(scope="session")
def zoo_model(tmp_path_factory: pytest.TempPathFactory) -> ZooModel:
    """zoo_model(family, seed=0, dtype="float32"): a model on disk with its prompts and reference tokens and logits."""
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
    profile = machine(cpu=processor(2e6, 8e6, task_s=0.0), gpu=processor(2e7, 8e7, task_s=0.0), emulated=True)

    def fixed(device: str, *_args: Any, **_options: Any) -> Any:
        return without_gpu(profile) if device == "cpu" else profile

    monkeypatch.setattr("twinpilots.api.load_or_measure", fixed)
