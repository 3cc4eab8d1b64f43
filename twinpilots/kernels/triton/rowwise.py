"""Row by row on the GPU: norms, the residual's sum, and activation rows over the link.

Owns the Triton kernels of NORM, ADD and COPY: one launch each, where torch takes six to ten. A row is held in registers, in fp32. COPY reads or writes
pinned host memory that is mapped into the device: a kernel on the compute stream does not wait behind weights on the copy engine.
Knows nothing of instructions or arenas.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LAYER_NORM = tl.constexpr(1)  # abi.NormKind


@triton.jit
def _normed(x, index, ok, gain, bias, width, eps, KIND: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """RMS or layer norm of a row; elements that are not ``ok`` are 0."""
    if KIND == LAYER_NORM:
        x = tl.where(ok, x - tl.sum(x) / width, 0.0)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x) / width + eps))
    if HAS_GAIN:
        y *= tl.load(gain + index, mask=ok, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + index, mask=ok, other=0.0)
    return y


@triton.jit(do_not_specialize=["first", "off_index"])
def _norm(
    out, ld_out, x, ld_x, meta, off_index, first, gain, bias, width, eps, KIND: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATHERS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    source = row
    if GATHERS:
        source = tl.load(meta + off_index + row)
    index = tl.arange(0, BN)
    ok = index < width
    values = tl.load(x + source.to(tl.int64) * ld_x + index, mask=ok, other=0.0)
    y = _normed(values, index, ok, gain, bias, width, eps, KIND, HAS_GAIN, HAS_BIAS)
    tl.store(out + row.to(tl.int64) * ld_out + index, y, mask=ok)


def norm(
    out: Tensor, x: Tensor, rows: range, meta: Tensor, off_index: int | None, gain: Tensor | None, bias: Tensor | None, *, width: int, kind: int, eps: float,
) -> int:  # fmt: skip
    """Rows ``rows`` of ``out [.., ld]`` from the same rows of ``x``, or from those that the metadata names at ``off_index``. Number of launches."""
    block = triton.next_power_of_2(width)
    _norm[(len(rows),)](
        out, out.stride(0), x, x.stride(0), meta, off_index or 0, rows.start, x if gain is None else gain, x if bias is None else bias, width, eps, KIND=kind,
        HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, GATHERS=off_index is not None, BN=block, num_warps=_warps(block),
    )  # fmt: skip
    return 1


@triton.jit
def _add(
    x, ld_x, p, ld_p, q, ld_q, bias, gain, gain_bias, width, eps, KIND: tl.constexpr, HAS_P: tl.constexpr, HAS_Q: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_GAIN_BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BN)
    ok = index < width
    total = tl.zeros((BN,), tl.float32)
    if HAS_P:
        total += tl.load(p + row * ld_p + index, mask=ok, other=0.0)
    if HAS_Q:
        total += tl.load(q + row * ld_q + index, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + index, mask=ok, other=0.0)
    if HAS_GAIN:
        total = _normed(total, index, ok, gain, gain_bias, width, eps, KIND, HAS_GAIN, HAS_GAIN_BIAS)
    place = x + row * ld_x + index
    tl.store(place, tl.load(place, mask=ok, other=0.0) + total, mask=ok)


def add(
    x: Tensor, terms: tuple[Tensor | None, Tensor | None], bias: Tensor | None, gain: Tensor | None, gain_bias: Tensor | None, *, kind: int, eps: float,
) -> int:  # fmt: skip
    """x [M, width] += norm(p + q + bias), the norm where there is a gain. Number of launches."""
    (m, width), (p, q) = x.shape, (x if term is None else term for term in terms)
    block = triton.next_power_of_2(width)
    some = tuple(x if vector is None else vector for vector in (bias, gain, gain_bias))
    _add[(m,)](
        x, x.stride(0), p, p.stride(0), q, q.stride(0), *some, width, eps, KIND=kind, HAS_P=terms[0] is not None, HAS_Q=terms[1] is not None,
        HAS_BIAS=bias is not None, HAS_GAIN=gain is not None, HAS_GAIN_BIAS=gain_bias is not None, BN=block, num_warps=_warps(block),
    )  # fmt: skip
    return 1


@triton.jit
def _copy(out, ld_out, x, ld_x, width, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BN + tl.arange(0, BN)
    tl.store(out + row * ld_out + index, tl.load(x + row * ld_x + index, mask=index < width), mask=index < width)


def copy(out: Tensor, x: Tensor) -> int:
    """``out [M, width]`` from ``x``, either of which may be pinned host memory. Number of launches."""
    m, width = x.shape
    _copy[(m, triton.cdiv(width, 1024))](out, out.stride(0), x, x.stride(0), width, BN=1024, num_warps=4)
    return 1


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))
