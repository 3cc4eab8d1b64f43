"""What a pass took and moved: the sums over one program's instructions, with everything that does not change from pass to pass computed once.

Owns the meaning of "busy" and of the byte counts in `EngineStats`. Knows nothing of devices or of how times are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twinpilots.kernels.abi import Meta, Op
from twinpilots.plan.expected import SMALL as SMALL_WORK
from twinpilots.plan.expected import WorkKind
from twinpilots.plan.tasks import Queue
from twinpilots.runtime.stats import BusySeconds, BytesMoved

_ROWS = slice(Meta.ROWS, Meta.ROWS + 32)  # [micro-batch][group]: first token row
_SEQS = slice(Meta.SEQS, Meta.SEQS + 32)


IDLE, LINK, SMALL = range(3)  # classes of instructions; further ones are a queue's kinds of linears, and attention


class _Alike(NamedTuple):
    """Copies of the same rows: one of them, and what all of them move, in units of that one."""

    insn: np.void
    times: float


def _alike(copies: np.ndarray) -> tuple[_Alike, ...]:
    """A pass has hundreds of copies, of a handful of kinds."""
    found: dict[tuple[int, ...], _Alike] = {}
    for insn in copies:
        key = tuple(int(insn[name]) for name in ("op", "mb", "glo", "ghi", "row_kind"))
        first, times = found.get(key, _Alike(insn, 0.0))
        found[key] = _Alike(first, times + (insn["a"][4] / first["a"][4] if insn["op"] == Op.COPY else 1.0))
    return tuple(found.values())


@dataclass(frozen=True)
class QueueAccount:
    """One queue's instructions, sorted by what they count for. Activation copies are the link's work; gathering embeddings is nobody's."""

    queue: Queue
    classes: np.ndarray  # per instruction: IDLE, LINK, SMALL, or 3 + the number of its kind among `kinds`
    kinds: tuple[WorkKind | None, ...]  # what each class is in the history: None for IDLE, and for classes that the queue has not
    weight_bytes: int
    copies: tuple[_Alike, ...]  # of activations
    kv_copies: tuple[_Alike, ...]
    streamed: np.ndarray  # indices of the instructions that take weights off the link

    @staticmethod
    def of(queue: Queue, insns: np.ndarray, kinds: Sequence[WorkKind | None], streamed: Sequence[int] = ()) -> QueueAccount:
        """``kinds``: of every instruction. ``streamed``: those that take weights off the link."""
        ops = insns["op"]
        first: dict[int, WorkKind] = {}
        numbers: dict[WorkKind, int] = {}
        classes = np.full(len(ops), IDLE)
        for index, kind in enumerate(kinds):
            if kind is not None:
                fixed = LINK if kind.resource == "link" else SMALL if kind.key == SMALL_WORK else None
                if fixed is None:
                    classes[index] = SMALL + 1 + numbers.setdefault(kind, len(numbers))
                else:
                    classes[index], first[fixed] = fixed, kind
        return QueueAccount(
            queue=queue, classes=classes, kinds=(None, first.get(LINK), first.get(SMALL), *numbers), weight_bytes=int(insns["a"][ops == Op.LOAD, 2].sum()),
            copies=_alike(insns[ops == Op.COPY]), kv_copies=_alike(insns[(ops == Op.LOAD_KV) | (ops == Op.STORE_KV)]), streamed=np.array(streamed, np.intp),
        )  # fmt: skip

    def seconds(self, times: Sequence[np.ndarray]) -> np.ndarray:
        """Seconds of work [passes][classes], from each pass's int64 [instructions][3]: wait began, work began, work ended (ns)."""
        count = len(self.kinds)
        classes = np.concatenate([self.classes + count * number for number in range(len(times))])
        return np.bincount(classes, np.concatenate([each[:, 2] - each[:, 1] for each in times]), count * len(times)).reshape(-1, count) * 1e-9

    def weight_wait_s(self, times: np.ndarray) -> float:
        """Seconds that instructions over streamed weights waited, from the same array."""
        return float((times[self.streamed, 1] - times[self.streamed, 0]).sum()) * 1e-9


def instruction_rows(insns: np.ndarray, meta: np.ndarray) -> np.ndarray:
    """Rows that each instruction works on in a pass with this metadata: of its micro-batch and groups, or the logit rows."""
    bounds = meta[_ROWS].reshape(8, 4)
    rows = bounds[insns["mb"], insns["ghi"]] - bounds[insns["mb"], insns["glo"]]
    return np.where(insns["row_kind"] == 1, meta[Meta.NUM_LOGITS], rows)


def instruction_bytes(insns: np.ndarray, meta: np.ndarray, page_bytes: int, page_size: int) -> np.ndarray:
    """Bytes that each instruction moves over the link in such a pass; 0 for those that compute."""
    ops, moved = insns["op"], np.zeros(len(insns), np.int64)
    loads, copies = ops == Op.LOAD, ops == Op.COPY
    moved[loads] = insns["a"][loads, 2]
    moved[copies] = 4 * instruction_rows(insns[copies], meta) * insns["a"][copies, 4]
    for index in np.flatnonzero((ops == Op.LOAD_KV) | (ops == Op.STORE_KV)):
        moved[index] = _kv_bytes(insns[index], meta, page_bytes, page_size)
    return moved


def _kv_bytes(insn: np.void, meta: np.ndarray, page_bytes: int, page_size: int) -> int:
    """Streamed KV moves earlier tokens' whole pages up and the new tokens down."""
    seqs = meta[_SEQS].reshape(8, 4)
    lens, ends = (meta[meta[word] : meta[word] + meta[Meta.NUM_SEQS]] for word in (Meta.OFF_SEQ_LEN, Meta.OFF_SEQ_KV))
    group = slice(seqs[insn["mb"], insn["glo"]], seqs[insn["mb"], insn["ghi"]])
    if insn["op"] == Op.STORE_KV:
        return int(lens[group].sum()) * page_bytes // page_size
    return int((-(-(ends[group] - lens[group]) // page_size)).sum()) * page_bytes


def span_seconds(times: Mapping[Queue, np.ndarray]) -> float:
    """From the begin of a pass's first work to the end of its last, waits inside included, from each queue's int64 [instructions][3]. Weights are loaded
    ahead of it."""
    fenced = [each for queue, each in times.items() if queue != "link_in" and len(each)]
    return (max(int(each[-1, 2]) for each in fenced) - min(int(each[0, 1]) for each in fenced)) * 1e-9 if fenced else 0.0


def busy_seconds(by_class: dict[Queue, np.ndarray]) -> BusySeconds:
    """Who worked how long, from each queue's seconds per class."""
    return BusySeconds(
        cpu=float(by_class["cpu"][SMALL:].sum()) if "cpu" in by_class else 0.0, gpu=float(by_class["gpu"][SMALL:].sum()) if "gpu" in by_class else 0.0,
        link=float(sum(seconds[LINK] for seconds in by_class.values())),
    )  # fmt: skip


def work_seconds(accounts: Sequence[QueueAccount], by_class: Mapping[Queue, np.ndarray]) -> dict[WorkKind, float]:
    """What each kind of work took, from each queue's seconds per class."""
    found: dict[WorkKind, float] = {}
    for account in accounts:
        for kind, seconds in zip(account.kinds, by_class[account.queue].tolist(), strict=True):
            if kind is not None:
                found[kind] = found.get(kind, 0.0) + seconds
    return found


def bytes_moved(accounts: tuple[QueueAccount, ...], meta: np.ndarray, page_bytes: int, page_size: int) -> BytesMoved:
    """What crossed the link in a pass with this metadata."""

    def copied(insn: np.void) -> int:
        if insn["op"] != Op.COPY:
            return _kv_bytes(insn, meta, page_bytes, page_size)
        start = Meta.ROWS + 4 * int(insn["mb"])
        rows = meta[Meta.NUM_LOGITS] if insn["row_kind"] == 1 else meta[start + int(insn["ghi"])] - meta[start + int(insn["glo"])]
        return 4 * int(rows) * int(insn["a"][4])

    return BytesMoved(
        link_weights=sum(account.weight_bytes for account in accounts),
        link_activations=round(sum(alike.times * copied(alike.insn) for account in accounts for alike in account.copies)),
        link_kv=round(sum(alike.times * copied(alike.insn) for account in accounts for alike in account.kv_copies)), disk=0,
    )  # fmt: skip
