"""Chained passes natively: the tokens are those of an argmax after every pass, the metadata those of the pass, and what must end a chain ends it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.cpu.native_twin import Batch, Machine, Seq, insn, native
from twinpilots.kernels.abi import CHAIN, CHOICE, NULL, Dtype, Meta, Op
from twinpilots.kernels.native import BAD_INSTRUCTION
from twinpilots.request import SamplingParams
from twinpilots.runtime.choice import choice_of, draw_slowly

PAGE = 4
FOREVER_NS = 60 * 10**9


class Rig:
    """A model of one instruction: the logits after a token are its row of ``table``."""

    def __init__(self, table: np.ndarray, firsts: list[int], contexts: list[int], passes: int, stops: list[list[int]] | None = None) -> None:
        vocab, count = len(table), len(firsts)
        self.machine, self.passes = Machine(1 << 24), passes
        pages = [tuple(100 * i + page for page in range((context + passes) // PAGE + 1)) for i, context in enumerate(contexts)]
        self.batch = Batch([Seq(1, context, 0, pages[i]) for i, context in enumerate(contexts)], PAGE, firsts, range(count))
        logits = self.machine.put(np.zeros((count, vocab), np.float32))
        embed = insn(Op.EMBED, logits, vocab, self.machine.put(table), 0, Dtype.FP32, vocab, 0, vocab, NULL, 0, 0, f=(1.0,), waits=[(0, 0)], record=1)
        self.entry = self.machine.entry([embed], self.batch, pass_id=5)
        self.tokens, self.times = np.full((passes, count), -7, np.int32), np.zeros((passes, 1, 3), np.int64)
        self.ended_ns = np.zeros(passes, np.int64)
        ids = stops or [[] for _ in firsts]
        self.ids, self.ends = np.array([token for each in ids for token in each], np.int32), np.cumsum([len(each) for each in ids], dtype=np.int32)
        self.chain = np.zeros((), CHAIN)
        self.chain["logits"], self.chain["width"], self.chain["passes"], self.chain["page_size"] = logits, vocab, passes, PAGE
        self.chain["budget_ns"] = FOREVER_NS
        self.choices, self.uniforms = np.zeros(count, CHOICE), np.zeros((passes, count))
        for name, array in (
            ("choices", self.choices),
            ("uniforms", self.uniforms),
            ("stop_ids", self.ids),
            ("stop_ends", self.ends),
            ("tokens", self.tokens),
            ("times", self.times),
            ("ended_ns", self.ended_ns),
        ):
            self.chain[name] = array.ctypes.data

    def run(self, pool: int = 0) -> np.ndarray:
        assert native().run_chain(self.machine.host_base, self.entry, self.chain, pool=pool) == 0
        return self.tokens[: int(self.chain["done"])]

    def words(self, word: Meta) -> np.ndarray:
        meta = self.machine.view(int(self.entry["meta"]), np.int32, self.batch.words.shape)
        return meta[meta[word] : meta[word] + meta[Meta.NUM_SEQS]]


def followed(table: np.ndarray, firsts: list[int], passes: int) -> np.ndarray:
    rows = [np.array(firsts)]
    for _ in range(passes):
        rows.append(table[rows[-1]].argmax(axis=1))
    return np.array(rows[1:])


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 257, 700])
def test_tokens_are_the_first_of_the_best_and_positions_go_on(isa: int, pool: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for count in (1, 3):
        table = rng.integers(-3, 4, (vocab, vocab)).astype(np.float32)  # many equals, the best ones too
        firsts, contexts = rng.integers(0, vocab, count).tolist(), rng.integers(0, 30, count).tolist()
        rig = Rig(table, firsts, contexts, 9)
        assert np.array_equal(rig.run(pool), followed(table, firsts, 9))
        last = np.array(contexts) + 8
        assert np.array_equal(rig.words(Meta.OFF_POSITION), last) and np.array_equal(rig.words(Meta.OFF_ROPE_ROW), last)
        assert np.array_equal(rig.words(Meta.OFF_SEQ_KV), last + 1)
        assert np.array_equal(rig.words(Meta.OFF_SLOT), (100 * np.arange(count) + last // PAGE) * PAGE + last % PAGE)
        assert rig.machine.events[1] == 5 + 8, "every pass has its own id"
        flat = np.column_stack([rig.times[:, 0], rig.ended_ns]).ravel()
        assert (np.diff(flat) >= 0).all() and flat[0] > 0, "one pass after another, each with its times"


def test_sequences_that_draw_take_their_own_number_in_every_pass(isa: int, pool: int) -> None:
    rng = np.random.default_rng(3)
    table = rng.standard_normal((90, 90), np.float32) * 2
    kinds = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.7), SamplingParams(top_k=9, top_p=0.8)]
    rig = Rig(table, [4, 5, 6], [0, 3, 9], 7)
    rig.uniforms[:] = rng.random(rig.uniforms.shape)
    for number, params in enumerate(kinds):
        rig.choices[number] = choice_of(params)
    found = rig.run(pool)
    before = np.vstack([[[4, 5, 6]], found[:-1]])
    for number, params in enumerate(kinds):
        drawn = [
            table[token].argmax() if params.is_greedy else draw_slowly(table[token], params, u)
            for token, u in zip(before[:, number], rig.uniforms[:, number], strict=True)
        ]
        assert found[:, number].tolist() == drawn


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_pass_whose_logits_are_not_finite_does_not_count(isa: int, odd: float) -> None:
    vocab = 37
    table = np.zeros((vocab, vocab), np.float32)
    table[np.arange(vocab), (np.arange(vocab) + 1) % vocab] = 1.0  # token i is followed by i + 1
    table[6] = odd if odd == -np.inf else table[6]
    table[6, 20] = odd
    rig = Rig(table, [3], [0], 8)
    assert rig.run().ravel().tolist() == [4, 5, 6]
    assert len(Rig(table, [6], [0], 8).run()) == 0


def test_a_stop_of_its_own_ends_the_chain_for_all() -> None:
    vocab = 40
    table = np.zeros((vocab, vocab), np.float32)
    table[np.arange(vocab), (np.arange(vocab) + 1) % vocab] = 1.0
    assert Rig(table, [3, 20], [0, 0], 8, [[21, 9], [5]]).run().tolist() == [[4, 21], [5, 22], [6, 23], [7, 24], [8, 25], [9, 26]]
    assert len(Rig(table, [3, 20], [0, 0], 8, [[21], []]).run()) == 8


def test_time_ends_a_chain_but_never_its_first_pass() -> None:
    table = np.zeros((5, 5), np.float32)
    rig = Rig(table, [0], [0], 8)
    rig.chain["budget_ns"] = 0
    assert len(rig.run()) == 1


def test_another_thread_ends_a_chain_after_the_pass_that_runs() -> None:
    rig = Rig(np.zeros((64, 64), np.float32), [0], [0], 100_000)
    for _ in range(20):
        thread = threading.Timer(0.002, lambda: rig.chain["hurry"].__setitem__(..., 1))
        thread.start()
        began = time.perf_counter()
        done = len(rig.run())
        thread.join(20)
        rig.chain["hurry"] = 0
        if 1 < done < 100_000:
            assert rig.ended_ns[done - 1] * 1e-9 < began + 20
            return
    raise AssertionError("no chain was ended half-way")


def test_what_is_no_decoding_pass_is_refused() -> None:
    rig = Rig(np.zeros((5, 5), np.float32), [0, 1], [0, 0], 4)
    rig.machine.view(int(rig.entry["meta"]), np.int32, (8,))[Meta.NUM_LOGITS] = 1
    assert native().run_chain(rig.machine.host_base, rig.entry, rig.chain) == BAD_INSTRUCTION
