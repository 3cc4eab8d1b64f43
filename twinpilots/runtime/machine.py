"""What instructions act on, in torch: both arenas as tensors, the current pass's metadata, decoded instructions.

Owns `Insn`, `Batch` and `Machine`: addresses to tensors, without a copy. Knows nothing of what an instruction does (`torch_ops.py`, `triton_ops.py`), nor of
queues, waits or streams.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinpilots.kernels.abi import INSN, NULL, Dtype, Meta, Space

TORCH_DTYPES: dict[int, torch.dtype] = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.INT8: torch.int8}
OFFSET_MASK = (1 << 56) - 1
SCALE_BYTES = 4  # of int8 KV: fp32
KV_CLASS = 256  # tokens: attention is launched for contexts rounded up to this, so that passes one token apart are launched alike


class KvShape(NamedTuple):
    """A page of one layer's KV (docs/execution.md, "KV pages")."""

    page_size: int
    kv_heads: int
    head_dim: int
    dtype: int

    @property
    def row_bytes(self) -> int:
        return self.head_dim * TORCH_DTYPES[self.dtype].itemsize

    @property
    def scales_offset(self) -> int:
        """Where an int8 page's scales begin."""
        return -(-2 * self.kv_heads * self.page_size * self.row_bytes // SCALE_BYTES) * SCALE_BYTES

    @property
    def is_dense(self) -> bool:
        """Whether a page holds nothing but its tokens' rows and scales: int8's may be padded."""
        rows = 2 * self.kv_heads * self.page_size
        return self.dtype != Dtype.INT8 or (self.scales_offset == rows * self.row_bytes and self.page_bytes == self.scales_offset + rows * SCALE_BYTES)

    @property
    def page_bytes(self) -> int:
        if self.dtype != Dtype.INT8:
            return 2 * self.kv_heads * self.page_size * self.row_bytes
        return -(-(self.scales_offset + 2 * self.kv_heads * self.page_size * SCALE_BYTES) // 64) * 64


class Insn(NamedTuple):
    """One INSN record as Python values (field access of numpy records costs microseconds)."""

    op: int
    layer: int
    row_kind: int
    mb: int
    glo: int
    ghi: int
    num_waits: int
    record: int
    wait_event: list[int]
    wait_offset: list[int]
    a: list[int]
    f: list[float]


def decode(insns: NDArray[Any]) -> list[Insn]:
    """INSN records as `Insn`."""
    assert INSN.names is not None
    return [Insn(*record) for record in zip(*(insns[name].tolist() for name in INSN.names), strict=True)]


class Batch:
    """One pass's metadata (abi.Meta): ``words`` on the host, ``device_words`` where the pass is computed."""

    def __init__(self, words: NDArray[np.int32], device_words: Tensor) -> None:
        self.words, self.device_words = words, device_words
        self.header: list[int] = words[: Meta.HEADER].tolist()
        self._tensors: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """All of the metadata that launches are made with: rows, sequences and offsets (not how many words there are), and where it lies."""
        return (*self.header[: Meta.NUM_WORDS], *self.header[Meta.NUM_WORDS + 1 :], self.device_words.data_ptr())

    def ints(self, which: Meta, first: int, last: int) -> list[int]:
        start = self.header[which]
        found: list[int] = self.words[start + first : start + last].tolist()
        return found

    def index(self, which: Meta, first: int, last: int) -> Tensor:
        """As int64 on the compute device, made once per pass."""
        key = (which, first, last)
        if key not in self._tensors:
            start = self.header[which]
            self._tensors[key] = self.device_words[start + first : start + last].long()
        return self._tensors[key]


class Machine:
    """Both arenas, as uint8 tensors. ``host_alias`` is the host arena as the compute device sees it (pinned and mapped), where that is not ``host``."""

    def __init__(self, host: NDArray[np.uint8], gpu: Tensor | None, host_alias: Tensor | None = None) -> None:
        self._arenas: dict[int, Tensor | None] = {Space.HOST: torch.from_numpy(host), Space.GPU: gpu}
        self._alias = host_alias
        self._host = host
        self._typed: dict[tuple[int, bool, torch.dtype], Tensor] = {}
        self.device = torch.device("cpu") if gpu is None else gpu.device
        self._meta: int = NULL
        self._words = torch.empty(0, dtype=torch.int32, device=self.device)
        self._batch: Batch | None = None

    def begin(self, meta: int) -> None:
        """A new entry. Its metadata is read when the first instruction asks, which is after that instruction's waits."""
        self._meta, self._batch = meta, None

    @property
    def is_aliased(self) -> bool:
        return self._alias is not None

    @property
    def has_metadata(self) -> bool:
        return self._meta >= 0

    @property
    def batch(self) -> Batch:
        if self._batch is None:
            assert self._meta >= 0, "an instruction on token rows needs the batch's metadata"
            raw = self._host[self._meta :]
            words = raw[: raw.size // 4 * 4].view(np.int32)
            words = words[: words[Meta.NUM_WORDS]]
            self._batch = Batch(words, self._on_device(words))
        return self._batch

    def _on_device(self, words: NDArray[np.int32]) -> Tensor:
        """A pass's metadata where it is computed: one copy per pass, into memory that is kept. The words stay as they are until the entry is finished."""
        if self.device.type == "cpu":
            return torch.from_numpy(words)
        if self._words.numel() < words.size:
            self._words = torch.empty(2 * words.size, dtype=torch.int32, device=self.device)
        target = self._words[: words.size]
        if self._alias is None:
            return target.copy_(torch.from_numpy(words), non_blocking=True)
        source = self._alias[self._meta : self._meta + words.nbytes].view(torch.int32)
        return torch.add(source, 0, out=target)  # a kernel that reads pinned memory: a copy would queue behind the weights on the copy engine

    def insns(self, address: int, count: int) -> list[Insn]:
        return decode(self._host[address : address + count * INSN.itemsize].view(INSN))

    def words64(self, address: int, count: int) -> NDArray[np.int64]:
        """``count`` int64 of host memory."""
        return self._host[address : address + 8 * count].view(np.int64)

    def bytes_at(self, address: int, num_bytes: int) -> Tensor:
        arena = self._arenas[address >> 56]
        assert arena is not None, "a CPU program has no GPU memory"
        offset = address & OFFSET_MASK
        return arena[offset : offset + num_bytes]

    def strided(self, address: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], *, aliased: bool = False) -> Tensor:
        """A view of ``size`` elements of ``dtype`` at ``address``. ``aliased``: host memory as the compute device sees it."""
        key = (address >> 56, aliased, dtype)
        if key not in self._typed:
            arena = self._alias if aliased and address >> 56 == Space.HOST and self._alias is not None else self._arenas[address >> 56]
            assert arena is not None, "a CPU program has no GPU memory"
            self._typed[key] = arena[: arena.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        whole = self._typed[key]
        offset = address & OFFSET_MASK
        assert offset % dtype.itemsize == 0, f"address {offset} is not aligned for {dtype}"
        return whole.as_strided(size, stride, whole.storage_offset() + offset // dtype.itemsize)

    def matrix(self, address: int, ld: int, first: int, last: int, columns: int, *, aliased: bool = False) -> Tensor:
        """fp32 activation rows [first, last) of a buffer with row stride ``ld``: [M, columns]."""
        return self.strided(address + 4 * ld * first, torch.float32, (last - first, columns), (ld, 1), aliased=aliased)

    def flat(self, address: int, dtype: int, count: int) -> Tensor:
        return self.strided(address, TORCH_DTYPES[dtype], (count,), (1,))

    def vector(self, address: int, count: int) -> Tensor | None:
        """An fp32 vector, or None for NULL."""
        return None if address == NULL else self.flat(address, Dtype.FP32, count)

    def rows(self, insn: Insn) -> tuple[int, int]:
        header = self.batch.header
        if insn.row_kind == 1:
            return 0, header[Meta.NUM_LOGITS]
        start = Meta.ROWS + 4 * insn.mb
        return header[start + insn.glo], header[start + insn.ghi]

    def sequences(self, insn: Insn, glo: int, ghi: int) -> range:
        start = Meta.SEQS + 4 * insn.mb
        return range(self.batch.header[start + glo], self.batch.header[start + ghi])

    def sequence(self, index: int) -> tuple[int, int, int]:
        """(first token row, query tokens, KV tokens after the pass) of one sequence."""
        row, length, kv = (self.batch.ints(which, index, index + 1)[0] for which in (Meta.OFF_SEQ_ROW, Meta.OFF_SEQ_LEN, Meta.OFF_SEQ_KV))
        return row, length, kv

    def pages(self, index: int, which: Meta, count: int) -> list[int]:
        """The first ``count`` page numbers of one sequence: attended ones (OFF_SEQ_PAGES) or home ones (OFF_SEQ_HOME)."""
        start = self.batch.ints(which, index, index + 1)[0]
        return self.batch.ints(Meta.OFF_PAGE, start, start + count)

    def kv_pages(self, address: int, page_stride: int, num_pages: int, shape: KvShape) -> Tensor:
        """[num_pages, 2 (k, v), G, page_size, D] as stored, no copy."""
        kind, (page_size, kv_heads, head_dim, _) = TORCH_DTYPES[shape.dtype], shape
        stride = (page_stride // kind.itemsize, kv_heads * page_size * head_dim, page_size * head_dim, head_dim, 1)
        return self.strided(address, kind, (num_pages, 2, kv_heads, page_size, head_dim), stride)

    def kv_scales(self, address: int, page_stride: int, num_pages: int, shape: KvShape) -> Tensor:
        """[num_pages, 2 (k, v), G, page_size] of int8 pages, no copy."""
        stride = (page_stride // SCALE_BYTES, shape.kv_heads * shape.page_size, shape.page_size, 1)
        return self.strided(address + shape.scales_offset, torch.float32, (num_pages, 2, shape.kv_heads, shape.page_size), stride)


def launched_kv(machine: Machine, insn: Insn) -> tuple[int, int]:
    """(most query tokens, longest context, rounded up) of the sequences of an ATTEND: what it is launched with, beside its rows."""
    sequences = machine.sequences(insn, insn.glo, insn.ghi)
    if not len(sequences):
        return 0, 0
    span = sequences.start, sequences.stop
    queries, kv = max(machine.batch.ints(Meta.OFF_SEQ_LEN, *span)), max(machine.batch.ints(Meta.OFF_SEQ_KV, *span))
    return queries, -(-kv // KV_CLASS) * KV_CLASS
