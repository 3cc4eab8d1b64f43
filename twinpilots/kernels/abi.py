"""Programs: the lowered task list that every interpreter runs (native, torch, CUDA).

Owns the binary contract between the executor and the interpreters: instruction records, addresses, the batch's metadata, mailboxes, event slots.
`kernels/native/abi.h` mirrors this file; `tests/unit/test_abi.py` holds the two against each other. The meaning of each instruction is in
`docs/execution.md`. Knows nothing of models, plans or scheduling.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

ABI_VERSION = 5
MAX_WAITS = 6
NUM_ARGS = 20
NUM_FLOATS = 4
NULL = -1
MAX_MICRO_BATCHES = 8


class Op(IntEnum):
    """Instruction codes."""

    EMBED = 1
    NORM = 2
    LINEAR = 3
    LINEAR_IN = 4
    ROPE_APPEND = 5
    ATTEND = 6
    ADD = 7
    COPY = 8
    LOAD = 9
    LOAD_KV = 10
    STORE_KV = 11
    POISON = 12


class Space(IntEnum):
    """Address spaces: the host arena (shared by both pilots) and one GPU's memory."""

    HOST = 0
    GPU = 1


class Dtype(IntEnum):
    FP32 = 0
    BF16 = 1
    FP16 = 2
    Q8_0 = 3  # from here to Q6_K: weights only
    Q4_0 = 4
    Q4_1 = 5
    Q4_Z32 = 6
    Q4_Z64 = 7
    Q4_Z128 = 8
    Q4_K = 9
    Q5_0 = 10
    Q5_1 = 11
    Q5_K = 12
    Q6_K = 13
    INT8 = 14  # KV only: codes, and an fp32 scale per token, head and k or v


class Activations(IntEnum):
    """How a linear with quantised weights rounds its activations, per row and group of 32."""

    EXACT = 0  # to 16 bits
    FAST = 1  # to 8 bits


class Epilogue(IntEnum):
    NONE = 0
    ACT = 1
    ACT_MUL = 2
    SOFTCAP = 3


class Act(IntEnum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


class NormKind(IntEnum):
    RMS = 0
    LAYER = 1


DTYPE_CODES = {dtype.name.lower(): dtype for dtype in Dtype}  # by model/weight_format.py's names
ACT_CODES = {"silu": Act.SILU, "gelu": Act.GELU, "gelu_tanh": Act.GELU_TANH, "relu": Act.RELU}
NORM_CODES = {"rmsnorm": NormKind.RMS, "layernorm": NormKind.LAYER}

# One instruction. Rows: row_kind 0 = token rows rows[mb][glo] .. rows[mb][ghi]; row_kind 1 = logit rows [0, num_logits).
INSN = np.dtype(
    [
        ("op", "<i4"),
        ("layer", "<i4"),
        ("row_kind", "<i4"),
        ("mb", "<i4"),
        ("glo", "<i4"),
        ("ghi", "<i4"),
        ("num_waits", "<i4"),
        ("record", "<i4"),  # event slot to set to the pass id when done, or -1
        ("wait_event", "<i4", (MAX_WAITS,)),
        ("wait_offset", "<i4", (MAX_WAITS,)),  # 0: this pass's value; -1: the previous pass's
        ("a", "<i8", (NUM_ARGS,)),
        ("f", "<f8", (NUM_FLOATS,)),
    ],
    align=False,
)

# One submitted run of a program on one queue.
ENTRY = np.dtype(
    [
        ("insns", "<i8"),  # address (host space) of the instruction array
        ("meta", "<i8"),  # address of the batch metadata
        ("trace", "<i8"),  # address of int64[count][3]: wait began, work began, work ended (CLOCK_MONOTONIC ns); or NULL
        ("count", "<i4"),
        ("pass_id", "<i4"),
        ("first_pass", "<i4"),  # waits with offset -1 are skipped when pass_id == first_pass
        ("flags", "<i4"),
    ]
)
# How a sequence's tokens are chosen from its logits (runtime/choice.py).
CHOICE = np.dtype(
    [
        ("temperature", "<f8"),  # 0: the best one
        ("top_p", "<f8"),
        ("floor", "<f8"),  # log of min_p
        ("top_k", "<i8"),  # 0 or less: all
    ]
)

# Decoding passes that follow each other without the driver in between (docs/execution.md, "Chained passes"). Pointers are plain ones of this process.
CHAIN = np.dtype(
    [
        ("logits", "<i8"),  # address of fp32 [sequences][width]: where the program leaves them
        ("width", "<i8"),
        ("stop_ids", "<i8"),  # pointer to int32: the tokens that end a sequence, one sequence's after the other's
        ("stop_ends", "<i8"),  # pointer to int32 [sequences]: where each one's end
        ("choices", "<i8"),  # pointer to CHOICE [sequences]
        ("uniforms", "<i8"),  # pointer to double [passes][sequences]: in [0, 1), one for every draw
        ("tokens", "<i8"),  # pointer to int32 [passes][sequences]: what was chosen
        ("times", "<i8"),  # pointer to int64 [passes][count][3]: as ENTRY.trace
        ("ended_ns", "<i8"),  # pointer to int64 [passes]: when each pass and its choice were over
        ("budget_ns", "<i8"),  # no pass begins that would, taking as long as the one before, end later after the first began
        ("passes", "<i4"),  # at most
        ("done", "<i4"),  # out: passes whose tokens count
        ("page_size", "<i4"),
        ("hurry", "<u4"),  # not 0: the pass that runs is the last one; any thread may set it meanwhile
    ]
)
MAILBOX_ENTRIES = 64
# head: finished entries; tail: submitted entries (both count up, mod 2**32; entry i lies in entries[i % 64]). futex words: tail (the queue sleeps on it), head.
MAILBOX = np.dtype([("head", "<u4"), ("tail", "<u4"), ("cancel_pass", "<i4"), ("status", "<i4"), ("entries", ENTRY, (MAILBOX_ENTRIES,))])

# Control block at host address 0: abort != 0 makes every wait return with an error.
CONTROL = np.dtype(
    [
        ("abi", "<u4"),
        ("abort", "<u4"),
        ("waiters", "<u4"),  # threads asleep on a futex of this arena, in all processes: who changes a word wakes sleepers only when there are any
        ("polled", "<u4"),  # not 0: a device writes event words without waking sleepers (CUDA), so nobody sleeps for long
        ("gpu", MAILBOX),
        ("link_in", MAILBOX),
        ("link_out", MAILBOX),
    ]
)
EVENTS_OFFSET = 16384  # u4 event slots follow the control block at this host address
assert CONTROL.itemsize <= EVENTS_OFFSET

EVENT_START = 0  # set by the driver when a pass's metadata is in place
EVENT_FIRST_PACKET = 1  # packet i: loaded = EVENT_FIRST_PACKET + 2 * i, consumed = loaded + 1


class Meta(IntEnum):
    """Words of the metadata header (int32). OFF_* hold the word offset of an array, counted from the header's first word."""

    NUM_TOKENS = 0
    NUM_SEQS = 1
    NUM_MICRO_BATCHES = 2
    NUM_LOGITS = 3
    OFF_TOKEN = 4  # [tokens] token id
    OFF_POSITION = 5  # [tokens] position in its sequence
    OFF_ROPE_ROW = 6  # [tokens] row of the rotary table
    OFF_SLOT = 7  # [tokens] page * page_size + offset in the tier where this pass appends it (group 1: the staging area)
    OFF_LOGIT_ROW = 8  # [logits] token row
    OFF_SEQ_ROW = 9  # [seqs] first token row
    OFF_SEQ_LEN = 10  # [seqs] query tokens in this pass
    OFF_SEQ_KV = 11  # [seqs] KV tokens after this pass (context + query tokens)
    OFF_SEQ_PAGES = 12  # [seqs] offset into PAGE of the pages attended in this pass (group 1: staging pages)
    OFF_SEQ_HOME = 13  # [seqs] offset into PAGE of the home pages (group 1: host pages; else same as SEQ_PAGES)
    OFF_PAGE = 14  # [..] page numbers
    NUM_WORDS = 15  # of all the metadata, header included: what a device copies once per pass
    ROWS = 16  # [MAX_MICRO_BATCHES][4]: first token row of groups 0, 1, 2 and the end
    SEQS = 16 + 4 * MAX_MICRO_BATCHES  # same for sequences
    HEADER = 16 + 8 * MAX_MICRO_BATCHES


def address(space: Space, offset: int) -> int:
    """The 64-bit address of a byte: space in the top byte, offset below."""
    return (int(space) << 56) | offset
