"""How much work one pass brings: which sequences, how many query tokens each, over how much KV. Plain data for the cost model.

Owns: `SeqClass`, `GroupLoad`, `PassLoad` and the constructors for the passes that a planner asks about. Knows nothing of devices, rates or tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twinpilots.plan.plan import BucketPlan
from twinpilots.plan.tasks import GPU_KV, HOST_KV, NUM_GROUPS, STREAMED_KV, PassShape


@dataclass(frozen=True, slots=True)
class SeqClass:
    """``num_seqs`` sequences alike: each brings ``query_tokens`` tokens and holds ``kv_len`` tokens of KV when the pass is over."""

    num_seqs: int
    query_tokens: int
    kv_len: int

    @property
    def tokens(self) -> int:
        return self.num_seqs * self.query_tokens

    def kv_read(self, window: int | None) -> int:
        """KV tokens that one sequence's attention reads: all, or the union of its queries' windows."""
        return self.kv_len if window is None else min(self.kv_len, window + self.query_tokens - 1)

    def pairs(self, window: int | None) -> int:
        """Query-key pairs of one sequence: the query at position p (ascending to kv_len - 1) sees min(p + 1, window) tokens."""
        first, last = self.kv_len - self.query_tokens + 1, self.kv_len
        if window is None or last <= window:
            return (first + last) * self.query_tokens // 2
        below = max(0, window - first + 1)  # queries that see fewer than window tokens, or just as many
        return (first + window) * below // 2 + (self.query_tokens - below) * window


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """The sequences of one token group of one micro-batch (groups: docs/execution.md)."""

    classes: tuple[SeqClass, ...] = ()

    @staticmethod
    def of(sequences: Iterable[tuple[int, int]]) -> GroupLoad:
        """From (query tokens, KV tokens after the pass) of each sequence; equal ones are counted together."""
        counts: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            counts[sequence] = counts.get(sequence, 0) + 1
        return GroupLoad(tuple(SeqClass(count, query, kv_len) for (query, kv_len), count in counts.items()))

    @property
    def num_seqs(self) -> int:
        return sum(c.num_seqs for c in self.classes)

    @property
    def tokens(self) -> int:
        return sum(c.tokens for c in self.classes)

    @property
    def kv_tokens(self) -> int:
        return sum(c.num_seqs * c.kv_len for c in self.classes)

    @property
    def score_pairs(self) -> int:
        return sum(c.num_seqs * c.pairs(None) for c in self.classes)


NO_GROUP = GroupLoad()


@dataclass(frozen=True, slots=True)
class PassLoad:
    """One pass: per micro-batch its three groups, and the number of rows whose logits are wanted."""

    micro_batches: tuple[tuple[GroupLoad, GroupLoad, GroupLoad], ...]
    logit_rows: int

    @property
    def shape(self) -> PassShape:
        """Which groups of which micro-batch have tokens: what `schedule.expand` asks for."""
        return tuple((bool(a.classes), bool(b.classes), bool(c.classes)) for a, b, c in self.micro_batches)

    def groups(self, mb: int, glo: int, ghi: int) -> tuple[GroupLoad, ...]:
        """The groups that a task of (mb, glo, ghi) covers; mb -1 means all micro-batches."""
        chosen = self.micro_batches if mb < 0 else (self.micro_batches[mb],)
        return tuple(group for groups in chosen for group in groups[glo:ghi])

    def tokens(self, mb: int = -1, glo: int = 0, ghi: int = NUM_GROUPS) -> int:
        return sum(group.tokens for group in self.groups(mb, glo, ghi))

    @property
    def num_seqs(self) -> int:
        return sum(group.num_seqs for group in self.groups(-1, 0, NUM_GROUPS))


def host_group(bucket: BucketPlan, *, prompt: bool) -> int:
    """The group of a sequence with host KV: attended where it lies, or streamed to the GPU."""
    where = bucket.host_prefill_attention if prompt else bucket.host_attention
    return HOST_KV if where == "cpu" else STREAMED_KV


def pass_load(bucket: BucketPlan, gpu: Sequence[SeqClass], host: Sequence[SeqClass], *, prompt: bool, logit_rows: int | None = None) -> PassLoad:
    """A pass over these sequences, dealt evenly to the bucket's micro-batches (fewer when there are fewer sequences).

    ``prompt`` says whether they bring prompt tokens (it chooses where host KV is attended). ``logit_rows`` defaults to one per sequence.
    """
    num_seqs = sum(c.num_seqs for c in (*gpu, *host))
    count = max(1, min(bucket.micro_batches, num_seqs))
    dealt: list[list[GroupLoad]] = [[NO_GROUP] * NUM_GROUPS for _ in range(count)]
    start = 0
    for group, classes in ((GPU_KV, gpu), (host_group(bucket, prompt=prompt), host)):
        shares: list[list[SeqClass]] = [[] for _ in range(count)]
        for c in classes:
            for mb, share in enumerate(_deal(c.num_seqs, count, start)):
                if share:
                    shares[mb].append(SeqClass(share, c.query_tokens, c.kv_len))
            start += c.num_seqs
        for mb in range(count):
            dealt[mb][group] = GroupLoad(tuple(shares[mb]))
    return PassLoad(tuple((a, b, c) for a, b, c in dealt), num_seqs if logit_rows is None else logit_rows)


def _deal(total: int, count: int, start: int) -> list[int]:
    """``total`` items in turn to ``count`` places, beginning at place ``start`` (mod count)."""
    return [total // count + ((place - start) % count < total % count) for place in range(count)]


def decode_load(num_gpu: int, num_host: int, context: int, bucket: BucketPlan) -> PassLoad:
    """One decode step of ``num_gpu`` sequences with KV on the GPU and ``num_host`` on the host, each with ``context`` tokens before the step."""
    return pass_load(bucket, _alike(num_gpu, 1, context + 1), _alike(num_host, 1, context + 1), prompt=False)


def prefill_load(num_gpu: int, num_host: int, chunk: int, context: int, bucket: BucketPlan, *, logit_rows: int | None = None) -> PassLoad:
    """A prompt chunk of ``chunk`` tokens of each sequence, after ``context`` earlier tokens. ``logit_rows`` defaults to one per sequence (last chunks)."""
    kv_len = context + chunk
    return pass_load(bucket, _alike(num_gpu, chunk, kv_len), _alike(num_host, chunk, kv_len), prompt=True, logit_rows=logit_rows)


def _alike(num_seqs: int, query_tokens: int, kv_len: int) -> tuple[SeqClass, ...]:
    return (SeqClass(num_seqs, query_tokens, kv_len),) if num_seqs else ()
