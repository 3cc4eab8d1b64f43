"""Quantised weights (docs/execution.md, "Quantised formats"): made, read, packed into panels and unpacked again.

Owns three forms of a weight ``[R outputs, K inputs]`` and the ways between them:
- **row blocks**, uint8 ``[R, K / block, block_bytes]``: the interchange form between readers, quantisers and packers. Those of q4_zG are ours:
  f16 s, f16 z, G / 2 bytes with the first G / 2 codes in the low nibbles, the others in the high ones; all others are ggml's, as they lie in a GGUF file.
- **lane rows**, the same shape: each block with its bytes in the order in which one column of a panel holds them (a panel of one column is a lane row).
- **panels**, flat uint8: what the kernels read; 32-bit lanes of neighbouring columns lie beside each other.
In numpy; quantising and packing in the native library where there is one, byte for byte the same. Knows nothing of models, files or arenas.
Shapes: R rows (outputs), K inputs, B blocks per row, w columns of a panel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels import native
from twinpilots.kernels.abi import DTYPE_CODES
from twinpilots.model.weight_format import WeightFormat

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_F16_MAX = np.float32(65504)
_TILE_BYTES = 1 << 20  # row blocks converted at a time: they stay in cache


# ---- row blocks: quantise and dequantise


def quantize(weights: Floats, fmt: WeightFormat, *, pool: int = 0) -> Bytes:
    """Row blocks of ``weights [R, K]``. q8_0: the scale maps the largest magnitude to 127. q4_1: see `_quantize_q4_1`. ``pool``: native compute threads."""
    if fmt.name not in _QUANTIZERS:
        raise ValueError(f"weights can be quantised to {', '.join(_QUANTIZERS)}, not to {fmt.name}")
    rows, width = weights.shape
    if width % fmt.block:
        raise ValueError(f"rows of {width} weights are no whole number of {fmt.name}'s blocks of {fmt.block}")
    result = np.empty((rows, width // fmt.block, fmt.block_bytes), np.uint8)
    if (library := native.load()) is not None:
        library.quantize(np.ascontiguousarray(weights, np.float32), DTYPE_CODES[fmt.name], result, pool=pool)
        return result
    step = max(1, _TILE_BYTES // 4 // max(1, width))
    for row in range(0, rows, step):
        tile = np.ascontiguousarray(weights[row : row + step], np.float32).reshape(-1, fmt.block)
        result[row : row + step] = _QUANTIZERS[fmt.name](tile).reshape(-1, *result.shape[1:])
    return result


def dequantize(row_blocks: Bytes, fmt: WeightFormat) -> Floats:
    """``[R, K]`` of row blocks: the weights that the kernels compute with, in fp32."""
    rows, blocks = _shape(row_blocks, fmt)
    result = np.empty((rows, blocks, fmt.block), np.float32)
    step = max(1, _TILE_BYTES // max(1, blocks * fmt.block_bytes))
    for row in range(0, rows, step):
        part = row_blocks[row : row + step]
        scales, offsets = _scales(_lane_bytes(part, fmt), fmt)
        result[row : row + step] = _values(_row_codes(part, fmt), scales, offsets)
    return result.reshape(rows, -1)


def _quantize_q8_0(x: Floats) -> Bytes:
    d = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype(np.float16)
    q = np.clip(np.rint(x * _inverse(d)), -127, 127).astype(np.int8)
    return np.concatenate([d.view(np.uint8), q.view(np.uint8)], 1)


# The part of a block's range that is cut off below and above before the 16 levels are laid over it: the first guess of (d, m).
_SHRINK = tuple((np.float32(lo), np.float32(hi)) for lo, hi in (
    (0, 0), (0.02, 0.02), (0.04, 0.04), (0.06, 0.06), (0.09, 0.09), (0.06, 0), (0, 0.06), (0.12, 0.03), (0.03, 0.12),
))  # fmt: skip


def _quantize_q4_1(x: Floats) -> Bytes:
    """The best of some guesses of (d, m) in squared error, each refined once by least squares. Weights that lie on a q4_1 grid (d > 0) come back exactly."""
    x = x + np.float32(0)  # one zero: no block depends on the order of a minimum
    best = _Best(x)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    width = high - low
    for cut_low, cut_high in _SHRINK:
        m = low + cut_low * width
        d = ((high - cut_high * width) - m) / np.float32(15)
        q = best.offer(d, m)
        best.offer(*_least_squares(x, q, d, m))
    _offer_grids(best, low, width)
    codes = _codes_q4_1(x, best.d, best.m).astype(np.uint8)
    return np.concatenate([best.d.view(np.uint8), best.m.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1)


class _Best:
    """The best (d, m) so far of every block, by squared error."""

    def __init__(self, x: Floats) -> None:
        self.x = x
        self.error = np.full((len(x), 1), np.inf, np.float32)
        self.d, self.m = np.zeros((len(x), 1), np.float16), np.zeros((len(x), 1), np.float16)

    def offer(self, d: Floats, m: Floats, only: NDArray[np.bool_] | None = None) -> Floats:
        """Take (d, m), rounded to f16, where it is better; returns its codes."""
        d16, m16 = (np.clip(value, -_F16_MAX, _F16_MAX).astype(np.float16) for value in (d, m))
        q = _codes_q4_1(self.x, d16, m16)
        error = _sum(np.square((q * d16.astype(np.float32) + m16.astype(np.float32)) - self.x))
        better = error < self.error if only is None else (error < self.error) & only
        for kept, new in ((self.error, error), (self.d, d16), (self.m, m16)):
            np.copyto(kept, new, where=better)
        return q


def _codes_q4_1(x: Floats, d: NDArray[np.float16], m: NDArray[np.float16]) -> Floats:
    return np.clip(np.rint((x - m.astype(np.float32)) * _inverse(d)), 0, 15)


def _least_squares(x: Floats, q: Floats, d: Floats, m: Floats) -> tuple[Floats, Floats]:
    """The (d, m) that minimises |d q + m - x| for given codes; the old ones where all codes are equal."""
    n = np.float32(x.shape[1])
    sum_q, sum_x = _sum(q), _sum(x)
    determinant = n * _sum(q * q) - sum_q * sum_q
    known = determinant > 0
    better_d = (n * _sum(q * x) - sum_q * sum_x) / np.where(known, determinant, np.float32(1))
    better_m = (sum_x - better_d * sum_q) / n
    return np.where(known, better_d, d), np.where(known, better_m, m)


def _offer_grids(best: _Best, low: Floats, width: Floats) -> None:
    """Blocks whose weights are evenly spaced lie on a grid: find its step, and the code of the smallest weight."""
    for steps in range(1, 16):
        d = width / np.float32(steps)
        at = (best.x - low) * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 1e-30)
        fits = (best.error > 0) & (np.abs(at - np.rint(at)).max(1, keepdims=True) < np.float32(2e-3))
        if fits.any():
            for first in range(16 - steps):
                best.offer(d, low - np.float32(first) * d, fits)


def _sum(x: Floats) -> Floats:
    """Sums of rows of 32, by halves: a fixed order, which the native quantiser follows."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def _inverse(d: NDArray[np.float16]) -> Floats:
    wide = d.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)


_QUANTIZERS: dict[str, Callable[[Floats], Bytes]] = {"q8_0": _quantize_q8_0, "q4_1": _quantize_q4_1}


# ---- panels

# What a column of a panel block consists of, in order: ``count`` pieces of ``size`` bytes. In a panel, piece i of all columns lies together.
_PIECES: dict[str, tuple[tuple[int, int], ...]] = {
    "q8_0": ((1, 2), (8, 4)), "q4_0": ((1, 2), (4, 4)), "q4_1": ((1, 2), (1, 2), (4, 4)),
    "q4_z32": ((1, 2), (1, 2), (4, 4)), "q4_z64": ((1, 2), (1, 2), (8, 4)), "q4_z128": ((1, 2), (1, 2), (16, 4)),
    "q4_k": ((1, 2), (1, 2), (12, 1), (32, 4)), "q5_0": ((1, 2), (5, 4)), "q5_1": ((1, 2), (1, 2), (5, 4)), "q5_k": ((1, 2), (1, 2), (12, 1), (40, 4)),
    "q6_k": ((1, 2), (16, 1), (32, 4), (16, 4)),
}  # fmt: skip


def pack_out(row_blocks: Bytes, fmt: WeightFormat, unit_rows: int, *, out: Bytes | None = None, row0: int = 0, row1: int | None = None) -> Bytes:
    """Rows [row0, row1) as one panel per unit, one after the other, into the flat ``out``; returns ``out``."""
    return _pack_panels((row_blocks,), fmt, unit_rows, out, row0, row1)


def pack_gate_up(gate: Bytes, up: Bytes, fmt: WeightFormat, unit_rows: int, *, out: Bytes | None = None, row0: int = 0, row1: int | None = None) -> Bytes:
    """As `pack_out`, each panel twice as wide: the unit's gate columns, then its up columns."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {gate.shape} and up {up.shape} must agree")
    return _pack_panels((gate, up), fmt, unit_rows, out, row0, row1)


def pack_in(row_blocks: Bytes, fmt: WeightFormat, *, out: Bytes | None = None, row0: int = 0, row1: int | None = None) -> Bytes:
    """Inputs [row0, row1) (multiples of ``fmt.block``) of all R outputs as one panel of R columns, into the flat ``out``; returns ``out``."""
    rows, blocks = _shape(row_blocks, fmt)
    first, last = _range(blocks * fmt.block, fmt.block, row0, row1)
    part = row_blocks[:, first // fmt.block : last // fmt.block]
    result = _output(out, part.size)
    _fill_panel(result.reshape(part.shape[1], rows * fmt.block_bytes), (part,), fmt)
    return result


def unpack_out(packed: Bytes, fmt: WeightFormat, rows: int, width: int, unit_rows: int) -> Floats:
    """The weights in the panels of `pack_out`, dequantised: ``[rows, width]``."""
    return _unpack_panels(packed, fmt, rows, width, unit_rows, 1)[0]


def unpack_gate_up(packed: Bytes, fmt: WeightFormat, rows: int, width: int, unit_rows: int) -> tuple[Floats, Floats]:
    """The weights in the panels of `pack_gate_up`, dequantised: gate and up, each ``[rows, width]``."""
    gate, up = _unpack_panels(packed, fmt, rows, width, unit_rows, 2)
    return gate, up


def unpack_in(packed: Bytes, fmt: WeightFormat, num_inputs: int, num_outputs: int) -> Floats:
    """The weights in the panel of `pack_in`, dequantised: ``[num_outputs, num_inputs]``."""
    return _read_panel(packed.reshape(num_inputs // fmt.block, -1), fmt, num_outputs)


def _pack_panels(sources: tuple[Bytes, ...], fmt: WeightFormat, unit_rows: int, out: Bytes | None, row0: int, row1: int | None) -> Bytes:
    rows, blocks = _shape(sources[0], fmt)
    first, last = _range(rows, unit_rows, row0, row1)
    row_bytes = len(sources) * blocks * fmt.block_bytes
    result = _output(out, (last - first) * row_bytes)
    at = 0
    for unit in range(first, last, unit_rows):
        end = min(unit + unit_rows, last)
        panel = result[at : at + (end - unit) * row_bytes].reshape(blocks, -1)
        _fill_panel(panel, tuple(source[unit:end] for source in sources), fmt)
        at += panel.size
    return result


def _fill_panel(panel: Bytes, sources: tuple[Bytes, ...], fmt: WeightFormat) -> None:
    """``panel [B, w * block_bytes]`` from the row blocks of its columns, in tiles that stay in cache (as many rows of each source)."""
    if not panel.size:
        return
    columns = sum(len(source) for source in sources)
    if (library := native.load()) is not None:
        for part, source in enumerate(sources):
            whole = source if source.strides[1:] == (fmt.block_bytes, 1) else np.ascontiguousarray(source)
            library.pack_columns(whole, DTYPE_CODES[fmt.name], panel, columns, part * len(source))
        return
    step = max(16, _TILE_BYTES // max(1, panel.shape[0] * fmt.block_bytes))
    at = 0
    for source in sources:
        for first in range(0, len(source), step):
            lanes = _lane_bytes(source[first : first + step], fmt)
            for offset, piece in _pieces(panel, fmt, columns):
                size = piece.dtype.itemsize * piece.shape[1]
                tile = lanes[:, :, offset : offset + size].view(piece.dtype)
                piece[:, :, at : at + len(lanes)] = tile.transpose(1, 2, 0)
            at += len(lanes)


def _pieces(panel: Bytes, fmt: WeightFormat, columns: int) -> list[tuple[int, NDArray[Any]]]:
    """(byte offset in a lane row's block, view [B, count, w] of elements as wide as the piece) of every kind of piece."""
    found, offset = [], 0
    for count, size in _PIECES[fmt.name]:
        stride = columns * fmt.block_bytes
        view: NDArray[Any] = np.ndarray(
            (len(panel), count, columns), f"<u{size}", buffer=panel.data, offset=offset * columns, strides=(stride, columns * size, size)
        )
        found.append((offset, view))
        offset += count * size
    return found


def _unpack_panels(packed: Bytes, fmt: WeightFormat, rows: int, width: int, unit_rows: int, parts: int) -> list[Floats]:
    results = [np.empty((rows, width), np.float32) for _ in range(parts)]
    blocks, at = width // fmt.block, 0
    for unit in range(0, rows, unit_rows):
        count = min(unit_rows, rows - unit)
        panel = packed[at : at + parts * count * blocks * fmt.block_bytes].reshape(blocks, -1)
        values = _read_panel(panel, fmt, parts * count)
        for part, result in enumerate(results):
            result[unit : unit + count] = values[part * count : (part + 1) * count]
        at += panel.size
    return results


def _read_panel(panel: Bytes, fmt: WeightFormat, columns: int) -> Floats:
    lanes = np.empty((columns, len(panel), fmt.block_bytes), np.uint8)
    for offset, piece in _pieces(panel, fmt, columns):
        size = piece.dtype.itemsize * piece.shape[1]
        lanes[:, :, offset : offset + size] = np.ascontiguousarray(piece.transpose(2, 0, 1)).view(np.uint8)
    scales, offsets = _scales(lanes, fmt)
    return _values(_lane_codes(lanes, fmt), scales, offsets).reshape(columns, -1)


# ---- lane rows

# Bytes of scales before the codes in a lane row's block; in a row block, too, but for q6_k, which keeps its scales behind the codes.
HEADER_BYTES = {
    "q8_0": 2, "q4_0": 2, "q4_1": 4, "q4_z32": 4, "q4_z64": 4, "q4_z128": 4, "q4_k": 16, "q5_0": 2, "q5_1": 4, "q5_k": 16, "q6_k": 18
}  # fmt: skip


def _lane_bytes(row_blocks: Bytes, fmt: WeightFormat) -> Bytes:
    """Lane rows of row blocks ``[R, B, block_bytes]``."""
    if fmt.name == "q8_0":
        return np.ascontiguousarray(row_blocks)
    codes = _row_codes(row_blocks, fmt)
    nibbles = (codes & 15).reshape(*codes.shape[:2], -1, 2, 4)
    low = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*codes.shape[:2], -1)
    if fmt.bits == 5:
        upper = (codes >> 4).reshape(*codes.shape[:2], -1, 8, 4) << np.arange(8, dtype=np.uint8)[:, None]
        return np.concatenate([row_blocks[:, :, : HEADER_BYTES[fmt.name]], low, np.bitwise_or.reduce(upper, 3).reshape(*codes.shape[:2], -1)], 2)
    if fmt.name != "q6_k":
        return np.concatenate([row_blocks[:, :, : HEADER_BYTES[fmt.name]], low], 2)
    upper = (codes >> 4).reshape(*codes.shape[:2], 16, 4, 4)
    high = upper[..., 0, :] | upper[..., 1, :] << 2 | upper[..., 2, :] << 4 | upper[..., 3, :] << 6
    return np.concatenate([row_blocks[:, :, 208:210], row_blocks[:, :, 192:208], low, high.reshape(*codes.shape[:2], -1)], 2)


def _row_codes(row_blocks: Bytes, fmt: WeightFormat) -> NDArray[Any]:
    """The codes of row blocks in ascending k, ``[R, B, block]``: signed for q8_0."""
    if fmt.name == "q6_k":
        return _row_codes_q6_k(row_blocks)
    if fmt.bits == 5:
        return _row_codes_five_bits(row_blocks, fmt)
    stored = row_blocks[:, :, HEADER_BYTES[fmt.name] :]
    if fmt.name == "q8_0":
        return stored.view(np.int8)
    return _halved_nibbles(stored, fmt)


def _halved_nibbles(stored: Bytes, fmt: WeightFormat) -> Bytes:
    """Codes [R, B, block] of bytes that hold the first half of a block (of 64 codes in blocks of 256) in their low nibbles, the second in the high ones."""
    chunks = stored.reshape(*stored.shape[:2], -1, 32 if fmt.block == 256 else fmt.block // 2)
    return np.stack([chunks & 15, chunks >> 4], 3).reshape(*stored.shape[:2], fmt.block)


def _row_codes_five_bits(row_blocks: Bytes, fmt: WeightFormat) -> Bytes:
    """Between scales and nibbles lie the upper bits: bit k of 32 belongs to code k; of q5_k, bit g of byte k belongs to code 32 g + k."""
    shape, first = row_blocks.shape[:2], HEADER_BYTES[fmt.name]
    last = first + fmt.block // 8
    bits = np.unpackbits(row_blocks[:, :, first:last], axis=2, bitorder="little")
    upper = bits.reshape(*shape, 32, 8).swapaxes(2, 3) if fmt.block == 256 else bits
    return _halved_nibbles(row_blocks[:, :, last:], fmt) | upper.reshape(*shape, fmt.block) << np.uint8(4)


def _row_codes_q6_k(row_blocks: Bytes) -> Bytes:
    """Halves of 128: 64 bytes of nibbles, the lower ones first, and 32 bytes whose bit pairs are the upper bits of 4 x 32 codes."""
    shape = row_blocks.shape[:2]
    nibbles = row_blocks[:, :, :128].reshape(*shape, 2, 1, 64)
    low = np.concatenate([nibbles & 15, nibbles >> 4], 3).reshape(*shape, 2, 4, 32)
    pairs = row_blocks[:, :, 128:192].reshape(*shape, 2, 1, 32)
    high = np.concatenate([pairs & 3, pairs >> 2 & 3, pairs >> 4 & 3, pairs >> 6], 3)
    return (low | high << 4).reshape(*shape, 256)


def _lane_codes(lanes: Bytes, fmt: WeightFormat) -> NDArray[Any]:
    """The codes of lane rows in ascending k, ``[w, B, block]``: signed for q8_0."""
    shape, header = lanes.shape[:2], HEADER_BYTES[fmt.name]
    if fmt.name == "q8_0":
        return lanes[:, :, header:].view(np.int8)
    stored = lanes[:, :, header : header + fmt.block // 2].reshape(*shape, -1, 4)
    codes = np.stack([stored & 15, stored >> 4], 3).reshape(*shape, fmt.block)
    if fmt.bits == 5:
        upper = lanes[:, :, header + fmt.block // 2 :].reshape(*shape, -1, 4)
        codes |= np.stack([(upper >> t & 1) << 4 for t in range(8)], 3).reshape(*shape, fmt.block)
    if fmt.name == "q6_k":
        upper = lanes[:, :, header + 128 :].reshape(*shape, 16, 4)
        codes |= np.stack([(upper >> 2 * t & 3) << 4 for t in range(4)], 3).reshape(*shape, fmt.block)
    return codes


def _scales(lanes: Bytes, fmt: WeightFormat) -> tuple[Floats, Floats]:
    """Scale and offset of every group of lane rows, each ``[w, B, groups]``: a weight is scale * code + offset."""
    if fmt.name in ("q4_k", "q5_k"):
        return _scales_k(lanes)
    d = _halves(lanes, 0)
    if fmt.name == "q8_0":
        return d, np.zeros_like(d)
    if fmt.name == "q6_k":
        scales = d * lanes[:, :, 2:18].view(np.int8).astype(np.float32)
        return scales, np.float32(-32) * scales
    if fmt.name in ("q4_0", "q5_0"):
        return d, np.float32(-8 if fmt.bits == 4 else -16) * d
    return d, _halves(lanes, 2) if fmt.name in ("q4_1", "q5_1") else -(d * _halves(lanes, 2))


def _scales_k(lanes: Bytes) -> tuple[Floats, Floats]:
    """ggml's twelve bytes: the lower 6 bits of bytes 0-3 and 4-7 are scales and mins 0-3; 4-7 have nibbles in bytes 8-11 and their upper bits in 0-7."""
    packed = lanes[:, :, 4:16]
    first, second, third = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], 2)
    mins = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], 2)
    return _halves(lanes, 0) * scales, -(_halves(lanes, 2) * mins)


def _halves(lanes: Bytes, offset: int) -> Floats:
    return np.ascontiguousarray(lanes[:, :, offset : offset + 2]).view(np.float16).astype(np.float32)


def _values(codes: NDArray[Any], scales: Floats, offsets: Floats) -> Floats:
    """``[w, B, block]``: each product is rounded before its offset is added, as ggml does it."""
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + offsets[..., None]).reshape(codes.shape)


# ---- checks


def _shape(row_blocks: Bytes, fmt: WeightFormat) -> tuple[int, int]:
    if fmt.name not in _PIECES:
        raise ValueError(f"{fmt.name} is no quantised format; there are {', '.join(_PIECES)}")
    if row_blocks.ndim != 3 or row_blocks.shape[2] != fmt.block_bytes or row_blocks.dtype != np.uint8:
        raise ValueError(f"row blocks of {fmt.name} must be uint8 [rows, blocks, {fmt.block_bytes}], got {row_blocks.dtype} {row_blocks.shape}")
    return row_blocks.shape[0], row_blocks.shape[1]


def _range(rows: int, unit: int, row0: int, row1: int | None) -> tuple[int, int]:
    last = rows if row1 is None else row1
    if unit < 1 or not 0 <= row0 <= last <= rows or any(edge % unit and edge != rows for edge in (row0, last)):
        raise ValueError(f"rows [{row0}, {last}) of {rows} are not on boundaries of units of {unit}")
    return row0, last


def _output(out: Bytes | None, size: int) -> Bytes:
    if out is None:
        return np.empty(size, np.uint8)
    if out.shape != (size,) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be {size} contiguous bytes, got shape {out.shape} of {out.dtype}")
    return out
