"""The formats that weights are kept in: sizes only.

Owns how many bytes a weight takes and along which boundaries an op's weights may be cut. The bytes themselves are docs/execution.md's ("Weight formats"),
packed by `kernels/format.py` and `kernels/quant_format.py`. Knows nothing of models, files or kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FormatName = Literal["fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_1", "q4_z32", "q4_z64", "q4_z128", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k"]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """``block_bytes`` bytes hold ``block`` consecutive inputs (k) of one output. Slices along k are cut at multiples of ``block``.

    ``group`` inputs share one scale (1: a float format). ``bits`` are those of a weight's code, scales excluded.
    """

    name: FormatName
    bits: int
    group: int = 1
    block: int = 1
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.group > 1

    @property
    def bytes_per_weight(self) -> float:
        return self.block_bytes / self.block

    def fits(self, num_inputs: int, num_outputs: int, split_dim: Literal["out", "in"]) -> bool:
        """Whether an op of this shape can be kept in this format: whole blocks along k, and whole bytes per row of the split dimension."""
        return num_inputs % self.block == 0 and (split_dim == "out" or num_outputs * self.block_bytes % self.block == 0)

    def row_bytes(self, elements: int, split_dim: Literal["out", "in"]) -> int:
        """Bytes of one row of ``elements`` weights: along k for an "out" op, across outputs (a 1/block share of their blocks) for an "in" op."""
        if elements * self.block_bytes % self.block:
            raise ValueError(f"a row of {elements} weights of an op split along its {split_dim}puts has no whole number of bytes in {self.name}")
        return elements * self.block_bytes // self.block


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat(name="fp32", bits=32, block_bytes=4),
        WeightFormat(name="bf16", bits=16, block_bytes=2),
        WeightFormat(name="fp16", bits=16, block_bytes=2),
        WeightFormat(name="q8_0", bits=8, group=32, block=32, block_bytes=34),
        WeightFormat(name="q4_0", bits=4, group=32, block=32, block_bytes=18),
        WeightFormat(name="q4_1", bits=4, group=32, block=32, block_bytes=20),
        WeightFormat(name="q4_z32", bits=4, group=32, block=32, block_bytes=20),
        WeightFormat(name="q4_z64", bits=4, group=64, block=64, block_bytes=36),
        WeightFormat(name="q4_z128", bits=4, group=128, block=128, block_bytes=68),
        WeightFormat(name="q4_k", bits=4, group=32, block=256, block_bytes=144),
        WeightFormat(name="q5_0", bits=5, group=32, block=32, block_bytes=22),
        WeightFormat(name="q5_1", bits=5, group=32, block=32, block_bytes=24),
        WeightFormat(name="q5_k", bits=5, group=32, block=256, block_bytes=176),
        WeightFormat(name="q6_k", bits=6, group=16, block=256, block_bytes=210),
    )
}
