"""What some requests amount to for the planner: one `Workload` of their mean lengths.

Pages are shared, so it is the mean that memory and time go by. Knows nothing of plans, prompts or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from twinpilots.plan.workload import Workload

LEN_STEP = 32  # lengths are rounded up to this: similar requests share a plan


def rounded(tokens: int) -> int:
    """Up to a multiple of `LEN_STEP`."""
    return -(-tokens // LEN_STEP) * LEN_STEP


def mean_workload(lengths: Iterable[tuple[int, int, int]], num_requests: int, *, limit: int, max_num_seqs: int) -> Workload:
    """``num_requests`` requests like those of ``lengths``: (prompt tokens, generated tokens, how many sequences of these). ``limit``: tokens of one sequence,
    at most."""
    known = list(lengths)
    count = sum(times for _, _, times in known)
    inputs, outputs = (sum(each[i] * each[2] for each in known) / count for i in (0, 1))
    seq_len = min(limit, max(2, rounded(math.ceil(inputs + outputs))))
    input_len = max(1, min(round(inputs), seq_len - 1))
    return Workload(num_requests=num_requests, input_len=input_len, output_len=seq_len - input_len, max_num_seqs=min(num_requests, max_num_seqs))
