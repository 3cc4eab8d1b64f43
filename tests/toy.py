"""A toy language model that runs on nothing but a pass's metadata words, and plans and engines around it.

Its next-token logits are a random function of every (token, rotary row) that the pass's page tables let it see, in order: a wrong page, slot, position,
staging page or a stale computed count gives other tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from twinpilots.kernels.abi import MAX_MICRO_BATCHES, Meta
from twinpilots.model.spec import LayerSpec, ModelSpec, RopeSpec
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.request import RequestOutput, SamplingParams
from twinpilots.runtime.batch import MetadataWriter, StepBatch, metadata_words, write_metadata
from twinpilots.runtime.engine import Engine
from twinpilots.runtime.kv_cache import KvCache
from twinpilots.runtime.scheduler import Scheduler

VOCAB = 53
UNWRITTEN = -1


def toy_spec(*, long_after: int | None = None) -> ModelSpec:
    """``long_after``: a longrope model that changes its rotary table beyond so many tokens."""
    rope = RopeSpec(rotary_dim=2, inv_freq=(1.0,), long_inv_freq=None if long_after is None else (0.5,), original_max_position=long_after)
    return ModelSpec(
        name="toy", family="llama", vocab_size=VOCAB, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4, intermediate_size=4,
        layers=(LayerSpec(),), max_model_len=64, weight_dtype="fp32", activation="silu", ropes=(rope,),
    )  # fmt: skip


def toy_plan(*, micro_batches: int = 1, host_attention: str = "cpu", host_prefill_attention: str = "cpu", **changes: Any) -> Plan:
    def bucket(phase: str, max_tokens: int) -> BucketPlan:
        return BucketPlan(
            phase=phase, max_tokens=max_tokens, micro_batches=micro_batches, splits=(),
            host_attention=host_attention, host_prefill_attention=host_prefill_attention,
        )  # type: ignore[arg-type]  # fmt: skip

    values: dict[str, Any] = {
        "model": "toy", "policy": "auto", "uses_gpu": True, "uses_cpu": True, "unit_rows": 64, "ring_bytes": 0, "packet_bytes": 0, "page_size": 4,
        "gpu_pages": 64, "host_pages": 64, "kv_dtype": "fp32", "max_num_seqs": 8, "max_pass_tokens": 32, "max_model_len": 64,
        "buckets": (bucket("decode", 8), bucket("prefill", 16), bucket("prefill", 32)),
    }  # fmt: skip
    return Plan(**{**values, **changes})


def code(token: int, rope_row: int) -> int:
    return token * 1000 + rope_row


def logits_of(codes: Sequence[int]) -> np.ndarray:
    """Logits after a sequence whose tokens have these codes."""
    digest = zlib.crc32(np.asarray(codes, np.int64).tobytes())
    return np.random.default_rng(digest).standard_normal(VOCAB, dtype=np.float32)


def greedy(prompt: Sequence[int], count: int, *, long_after: int | None = None, long_offset: int = 0) -> list[int]:
    """What the toy model says when computed from scratch for every token."""
    tokens = list(prompt)
    for _ in range(count):
        offset = long_offset if long_after is not None and len(tokens) > long_after else 0
        tokens.append(int(logits_of([code(token, i + offset) for i, token in enumerate(tokens)]).argmax()))
    return tokens[len(prompt) :]


class ToyExecutor:
    """Executes a pass from its metadata words alone; remembers the batches and the hints it was given."""

    def __init__(self, spec: ModelSpec, plan: Plan) -> None:
        self.spec, self.plan = spec, plan
        self.meta = np.zeros(metadata_words(plan), np.int32)
        self._writer = MetadataWriter(np.full(metadata_words(plan), 7, np.int32), spec, plan)
        self.tiers = [np.full(pages * plan.page_size, UNWRITTEN, np.int64) for pages in (plan.gpu_pages, plan.host_pages)]
        self.batches: list[StepBatch] = []
        self.more: list[bool] = []

    def execute(self, batch: StepBatch, *, more: bool) -> np.ndarray:
        self.batches.append(batch)
        self.more.append(more)
        if not batch.items:
            self._move(batch)
            return np.zeros((0, VOCAB), np.float32)
        self.meta[:] = 7  # nothing of the last pass may survive
        write_metadata(batch, self.meta, self.spec, self.plan)
        self._check_writer(batch)
        seen: dict[int, list[int]] = {}
        for mb in range(MAX_MICRO_BATCHES):
            bounds = self.meta[Meta.SEQS + 4 * mb : Meta.SEQS + 4 * mb + 4]
            staging = np.full(max(1, self.plan.kv_staging_pages) * self.plan.page_size, UNWRITTEN, np.int64)
            for group in range(3):
                for seq in range(bounds[group], bounds[group + 1]):
                    self._run_sequence(seq, group, staging, seen)
        rows = self._array(Meta.OFF_LOGIT_ROW, self.meta[Meta.NUM_LOGITS])
        self._move(batch)  # as late as may be
        return np.stack([logits_of(seen[row]) for row in rows.tolist()]) if len(rows) else np.zeros((0, VOCAB), np.float32)

    def _move(self, batch: StepBatch) -> None:
        """What leaves a page leaves nothing behind, unless others share it."""
        for move in batch.moves:
            to, fro = self.tiers[:: 1 if move.to == "gpu" else -1]
            for source, target in zip(move.source, move.target, strict=True):
                rows = [slice(page * self.plan.page_size, (page + 1) * self.plan.page_size) for page in (source, target)]
                to[rows[1]] = fro[rows[0]]

    def _check_writer(self, batch: StepBatch) -> None:
        """What grows from pass to pass is what is written from scratch."""
        self._writer.write(batch)
        used = self.meta[Meta.OFF_PAGE] + sum(len(item.pages) for item in batch.items)  # staging numbers follow: the same in every pass
        assert np.array_equal(self._writer.out[:used], self.meta[:used])

    def _array(self, word: Meta, count: int) -> np.ndarray:
        return self.meta[self.meta[word] : self.meta[word] + count]

    def _run_sequence(self, seq: int, group: int, staging: np.ndarray, seen: dict[int, list[int]]) -> None:
        size, num_seqs, num_tokens = self.plan.page_size, self.meta[Meta.NUM_SEQS], self.meta[Meta.NUM_TOKENS]
        row, length, kv_len, attended, home = (
            int(self._array(word, num_seqs)[seq]) for word in (Meta.OFF_SEQ_ROW, Meta.OFF_SEQ_LEN, Meta.OFF_SEQ_KV, Meta.OFF_SEQ_PAGES, Meta.OFF_SEQ_HOME)
        )
        pages = self.meta[self.meta[Meta.OFF_PAGE] :]
        places = [pages[attended + p // size] * size + p % size for p in range(kv_len)]
        homes = [pages[home + p // size] * size + p % size for p in range(kv_len)]
        memory = staging if group == 1 else self.tiers[0 if group == 0 else 1]
        if group == 1:
            for p in range(kv_len - length):
                staging[places[p]] = self.tiers[1][homes[p]]
        tokens, positions, rope_rows, slots = (self._array(word, num_tokens) for word in (Meta.OFF_TOKEN, Meta.OFF_POSITION, Meta.OFF_ROPE_ROW, Meta.OFF_SLOT))
        for i in range(row, row + length):
            memory[slots[i]] = code(int(tokens[i]), int(rope_rows[i]))
            assert slots[i] == places[positions[i]]
        for i in range(row, row + length):
            seen[i] = [int(memory[place]) for place in places[: kv_len - length + i - row + 1]]
            assert UNWRITTEN not in seen[i], "a token is attended before it was written"
        if group == 1:
            for p in range(kv_len - length, kv_len):
                self.tiers[1][homes[p]] = staging[places[p]]


class LetterTokenizer:
    """Token i is the letter a, b, ... ; tokens from 26 on are a letter and a dot. Token 52 is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join("" if i == 52 and skip_special_tokens else chr(97 + i % 26) + ("." if i >= 26 else "") for i in ids)


def toy_engine(
    plan: Plan | None = None, *, growth_tokens: int = 0, long_after: int | None = None, tokenizer: Any = None, eos: Sequence[int] = (), seed: int = 0,
    share: bool = True, pricing: Any = None,
) -> Engine:  # fmt: skip
    plan = plan or toy_plan()
    kv = KvCache(plan, share_prefixes=share and long_after is None)
    scheduler = Scheduler(plan, kv, growth_tokens=growth_tokens, recompute_beyond=long_after, pricing=pricing)
    executor = ToyExecutor(toy_spec(long_after=long_after), plan)
    return Engine(executor, scheduler, kv, vocab_size=VOCAB, eos_token_ids=eos, tokenizer=tokenizer, seed=seed)


def run_all(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left, checking the books after every step; the final outputs by request."""
    done: dict[str, RequestOutput] = {}
    for _ in range(5000):
        if not engine.has_unfinished():
            return done
        done.update({output.request_id: output for output in engine.step() if output.finished})
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def alone(prompt: Sequence[int], params: SamplingParams, **engine: Any) -> RequestOutput:
    """The request by itself, one token per pass, with all the memory in the world."""
    single = toy_engine(replace(toy_plan(), max_pass_tokens=1, max_num_seqs=1, gpu_pages=16), **engine)
    single.add_request("alone", prompt, params)
    return run_all(single)["alone"]
