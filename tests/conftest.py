"""What all tests share: one thread per library, a cache directory of their own, marks by folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before numpy or torch are first imported: the suite's own pilots count their threads, and a library's pool beside them is noise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parent
MARKED_FOLDERS = ("gpu", "emulated", "cpu")


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
