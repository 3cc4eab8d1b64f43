"""Reading and writing safetensors files, memory-mapped, with every offset of an untrusted header checked before use.

Owns: `SafetensorsFile` (one file), `open_shards` (one model's files), `write_safetensors`. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twinpilots.errors import CheckpointError
from twinpilots.model.spec import WeightDtype
from twinpilots.model.tensors import NUMPY_DTYPES, Array, RawTensor

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_ELEMENTS = 2**48
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
FLOATS: dict[str, WeightDtype] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor as its file declares it. ``start`` and ``stop`` are byte offsets in the file. ``dtype`` is the file format's own name."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


class SafetensorsFile:
    """One open safetensors file. Tensors are views of the mapped file; `close` drops the map once no view is left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, data_size = _read_header(path)
        self._map: Array | None = np.memmap(path, dtype=np.uint8, mode="r") if data_size else np.zeros(0, np.uint8)

    def read(self, name: str) -> RawTensor:
        """The tensor as stored (fp32, fp16 or bf16). Raises CheckpointError for any other dtype."""
        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"{self.path}: tensor '{name}' has dtype {stored.dtype}; only F32, F16 and BF16 weights are supported")
        assert self._map is not None, "read after close"
        dtype = FLOATS[stored.dtype]
        data = self._map[stored.start : stored.stop].view(np.ndarray)
        if (data.ctypes.data % 4) and data.size:
            data = data.copy()  # kernels need aligned rows
        return RawTensor(data=data.view(NUMPY_DTYPES[dtype]).reshape(stored.shape), dtype=dtype)

    def view(self, name: str) -> Array:
        """A tensor of packed codes (int32) as stored."""
        stored = self.tensors[name]
        assert self._map is not None, "read after close"
        assert stored.dtype == "I32", f"{name} is {stored.dtype}"
        data = self._map[stored.start : stored.stop].view(np.ndarray)
        return (data.copy() if data.ctypes.data % 4 else data).view("<i4").reshape(stored.shape)

    def close(self) -> None:
        self._map = None


def open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> open file, for ``model.safetensors`` or the shards of ``model.safetensors.index.json``."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.exists() and single.exists():
        file = SafetensorsFile(single)
        return dict.fromkeys(file.tensors, file)
    if index.exists():
        return _open_index(directory, index)
    others = sorted(directory.glob("*.safetensors"))
    if others:
        return _merge(SafetensorsFile(path) for path in others)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(f"{directory}: {pickles[0]} is a pickle, which can run code and is never opened; convert the model to safetensors")
    raise CheckpointError(f"{directory}: no model.safetensors, model.safetensors.index.json or other *.safetensors file found")


def read_json(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError when it is missing, too long, malformed or has duplicate keys."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size} bytes of JSON, at most {max_bytes} are read")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, found {type(value).__name__}")
    return value


def write_safetensors(stream: BinaryIO, shapes: Mapping[str, tuple[tuple[int, ...], WeightDtype]], tensors: Iterable[RawTensor]) -> None:
    """Write a safetensors file. ``tensors`` come in the order of ``shapes``, one at a time, so that the model never lies in memory as a whole."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        nbytes = int(np.prod(shape)) * np.dtype(NUMPY_DTYPES[dtype]).itemsize
        header[name] = {"dtype": FLOAT_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    stream.write(len(text).to_bytes(8, "little") + text)
    for (name, (shape, dtype)), tensor in zip(shapes.items(), tensors, strict=True):
        assert tensor.shape == shape and tensor.dtype == dtype, f"{name}: {tensor.shape} {tensor.dtype} != {shape} {dtype}"
        stream.write(np.ascontiguousarray(tensor.data).data.cast("B"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key '{twice[:80]}'")
    return result


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """The checked header and the number of data bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes, a safetensors file has at least 8")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}")
            header = parse_json(stream.read(length), f"{path}: header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    data = size - 8 - length
    tensors = {name: _check_entry(path, name, entry, 8 + length, data) for name, entry in header.items()}
    check_layout(path, tensors, 8 + length)
    return tensors, data


def _check_entry(path: Path, name: str, entry: Any, base: int, data_bytes: int) -> StoredTensor:
    where = f"{path}: tensor '{name[:120]}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in shape):
        raise CheckpointError(f"{where}: bad shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two integers")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise CheckpointError(f"{where}: bad data_offsets [{str(start)[:30]}, {str(stop)[:30]}]")
    if stop > data_bytes:
        raise CheckpointError(f"{where}: truncated file: its data ends at byte {str(stop)[:30]}, the file holds {data_bytes} bytes of data")
    stored = StoredTensor(shape=tuple(shape), dtype=dtype, start=base + start, stop=base + stop)
    if stored.num_elements > MAX_ELEMENTS or (stop - start) * 8 != stored.num_elements * DTYPE_BITS[dtype]:
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} of {dtype} does not fill its {stop - start} bytes")
    return stored


def check_layout(path: Path, tensors: Mapping[str, StoredTensor], base: int) -> None:
    """Tensors must not overlap (a gap is harmless: nothing reads it)."""
    end, last = base, ""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start < end:
            raise CheckpointError(f"{path}: tensors '{last[:120]}' and '{name[:120]}' overlap")
        end, last = stored.stop, name


def _open_index(directory: Path, index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    files = {shard: SafetensorsFile(_shard_path(directory, index, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise CheckpointError(f"{index}: tensor '{name}' is missing from {shard}")
    return _merge(files.values())


def _merge(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owners: dict[str, SafetensorsFile] = {}
    for name, file in _pairs(files):
        if name in owners:
            raise CheckpointError(f"{file.path}: tensor '{name}' is also in {owners[name].path.name}")
        owners[name] = file
    return owners


def _pairs(files: Iterable[SafetensorsFile]) -> Iterator[tuple[str, SafetensorsFile]]:
    return ((name, file) for file in files for name in file.tensors)


def _shard_path(directory: Path, index: Path, shard: str) -> Path:
    """The shard's path, refused unless it names a file of this directory. (A hub cache links every file to its blobs beside the snapshots.)"""
    if not shard or "/" in shard or "\\" in shard or "\0" in shard or shard in (".", "..") or os.path.isabs(shard):
        raise CheckpointError(f"{index}: shard path '{shard[:120]}' leaves the model's directory")
    path = directory / shard
    if not path.exists():
        raise CheckpointError(f"{index}: shard {shard} is missing")
    real, roots = path.resolve(), [directory.resolve()]
    if directory.parent.name == "snapshots":
        roots.append((directory.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{index}: shard {shard} is a link to {real}, outside the model's directory")
    return path
