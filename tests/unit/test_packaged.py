"""Models that Python packages carry: a file is taken where it lies, parts become one file once, and what is damaged or missing is one clear error."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from twinpilots.errors import CheckpointError, UserError
from twinpilots.model import packaged
from twinpilots.model.locate import resolve_model
from twinpilots.model.packaged import Packaged

PARTS = [b"GGUF" + bytes(range(256)) * 8000, b"and the rest"]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages with a part each; importing them is an error. ``whole-model`` is known by its sha256, and the cache is empty."""
    for number, content in enumerate(PARTS):
        data = tmp_path / "site" / f"carrier_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise AssertionError('imported')")
        (data / f"model.gguf.part0{number}").write_bytes(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = Packaged(packages=("carrier_part0", "carrier_part1"), pip="pip install carrier", sha256=hashlib.sha256(b"".join(PARTS)).hexdigest())
    monkeypatch.setitem(packaged.PACKAGED, "whole-model", entry)
    return tmp_path / "site"


def test_parts_are_put_together_once(installed: Path) -> None:
    found = resolve_model("whole-model")
    assert (found.kind, found.name, found.files.read_bytes()) == ("gguf", "whole-model", b"".join(PARTS))
    written = found.files.stat().st_mtime_ns
    assert resolve_model("whole-model").files.stat().st_mtime_ns == written, "it was written again"
    found.files.write_bytes(b"GGUF")  # cut short
    assert resolve_model("whole-model").files.read_bytes() == b"".join(PARTS)
    assert [path.name for path in found.files.parent.iterdir()] == [found.files.name], "something was left behind"


def test_damaged_parts_leave_nothing_in_the_cache(installed: Path, tmp_path: Path) -> None:
    (installed / "carrier_part1" / "data" / "model.gguf.part01").write_bytes(b"and the  est")
    with pytest.raises(CheckpointError, match=r"whole-model.*damaged.*reinstall"):
        resolve_model("whole-model")
    assert list((tmp_path / "cache" / "twinpilots" / "packaged").iterdir()) == []


def test_a_missing_part_is_a_package_to_install(installed: Path) -> None:
    (installed / "carrier_part0" / "data" / "model.gguf.part00").unlink()
    with pytest.raises(UserError, match="pip install carrier"):
        resolve_model("whole-model")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"whole-model comes in 2 parts.*XDG_CACHE_HOME"):
        resolve_model("whole-model")


def test_a_whole_file_is_used_where_it_lies(installed: Path) -> None:
    whole = installed / "carrier_part0" / "model.gguf"
    whole.write_bytes(b"GGUF")
    assert resolve_model("whole-model").files == whole
