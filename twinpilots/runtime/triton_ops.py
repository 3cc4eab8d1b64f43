"""Instructions on Triton kernels: what a CUDA device runs of its own, asked before torch's operations (`torch_ops.execute`).

Owns the way from an instruction's arguments to a kernel's, the workspace (one, allocated with the first instruction that needs it) and the count of launches.
An operation returns False to leave an instruction to torch; one whose kernel cannot be compiled here is reported once and left to torch from then on.
Which products they take is decided in `kernels/triton`. Needs triton; loaded only where it is used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from twinpilots.kernels.abi import DTYPE_CODES, NULL, Activations, Dtype, Epilogue, Meta, Op
from twinpilots.kernels.triton import attention, cannot_build, multiplies, rowwise
from twinpilots.kernels.triton.linear import Finish, linear
from twinpilots.model.weight_format import FORMATS, WeightFormat
from twinpilots.runtime.machine import SCALE_BYTES, TORCH_DTYPES, Insn, KvShape, Machine, launched_kv

_LOG = logging.getLogger(__name__)
SCRATCH_BYTES = 32 * 2**20  # partial sums; a launch that would need more is cut into fewer parts
FORMAT_OF: dict[int, WeightFormat] = {int(DTYPE_CODES[name]): fmt for name, fmt in FORMATS.items()}


class TritonOps:
    """The kernels of one queue on ``device``. ``programs``: how many of them keep the device busy."""

    def __init__(self, device: torch.device, programs: int) -> None:
        self.launches: Counter[str] = Counter()
        self.programs = programs
        self._device = device
        self._scratch: Tensor | None = None
        self._ops: dict[int, Callable[[TritonOps, Machine, Insn], int]] = dict(OPS)

    def run(self, m: Machine, insn: Insn) -> bool:
        """Whether a kernel took the instruction. Nothing is launched that could be left half done: a kernel is compiled before it is launched."""
        op = self._ops.get(insn.op)
        if op is None:
            return False
        try:
            launched = op(self, m, insn)
        except Exception as error:
            if not cannot_build(error):
                raise
            del self._ops[insn.op]
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _LOG.warning("the Triton kernel of %s cannot be built on %s, torch's operations run instead, more slowly: %s", Op(insn.op).name, self._device, text)
            return False
        self.launches[Op(insn.op).name] += launched
        return launched > 0

    @property
    def scratch(self) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty(SCRATCH_BYTES // 4, dtype=torch.float32, device=self._device)
        return self._scratch


def kernels_for(device: torch.device) -> TritonOps:
    """The kernels of one queue of a CUDA device that `kernels.triton.unavailable` does not rule out."""
    return TritonOps(device, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def _weights(m: Machine, address: int, fmt: WeightFormat, dtype: int) -> Tensor:
    """Where weights begin: a kernel asks only for the address and the type of an element."""
    return m.bytes_at(address, 1) if fmt.is_quantized else m.flat(address, dtype, 1)


def _linear(k: TritonOps, m: Machine, insn: Insn) -> int:
    dst, dst_ld, src, src_ld, w, dtype, rows, width, unit, epilogue, activation, bias, bias2, activations = insn.a[:14]
    (first, last), fmt = m.rows(insn), FORMAT_OF[dtype]
    if activations == Activations.FAST or not multiplies(fmt, last - first):
        return 0
    cap, biases = insn.f[0] if epilogue == Epilogue.SOFTCAP else 1.0, (m.vector(bias, rows), m.vector(bias2, rows))
    finish = Finish(epilogue=epilogue, activation=activation, softcap=cap, biases=biases)
    x, out = m.matrix(src, src_ld, first, last, width), m.matrix(dst, dst_ld, first, last, rows)
    return linear(x, _weights(m, w, fmt, dtype), out, fmt, unit, finish, programs=k.programs, scratch=k.scratch)


def _linear_in(k: TritonOps, m: Machine, insn: Insn) -> int:
    dst, dst_ld, src, src_ld, w, dtype, rows, width, accumulate, activations = insn.a[:10]
    (first, last), fmt = m.rows(insn), FORMAT_OF[dtype]
    if activations == Activations.FAST or not multiplies(fmt, last - first):
        return 0
    x, out = m.matrix(src, src_ld, first, last, rows), m.matrix(dst, dst_ld, first, last, width)
    finish = Finish(accumulate=bool(accumulate))
    return linear(x, _weights(m, w, fmt, dtype), out, fmt, width, finish, programs=k.programs, scratch=k.scratch)


def _pages(m: Machine, kv: int, page_stride: int, page_size: int, heads: int, kv_heads: int, head_dim: int, dtype: int) -> attention.Pages:
    stride = page_stride // TORCH_DTYPES[dtype].itemsize
    scales = None
    if dtype == Dtype.INT8:
        scales = m.flat(kv + KvShape(page_size, kv_heads, head_dim, dtype).scales_offset, Dtype.FP32, 1)
    return attention.Pages(
        kv=m.flat(kv, dtype, 1), stride=stride, page_size=page_size, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scales=scales,
        scale_stride=page_stride // SCALE_BYTES,
    )  # fmt: skip


def _rope_append(_k: TritonOps, m: Machine, insn: Insn) -> int:
    qkv, ld, q_gain, k_gain, cos, sin, rotary_dim, heads, kv_heads, head_dim, kv, page_stride, page_size, kv_dtype = insn.a[:14]
    (first, last), header = m.rows(insn), m.batch.header
    half, one = rotary_dim // 2, 1  # of the tables the kernel asks only where they begin
    norms = attention.Norms(
        q_gain=m.vector(q_gain, head_dim), k_gain=m.vector(k_gain, head_dim), cos=m.vector(cos, one), sin=m.vector(sin, one), half=half, eps=insn.f[0],
    )  # fmt: skip
    whole = m.matrix(qkv, ld, 0, last, (heads + 2 * kv_heads) * head_dim)
    pages = _pages(m, kv, page_stride, page_size, heads, kv_heads, head_dim, kv_dtype)
    offsets = header[Meta.OFF_ROPE_ROW], header[Meta.OFF_SLOT]
    return attention.rope_append(whole, m.batch.device_words, *offsets, range(first, last), pages, norms)


def _attend(k: TritonOps, m: Machine, insn: Insn) -> int:
    dst, dst_ld, qkv, ld, heads, kv_heads, head_dim, kv, page_stride, page_size, kv_dtype, window = insn.a[:12]
    (first, last), sequences, batch = m.rows(insn), m.sequences(insn, insn.glo, insn.ghi), m.batch
    if first == last:
        return 0
    max_queries, max_kv = launched_kv(m, insn)
    attended = attention.Attended(sequences=sequences, rows=range(first, last), max_queries=max_queries, max_kv=max_kv)
    header = batch.header
    offsets = header[Meta.OFF_SEQ_ROW], header[Meta.OFF_SEQ_LEN], header[Meta.OFF_SEQ_KV], header[Meta.OFF_SEQ_PAGES], header[Meta.OFF_PAGE]
    q, out = m.matrix(qkv, ld, 0, last, heads * head_dim), m.matrix(dst, dst_ld, 0, last, heads * head_dim)
    return attention.attend(
        q, out, batch.device_words, offsets, attended, _pages(m, kv, page_stride, page_size, heads, kv_heads, head_dim, kv_dtype), scale=insn.f[0],
        softcap=insn.f[1], window=window, programs=k.programs, scratch=k.scratch,
    )  # fmt: skip


def _norm(_k: TritonOps, m: Machine, insn: Insn) -> int:
    dst, dst_ld, src, src_ld, gain, bias, width, kind = insn.a[:8]
    first, last = m.rows(insn)
    tokens = m.batch.header[Meta.NUM_TOKENS]
    x, out = m.matrix(src, src_ld, 0, tokens, width), m.matrix(dst, dst_ld, 0, last, width)
    off_index = m.batch.header[Meta.OFF_LOGIT_ROW] if insn.row_kind == 1 else None
    return rowwise.norm(
        out, x, range(first, last), m.batch.device_words, off_index, m.vector(gain, width), m.vector(bias, width), width=width, kind=kind, eps=insn.f[0],
    )  # fmt: skip


def _add(_k: TritonOps, m: Machine, insn: Insn) -> int:
    x, x_ld, p, p_ld, q, q_ld, bias, gain, gain_bias, norm_kind, width = insn.a[:11]
    first, last = m.rows(insn)
    terms = tuple(None if term == NULL else m.matrix(term, ld, first, last, width) for term, ld in ((p, p_ld), (q, q_ld)))
    vectors = (m.vector(address, width) for address in (bias, gain, gain_bias))
    return rowwise.add(m.matrix(x, x_ld, first, last, width), (terms[0], terms[1]), *vectors, kind=norm_kind, eps=insn.f[0])


def _copy(_k: TritonOps, m: Machine, insn: Insn) -> int:
    """Where the host arena is pinned and mapped; else the copy engine moves the rows."""
    dst, dst_ld, src, src_ld, columns = insn.a[:5]
    first, last = m.rows(insn)
    out, x = m.matrix(dst, dst_ld, first, last, columns, aliased=True), m.matrix(src, src_ld, first, last, columns, aliased=True)
    return rowwise.copy(out, x) if out.device == x.device == m.device else 0


OPS: dict[int, Callable[[TritonOps, Machine, Insn], int]] = {
    Op.LINEAR: _linear, Op.LINEAR_IN: _linear_in, Op.ROPE_APPEND: _rope_append, Op.ATTEND: _attend, Op.NORM: _norm, Op.ADD: _add, Op.COPY: _copy,
}  # fmt: skip
