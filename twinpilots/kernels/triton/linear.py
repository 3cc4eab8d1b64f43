"""Linears on the GPU: panels of any weight format (docs/execution.md) times activations, never more than a tile of weights in fp32 or 16 bits.

Owns the Triton kernels of LINEAR and LINEAR_IN, and how a launch is cut up. One kernel serves both: a weight is panels of ``unit`` columns, an input
slice is one panel of all outputs. Sums are fp32. fp32 weights multiply fp32 activations without TF32; bf16 ones activations rounded to bf16; fp16 and
quantised ones (a tile of which becomes fp16) activations rounded to fp16, scaled below its range per row and tile. Where tiles are few, K is split too,
and a second kernel adds the parts in ascending order: no atomics, the same bits each time. Knows nothing of instructions or arenas.

Shapes: M rows, K inputs, N outputs; w columns of a panel (gate_up: gate columns, then as many up columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from twinpilots.kernels.quant_format import HEADER_BYTES
from twinpilots.model.weight_format import WeightFormat

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
MAX_SPLITS = 16
SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # abi.Act; 3 is RELU
ACT, ACT_MUL, SOFTCAP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # abi.Epilogue


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What follows the sums (abi.Epilogue, abi.Act). ``biases``: of the outputs, and of the up half."""

    epilogue: int = 0
    activation: int = 0
    softcap: float = 1.0
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    accumulate: bool = False


# ---- tiles of weights


@triton.jit
def _halves(w, at, mask):
    """f16 values at even byte offsets, in fp32."""
    return tl.load(w.to(tl.pointer_type(tl.float16)) + at // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _bytes(w, at, mask):
    return tl.load(w + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _lanes(w, at, index, mask, ALIGNED: tl.constexpr):
    """32-bit lane ``index`` of the lanes that begin at byte ``at``."""
    if ALIGNED:
        lanes = tl.load(w.to(tl.pointer_type(tl.int32)) + (at // 4 + index), mask=mask, other=0)
    else:
        first = at + 4 * index
        lanes = _bytes(w, first, mask) | _bytes(w, first + 1, mask) << 8 | _bytes(w, first + 2, mask) << 16 | _bytes(w, first + 3, mask) << 24
    return lanes


@triton.jit
def _scales(w, at, width, col, lane, mask, FORMAT: tl.constexpr):
    """Scale and offset of each lane's group; ``at``: the lane's block, ``lane``: its number there. A weight is scale * code + offset."""
    d = _halves(w, at + 2 * col, mask)
    if FORMAT == "q8_0":
        scale, offset = d, tl.zeros_like(d)
    elif FORMAT == "q4_0":
        scale, offset = d, -8.0 * d
    elif FORMAT == "q5_0":
        scale, offset = d, -16.0 * d
    elif FORMAT == "q6_k":
        code = _bytes(w, at + 2 * width + lane // 2 * width + col, mask)
        scale = d * (code << 24 >> 24).to(tl.float32)
        offset = -32.0 * scale
    elif FORMAT == "q4_1" or FORMAT == "q5_1":
        scale, offset = d, _halves(w, at + 2 * width + 2 * col, mask)
    elif FORMAT == "q4_k" or FORMAT == "q5_k":
        group, table = lane // 4, at + 4 * width + col
        high, four = group >= 4, 4 * width
        own, later = _bytes(w, table + group * width, mask), _bytes(w, table + group * width + four, mask)  # later: only meant where it exists
        first = _bytes(w, table + tl.where(high, group - 4, 0) * width, mask)
        scale = d * tl.where(high, later & 15 | first >> 6 << 4, own & 63).to(tl.float32)
        mins = tl.where(high, later >> 4 | own >> 6 << 4, later & 63).to(tl.float32)
        offset = -(_halves(w, at + 2 * width + 2 * col, mask) * mins)
    else:  # q4_zG
        scale = d
        offset = -(d * _halves(w, at + 2 * width + 2 * col, mask))
    return scale, offset


@triton.jit
def _operand(x, KIND: tl.constexpr):
    """Rounded for a product. The interpreter's products know no 16-bit types: it multiplies the rounded values in fp32."""
    if KIND == "fp32":
        y = x
    elif KIND == "bf16":
        y = x.to(tl.bfloat16)
    else:
        y = x.to(tl.float16)
    if INTERPRETED:
        y = y.to(tl.float32)
    return y


@triton.jit
def _range_scale(x, KIND: tl.constexpr):
    """Per row: what brings x [BM, BK] below half of fp16's range; 1 where it is below, and for the wider types."""
    top = tl.max(tl.abs(x), 1)
    if KIND == "fp16":
        scale = tl.maximum(top / 32768.0, 1.0)
    else:
        scale = 0.0 * top + 1.0
    return scale


# ---- sums


@triton.jit
def _plain_step(acc, x, row_ok, w, width, col, col_ok, k, last, KIND: tl.constexpr, BK: tl.constexpr):
    """One tile of fp32, bf16 or fp16 weights [K][w]; ``x`` points to the rows."""
    inputs = k + tl.arange(0, BK)
    ok = inputs < last
    xs = tl.load(x[:, None] + inputs[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
    weights = tl.load(w + inputs[:, None] * width + col[None, :], mask=ok[:, None] & col_ok[None, :], other=0.0)
    if KIND == "fp16":
        scale = _range_scale(xs, KIND)
        acc += tl.dot(_operand(xs / scale[:, None], KIND), _operand(weights, KIND)) * scale[:, None]
    else:
        acc = tl.dot(_operand(xs, KIND), _operand(weights, KIND), acc, input_precision="ieee")
    return acc


@triton.jit
def _packed_step(
    acc, x, row_ok, w, width, col, col_ok, k, last, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    HEADER: tl.constexpr, LANE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of quantised weights: LANE products, the t-th of every lane's t-th input. So lanes are used as they are loaded, coalesced along the columns."""
    FIVE_BITS: tl.constexpr = FORMAT == "q5_0" or FORMAT == "q5_1" or FORMAT == "q5_k"
    inputs = k + tl.arange(0, BK)
    scale = _range_scale(tl.load(x[:, None] + inputs[None, :], mask=row_ok[:, None] & (inputs < last)[None, :], other=0.0), "fp16")
    start = k + LANE * tl.arange(0, BK // LANE)  # the first input of each lane
    ok = start < last
    mask = ok[:, None] & col_ok[None, :]
    lane = (start % BLOCK // LANE)[:, None]
    at = (start // BLOCK * (BLOCK_BYTES * width))[:, None]
    column = col[None, :]
    lanes = _lanes(w, at + HEADER * width, lane * width + column, mask, ALIGNED)
    if FORMAT == "q6_k":
        upper = _lanes(w, at + (HEADER + 128) * width, lane // 2 * width + column, mask, ALIGNED) >> lane % 2 * 4
    elif FIVE_BITS:
        upper = _lanes(w, at + (HEADER + BLOCK // 2) * width, lane // 4 * width + column, mask, ALIGNED) >> lane % 4 * 2
    factor, offset = _scales(w, at, width, column, lane, mask, FORMAT)
    part = tl.zeros_like(acc)
    for t in tl.static_range(LANE):
        if FORMAT == "q8_0":
            code = lanes << (24 - 8 * t) >> 24
        else:
            code = lanes >> (t % 4 * 8 + t // 4 * 4) & 15
            if FORMAT == "q6_k":
                code = code | (upper >> (t % 4 * 8 + t // 4 * 2) & 3) << 4
            elif FIVE_BITS:
                code = code | (upper >> (t % 4 * 8 + t // 4) & 1) << 4
        weights = code.to(tl.float32) * factor + offset
        xs = tl.load(x[:, None] + (start + t)[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        part = tl.dot(_operand(xs / scale[:, None], "fp16"), _operand(weights, "fp16"), part)
    return acc + part * scale[:, None]


@triton.jit
def _sums(
    x, row_ok, w, width, col, col_ok, first, last, FORMAT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    HEADER: tl.constexpr, LANE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x @ panel over inputs [first, last): [BM, BN]."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(first, last, BK):
        if BLOCK == 1:
            acc = _plain_step(acc, x, row_ok, w, width, col, col_ok, k, last, FORMAT, BK)
        else:
            acc = _packed_step(acc, x, row_ok, w, width, col, col_ok, k, last, FORMAT, ALIGNED, BLOCK, BLOCK_BYTES, HEADER, LANE, BK)
    return acc


# ---- what follows the sums


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == SILU:
        y = x / (1.0 + tl.exp(-x))
    elif KIND == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == GELU_TANH:
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.where(x < 0.0, 0.0, x)  # not maximum: it may drop a NaN
    return y


@triton.jit
def _store(
    out, ld_out, row, n, mask, y, up, bias, bias2, softcap, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIAS2: tl.constexpr,
):  # fmt: skip
    """Bias, epilogue and store of sums [.., ..] at rows ``row`` and outputs ``n``."""
    if HAS_BIAS:
        y += tl.load(bias + n, mask=mask, other=0.0)
    if HAS_BIAS2:
        up += tl.load(bias2 + n, mask=mask, other=0.0)
    if EPILOGUE == ACT_MUL:
        y = _activate(y, ACTIVATION) * up
    elif EPILOGUE == ACT:
        y = _activate(y, ACTIVATION)
    elif EPILOGUE == SOFTCAP:
        y = softcap * _tanh(y / softcap)
    place = out + row * ld_out + n
    if ACCUMULATE:
        y += tl.load(place, mask=mask, other=0.0)
    tl.store(place, y, mask=mask)


# ---- kernels


@triton.jit(do_not_specialize=["m", "split_inputs"])
def _linear(
    x, ld_x, w, out, ld_out, bias, bias2, softcap, parts, m, n, k, unit, split_inputs,
    FORMAT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_BYTES: tl.constexpr, HEADER: tl.constexpr, LANE: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIAS2: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (column tile of a panel and row tile, part of K). SPLIT: sums go to ``parts`` [splits][halves][M][N], else they are finished here.

    Row tiles of one column tile follow each other: its weights are still in the cache.
    """
    row_tiles = tl.cdiv(m, BM)
    tiles = tl.cdiv(unit, BN)
    panel = tl.program_id(0) // row_tiles // tiles
    tile = tl.program_id(0) // row_tiles % tiles
    count = tl.minimum(unit, n - panel * unit)  # outputs of this panel
    col = tile * BN + tl.arange(0, BN)
    col_ok = col < count
    row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    row_ok = row < m
    rows = x + row.to(tl.int64) * ld_x
    first = tl.program_id(1) * split_inputs
    last = tl.minimum(first + split_inputs, k)
    halves: tl.constexpr = 2 if EPILOGUE == ACT_MUL else 1
    width = halves * count
    start = panel.to(tl.int64) * unit * halves
    base = w + start * (k // BLOCK) * BLOCK_BYTES
    y = _sums(rows, row_ok, base, width, col, col_ok, first, last, FORMAT, ALIGNED, BLOCK, BLOCK_BYTES, HEADER, LANE, BM, BN, BK)
    up = y
    if EPILOGUE == ACT_MUL:
        up = _sums(rows, row_ok, base, width, count + col, col_ok, first, last, FORMAT, ALIGNED, BLOCK, BLOCK_BYTES, HEADER, LANE, BM, BN, BK)
    output = (panel * unit + col)[None, :]
    at = row.to(tl.int64)[:, None]
    mask = row_ok[:, None] & col_ok[None, :]
    if SPLIT:
        place = parts + (tl.program_id(1).to(tl.int64) * halves * m + at) * n + output
        tl.store(place, y, mask=mask)
        if EPILOGUE == ACT_MUL:
            tl.store(place + m * n, up, mask=mask)
    else:
        _store(out, ld_out, at, output, mask, y, up, bias, bias2, softcap, EPILOGUE, ACTIVATION, ACCUMULATE, HAS_BIAS, HAS_BIAS2)


@triton.jit(do_not_specialize=["m", "num_splits"])
def _finish(
    parts, out, ld_out, bias, bias2, softcap, m, n, num_splits, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, ACCUMULATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BIAS2: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (row, columns): the parts of one row added in ascending order, and finished."""
    row = tl.program_id(0)
    output = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = output < n
    halves: tl.constexpr = 2 if EPILOGUE == ACT_MUL else 1
    place = parts + row * n + output
    y = tl.zeros((BN,), tl.float32)
    up = tl.zeros((BN,), tl.float32)
    for _ in range(num_splits):
        y += tl.load(place, mask=mask, other=0.0)
        if EPILOGUE == ACT_MUL:
            up += tl.load(place + m * n, mask=mask, other=0.0)
        place += halves * m * n
    _store(out, ld_out, row.to(tl.int64), output, mask, y, up, bias, bias2, softcap, EPILOGUE, ACTIVATION, ACCUMULATE, HAS_BIAS, HAS_BIAS2)


# ---- launches


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How one launch is cut up. ``split_inputs`` is a multiple of ``bk``."""

    bm: int
    bn: int
    bk: int
    splits: int
    split_inputs: int


def cut(m: int, n: int, k: int, unit: int, halves: int, *, quantized: bool, programs: int, room: int) -> _Cut:
    """Tiles for M rows, and so many parts of K that about ``programs`` run at once, if ``room`` floats hold their sums."""
    bm = 16 if m <= 16 else 64
    bn = min(64, max(16, triton.next_power_of_2(unit)))
    bk = 128 if quantized else 64 if bm == 16 else 32
    tiles = triton.cdiv(m, bm) * triton.cdiv(unit, bn) * triton.cdiv(n, unit)
    most = min(MAX_SPLITS, max(1, k // (2 * bk)), room // max(1, halves * m * n))
    wanted = max(1, min(triton.cdiv(programs, tiles), most))
    split_inputs = triton.cdiv(triton.cdiv(k, bk), wanted) * bk
    return _Cut(bm=bm, bn=bn, bk=bk, splits=triton.cdiv(k, split_inputs), split_inputs=split_inputs)


def linear(x: Tensor, w: Tensor, out: Tensor, fmt: WeightFormat, unit: int, finish: Finish, *, programs: int, scratch: Tensor) -> int:
    """``out [M, N]`` from ``x [M, K]``, both fp32 with rows of any stride. ``w``: where the panels begin, uint8 if quantised; ``unit``: outputs of a panel.

    ``programs``: how many the device wants at once; ``scratch``: fp32 workspace. Returns the number of launches.
    """
    (m, k), n, halves = x.shape, out.shape[1], 2 if finish.epilogue == ACT_MUL.value else 1
    plan = cut(m, n, k, unit, halves, quantized=fmt.is_quantized, programs=programs, room=scratch.numel())
    bias, bias2 = finish.biases
    options: dict[str, Any] = {
        "EPILOGUE": finish.epilogue, "ACTIVATION": finish.activation, "ACCUMULATE": finish.accumulate, "HAS_BIAS": bias is not None,
        "HAS_BIAS2": halves == 2 and bias2 is not None,
    }  # fmt: skip
    after = (out, out.stride(0), out if bias is None else bias, out if bias2 is None else bias2, finish.softcap)
    packed = fmt.is_quantized
    grid = (triton.cdiv(m, plan.bm) * triton.cdiv(unit, plan.bn) * triton.cdiv(n, unit), plan.splits)
    _linear[grid](
        x, x.stride(0), w, *after, scratch, m, n, k, unit, plan.split_inputs, FORMAT=fmt.name, ALIGNED=packed and _is_aligned(w, fmt, n, unit, halves),
        BLOCK=fmt.block if packed else 1, BLOCK_BYTES=fmt.block_bytes if packed else 1, HEADER=HEADER_BYTES.get(fmt.name, 0),
        LANE=4 if fmt.name == "q8_0" else 8,
        SPLIT=plan.splits > 1, BM=plan.bm, BN=plan.bn, BK=plan.bk, num_warps=4 if plan.bm == 16 else 8,
        num_stages=1 if packed else 3, **options,
    )  # fmt: skip
    if plan.splits == 1:
        return 1
    _finish[(m, triton.cdiv(n, 256))](scratch, *after, m, n, plan.splits, BN=256, num_warps=4, **options)
    return 2


def _is_aligned(w: Tensor, fmt: WeightFormat, n: int, unit: int, halves: int) -> bool:
    """Whether every lane of every panel lies on 4 bytes: not so for formats of 4 n + 2 bytes per block and panels of an odd number of columns."""
    odd = any(halves * columns * size % 4 for columns in (min(unit, n), n % unit) for size in (fmt.block_bytes, HEADER_BYTES[fmt.name]))
    return w.data_ptr() % 4 == 0 and not odd
