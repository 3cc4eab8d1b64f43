"""Four-bit weights of GPTQ and AWQ checkpoints, as their tools pack them into safetensors, turned exactly into row blocks of ours.

Owns: `PackedWeights` (the modules of one checkpoint that are packed) and the checks of ``quantization_config``. A weight is scale * (code - zero) in both.
Sources: AutoGPTQ's and GPTQModel's ``qlinear`` (codes of eight inputs to a word, zero points stored less one), AutoAWQ's ``WQLinear_GEMM`` (codes of eight
outputs to a word, in the order `AWQ_ORDER`). Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from twinpilots.errors import CheckpointError, UnsupportedModelError
from twinpilots.kernels.quant_format import dequantize
from twinpilots.model.safetensors_file import SafetensorsFile, StoredTensor
from twinpilots.model.tensors import Array, RawTensor
from twinpilots.model.weight_format import FORMATS, WeightFormat

FIELD = "quantization_config"
PER_WORD = 8  # 4-bit codes in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds output AWQ_ORDER[i] of its eight
GROUPS = (128, 64, 32)  # of our formats; a larger group is cut into several with the same scale
TILE_ROWS = 1024  # outputs converted at a time


@dataclass(frozen=True, kw_only=True)
class PackedConfig:
    """A checked ``quantization_config``. ``group_size`` None: one group for all inputs. ``zero_offset`` is added to stored zero points."""

    method: str
    group_size: int | None
    zero_offset: int

    def format_for(self, num_inputs: int) -> WeightFormat | None:
        """The format that holds a weight with so many inputs exactly, None when its groups cannot be cut into ours."""
        group = gcd(self.group_size or num_inputs, num_inputs)
        size = next((size for size in GROUPS if group % size == 0), None)
        return None if size is None else FORMATS[f"q4_z{size}"]


def packed_config(config: Mapping[str, Any], where: str) -> PackedConfig | None:
    """What ``quantization_config`` says, None when there is none. UnsupportedModelError for anything but 4-bit GPTQ without reordering and AWQ's gemm."""
    raw = config.get(FIELD)
    if raw is None:
        return None
    method = raw.get("quant_method") if isinstance(raw, dict) else raw
    if method not in ("gptq", "awq"):
        raise UnsupportedModelError(f"{where}: {FIELD} with quant_method {str(method)[:40]!r} is not supported; supported are gptq and awq, 4 bits")

    def refuse(what: str, instead: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{where}: {method} weights with {what} are not supported; {instead}")

    bits = raw.get("bits", raw.get("w_bit"))
    if bits != 4:
        raise refuse(f"bits = {str(bits)[:40]}", "use a 4-bit checkpoint, or the original with --quantization")
    group = raw.get("group_size", raw.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and (group < 1 or group % GROUPS[-1])):
        raise refuse(f"group_size = {str(group)[:40]}", "use one with a multiple of 32, or -1")
    zero_offset = 0
    if method == "gptq":
        layout = raw.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise refuse(f"checkpoint_format {str(layout)[:40]!r}", "use one in the format gptq or gptq_v2")
        zero_offset = 1 if layout == "gptq" else 0
    elif str(raw.get("version", "gemm")).lower() != "gemm":
        raise refuse(f"version {str(raw['version'])[:40]!r}", "use one in the version gemm")
    return PackedConfig(method=method, group_size=None if group == -1 else group, zero_offset=zero_offset)


class PackedWeights:
    """The packed modules among a checkpoint's tensors, presented as one ``NAME.weight`` each."""

    def __init__(self, config: PackedConfig, owners: Mapping[str, SafetensorsFile], where: str) -> None:
        self._config, self._owners, self._where = config, owners, where
        modules = [name.removesuffix(".qweight") for name in owners if name.endswith(".qweight")]
        self.shapes = {f"{module}.weight": self._check(module) for module in modules}
        found = {name: config.format_for(shape[1]) for name, shape in self.shapes.items()}
        for name, chosen in found.items():
            if chosen is None:
                raise UnsupportedModelError(f"{where}: tensor '{name}' has {self.shapes[name][1]} inputs, whose groups are no multiples of {GROUPS[-1]}")
        self.formats: dict[str, WeightFormat] = {name: chosen for name, chosen in found.items() if chosen is not None}

    def stored(self) -> dict[str, StoredTensor]:
        """All tensors of the checkpoint, with one weight in place of each packed module's parts."""
        parts = {f"{name.removesuffix('weight')}{part}" for name in self.shapes for part in ("qweight", "qzeros", "scales", "g_idx")}
        plain = {name: file.tensors[name] for name, file in self._owners.items() if name not in parts}
        return plain | {name: StoredTensor(shape=shape, dtype=self._config.method.upper(), start=0, stop=0) for name, shape in self.shapes.items()}

    def read(self, name: str) -> RawTensor:
        """Any tensor: packed ones dequantised."""
        if name in self.formats:
            return RawTensor(data=dequantize(self.blocks(name), self.formats[name]), dtype="fp32")
        return self._owners[name].read(name)

    def blocks(self, name: str) -> Array:
        """Row blocks of a packed weight ``[outputs, inputs]``: per group f16 scale, f16 zero, codes."""
        module, chosen, (rows, width) = name.removesuffix(".weight"), self.formats[name], self.shapes[name]
        scales, zeros = self._scales(module), self._zeros(module)
        repeat = (self._config.group_size or width) // chosen.group
        result = np.empty((rows, width // chosen.block, chosen.block_bytes), np.uint8)
        codes_of = _gptq_codes if self._config.method == "gptq" else _awq_codes
        words = self._part(module, "qweight")
        for first in range(0, rows, TILE_ROWS):
            last = min(rows, first + TILE_ROWS)
            codes = codes_of(words, first, last).reshape(last - first, -1, 2, chosen.block // 2)
            tile = result[first:last]
            for at, values in ((0, scales), (2, zeros)):
                halves = np.ascontiguousarray(np.repeat(values[:, first:last], repeat, 0).T[:, : tile.shape[1]])
                tile[:, :, at : at + 2] = halves.view(np.uint8).reshape(last - first, -1, 2)
            tile[:, :, 4:] = codes[:, :, 0] | codes[:, :, 1] << 4
        return result

    def _part(self, module: str, part: str) -> Array:
        return self._owners[f"{module}.{part}"].view(f"{module}.{part}")

    def _scales(self, module: str) -> Array:
        """f16 ``[groups, outputs]``. Scales that f16 cannot hold would change the weights, and are refused."""
        raw = self._owners[f"{module}.scales"].read(f"{module}.scales")
        values = raw.float32()
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            raise CheckpointError(f"{self._where}: tensor '{module}.scales' holds {raw.dtype} values that fp16 cannot; use a checkpoint with fp16 scales")
        return halves

    def _zeros(self, module: str) -> Array:
        """f16 zero points ``[groups, outputs]``. GPTQ's first format stores them less one, modulo 16."""
        words = self._part(module, "qzeros")
        codes = _nibbles(words) if self._config.method == "gptq" else _nibbles(words)[:, :, np.argsort(AWQ_ORDER)]
        return ((codes.reshape(len(words), -1) + self._config.zero_offset) & 15).astype(np.float16)

    def _check(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a module whose parts all fit together. CheckpointError names the one that does not."""
        gptq = self._config.method == "gptq"
        first, second = self._shape(module, "qweight", "I32")
        width, rows = (first * PER_WORD, second) if gptq else (first, second * PER_WORD)
        groups = 1 if self._config.group_size is None else -(-width // self._config.group_size)
        for part, dtype, expected in (("qzeros", "I32", (groups, rows // PER_WORD)), ("scales", None, (groups, rows))):
            found = self._shape(module, part, dtype)
            if found != expected:
                raise CheckpointError(f"{self._where}: tensor '{module}.{part}' has shape {list(found)}, {list(expected)} would fit its qweight")
        if f"{module}.g_idx" in self._owners:
            self._check_order(module, width)
        return rows, width

    def _shape(self, module: str, part: str, dtype: str | None) -> tuple[int, int]:
        name = f"{module}.{part}"
        stored = self._owners[name].tensors[name] if name in self._owners else None
        if stored is None:
            raise CheckpointError(f"{self._where}: tensor '{name}' is missing, {module}.qweight is there")
        if len(stored.shape) != 2 or (dtype is not None and stored.dtype != dtype):
            raise CheckpointError(f"{self._where}: tensor '{name}' is {stored.dtype} {list(stored.shape)}, a matrix of {dtype or 'F16'} is expected")
        return stored.shape[0], stored.shape[1]

    def _check_order(self, module: str, width: int) -> None:
        stored = self._owners[f"{module}.g_idx"].tensors[f"{module}.g_idx"]
        if stored.dtype != "I32":
            raise CheckpointError(f"{self._where}: tensor '{module}.g_idx' is {stored.dtype}, I32 is expected")
        order = self._part(module, "g_idx")
        if order.shape != (width,) or not np.array_equal(order, np.arange(width) // (self._config.group_size or width)):
            raise UnsupportedModelError(
                f"{self._where}: tensor '{module}.g_idx' reorders the inputs (desc_act), which is not supported; use a checkpoint made with desc_act=False"
            )


def _nibbles(words: Array) -> Array:
    """The eight 4-bit codes of every word, lowest bits first: ``[..., 8]`` uint8."""
    shifts = np.arange(0, 4 * PER_WORD, 4, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & 15).astype(np.uint8)


def _gptq_codes(words: Array, first: int, last: int) -> Array:
    """Outputs [first, last) of words ``[inputs / 8, outputs]``: ``[last - first, inputs]``."""
    part = np.ascontiguousarray(words[:, first:last].T)
    return _nibbles(part).reshape(last - first, -1)


def _awq_codes(words: Array, first: int, last: int) -> Array:
    """Outputs [first, last) (multiples of eight) of words ``[inputs, outputs / 8]``: ``[last - first, inputs]``."""
    codes = _nibbles(words[:, first // PER_WORD : last // PER_WORD])[:, :, np.argsort(AWQ_ORDER)]
    return np.ascontiguousarray(codes.reshape(len(words), -1).T)
