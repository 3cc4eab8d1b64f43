"""Support of the native tests: a small arena (`Machine`) that runs instructions, a batch builder, and the arithmetic again in plain float64 numpy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import erf

from twinpilots.kernels import native as native_module
from twinpilots.kernels.abi import CONTROL, ENTRY, EVENTS_OFFSET, INSN, NULL, Act, Dtype, Meta, Space, address
from twinpilots.kernels.native import LinkParams, Native

NUM_EVENTS = 256
DTYPES = (Dtype.FP32, Dtype.BF16, Dtype.FP16)
KV_DTYPES = (*DTYPES, Dtype.INT8)


@cache
def native() -> Native:
    """The library under test: the built one, or the one that `python -m twinpilots.kernels.build --sanitize` names."""
    path = os.environ.get("TWINPILOTS_TEST_NATIVE")
    found = Native(Path(path)) if path else native_module.load()
    if found is None:
        import pytest

        pytest.skip("the native library is not built (python -m twinpilots.kernels.build)")
    return found


def mailbox_offset(queue: str) -> int:
    assert CONTROL.fields is not None
    return int(CONTROL.fields[queue][1])


# ---- stored types


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to raw bf16, nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Values as stored: float32, or raw 16-bit words."""
    if dtype == Dtype.BF16:
        return to_bf16(values)
    return values.astype(np.float16).view(np.uint16) if dtype == Dtype.FP16 else values.astype(np.float32)


def decode(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype == Dtype.BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32) if dtype == Dtype.FP16 else stored


def quantize_row(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., dim] as int8 KV keeps them: codes, and their scales [...]."""
    rows = np.asarray(values, np.float32)
    scales = np.abs(rows).max(-1) / np.float32(127)
    return np.rint(rows / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8), scales


@dataclass(frozen=True)
class KvLayout:
    """The bytes of a page of one layer (docs/execution.md): ``write`` and ``read`` one token's rows [kv_heads, dim] of ``which`` (0 keys, 1 values)."""

    kv_heads: int
    page_size: int
    dim: int
    dtype: Dtype

    @property
    def element_bytes(self) -> int:
        return {Dtype.FP32: 4, Dtype.INT8: 1}.get(self.dtype, 2)

    @property
    def values_bytes(self) -> int:
        return 2 * self.kv_heads * self.page_size * self.dim * self.element_bytes

    @property
    def page_bytes(self) -> int:
        scales = 4 * 2 * self.kv_heads * self.page_size
        return -(-(-(-self.values_bytes // 4) * 4 + scales) // 64) * 64 if self.dtype == Dtype.INT8 else self.values_bytes

    def values(self, page: np.ndarray) -> np.ndarray:
        """[2, kv_heads, page_size, dim] as stored, a view of the page's bytes."""
        kind = {Dtype.FP32: np.float32, Dtype.INT8: np.int8}.get(self.dtype, np.uint16)
        return page[: self.values_bytes].view(kind).reshape(2, self.kv_heads, self.page_size, self.dim)

    def scales(self, page: np.ndarray) -> np.ndarray:
        """[2, kv_heads, page_size] of an int8 page."""
        start = -(-self.values_bytes // 4) * 4
        return page[start : start + 8 * self.kv_heads * self.page_size].view(np.float32).reshape(2, self.kv_heads, self.page_size)

    def write(self, page: np.ndarray, which: int, offset: int, rows: np.ndarray) -> None:
        if self.dtype == Dtype.INT8:
            self.values(page)[which, :, offset], self.scales(page)[which, :, offset] = quantize_row(rows)
        else:
            self.values(page)[which, :, offset] = encode(rows, self.dtype)

    def read(self, page: np.ndarray, which: int, offset: int) -> np.ndarray:
        stored = self.values(page)[which, :, offset]
        if self.dtype == Dtype.INT8:
            return stored.astype(np.float32) * self.scales(page)[which, :, offset, None]
        return decode(stored, self.dtype)


# ---- the machine


@dataclass
class Seq:
    """One sequence of a pass: its query tokens, the tokens before them, its KV group."""

    query: int
    context: int = 0
    group: int = 0
    pages: tuple[int, ...] = ()
    home: tuple[int, ...] | None = None


@dataclass
class Batch:
    """Metadata of one micro-batch, sequences sorted by group (docs/execution.md)."""

    seqs: Sequence[Seq]
    page_size: int = 16
    tokens: Sequence[int] | None = None
    logit_rows: Sequence[int] = ()
    rope_offset: int = 0
    words: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        positions = [seq.context + i for seq in self.seqs for i in range(seq.query)]
        places = [
            (seq.pages[p // self.page_size] if seq.pages else 0, p % self.page_size) for seq in self.seqs for p in range(seq.context, seq.context + seq.query)
        ]
        slots = [page * self.page_size + offset for page, offset in places]
        self.num_tokens = len(positions)
        header = np.zeros(Meta.HEADER, np.int32)
        arrays: list[tuple[Meta, Sequence[int]]] = [
            (Meta.OFF_TOKEN, self.tokens if self.tokens is not None else [0] * len(positions)), (Meta.OFF_POSITION, positions),
            (Meta.OFF_ROPE_ROW, [p + self.rope_offset for p in positions]), (Meta.OFF_SLOT, slots), (Meta.OFF_LOGIT_ROW, self.logit_rows),
            (Meta.OFF_SEQ_ROW, self.first_rows()), (Meta.OFF_SEQ_LEN, [s.query for s in self.seqs]),
            (Meta.OFF_SEQ_KV, [s.query + s.context for s in self.seqs]),
        ]  # fmt: skip
        pages: list[int] = []
        starts: dict[str, list[int]] = {"pages": [], "home": []}
        for seq in self.seqs:
            for name, numbers in (("pages", seq.pages), ("home", seq.pages if seq.home is None else seq.home)):
                starts[name].append(len(pages))
                pages += numbers
        arrays += [(Meta.OFF_SEQ_PAGES, starts["pages"]), (Meta.OFF_SEQ_HOME, starts["home"]), (Meta.OFF_PAGE, pages)]
        header[[Meta.NUM_TOKENS, Meta.NUM_SEQS, Meta.NUM_MICRO_BATCHES, Meta.NUM_LOGITS]] = [len(positions), len(self.seqs), 1, len(self.logit_rows)]
        parts, at = [header], len(header)
        for word, values in arrays:
            header[word] = at
            parts.append(np.asarray(values, np.int32))
            at += len(values)
        for group in range(4):
            header[Meta.SEQS + group] = sum(s.group < group for s in self.seqs)
            header[Meta.ROWS + group] = sum(s.query for s in self.seqs if s.group < group)
        header[Meta.NUM_WORDS] = at
        self.words = np.concatenate(parts)

    def first_rows(self) -> list[int]:
        return [sum(s.query for s in self.seqs[:i]) for i in range(len(self.seqs))]


class Machine:
    """A host and a GPU arena in this process. ``put`` places an array, ``run`` runs instructions on the calling thread."""

    def __init__(self, num_bytes: int = 1 << 22, host: np.ndarray | None = None) -> None:
        self.host = np.zeros(num_bytes, np.uint8) if host is None else host
        self.gpu = np.zeros(num_bytes, np.uint8)
        self.used = {Space.HOST: EVENTS_OFFSET + 4 * NUM_EVENTS, Space.GPU: 64}
        self.control = self.host[: CONTROL.itemsize].view(CONTROL)[0]
        self.events = self.host[EVENTS_OFFSET : EVENTS_OFFSET + 4 * NUM_EVENTS].view(np.uint32)

    @property
    def host_base(self) -> int:
        return int(self.host.ctypes.data)

    @property
    def gpu_base(self) -> int:
        return int(self.gpu.ctypes.data)

    def put(self, values: np.ndarray, space: Space = Space.HOST) -> int:
        """Copy ``values`` into an arena (16-byte aligned only, as slices of weights are); its address."""
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        at = self.used[space]
        self.used[space] = at + -(-(len(data) + 48) // 16) * 16
        assert self.used[space] <= len(self.host), "the test's arena is too small"
        (self.host if space == Space.HOST else self.gpu)[at : at + len(data)] = data
        return address(space, at)

    def view(self, where: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        arena = self.host if where >> 56 == Space.HOST else self.gpu
        offset = where & ((1 << 56) - 1)
        return np.ndarray(shape, dtype, buffer=arena, offset=offset)

    def entry(
        self, insns: Sequence[np.ndarray], batch: Batch | None = None, *, pass_id: int = 1, first_pass: int = 1, trace: int = NULL, flags: int = 0
    ) -> np.ndarray:
        record = np.zeros((), ENTRY)
        program = np.stack(insns) if insns else np.zeros(0, INSN)
        words = batch.words if batch else np.zeros(Meta.HEADER, np.int32)
        record["insns"], record["meta"], record["trace"] = self.put(program), self.put(words), trace
        record["count"], record["pass_id"], record["first_pass"], record["flags"] = len(program), pass_id, first_pass, flags
        return record

    def run(
        self, insns: Sequence[np.ndarray], batch: Batch | None = None, *, pool: int = 0, link: LinkParams | None = None, mailbox: int = -1, **options: int
    ) -> int:
        return native().run(self.host_base, self.gpu_base, self.entry(insns, batch, **options), pool=pool, link=link, mailbox_offset=mailbox)


def insn(
    op: int, *a: int, f: Sequence[float] = (), row_kind: int = 0, glo: int = 0, ghi: int = 3, waits: Sequence[tuple[int, int]] = (), record: int = -1
) -> np.ndarray:
    """One INSN record; ``waits`` are (event, offset)."""
    result = np.zeros((), INSN)
    result["op"], result["row_kind"], result["glo"], result["ghi"], result["record"], result["num_waits"] = op, row_kind, glo, ghi, record, len(waits)
    result["a"][: len(a)] = a
    result["f"][: len(f)] = f
    for i, (event, offset) in enumerate(waits):
        result["wait_event"][i], result["wait_offset"][i] = event, offset
    return result


def rows_batch(rows: int, **options: Any) -> Batch:
    """A batch of ``rows`` one-token sequences of group 0."""
    return Batch([Seq(1) for _ in range(rows)], **options)


# ---- the arithmetic again, in float64


def activate(kind: Act, x: np.ndarray) -> np.ndarray:
    if kind == Act.SILU:
        return x / (1 + np.exp(-x))
    if kind == Act.GELU:
        return 0.5 * x * (1 + erf(x / np.sqrt(2.0)))
    if kind == Act.GELU_TANH:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + bias


def rotate_half(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [..., head_dim] with cos, sin [..., rotary_dim / 2]."""
    half = cos.shape[-1]
    lo, hi, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([lo * cos - hi * sin, hi * cos + lo * sin, rest], -1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, context: int, *, scale: float, window: int = 0, softcap: float = 0.0) -> np.ndarray:
    """q [tokens, heads, dim], k and v [kv tokens, kv_heads, dim] -> [tokens, heads, dim], causal."""
    group = q.shape[1] // k.shape[1]
    out = np.empty(q.shape)
    for i in range(q.shape[0]):
        position = context + i
        first = max(0, position - window + 1) if window else 0
        for head in range(q.shape[1]):
            scores = k[first : position + 1, head // group] @ q[i, head] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            p = np.exp(scores - scores.max())
            out[i, head] = p @ v[first : position + 1, head // group] / p.sum()
    return out


def relative_rms(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(np.square(wanted))))
