"""Checkpoints whose weights are quantised: as their files have them, or made so on load.

Owns `QuantizedCheckpoint`, which gives the formats of its spec whatever the files hold. Knows nothing of file formats or of which weight gets which format
(`quantization`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from twinpilots.errors import CheckpointError
from twinpilots.kernels.quant_format import dequantize, quantize
from twinpilots.model.block_cache import BlockCache
from twinpilots.model.quantization import EMBED, Stored
from twinpilots.model.spec import ModelSpec, OpName
from twinpilots.model.tensor_names import is_small, tensor_shapes
from twinpilots.model.tensors import Array, RawTensor
from twinpilots.model.weight_format import WeightFormat

ROWS_PER_JOB = 256
MOST_FP16 = 65504.0
PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}  # ops of several tensors
_OP_OF = {part: op for op, parts in PARTS.items() for part in parts}


class FileWeights(Protocol):
    """What is in the files. ``values`` gives a weight at the precision of its file; ``blocks`` those of ``stored`` (formats by tensor id) as they are."""

    spec: ModelSpec
    generation_config: dict[str, Any]
    source_dtype: str
    fingerprint: str

    @property
    def stored(self) -> Mapping[str, WeightFormat]: ...

    def values(self, tensor_id: str) -> RawTensor: ...

    def tensor(self, tensor_id: str) -> RawTensor: ...

    def blocks(self, tensor_id: str) -> Array: ...

    def close(self) -> None: ...


class QuantizedCheckpoint:
    """A `Checkpoint` in the formats of ``spec``. What the files do not hold in its format is quantised when asked for, and kept on disk for the next start."""

    def __init__(self, files: FileWeights, spec: ModelSpec) -> None:
        self.spec = spec
        self.generation_config, self.source_dtype = files.generation_config, files.source_dtype
        self.fingerprint = files.fingerprint
        self._files = files
        formats = {tensor_id: chosen for tensor_id in tensor_shapes(spec) if (chosen := tensor_format(spec, tensor_id)) is not None}
        if spec.tied:
            formats.pop(EMBED, None)  # the same tensor as lm_head
        made = {tensor_id: chosen for tensor_id, chosen in formats.items() if files.stored.get(tensor_id) != chosen}
        shapes = tensor_shapes(spec)
        blocks = {name: (shapes[name][0], shapes[name][1] // chosen.block, chosen.block_bytes) for name, chosen in made.items()}
        key = repr((files.fingerprint, [(name, chosen.name) for name, chosen in made.items()]))
        self._made = made
        self._cache = BlockCache(key, blocks) if made else None

    def tensor(self, tensor_id: str) -> RawTensor:
        """Native weights in the spec's dtype; quantised ones in fp32, exactly as they are computed with; norms and biases in fp32."""
        chosen = tensor_format(self.spec, tensor_id)
        if chosen is not None:
            return RawTensor(data=dequantize(self.blocks(tensor_id), chosen), dtype="fp32")
        return self._files.tensor(tensor_id)

    def blocks(self, tensor_id: str) -> Array:
        """Row blocks of a quantised weight."""
        tensor_id = "lm_head" if tensor_id == EMBED and self.spec.tied else tensor_id
        if tensor_id not in self._made:
            return self._files.blocks(tensor_id)
        assert self._cache is not None
        found = self._cache.get(tensor_id)
        if found is None:
            found = _quantized(self._files.values(tensor_id), self._made[tensor_id], tensor_id)
            self._cache.put(tensor_id, found)
        return found

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        self._files.close()


def tensor_format(spec: ModelSpec, tensor_id: str) -> WeightFormat | None:
    """The quantised format of one of our tensors; None for a native one."""
    layer, _, name = tensor_id.rpartition(".")
    if is_small(tensor_id) or tensor_id == "positions":
        return None
    if tensor_id == EMBED:
        chosen = spec.table_format
    else:
        op: OpName = _OP_OF.get(name, name)  # type: ignore[assignment]
        chosen = spec.format_of(int(layer) if layer else -1, op)
    return chosen if chosen.is_quantized else None


def stored_ops(spec: ModelSpec, stored: Mapping[str, WeightFormat]) -> Stored:
    """Formats by weight, given those of tensors: gate and up count as one, and as native where they differ."""
    found = {}
    for tensor_id, chosen in stored.items():
        layer, _, name = tensor_id.rpartition(".")
        op = _OP_OF.get(name, name)
        parts = [f"{layer}.{part}" if layer else part for part in PARTS.get(op, (op,))]
        if all(stored.get(part) == chosen for part in parts):
            found[f"{layer}.{op}" if layer else op] = chosen.name
    if spec.tied:
        found.pop(EMBED, None)
    return found


def check_scales(blocks: Array, chosen: WeightFormat, where: str) -> None:
    """CheckpointError for a block whose scales are infinite or undefined: the file is damaged."""
    columns = {"q6_k": (208,), "q8_0": (0,), "q4_0": (0,), "q5_0": (0,)}.get(chosen.name, (0, 2))
    for first in columns:
        halves = blocks[:, :, first + 1]  # the upper byte of a little-endian half holds its exponent
        if ((halves & 0x7C) == 0x7C).any():
            raise CheckpointError(f"{where} holds infinite or undefined scales; the file is damaged")


def _quantized(raw: RawTensor, chosen: WeightFormat, what: str) -> Array:
    """Row blocks, in parallel over rows: numpy and the native library work without Python's lock."""
    rows = raw.shape[0]
    result = np.empty((rows, raw.shape[1] // chosen.block, chosen.block_bytes), np.uint8)

    def job(row: int) -> None:
        part = RawTensor(data=raw.data[row : row + ROWS_PER_JOB], dtype=raw.dtype).float32()
        if not np.isfinite(part).all():
            raise CheckpointError(f"tensor '{what}' holds infinite or undefined weights and cannot be quantised; the file is damaged")
        largest = float(np.abs(part).max())
        if largest > MOST_FP16:  # its scale would be cut off (q4_1) or infinite (q8_0)
            raise CheckpointError(f"tensor '{what}' holds a weight of magnitude {largest:g}, above the {MOST_FP16:g} that fp16 scales hold; use --keep")
        result[row : row + ROWS_PER_JOB] = quantize(part, chosen)

    with ThreadPoolExecutor(_num_threads()) as pool:
        list(pool.map(job, range(0, rows, ROWS_PER_JOB)))
    return result


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
