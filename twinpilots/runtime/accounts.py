"""What a pass took and moved: the sums over one program's instructions, with everything that does not change from pass to pass computed once.

Owns the meaning of "busy" and of the byte counts in `EngineStats`. Knows nothing of devices or of how times are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twinpilots.kernels.abi import Meta, Op
from twinpilots.plan.tasks import Queue
from twinpilots.runtime.stats import BusySeconds, BytesMoved

_ROWS = slice(Meta.ROWS, Meta.ROWS + 32)  # [micro-batch][group]: first token row
_SEQS = slice(Meta.SEQS, Meta.SEQS + 32)


IDLE, LINK, SMALL = range(3)  # classes of instructions; further ones are a queue's kinds of linears


@dataclass(frozen=True)
class QueueAccount:
    """One queue's instructions, sorted by what they count for. Activation copies are the link's work; gathering embeddings is nobody's."""

    queue: Queue
    classes: np.ndarray  # per instruction: IDLE, LINK, SMALL, or 3 + the number of its kind of linear
    num_classes: int
    weight_bytes: int
    copies: np.ndarray  # INSN
    kv_copies: np.ndarray  # INSN
    streamed: np.ndarray  # indices of the instructions that take weights off the link

    @staticmethod
    def of(queue: Queue, insns: np.ndarray, linears: Sequence[np.ndarray], streamed: Sequence[int] = ()) -> QueueAccount:
        """``linears``: per kind of linear the indices of its instructions. ``streamed``: those that take weights off the link."""
        ops = insns["op"]
        classes = np.full(len(ops), LINK if queue in ("link_in", "link_out") else SMALL)
        classes[ops == Op.COPY], classes[ops == Op.EMBED] = LINK, IDLE
        for number, indices in enumerate(linears):
            classes[indices] = SMALL + 1 + number
        return QueueAccount(
            queue=queue, classes=classes, num_classes=SMALL + 1 + len(linears), weight_bytes=int(insns["a"][ops == Op.LOAD, 2].sum()),
            copies=insns[ops == Op.COPY], kv_copies=insns[(ops == Op.LOAD_KV) | (ops == Op.STORE_KV)], streamed=np.array(streamed, np.intp),
        )  # fmt: skip

    def seconds(self, times: np.ndarray) -> np.ndarray:
        """Seconds of work per class, from int64 [instructions][3]: wait began, work began, work ended (ns)."""
        return np.bincount(self.classes, times[:, 2] - times[:, 1], self.num_classes) * 1e-9

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


def busy_seconds(by_class: dict[Queue, np.ndarray]) -> BusySeconds:
    """Who worked how long, from each queue's seconds per class."""
    return BusySeconds(
        cpu=float(by_class["cpu"][SMALL:].sum()) if "cpu" in by_class else 0.0, gpu=float(by_class["gpu"][SMALL:].sum()) if "gpu" in by_class else 0.0,
        link=float(sum(seconds[LINK] for seconds in by_class.values())),
    )  # fmt: skip


def bytes_moved(accounts: tuple[QueueAccount, ...], meta: np.ndarray, page_bytes: int, page_size: int) -> BytesMoved:
    """What crossed the link in a pass with this metadata."""

    def total(insns: np.ndarray) -> int:
        return int(instruction_bytes(insns, meta, page_bytes, page_size).sum()) if len(insns) else 0

    return BytesMoved(
        link_weights=sum(account.weight_bytes for account in accounts), link_activations=sum(total(account.copies) for account in accounts),
        link_kv=sum(total(account.kv_copies) for account in accounts), disk=0,
    )  # fmt: skip
