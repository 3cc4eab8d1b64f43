"""Weight formats (docs/execution.md): unit panels for linears split along the output, ``[in][out]`` for those split along the input. numpy only.

Owns packing and its inverse, for any element of 2 or 4 bytes (fp32, or raw 16-bit words). Knows nothing of models, files or arenas.
Shapes: R rows (outputs), K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[Any]


def pack_out(weights: Weights, unit_rows: int, *, out: Weights | None = None, row0: int = 0, row1: int | None = None) -> Weights:
    """Rows [row0, row1) of ``weights [R, K]`` as unit panels ``[K][w]``, one after the other, into the flat ``out``; returns ``out``."""
    return _pack_panels((weights,), unit_rows, out, row0, row1)


def pack_gate_up(gate: Weights, up: Weights, unit_rows: int, *, out: Weights | None = None, row0: int = 0, row1: int | None = None) -> Weights:
    """As `pack_out`, each panel ``[K][2 w]``: w gate columns, then the same rows' up columns."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} must agree")
    return _pack_panels((gate, up), unit_rows, out, row0, row1)


def pack_in(weights: Weights, *, out: Weights | None = None, row0: int = 0, row1: int | None = None) -> Weights:
    """Inputs [row0, row1) of ``weights [N, K]`` as ``[K][N]`` into the flat ``out``; returns ``out``."""
    num_outputs, num_inputs = weights.shape
    first, last = _row_range(num_inputs, 1, row0, row1)
    result = _output(out, weights, (last - first) * num_outputs)
    _transpose_into(result.reshape(last - first, num_outputs), weights[:, first:last])
    return result


def unpack_out(packed: Weights, rows: int, width: int, unit_rows: int) -> Weights:
    """The inverse of `pack_out` for all rows: ``[rows, width]``."""
    return _unpack_panels(packed, rows, width, unit_rows, 1)[0]


def unpack_gate_up(packed: Weights, rows: int, width: int, unit_rows: int) -> tuple[Weights, Weights]:
    """The inverse of `pack_gate_up` for all rows: gate and up, each ``[rows, width]``."""
    gate, up = _unpack_panels(packed, rows, width, unit_rows, 2)
    return gate, up


def unpack_in(packed: Weights, num_inputs: int, num_outputs: int) -> Weights:
    """The inverse of `pack_in` for all inputs: ``[num_outputs, num_inputs]``."""
    return np.ascontiguousarray(packed.reshape(num_inputs, num_outputs).T)


def _pack_panels(sources: tuple[Weights, ...], unit_rows: int, out: Weights | None, row0: int, row1: int | None) -> Weights:
    rows, width = sources[0].shape
    first, last = _row_range(rows, unit_rows, row0, row1)
    parts = len(sources)
    result = _output(out, sources[0], parts * (last - first) * width)
    at = 0
    for unit in range(first, last, unit_rows):
        end = min(unit + unit_rows, last)
        panel = result[at : at + parts * (end - unit) * width].reshape(width, parts, end - unit)
        for part, source in enumerate(sources):
            _transpose_into(panel[:, part], source[unit:end])
        at += panel.size
    return result


def _unpack_panels(packed: Weights, rows: int, width: int, unit_rows: int, parts: int) -> list[Weights]:
    results = [np.empty((rows, width), packed.dtype) for _ in range(parts)]
    at = 0
    for unit in range(0, rows, unit_rows):
        end = min(unit + unit_rows, rows)
        panel = packed[at : at + parts * (end - unit) * width].reshape(width, parts, end - unit)
        for part, result in enumerate(results):
            result[unit:end] = panel[:, part].T
        at += panel.size
    return results


def _transpose_into(out: Weights, source: Weights) -> None:
    """out[k, n] = source[n, k], in tiles that stay in cache: numpy's own transposed copy of a wide matrix misses on every element."""
    tile = 128
    for k in range(0, out.shape[0], tile):
        for n in range(0, out.shape[1], tile):
            out[k : k + tile, n : n + tile] = source[n : n + tile, k : k + tile].T


def _row_range(rows: int, unit_rows: int, row0: int, row1: int | None) -> tuple[int, int]:
    last = rows if row1 is None else row1
    if unit_rows < 1 or not 0 <= row0 <= last <= rows or any(edge % unit_rows and edge != rows for edge in (row0, last)):
        raise ValueError(f"rows [{row0}, {last}) of {rows} are not on boundaries of units of {unit_rows}")
    return row0, last


def _output(out: Weights | None, source: Weights, size: int) -> Weights:
    if source.dtype.itemsize not in (2, 4):
        raise ValueError(f"weights must have 2 or 4 bytes per element, got {source.dtype}")
    if out is None:
        return np.empty(size, source.dtype)
    if out.shape != (size,) or out.dtype != source.dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be {size} contiguous elements of {source.dtype}, got shape {out.shape} of {out.dtype}")
    return out
