"""Raw tensors on the host: numpy data with a dtype tag, because numpy has no bfloat16.

Owns: `RawTensor` and the conversions between fp32, bf16 and fp16. Knows nothing of files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twinpilots.errors import CheckpointError
from twinpilots.model.spec import WeightDtype

Array = npt.NDArray[Any]
NUMPY_DTYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """Weights as they lie in memory: float32, float16, or bf16 as raw uint16. May be a read-only view of a mapped file."""

    data: Array
    dtype: WeightDtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32."""
        return to_float32(self.data, self.dtype)


def to_float32(data: Array, dtype: WeightDtype) -> npt.NDArray[np.float32]:
    if dtype == "bf16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32, copy=False)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def convert(tensor: RawTensor, dtype: WeightDtype, what: str) -> RawTensor:
    """``tensor`` in another dtype. Raises CheckpointError, naming ``what``, when a finite value does not fit into fp16."""
    if tensor.dtype == dtype:
        return tensor
    values = tensor.float32()
    if dtype == "fp32":
        return RawTensor(data=values, dtype=dtype)
    if dtype == "bf16":
        return RawTensor(data=to_bf16(values), dtype=dtype)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if values.size and not np.isfinite(halves).all() and np.isfinite(values).all():
        raise CheckpointError(f"{what}: {np.abs(values).max():.3g} is beyond fp16's 65504; load it with dtype bf16 or fp32")
    return RawTensor(data=halves, dtype=dtype)
