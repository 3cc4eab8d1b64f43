"""What each instruction does, in torch: the slow twin of the native kernels, and the arithmetic of the CUDA path.

Owns `OPS`, one small function per instruction. The meaning is docs/execution.md's. Knows nothing of queues, waits or streams: the caller runs it on the
stream it likes. Kernels of the device's own (`triton_ops.py`), where `execute` is given them, are asked first. On the CPU everything is computed in fp32; on
CUDA 16-bit weights multiply activations rounded to the weights' type, with fp32 sums. Quantised weights are unpacked to fp32 by `runtime/torch_quant.py`.

Shapes: M rows (tokens or logits), K inputs, N outputs, P panels, D head_dim, G KV heads, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from twinpilots.kernels.abi import NULL, Act, Dtype, Epilogue, Meta, NormKind, Op
from twinpilots.runtime.machine import SCALE_BYTES, TORCH_DTYPES, Insn, KvShape, Machine
from twinpilots.runtime.torch_quant import FORMAT_OF, panel_weights, rounded

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Act.SILU: F.silu, Act.GELU: F.gelu, Act.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), Act.RELU: F.relu,
}  # fmt: skip
SCORE_BYTES = 64 * 2**20
FP16_SAFE = 2.0**15  # activations are scaled below this before they are rounded to fp16, whose largest number is 65504


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] times each of w [P, K, N], summed in fp32: [P, M, N]."""
    if w.dtype == torch.float32 or not w.is_cuda:
        return torch.matmul(x, w.float())
    scale = None
    if w.dtype == torch.float16:  # a row beyond fp16's range is multiplied scaled down
        scale = (x.abs().amax(-1, keepdim=True) / FP16_SAFE).clamp_(min=1.0)
        x = x / scale
    y: Tensor = torch.bmm(x.to(w.dtype).expand(w.shape[0], -1, -1), w, out_dtype=torch.float32)
    return y if scale is None else y * scale


def normed(x: Tensor, gain: Tensor | None, bias: Tensor | None, kind: int, eps: float) -> Tensor:
    """RMS or layer norm over the last dimension, in fp32."""
    if kind == NormKind.LAYER:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


def embed(m: Machine, insn: Insn) -> None:
    dst, dst_ld, table, layout, dtype, width, unit, vocab, pos_table, pos_offset, pos_dtype = insn.a[:11]
    first, last = m.rows(insn)
    token, columns = m.batch.index(Meta.OFF_TOKEN, first, last)[:, None], torch.arange(width, device=m.device)
    if dtype in FORMAT_OF:
        x = embed_quantized(m, insn, first, last)
    elif layout == 0:
        x = m.flat(table, dtype, vocab * width)[token * width + columns].float() * insn.f[0]
    else:
        start = token // unit * unit  # of the token's panel, [width][panel rows]
        where = start * width + columns * (vocab - start).clamp(max=unit) + token - start
        x = m.flat(table, dtype, vocab * width)[where].float() * insn.f[0]
    if pos_table != NULL:
        position = m.batch.index(Meta.OFF_POSITION, first, last) + pos_offset
        rows = int(max(m.batch.ints(Meta.OFF_POSITION, first, last))) + pos_offset + 1
        x = x + m.flat(pos_table, pos_dtype, rows * width).view(rows, width)[position].float()
    m.matrix(dst, dst_ld, first, last, width).copy_(x)


def embed_quantized(m: Machine, insn: Insn, first: int, last: int) -> Tensor:
    """Columns of unit panels: each panel that holds one of the batch's tokens is unpacked once."""
    _, _, table, _, dtype, width, unit, vocab = insn.a[:8]
    tokens = m.batch.ints(Meta.OFF_TOKEN, first, last)
    fmt, x = FORMAT_OF[dtype], torch.empty((last - first, width), device=m.device)
    for start in {token // unit * unit for token in tokens}:
        columns = min(unit, vocab - start)
        packed = m.bytes_at(table + fmt.row_bytes(start * width, "out"), fmt.row_bytes(columns * width, "out"))
        weights = panel_weights(packed, fmt, 1, columns, width)[0]
        for row in (row for row, token in enumerate(tokens) if token // unit * unit == start):
            x[row] = weights[tokens[row] - start]
    return x * insn.f[0]


def norm(m: Machine, insn: Insn) -> None:
    dst, dst_ld, src, src_ld, gain, bias, width, kind = insn.a[:8]
    first, last = m.rows(insn)
    if insn.row_kind == 1:
        x = m.matrix(src, src_ld, 0, m.batch.header[Meta.NUM_TOKENS], width)[m.batch.index(Meta.OFF_LOGIT_ROW, first, last)]
    else:
        x = m.matrix(src, src_ld, first, last, width)
    m.matrix(dst, dst_ld, first, last, width).copy_(normed(x, m.vector(gain, width), m.vector(bias, width), kind, insn.f[0]))


def unit_panels(m: Machine, w: int, dtype: int, width: int, start: int, count: int, halves: int, panel: int) -> Tensor:
    """``count`` panels of ``panel`` outputs (of each half) from output ``start`` on: [P, K, halves * panel]."""
    elements = count * halves * panel * width
    if dtype not in FORMAT_OF:
        return m.flat(w + halves * start * width * TORCH_DTYPES[dtype].itemsize, dtype, elements).view(count, width, halves * panel)
    fmt = FORMAT_OF[dtype]
    packed = m.bytes_at(w + fmt.row_bytes(halves * start * width, "out"), fmt.row_bytes(elements, "out"))
    return panel_weights(packed, fmt, count, halves * panel, width).transpose(1, 2)


def linear(m: Machine, insn: Insn) -> None:
    dst, dst_ld, src, src_ld, w, dtype, rows, width, unit, epilogue, activation, bias, bias2 = insn.a[:13]
    first, last = m.rows(insn)
    x, halves = m.matrix(src, src_ld, first, last, width), 2 if epilogue == Epilogue.ACT_MUL else 1
    if dtype in FORMAT_OF:
        x = rounded(x, insn.a[13])
    parts = []
    for start, count, panel in ((0, rows // unit, unit), (rows // unit * unit, 1, rows % unit)):  # the whole panels at once, then a narrower last one
        if count * panel:
            y = multiply(x, unit_panels(m, w, dtype, width, start, count, halves, panel)).view(count, last - first, halves, panel)
            parts.append(y.permute(2, 1, 0, 3).reshape(halves, last - first, count * panel))
    y = torch.cat(parts, -1)  # [halves, M, rows]
    biases = [m.vector(address, rows) for address in (bias, bias2)]
    y = torch.stack([half if b is None else half + b for half, b in zip(y, biases, strict=False)])
    if epilogue == Epilogue.ACT_MUL:
        out = ACTIVATIONS[activation](y[0]) * y[1]
    elif epilogue == Epilogue.ACT:
        out = ACTIVATIONS[activation](y[0])
    elif epilogue == Epilogue.SOFTCAP:
        out = insn.f[0] * torch.tanh(y[0] / insn.f[0])
    else:
        out = y[0]
    m.matrix(dst, dst_ld, first, last, rows).copy_(out)


def linear_in(m: Machine, insn: Insn) -> None:
    dst, dst_ld, src, src_ld, w, dtype, rows, width, accumulate = insn.a[:9]
    first, last = m.rows(insn)
    x = m.matrix(src, src_ld, first, last, rows)
    if dtype in FORMAT_OF:
        fmt = FORMAT_OF[dtype]
        weights = panel_weights(m.bytes_at(w, fmt.row_bytes(rows * width, "in")), fmt, 1, width, rows)[0]
        y = torch.matmul(rounded(x, insn.a[9]), weights.T)
    else:
        y = multiply(x, m.flat(w, dtype, rows * width).view(1, rows, width))[0]
    out = m.matrix(dst, dst_ld, first, last, width)
    if accumulate:
        out.add_(y)
    else:
        out.copy_(y)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of the first 2 * cos.shape[-1] dims of x [M, heads, D]; cos, sin [M, rotary_dim / 2]."""
    half = cos.shape[-1]
    lo, hi, cos, sin = x[..., :half], x[..., half : 2 * half], cos[:, None], sin[:, None]
    return torch.cat((lo * cos - hi * sin, hi * cos + lo * sin, x[..., 2 * half :]), -1)


def rope_append(m: Machine, insn: Insn) -> None:
    qkv, ld, q_gain, k_gain, cos, sin, rotary_dim, heads, kv_heads, head_dim, kv, page_stride, page_size, kv_dtype = insn.a[:14]
    first, last = m.rows(insn)
    whole = m.matrix(qkv, ld, first, last, (heads + 2 * kv_heads) * head_dim).view(last - first, -1, head_dim)
    q, k, v = whole[:, :heads], whole[:, heads : heads + kv_heads], whole[:, heads + kv_heads :]
    if q_gain != NULL:
        q_new = normed(q, m.vector(q_gain, head_dim), None, NormKind.RMS, insn.f[0])
    else:
        q_new = q
    if k_gain != NULL:
        k = normed(k, m.vector(k_gain, head_dim), None, NormKind.RMS, insn.f[0])
    if cos != NULL:
        row, half = m.batch.index(Meta.OFF_ROPE_ROW, first, last), rotary_dim // 2
        rows = max(m.batch.ints(Meta.OFF_ROPE_ROW, first, last)) + 1
        c, s = (m.flat(table, Dtype.FP32, rows * half).view(rows, half)[row] for table in (cos, sin))
        q_new, k = rotated(q_new, c, s), rotated(k, c, s)
    if q_new is not q:
        q.copy_(q_new)
    slot = m.batch.index(Meta.OFF_SLOT, first, last)
    num_pages = max(m.batch.ints(Meta.OFF_SLOT, first, last)) // page_size + 1
    shape = KvShape(page_size, kv_heads, head_dim, kv_dtype)
    pages = m.kv_pages(kv, page_stride, num_pages, shape)
    page, offset = slot // page_size, slot % page_size
    for which, new in enumerate((k, v)):
        stored = new
        if kv_dtype == Dtype.INT8:
            stored, scales = kv_codes(new)
            m.kv_scales(kv, page_stride, num_pages, shape)[page, which, :, offset] = scales
        pages[page, which, :, offset] = stored.to(pages.dtype)


def kv_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [.., D] as int8 KV keeps them: codes, and the scales [..] that bring them back (not a number where a row holds something that is not finite)."""
    scales = x.abs().amax(-1) / 127
    scales = scales.where(scales.isfinite(), torch.nan)
    codes = (x / scales[..., None]).round().clamp(-127, 127)
    return codes.where(scales[..., None] > 0, 0), scales


def attend(m: Machine, insn: Insn) -> None:
    for index in m.sequences(insn, insn.glo, insn.ghi):
        attend_sequence(m, insn, index)


def attend_sequence(m: Machine, insn: Insn, index: int) -> None:
    """Softmax attention of one sequence's queries over its pages, in fp32; queries in blocks, so that the scores take SCORE_BYTES at most (or one row's)."""
    dst, dst_ld, qkv, ld, heads, kv_heads, head_dim, kv, page_stride, page_size, kv_dtype = insn.a[:11]
    row, length, kv_len = m.sequence(index)
    start = m.batch.ints(Meta.OFF_SEQ_PAGES, index, index + 1)[0]
    count = -(-kv_len // page_size)
    num_pages = max(m.batch.ints(Meta.OFF_PAGE, start, start + count)) + 1
    shape, used = KvShape(page_size, kv_heads, head_dim, kv_dtype), m.batch.index(Meta.OFF_PAGE, start, start + count)
    pages = m.kv_pages(kv, page_stride, num_pages, shape)[used]  # [pages, 2, G, page_size, D]
    if kv_dtype == Dtype.INT8:
        pages = pages * m.kv_scales(kv, page_stride, num_pages, shape)[used][..., None]
    keys, values = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :kv_len].float()
    step = max(1, SCORE_BYTES // (4 * heads * kv_len))
    for first in range(0, length, step):
        last = min(first + step, length)
        q = m.matrix(qkv, ld, row + first, row + last, heads * head_dim)
        out = attend_block(insn, q, keys, values, kv_len - length + first)
        m.matrix(dst, dst_ld, row + first, row + last, heads * head_dim).copy_(out)


def attend_block(insn: Insn, q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """q [M, H * D], the first at ``position``, over keys and values [G, kv_len, D]: [M, H * D]."""
    heads, kv_heads, head_dim, window = insn.a[4], insn.a[5], insn.a[6], insn.a[11]
    grouped = q.view(q.shape[0], kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = torch.matmul(grouped, keys[:, None].transpose(-1, -2)) * insn.f[0]  # [G, H / G, M, kv_len]
    if insn.f[1]:
        scores = insn.f[1] * torch.tanh(scores / insn.f[1])
    own = torch.arange(position, position + q.shape[0], device=q.device)[:, None]
    key = torch.arange(keys.shape[1], device=q.device)
    hidden = key > own
    if window:
        hidden |= key <= own - window
    weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
    return torch.matmul(weights, values[:, None]).permute(2, 0, 1, 3).reshape(q.shape[0], heads * head_dim)


def add(m: Machine, insn: Insn) -> None:
    x, x_ld, p, p_ld, q, q_ld, bias, gain, gain_bias, norm_kind, width = insn.a[:11]
    first, last = m.rows(insn)
    out = m.matrix(x, x_ld, first, last, width)
    total = torch.zeros((last - first, width), device=out.device)
    for term, ld in ((p, p_ld), (q, q_ld)):
        if term != NULL:
            total = total + m.matrix(term, ld, first, last, width)
    if bias != NULL:
        total = total + m.flat(bias, Dtype.FP32, width)
    if gain != NULL:
        total = normed(total, m.vector(gain, width), m.vector(gain_bias, width), norm_kind, insn.f[0])
    out.add_(total)


def copy(m: Machine, insn: Insn) -> None:
    dst, dst_ld, src, src_ld, columns = insn.a[:5]
    first, last = m.rows(insn)
    target, source = m.matrix(dst, dst_ld, first, last, columns, aliased=True), m.matrix(src, src_ld, first, last, columns, aliased=True)
    if m.is_aliased:
        torch.mul(source, 1.0, out=target)  # a kernel that touches pinned memory: a copy would queue behind the weights on the copy engine
    elif target.device == source.device or (target.is_contiguous() and source.is_contiguous()):
        target.copy_(source, non_blocking=True)
    else:
        for to, fro in zip(target, source, strict=True):  # torch would stage a strided copy between devices in memory of its own
            to.copy_(fro, non_blocking=True)


def load(m: Machine, insn: Insn) -> None:
    for dst, src, num_bytes in m.words64(insn.a[0], 3 * insn.a[1]).reshape(-1, 3).tolist():
        m.bytes_at(dst, num_bytes).copy_(m.bytes_at(src, num_bytes), non_blocking=True)


def load_kv(m: Machine, insn: Insn) -> None:
    staging, home, page_stride, page_size, kv_heads, head_dim, dtype = insn.a[:7]
    page_bytes = KvShape(page_size, kv_heads, head_dim, dtype).page_bytes
    for index in m.sequences(insn, 1, 2):
        _, length, kv_len = m.sequence(index)
        count = -(-(kv_len - length) // page_size)
        pages = zip(m.pages(index, Meta.OFF_SEQ_PAGES, count), m.pages(index, Meta.OFF_SEQ_HOME, count), strict=True)
        copy_pages(m, staging, home, page_stride, page_bytes, pages)


def copy_pages(m: Machine, to: int, fro: int, page_stride: int, page_bytes: int, pages: Iterable[tuple[int, int]]) -> None:
    """Whole pages, pairs of (number at ``to``, number at ``fro``). Those that follow each other on both sides cross at one stroke."""
    runs: list[tuple[int, int, int]] = []
    for target, source in pages:
        first, other, count = runs[-1] if runs and page_stride == page_bytes else (-1, -1, 0)
        if count and (first + count, other + count) == (target, source):
            runs[-1] = first, other, count + 1
        else:
            runs.append((target, source, 1))
    for target, source, count in runs:
        num_bytes = count * page_bytes
        m.bytes_at(to + target * page_stride, num_bytes).copy_(m.bytes_at(fro + source * page_stride, num_bytes), non_blocking=True)


def store_kv(m: Machine, insn: Insn) -> None:
    """Only the rows of this pass's tokens: a page's other rows are not this pass's to write."""
    staging, home, page_stride, page_size, kv_heads, head_dim, dtype = insn.a[:7]
    shape = KvShape(page_size, kv_heads, head_dim, dtype)
    for index in m.sequences(insn, 1, 2):
        _, length, kv_len = m.sequence(index)
        count = -(-kv_len // page_size)
        pages = list(zip(m.pages(index, Meta.OFF_SEQ_HOME, count), m.pages(index, Meta.OFF_SEQ_PAGES, count), strict=True))
        first = (kv_len - length) // page_size
        whole = range(-(-(kv_len - length) // page_size), kv_len // page_size) if shape.is_dense else range(0)
        copy_pages(m, home, staging, page_stride, shape.page_bytes, (pages[page] for page in whole))
        for page in (page for page in range(first, count) if page not in whole):
            to, fro = home + pages[page][0] * page_stride, staging + pages[page][1] * page_stride
            copy_rows(m, to, fro, shape, max(kv_len - length - page * page_size, 0), min(kv_len - page * page_size, page_size))


def copy_rows(m: Machine, to: int, fro: int, shape: KvShape, lo: int, hi: int) -> None:
    """Tokens [lo, hi) of one page, of all heads, keys and values, with their scales."""
    lines = [(0, shape.row_bytes)] + ([(shape.scales_offset, SCALE_BYTES)] if shape.dtype == Dtype.INT8 else [])  # where they begin, bytes per token and head
    for begin, num_bytes in lines:
        target, source = to + begin + lo * num_bytes, fro + begin + lo * num_bytes
        kind = torch.uint8 if (target | source | num_bytes) % 4 else torch.int32
        size = (2 * shape.kv_heads, (hi - lo) * num_bytes // kind.itemsize)
        stride = (shape.page_size * num_bytes // kind.itemsize, 1)
        there, here = m.strided(target, kind, size, stride, aliased=True), m.strided(source, kind, size, stride)
        if there.device == here.device:  # at one stroke: on a GPU by a kernel that writes pinned memory
            there.copy_(here, non_blocking=True)
        else:
            for one, other in zip(there, here, strict=True):  # torch would stage a strided copy between devices in memory of its own
                one.copy_(other, non_blocking=True)


def poison(m: Machine, insn: Insn) -> None:
    m.bytes_at(insn.a[0], insn.a[1]).fill_(0xFF)


OPS: Mapping[int, Callable[[Machine, Insn], None]] = {
    Op.EMBED: embed, Op.NORM: norm, Op.LINEAR: linear, Op.LINEAR_IN: linear_in, Op.ROPE_APPEND: rope_append, Op.ATTEND: attend, Op.ADD: add,
    Op.COPY: copy, Op.LOAD: load, Op.LOAD_KV: load_kv, Op.STORE_KV: store_kv, Op.POISON: poison,
}  # fmt: skip
ROW_OPS = frozenset({Op.EMBED, Op.NORM, Op.LINEAR, Op.LINEAR_IN, Op.ROPE_APPEND, Op.ADD, Op.COPY})


class Kernels(Protocol):
    """Kernels of the device's own."""

    def run(self, machine: Machine, insn: Insn) -> bool:
        """Whether this instruction was run; else it is torch's."""
        ...


def execute(machine: Machine, insn: Insn, kernels: Kernels | None = None) -> bool:
    """Run one instruction; nothing happens when it has no rows. Whether it was left to ``kernels``, or nothing was to be done."""
    if insn.op in ROW_OPS:
        first, last = machine.rows(insn)
        if first == last:
            return True
    with torch.inference_mode():
        if kernels is not None and kernels.run(machine, insn):
            return True
        OPS[insn.op](machine, insn)
    return False


def is_known(insn: Insn) -> bool:
    """Whether the instruction is one that this interpreter runs."""
    return insn.op in OPS and 0 <= insn.mb < 8 and 0 <= insn.glo <= insn.ghi <= 3 and insn.row_kind in (0, 1)


def link_bytes(machine: Machine, insn: Insn) -> tuple[int, int] | None:
    """(bytes, 0 up or 1 down) that an instruction moves over the link; None when it moves nothing there."""
    if insn.op == Op.COPY:
        first, last = machine.rows(insn)
        return 4 * insn.a[4] * (last - first), insn.a[5]
    if insn.op == Op.LOAD:
        return insn.a[2], 0
    if insn.op not in (Op.LOAD_KV, Op.STORE_KV):
        return None
    _, _, _, page_size, kv_heads, head_dim, dtype = insn.a[:7]
    total = 0
    for index in machine.sequences(insn, 1, 2):
        _, length, kv_len = machine.sequence(index)
        total += -(-(kv_len - length) // page_size) * page_size if insn.op == Op.LOAD_KV else length
    return 2 * kv_heads * head_dim * TORCH_DTYPES[dtype].itemsize * total, 0 if insn.op == Op.LOAD_KV else 1
