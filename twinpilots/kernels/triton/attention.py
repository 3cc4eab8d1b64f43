"""Attention on the GPU over paged KV, and what goes before it: QK norm, rotary and the append to the pages.

Owns the Triton kernels of ROPE_APPEND (one launch) and ATTEND (one launch for all sequences and heads of an instruction; where those are few, the context
is split too, and a second kernel combines the parts in ascending order). Page tables and lengths are read from the pass's metadata (kernels/abi.py),
which lies on the device. Sums and softmax are fp32; products are fp32 for fp32 KV, TF32 (whose mantissa is longer than bf16's, as long as fp16's) for
16-bit and int8 KV, whose scales multiply scores and probabilities. Knows nothing of instructions or arenas.

Shapes: D head_dim, G KV heads, R query heads per KV head; a page of one layer is [2 (k, v)][G][page_size][D], of int8 then [2][G][page_size] scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 32
BLOCK_KEYS = 64


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The KV pages of one layer: ``kv`` points to page 0, pages lie ``stride`` elements apart. int8: ``scales`` to page 0's, ``scale_stride`` floats apart."""

    kv: Tensor
    stride: int
    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    scales: Tensor | None = None
    scale_stride: int = 0


@dataclass(frozen=True, kw_only=True)
class Norms:
    """What ROPE_APPEND does to q and k: gains [D] of RMS norms, and cos, sin [rows, half] of the rotation. None: nothing."""

    q_gain: Tensor | None
    k_gain: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    half: int
    eps: float


@triton.jit
def _gain(gain, index, mask, inverse, on):
    """The factor of a head's elements: gain times 1 / RMS where ``on``, else 1."""
    return tl.where(on, tl.load(gain + index, mask=mask, other=0.0) * inverse, 1.0)


@triton.jit
def _codes(x, scale):
    """Whole numbers in [-127, 127], nearest, ties to even; 0 where the scale is 0 or not a number."""
    code = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0))
    code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    return tl.where(scale > 0.0, tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)


@triton.jit(do_not_specialize=["off_rope", "off_slot", "first"])
def _rope_append(
    qkv, ld, kv, stride, scales, scale_stride, meta, off_rope, off_slot, first, q_gain, k_gain, cos, sin, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    ROTATES: tl.constexpr, CODES: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program (token row, head of q, k or v). One warp: it has loaded all of the head before it stores the first of it in place."""
    row = first + tl.program_id(0)
    head = tl.program_id(1)
    is_q, is_k = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    index, other = tl.arange(0, BH), tl.arange(0, BR)
    ok, rest_ok = index < HALF, other < D - 2 * HALF
    source = qkv + row.to(tl.int64) * ld + head * D
    lo = tl.load(source + index, mask=ok, other=0.0)
    hi = tl.load(source + HALF + index, mask=ok, other=0.0)
    rest = tl.load(source + 2 * HALF + other, mask=rest_ok, other=0.0)
    inverse = tl.rsqrt((tl.sum(lo * lo) + tl.sum(hi * hi) + tl.sum(rest * rest)) / D + eps)
    if Q_NORM:
        lo, hi = lo * _gain(q_gain, index, ok, inverse, is_q), hi * _gain(q_gain + HALF, index, ok, inverse, is_q)
        rest *= _gain(q_gain + 2 * HALF, other, rest_ok, inverse, is_q)
    if K_NORM:
        lo, hi = lo * _gain(k_gain, index, ok, inverse, is_k), hi * _gain(k_gain + HALF, index, ok, inverse, is_k)
        rest *= _gain(k_gain + 2 * HALF, other, rest_ok, inverse, is_k)
    if ROTATES:
        turned = index < tl.where(is_q | is_k, HALF, 0)
        angle = tl.load(meta + off_rope + row) * HALF + index
        c, s = tl.load(cos + angle, mask=turned, other=1.0), tl.load(sin + angle, mask=turned, other=0.0)
        lo, hi = lo * c - hi * s, hi * c + lo * s
    if Q_NORM or ROTATES:
        half, left = tl.where(is_q, HALF, 0), tl.where(is_q, D - 2 * HALF, 0)
        tl.store(source + index, lo, mask=index < half)
        tl.store(source + HALF + index, hi, mask=index < half)
        tl.store(source + 2 * HALF + other, rest, mask=other < left)
    slot = tl.load(meta + off_slot + row)
    line = (head - HEADS) * PAGE + slot % PAGE  # v's heads follow k's
    target = kv + (slot // PAGE).to(tl.int64) * stride + line * D
    kind = kv.dtype.element_ty
    if CODES:
        top = tl.maximum(tl.max(tl.abs(lo)), tl.maximum(tl.max(tl.abs(hi)), tl.max(tl.abs(rest))))
        nothing = tl.sum(lo - lo) + tl.sum(hi - hi) + tl.sum(rest - rest)  # 0, or not a number where the head holds something that is not finite
        scale = tl.div_rn(top, 127.0) + nothing
        tl.store(scales + (slot // PAGE).to(tl.int64) * scale_stride + line, scale, mask=head >= HEADS)
        lo, hi, rest = _codes(lo, scale), _codes(hi, scale), _codes(rest, scale)
    half, left = tl.where(is_q, 0, HALF), tl.where(is_q, 0, D - 2 * HALF)
    tl.store(target + index, lo.to(kind), mask=index < half)
    tl.store(target + HALF + index, hi.to(kind), mask=index < half)
    tl.store(target + 2 * HALF + other, rest.to(kind), mask=other < left)


def rope_append(qkv: Tensor, meta: Tensor, off_rope: int, off_slot: int, rows: range, pages: Pages, norms: Norms) -> int:
    """Norm and rotate q (in place) and k of token rows ``rows`` of ``qkv [.., ld]``; k and v to their slots. Returns the number of launches."""
    half = norms.half if norms.cos is not None else pages.head_dim // 2  # without rotation: any way of cutting a head will do
    unused = qkv
    _rope_append[(len(rows), pages.heads + 2 * pages.kv_heads)](
        qkv, qkv.stride(0), pages.kv, pages.stride, _or(pages.scales, unused), pages.scale_stride, meta, off_rope, off_slot, rows.start,
        _or(norms.q_gain, unused), _or(norms.k_gain, unused), _or(norms.cos, unused), _or(norms.sin, unused), norms.eps, HEADS=pages.heads,
        KV_HEADS=pages.kv_heads, D=pages.head_dim, HALF=half, PAGE=pages.page_size, Q_NORM=norms.q_gain is not None, K_NORM=norms.k_gain is not None,
        ROTATES=norms.cos is not None, CODES=pages.scales is not None, BH=triton.next_power_of_2(max(1, half)),
        BR=triton.next_power_of_2(max(1, pages.head_dim - 2 * half)), num_warps=1,
    )  # fmt: skip
    return 1


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    return unused if tensor is None else tensor


@triton.jit(do_not_specialize=["off_row", "off_len", "off_kv", "off_pages", "off_page", "first_seq", "q_tiles", "chunk", "row0", "num_rows"])
def _attend(
    q, ld_q, out, ld_out, kv, stride, scales, scale_stride, meta, off_row, off_len, off_kv, off_pages, off_page, first_seq, q_tiles, chunk, row0, num_rows,
    sums, peaks, scale, softcap, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    SPLIT: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (sequence and tile of its queries, KV head, part of the context): online softmax over BK keys at a time.

    A tile's rows are query tokens x the query heads of the KV head. SPLIT: unscaled sums, peak and total of each row go to ``sums`` and ``peaks``.
    """
    seq = first_seq + tl.program_id(0) // q_tiles
    tile, group, part = tl.program_id(0) % q_tiles, tl.program_id(1), tl.program_id(2)
    length, kv_len = tl.load(meta + off_len + seq), tl.load(meta + off_kv + seq)
    first_row, table = tl.load(meta + off_row + seq), meta + off_page + tl.load(meta + off_pages + seq)
    repeat: tl.constexpr = HEADS // KV_HEADS
    item = tile * BM + tl.arange(0, BM)
    token, head = item // repeat, group * repeat + item % repeat
    row, row_ok = (first_row + token).to(tl.int64), token < length
    position = kv_len - length + token
    dim = tl.arange(0, BD)
    mask = row_ok[:, None] & (dim < D)[None, :]
    qs = tl.load(q + row[:, None] * ld_q + (head * D)[:, None] + dim[None, :], mask=mask, other=0.0)

    first, last = kv_len - length + tile * BM // repeat, kv_len - length + (tile * BM + BM - 1) // repeat  # positions of the tile's queries
    begin, end = part * chunk, tl.minimum(tl.minimum((part + 1) * chunk, kv_len), last + 1)
    if WINDOW > 0:
        begin = tl.maximum(begin, (first - WINDOW + 1) // BK * BK)
    peak, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for start in range(begin, end, BK):
        key = start + tl.arange(0, BK)
        ok = (key < end) & (key >= 0)
        page = tl.load(table + key // PAGE, mask=ok, other=0).to(tl.int64)
        line = group * PAGE + key % PAGE
        place = kv + (page * stride + line * D)[:, None] + dim[None, :]
        there = ok[:, None] & (dim < D)[None, :]
        keys = tl.load(place, mask=there, other=0).to(tl.float32)
        score = tl.dot(qs, tl.trans(keys), input_precision=PRECISION) * scale
        if CODES:
            score *= tl.load(scales + page * scale_stride + line, mask=ok, other=0.0)[None, :]
        if SOFTCAP:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        seen = ok[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen no key yet
        weight, shrink = tl.exp(score - base[:, None]), tl.exp(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        if CODES:
            weight *= tl.load(scales + page * scale_stride + KV_HEADS * PAGE + line, mask=ok, other=0.0)[None, :]
        values = tl.load(place + KV_HEADS * PAGE * D, mask=there, other=0).to(tl.float32)
        acc = tl.dot(weight, values, acc * shrink[:, None], input_precision=PRECISION)
        peak = top
    if SPLIT:
        line = (part * num_rows + row - row0) * HEADS + head
        tl.store(sums + line[:, None] * D + dim[None, :], acc, mask=mask)
        tl.store(peaks + 2 * line, peak, mask=row_ok)
        tl.store(peaks + 2 * line + 1, total, mask=row_ok)
    else:
        tl.store(out + row[:, None] * ld_out + (head * D)[:, None] + dim[None, :], acc / tl.where(row_ok, total, 1.0)[:, None], mask=mask)


@triton.jit(do_not_specialize=["row0", "num_rows", "num_splits"])
def _combine(out, ld_out, row0, num_rows, num_splits, sums, peaks, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Program (row, head): the parts of the context, weighted by their peaks."""
    dim = tl.arange(0, BD)
    line = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    step = num_rows * HEADS
    top = tl.load(peaks + 2 * line)
    for part in range(1, num_splits):
        top = tl.maximum(top, tl.load(peaks + 2 * (line + part * step)))
    acc, total = tl.zeros((BD,), tl.float32), 0.0
    for part in range(num_splits):
        at = line + part * step
        weight = tl.exp(tl.load(peaks + 2 * at) - top)
        acc += weight * tl.load(sums + at * D + dim, mask=dim < D, other=0.0)
        total += weight * tl.load(peaks + 2 * at + 1)
    tl.store(out + (row0 + tl.program_id(0)).to(tl.int64) * ld_out + tl.program_id(1) * D + dim, acc / total, mask=dim < D)


@dataclass(frozen=True, kw_only=True)
class Attended:
    """The sequences of one instruction, known on the host: their token rows, the longest query and the longest context (after the pass)."""

    sequences: range
    rows: range
    max_queries: int
    max_kv: int


def context_parts(attended: Attended, pages: Pages, block_rows: int, programs: int, room: int) -> tuple[int, int]:
    """(parts, keys of each): so many parts of the context that about ``programs`` run at once, if ``room`` floats hold their sums."""
    tiles = len(attended.sequences) * triton.cdiv(attended.max_queries * (pages.heads // pages.kv_heads), block_rows) * pages.kv_heads
    most = min(MAX_SPLITS, room // (len(attended.rows) * pages.heads * (pages.head_dim + 2)))
    parts = max(1, min(triton.cdiv(programs, tiles), most))
    chunk = triton.cdiv(triton.cdiv(attended.max_kv, BLOCK_KEYS), parts) * BLOCK_KEYS
    return triton.cdiv(attended.max_kv, chunk), chunk


def attend(
    q: Tensor, out: Tensor, meta: Tensor, offsets: tuple[int, int, int, int, int], attended: Attended, pages: Pages, *, scale: float, softcap: float,
    window: int, programs: int, scratch: Tensor,
) -> int:  # fmt: skip
    """Causal attention of ``q [.., ld]`` into ``out [.., ld]`` (row 0 of both is the pass's row 0). ``offsets``: of SEQ_ROW, SEQ_LEN, SEQ_KV, SEQ_PAGES, PAGE.

    ``softcap``, ``window``: 0 for none. Returns the number of launches.
    """
    items = attended.max_queries * (pages.heads // pages.kv_heads)
    exact, dims = pages.kv.dtype == torch.float32, max(16, triton.next_power_of_2(pages.head_dim))
    most_rows = 64 if dims <= (64 if exact else 128) else 32 if dims <= 128 or not exact else 16  # shared memory: 99 KiB on the smallest cards
    block_rows = 16 if items <= 16 else most_rows
    parts, chunk = context_parts(attended, pages, block_rows, programs, scratch.numel())
    q_tiles, num_rows, row0 = triton.cdiv(items, block_rows), len(attended.rows), attended.rows.start
    sums = scratch[2 * parts * num_rows * pages.heads :]
    _attend[(len(attended.sequences) * q_tiles, pages.kv_heads, parts)](
        q, q.stride(0), out, out.stride(0), pages.kv, pages.stride, _or(pages.scales, q), pages.scale_stride, meta, *offsets, attended.sequences.start,
        q_tiles, chunk, row0, num_rows, sums, scratch, scale, softcap, WINDOW=window, SOFTCAP=softcap != 0, HEADS=pages.heads,
        KV_HEADS=pages.kv_heads, D=pages.head_dim, PAGE=pages.page_size,
        SPLIT=parts > 1, CODES=pages.scales is not None, PRECISION="ieee" if exact else "tf32", BM=block_rows, BD=dims, BK=BLOCK_KEYS if dims <= 128 else 32,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts == 1:
        return 1
    _combine[(num_rows, pages.heads)](out, out.stride(0), row0, num_rows, parts, sums, scratch, HEADS=pages.heads, D=pages.head_dim, BD=dims, num_warps=1)
    return 2
