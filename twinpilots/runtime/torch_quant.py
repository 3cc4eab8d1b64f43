"""Quantised weights in torch: panels (docs/execution.md, "Quantised formats") to fp32, on whatever device they lie, and activations as the kernels round them.

Owns the bit operations. Knows nothing of instructions or arenas. Shapes: P panels of w columns, B blocks of K inputs each, G groups per block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinpilots.kernels.abi import DTYPE_CODES, Activations
from twinpilots.kernels.quant_format import HEADER_BYTES
from twinpilots.model.weight_format import FORMATS, WeightFormat

FORMAT_OF: dict[int, WeightFormat] = {int(DTYPE_CODES[name]): fmt for name, fmt in FORMATS.items() if fmt.is_quantized}
TINY = 1e-30  # groups whose largest activation is below this are 0


def rounded(x: Tensor, activations: int) -> Tensor:
    """x [M, K] with each group of 32 inputs of a row rounded as the native kernels do (`Activations`; NULL counts as EXACT)."""
    groups = x.reshape(x.shape[0], -1, 32)
    top = groups.abs().amax(-1, keepdim=True)
    limit = torch.full_like(
        top, 127.0 if activations == Activations.FAST else 32767.0
    )  # a tensor: torch divides by a number, or a number by it, in two roundings
    codes = torch.round(groups * (limit / top))
    y = codes * (top / limit)
    y = torch.where(top < TINY, 0.0, torch.where(torch.isfinite(top), y, torch.nan))
    return y.reshape(x.shape)


def panel_weights(packed: Tensor, fmt: WeightFormat, panels: int, columns: int, width: int) -> Tensor:
    """``panels`` panels of ``columns`` columns over ``width`` inputs, packed one after the other (uint8), in fp32: [P, w, K]."""
    blocks = packed.view(panels, width // fmt.block, columns * fmt.block_bytes)
    codes, (scales, offsets) = _codes(blocks, fmt, columns), _scales(blocks, fmt, columns)
    grouped = codes.reshape(*scales.shape, -1).float()
    return (grouped * scales[..., None] + offsets[..., None]).reshape(panels, columns, width)


def _piece(blocks: Tensor, columns: int, offset: int, count: int, size: int) -> Tensor:
    """Bytes that follow ``offset`` bytes per column: [P, B, count, w, size]."""
    return blocks[:, :, offset * columns : (offset + count * size) * columns].reshape(*blocks.shape[:2], count, columns, size)


def _halves(blocks: Tensor, columns: int, offset: int) -> Tensor:
    """f16 values: fp32 [P, w, B, 1]."""
    return _piece(blocks, columns, offset, 1, 2).contiguous().view(torch.float16)[:, :, 0].float().transpose(1, 2)


def _codes(blocks: Tensor, fmt: WeightFormat, columns: int) -> Tensor:
    """The codes in ascending k: [P, w, B, block]."""
    if fmt.name == "q8_0":
        return _piece(blocks, columns, 2, 8, 4).view(torch.int8).permute(0, 3, 1, 2, 4).flatten(3)
    header = HEADER_BYTES[fmt.name]
    packed = _piece(blocks, columns, header, fmt.block // 8, 4)
    codes = torch.stack([packed & 15, packed >> 4], 3).permute(0, 4, 1, 2, 3, 5).flatten(3)
    if fmt.bits == 5:
        upper = _piece(blocks, columns, header + fmt.block // 2, fmt.block // 32, 4)
        codes = codes | torch.stack([(upper >> t & 1) << 4 for t in range(8)], 3).permute(0, 4, 1, 2, 3, 5).flatten(3)
    if fmt.name == "q6_k":
        upper = _piece(blocks, columns, header + 128, 16, 4)
        codes = codes | torch.stack([(upper >> 2 * t & 3) << 4 for t in range(4)], 3).permute(0, 4, 1, 2, 3, 5).flatten(3)
    return codes


def _scales(blocks: Tensor, fmt: WeightFormat, columns: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of every group: [P, w, B, G] each; a weight is scale * code + offset."""
    d = _halves(blocks, columns, 0)
    if fmt.name == "q8_0":
        return d, torch.zeros_like(d)
    if fmt.name in ("q4_0", "q5_0"):
        return d, (-8.0 if fmt.bits == 4 else -16.0) * d
    if fmt.name == "q6_k":
        scales = d * _piece(blocks, columns, 2, 16, 1).view(torch.int8).permute(0, 3, 1, 2, 4).flatten(3).float()
        return scales, -32.0 * scales
    second = _halves(blocks, columns, 2)
    if fmt.name in ("q4_1", "q5_1"):
        return d, second
    if fmt.name not in ("q4_k", "q5_k"):
        return d, -(d * second)
    first, middle, last = _piece(blocks, columns, 4, 12, 1).permute(0, 3, 1, 2, 4).flatten(3).split(4, -1)
    scales = torch.cat([first & 63, last & 15 | first >> 6 << 4], -1)
    mins = torch.cat([middle & 63, last >> 4 | middle >> 6 << 4], -1)
    return d * scales, -(second * mins)
