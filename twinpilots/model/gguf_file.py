"""Reading GGUF files, memory-mapped: metadata, tensor table, tensors as their blocks or dequantised.

Owns: `GgufFile`. The header is parsed here, because it is untrusted and because the gguf package takes seconds over a vocabulary; the package is
imported only for types that we cannot keep packed. Knows nothing of architectures (see `gguf_config`).
"""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from typing import Any

import numpy as np

from twinpilots.errors import CheckpointError, UnsupportedModelError, UserError
from twinpilots.kernels.quant_format import dequantize
from twinpilots.model.safetensors_file import StoredTensor, check_layout
from twinpilots.model.spec import WeightDtype
from twinpilots.model.tensors import NUMPY_DTYPES, Array, RawTensor
from twinpilots.model.weight_format import FORMATS, WeightFormat

MAGIC = b"GGUF"
MAX_ENTRIES = 1_000_000
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_PLAIN: dict[int, WeightDtype] = {0: "fp32", 1: "fp16", 30: "bf16"}
_PLAIN_NAMES = {0: "F32", 1: "F16", 30: "BF16"}
_PACKED: dict[int, WeightFormat] = {
    2: FORMATS["q4_0"], 3: FORMATS["q4_1"], 6: FORMATS["q5_0"], 7: FORMATS["q5_1"], 8: FORMATS["q8_0"], 12: FORMATS["q4_k"], 13: FORMATS["q5_k"],
    14: FORMATS["q6_k"],
}  # fmt: skip


class GgufFile:
    """One open GGUF file: ``fields`` (metadata), ``tensors`` (shapes in row-major order, outermost first), `read`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._map: Array | None = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        cursor = _Cursor(self._map, str(path))
        self.fields, num_tensors = _read_fields(cursor)
        self.tensors, self._types = self._read_table(cursor, num_tensors)

    def source_dtype(self, name: str) -> str:
        """fp32, fp16 or bf16 for plain tensors, the quantisation's name (Q4_1, ...) otherwise."""
        return _PLAIN.get(self._types[name]) or self.tensors[name].dtype

    def is_quantized(self, name: str) -> bool:
        return self._types[name] not in _PLAIN

    def packed_format(self, name: str) -> WeightFormat | None:
        """The format of a tensor that can be computed with as it lies in the file; None for plain and for other quantised types."""
        return _PACKED.get(self._types[name])

    def blocks(self, name: str) -> Array:
        """Row blocks of such a tensor ``[rows, columns]``: a view of the file."""
        stored, packed = self.tensors[name], _PACKED[self._types[name]]
        assert self._map is not None, "read after close"
        data = self._map[stored.start : stored.stop].view(np.ndarray)
        return data.reshape(-1, stored.shape[-1] // packed.block, packed.block_bytes)

    def read(self, name: str) -> RawTensor:
        """The tensor: plain types as stored, quantised types dequantised to fp32. Safe to call from several threads."""
        stored = self.tensors[name]
        assert self._map is not None, "read after close"
        data = self._map[stored.start : stored.stop].view(np.ndarray)
        plain = _PLAIN.get(self._types[name])
        if plain is not None:
            if data.ctypes.data % 4 and data.size:
                data = data.copy()
            return RawTensor(data=data.view(NUMPY_DTYPES[plain]).reshape(stored.shape), dtype=plain)
        if self._types[name] in _PACKED:
            with np.errstate(all="ignore"):
                values = dequantize(self.blocks(name), _PACKED[self._types[name]])
        else:
            values = self._dequantized(name, data)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: tensor '{name}' holds infinite or undefined weights; the file is damaged")
        return RawTensor(data=np.ascontiguousarray(values, dtype=np.float32).reshape(stored.shape), dtype="fp32")

    def _dequantized(self, name: str, data: Array) -> Array:
        """A tensor of a type that only the gguf package knows."""
        stored = self.tensors[name]
        gguf = import_gguf(str(self.path))
        try:
            rows = data.reshape(-1, data.size // max(1, stored.num_elements // stored.shape[-1]))
            with np.errstate(all="ignore"):
                return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(self._types[name])))
        except (NotImplementedError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path}: tensor '{name}' of type {stored.dtype} cannot be dequantised: {error}") from error

    def close(self) -> None:
        self._map = None

    def _read_table(self, cursor: _Cursor, count: int) -> tuple[dict[str, StoredTensor], dict[str, int]]:
        raw = [_read_info(cursor) for _ in range(count)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise CheckpointError(f"{self.path}: field 'general.alignment' is {alignment!r}")
        base = -(-cursor.position // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        types: dict[str, int] = {}
        for name, shape, kind, offset in raw:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor '{name[:120]}' is declared twice")
            tensors[name] = self._check_tensor(name, shape, kind, base + offset, cursor.size)
            types[name] = kind
        check_layout(self.path, tensors, base)
        return tensors, types

    def _check_tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> StoredTensor:
        where = f"{self.path}: tensor '{name[:120]}'"
        block, block_bytes, type_name = _type_size(kind, where, str(self.path))
        elements = 1
        for extent in shape:
            elements *= extent
        if not shape or elements == 0 or shape[-1] % block:
            raise CheckpointError(f"{where}: bad shape {list(shape)} for type {type_name}, which packs {block} values")
        stop = start + elements // block * block_bytes
        if stop > size:
            raise CheckpointError(f"{where}: truncated file: its data ends at byte {stop}, the file has {size}")
        return StoredTensor(shape=shape, dtype=type_name, start=start, stop=stop)


def import_gguf(where: str) -> Any:
    """The gguf package with its dequantisers, or an error that names the extra to install."""
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ImportError as error:
        known = ", ".join([*_PLAIN_NAMES.values(), *(packed.name.upper() for packed in _PACKED.values())])
        raise UserError(f"{where}: tensors of other types than {known} need the gguf package; install it with: pip install 'twinpilots[gguf]'") from error


class _Cursor:
    """A position in the mapped file; every step is checked against the file's end."""

    def __init__(self, data: Array, where: str) -> None:
        self._bytes = data.view(np.ndarray).data.cast("B")
        self.size = len(self._bytes)
        self.position = 0
        self.where = where

    def take(self, count: int) -> memoryview:
        if count > self.size - self.position:
            raise CheckpointError(f"{self.where}: truncated GGUF header: {count} bytes wanted at byte {self.position} of {self.size}")
        self.position += count
        return self._bytes[self.position - count : self.position]

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return str(self.take(self.scalar("<Q")), "utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """As many texts one after the other: what `string` gives, without its calls, which take most of a start with a vocabulary of 262,144."""
        data, size, at, found, length_at = self._bytes, self.size, self.position, list[str](), struct.Struct("<Q").unpack_from
        for _ in range(count):
            end = at + 8 + (length_at(data, at)[0] if at + 8 <= size else size)
            if end > size:
                break
            found.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        self.position = at
        return found if len(found) == count else [*found, self.string()]  # which says what is wrong

    def count(self, layout: str, what: str) -> int:
        value = int(self.scalar(layout))
        if value > MAX_ENTRIES:
            raise CheckpointError(f"{self.where}: the header claims {value} {what}, at most {MAX_ENTRIES} are read")
        return value


def _read_fields(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The metadata and the number of tensors."""
    if cursor.size < 4 or bytes(cursor.take(4)) != MAGIC:
        raise CheckpointError(f"{cursor.where}: not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise UnsupportedModelError(f"{cursor.where}: GGUF version {version} is not supported; versions 2 and 3 (little-endian) are")
    num_tensors, num_fields = cursor.count("<Q", "tensors"), cursor.count("<Q", "metadata fields")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.string()
        if key in fields:
            raise CheckpointError(f"{cursor.where}: metadata field '{key[:80]}' appears twice")
        fields[key] = _read_value(cursor, cursor.scalar("<I"), key)
    return fields, num_tensors


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.where}: metadata field '{key[:80]}' has unknown type {kind}")
    item, count = cursor.scalar("<I"), cursor.scalar("<Q")
    if item == _STRING:
        if count > cursor.size // 8:  # a text takes at least its 8-byte length
            raise CheckpointError(f"{cursor.where}: truncated GGUF header: field '{key[:80]}' claims {count} texts")
        return cursor.strings(count)
    if item not in _SCALARS:
        raise CheckpointError(f"{cursor.where}: metadata field '{key[:80]}' is an array of unknown type {item}")
    layout = np.dtype(_SCALARS[item])
    return np.frombuffer(cursor.take(count * layout.itemsize), dtype=layout).tolist()


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("<I")
    if num_dims > 4:
        raise CheckpointError(f"{cursor.where}: tensor '{name[:120]}' claims {num_dims} dimensions, GGUF has at most 4")
    shape = tuple(int(cursor.scalar("<Q")) for _ in range(num_dims))[::-1]  # GGUF lists the innermost extent first
    return name, shape, int(cursor.scalar("<I")), int(cursor.scalar("<Q"))


def _type_size(kind: int, where: str, path: str) -> tuple[int, int, str]:
    """(values per block, bytes per block, name) of a tensor type."""
    if kind in _PLAIN:
        return 1, np.dtype(NUMPY_DTYPES[_PLAIN[kind]]).itemsize, _PLAIN_NAMES[kind]
    if kind in _PACKED:
        return _PACKED[kind].block, _PACKED[kind].block_bytes, _PACKED[kind].name.upper()
    gguf = import_gguf(path)
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: unknown tensor type {kind}") from error
    return int(block), int(block_bytes), str(quantization.name)
