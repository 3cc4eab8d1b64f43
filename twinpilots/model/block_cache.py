"""The user's cache of weights quantised on load: row blocks, memory-mapped, in ``twinpilots/quantized`` beside the converted models.

Owns `BlockCache`: one directory per (checkpoint, formats), written while the model loads for the first time, renamed into place when it is whole.
Knows nothing of what the blocks mean.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from twinpilots.model.convert_cache import cache_root
from twinpilots.units import format_bytes

logger = logging.getLogger(__name__)
Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]
SCHEMA = 1  # part of every key: a change of how weights are quantised makes old files unreachable
ALIGN_BYTES = 64
FILE, MARKER, WRITING = "blocks.bin", "complete", ".writing-"
STALE_S = 3600.0


class BlockCache:
    """Tensors of known shapes in one file, in the order of ``shapes``. `get` what is there; `put` each tensor once while nothing is."""

    def __init__(self, key: str, shapes: Mapping[str, Shape]) -> None:
        digest = hashlib.sha256(repr((SCHEMA, key, sorted(shapes.items()))).encode()).hexdigest()[:32]
        self.directory = cache_root() / "quantized" / digest
        self._shapes = dict(shapes)
        self._offsets, self._num_bytes = _layout(self._shapes)
        self._map: Bytes | None = None
        self._writing: Path | None = None
        self._stream: BinaryIO | None = None
        self._missing = set(shapes)
        self._failed = False

    def get(self, name: str) -> Bytes | None:
        """The tensor as a view of the file, None while it is not cached."""
        if self._map is None and self._is_complete():
            self._map = np.memmap(self.directory / FILE, np.uint8, mode="r")
        if self._map is None:
            return None
        shape, start = self._shapes[name], self._offsets[name]
        return self._map[start : start + int(np.prod(shape))].view(np.ndarray).reshape(shape)

    def put(self, name: str, blocks: Bytes) -> None:
        """Write one tensor; with the last one the file takes its place. A disk that refuses is one warning, and nothing is kept."""
        assert blocks.shape == self._shapes[name], f"{name}: {blocks.shape} != {self._shapes[name]}"
        if self._failed or name not in self._missing:
            return
        try:
            stream = self._stream or self._open()
            stream.seek(self._offsets[name])
            stream.write(np.ascontiguousarray(blocks).data.cast("B"))
            self._missing.discard(name)
            if not self._missing:
                self._finish(stream)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Drop the map, and what was begun but not finished."""
        self._map = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._writing is not None:
            shutil.rmtree(self._writing, ignore_errors=True)
            self._writing = None

    def _is_complete(self) -> bool:
        file = self.directory / FILE
        return (self.directory / MARKER).is_file() and file.is_file() and file.stat().st_size == self._num_bytes

    def _open(self) -> BinaryIO:
        parent = self.directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        free = shutil.disk_usage(parent).free
        if free < self._num_bytes:
            raise OSError(28, f"{format_bytes(self._num_bytes)} are needed, {format_bytes(free)} are free")
        self._writing = Path(tempfile.mkdtemp(prefix=WRITING, dir=parent))
        self._stream = (self._writing / FILE).open("wb")
        self._stream.truncate(self._num_bytes)
        return self._stream

    def _finish(self, stream: BinaryIO) -> None:
        stream.close()
        self._stream = None
        assert self._writing is not None
        (self._writing / MARKER).touch()
        if not self._is_complete():  # else another process was faster
            shutil.rmtree(self.directory, ignore_errors=True)  # a damaged one
            os.replace(self._writing, self.directory)
            self._writing = None
        self.close()

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._failed = not self._is_complete()
        if self._failed:
            logger.warning("%s cannot keep the quantised weights (%s); they are quantised again at every start", self.directory.parent, error.strerror or error)


def _layout(shapes: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and the file's size."""
    offsets, position = {}, 0
    for name, shape in shapes.items():
        offsets[name] = position
        position += -(-int(np.prod(shape)) // ALIGN_BYTES) * ALIGN_BYTES
    return offsets, position


def _sweep(parent: Path) -> None:
    """Remove what processes that died left half-written: nobody has written to it for an hour."""
    for left in parent.glob(f"{WRITING}*"):
        with suppress(OSError):
            if time.time() - (left / FILE).stat().st_mtime > STALE_S:
                shutil.rmtree(left, ignore_errors=True)
