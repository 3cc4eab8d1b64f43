"""Launches at one stroke, on the CUDA stand-in: which parts of a program are captured, when a capture holds, and that replaying changes nothing else.

The fake's kernels are torch's operations; captured, they insist that a pass has the rows and contexts that they were captured with, as a real launch's would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_steps import TokenTask, run_tokens
from tests.cpu.native_twin import Batch, Seq
from tests.cpu.test_cuda_standin import MIB, FakeRuntime
from tests.device_programs import entry, insn
from tests.graph_case import PLAN_SEEDS, compare
from twinpilots.device.cuda import CudaGpu
from twinpilots.device.cuda_graphs import CudaGraphs
from twinpilots.device.memory import HostArena
from twinpilots.kernels.abi import NULL, Meta, NormKind, Op, Space, address
from twinpilots.runtime import graphs
from twinpilots.runtime.graphs import Replays, cut
from twinpilots.runtime.machine import KV_CLASS, Insn, Machine, decode, launched_kv
from twinpilots.runtime.torch_ops import OPS

WIDTH = 8


class RecordingGraphs:
    """Captures by writing down; a replay runs what was written down."""

    def __init__(self) -> None:
        self.recording: list[Callable[[], None]] | None = None
        self.sizes: list[int] = []
        self.works = True
        self.taken_bytes, self.most = 0, 1 << 30

    def room(self) -> bool:
        self.taken_bytes = MIB * len(self.sizes)
        return self.taken_bytes < self.most * MIB

    def capture(self, launch: Callable[[], bool]) -> Callable[[], None] | None:
        if not self.works:
            return None
        recorded: list[Callable[[], None]] = []
        self.recording = recorded
        whole = launch()
        self.recording = None
        self.sizes.append(len(recorded))
        return (lambda: [run() for run in recorded] and None) if whole else None


class RecordingKernels:
    """Torch's operations in the place of kernels, all but ``refused``."""

    def __init__(self, graphs: RecordingGraphs, refused: frozenset[int]) -> None:
        self._graphs, self._refused = graphs, refused

    def run(self, machine: Machine, insn: Insn) -> bool:
        if insn.op in self._refused:
            return False
        made_with = machine.batch.shape, launched_kv(machine, insn) if insn.op == Op.ATTEND else None

        def launched() -> None:
            now = machine.batch.shape, launched_kv(machine, insn) if insn.op == Op.ATTEND else None
            assert now == made_with, "a graph was replayed for another pass than it was captured for"
            OPS[insn.op](machine, insn)

        if self._graphs.recording is None:
            launched()
        else:
            self._graphs.recording.append(launched)
        return True


class GraphRuntime(FakeRuntime):
    """The stand-in with kernels and graphs. Torch copies and gathers as it is, as on a card."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.recorder = RecordingGraphs()
        self._kernels = RecordingKernels(self.recorder, frozenset((Op.EMBED, Op.LOAD, Op.LOAD_KV, Op.STORE_KV, Op.POISON, *refused)))

    def kernels(self) -> Any:
        return self._kernels

    def graphs(self) -> Any:
        return self.recorder


class Bed:
    """A device with x, h and a gain of ones in its memory, and programs of norms over the rows of a batch."""

    def __init__(self, runtime: GraphRuntime) -> None:
        self.runtime = runtime
        self.host, self.gpu, self.passes = HostArena(8 * MIB, shared=False, num_events=64), CudaGpu(0, runtime), 0
        self.gpu.open(self.host, 2 * MIB)
        self.meta = self.host.alloc(1 << 14, "programs")

    def norm(self, dst: int, src: int, **extra: Any) -> Any:
        made = insn(Op.NORM, *(n for at in (dst, src) for n in (address(Space.GPU, at), WIDTH)), NULL, NULL, WIDTH, NormKind.RMS, **extra)
        made["ghi"], made["f"][0] = 3, 1e-5
        return made

    def run(self, *insns: Any, seqs: int = 2, times: bool = False) -> np.ndarray | None:
        """One pass over as many sequences of one token. Returns the times where they are wanted."""
        words = Batch([Seq(1, 3, 0, (number,)) for number in range(seqs)]).words
        self.host.view(self.meta, np.int32, words.shape)[:] = words
        self.passes += 1
        work = entry(self.host, *insns, pass_id=self.passes)
        work["meta"] = self.meta
        trace = self.host.alloc(24 * len(insns), "programs")
        if times:
            work["trace"] = trace
        self.gpu.submit("gpu", work)
        self.gpu.wait("gpu", 10.0)
        return self.host.view(trace, np.int64, (len(insns), 3)).copy() if times else None

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.gpu.launches.items() if name not in ("host_ns", "graph_bytes")}


@contextmanager
def bed(*refused: int) -> Iterator[Bed]:
    made = Bed(GraphRuntime(refused))
    try:
        yield made
    finally:
        made.gpu.close()
        made.host.close()


def test_a_part_waits_at_its_beginning_and_records_at_its_end() -> None:
    insns = decode(np.stack([
        insn(Op.NORM), insn(Op.NORM, record=1), insn(Op.NORM, waits=(2,)), insn(Op.NORM), insn(Op.NORM, waits=(3,), record=4), insn(Op.NORM), insn(Op.NORM),
    ]))  # fmt: skip
    assert cut(insns) == (range(2), range(2, 4), range(4, 5), range(5, 7))
    assert cut([]) == () and cut(insns[:1]) == (range(1),)


def test_parts_are_launched_once_captured_once_and_replayed_from_then_on() -> None:
    with bed() as b:
        program = [b.norm(512, 0), b.norm(1024, 512, record=5), b.norm(1536, 1024, waits=(5,))]
        for number in range(5):
            x = np.random.default_rng(number).standard_normal((2, WIDTH)).astype(np.float32)
            b.gpu.write(0, x)
            b.run(*program)
            found = b.gpu.read(1536, 4 * 2 * WIDTH).view(np.float32).reshape(2, WIDTH)
            normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
            np.testing.assert_allclose(found, normed, rtol=1e-4)
            assert b.host.events[5] == number + 1, "recorded in every pass"
        assert b.runtime.recorder.sizes == [2, 1]
        assert b.counts() == {"launched": 3, "captured": 2, "replayed": 12}


def test_other_rows_and_other_programs_are_other_launches() -> None:
    with bed() as b:
        program = [b.norm(512, 0), b.norm(1024, 512)]
        for seqs in (1, 2, 2, 3, 2, 1):  # one sequence: launched, then captured at its second pass; two alike
            b.run(*program, seqs=seqs)
        assert b.counts() == {"launched": 6, "captured": 2, "replayed": 6}
        for _ in range(2):
            b.run(b.norm(2048, 0), b.norm(1024, 512))  # the same place in memory may hold another plan's program
        assert b.counts() == {"launched": 8, "captured": 3, "replayed": 8}


def test_contexts_of_one_class_share_a_capture() -> None:
    machine = Machine(np.zeros(1 << 16, np.uint8), None)
    attend = decode(np.stack([insn(Op.ATTEND)]))[0]._replace(ghi=3)
    found = []
    for context in (3, KV_CLASS - 1, KV_CLASS):
        words = Batch([Seq(1, 2, 0, (0,)), Seq(1, context, 0, tuple(range(1, 2 + context // 16 + 1)))]).words
        memory = np.zeros(1 << 16, np.uint8)
        memory[: words.nbytes] = words.view(np.uint8)
        machine = Machine(memory, None)
        machine.begin(0)
        found.append(launched_kv(machine, attend))
    assert found == [(1, KV_CLASS), (1, KV_CLASS), (1, 2 * KV_CLASS)]
    assert launched_kv(machine, attend._replace(glo=2)) == (0, 0)


def test_what_torch_has_to_do_keeps_its_part_from_being_captured() -> None:
    with bed(Op.ADD) as b:
        add = insn(Op.ADD, *(n for at in (0, 512) for n in (address(Space.GPU, at), WIDTH)), NULL, 0, NULL, NULL, NULL, NormKind.RMS, WIDTH)
        add["ghi"] = 3
        for _ in range(3):
            b.run(b.norm(512, 0), add, b.norm(1024, 512, waits=()))
        assert b.counts() == {"launched": 9} and not b.runtime.recorder.sizes, "not even tried"


def test_a_capture_that_fails_is_the_last_one_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with bed() as b, caplog.at_level(logging.WARNING, "twinpilots.runtime.graphs"):
        b.runtime.recorder.works = False
        b.gpu.write(0, np.full((2, WIDTH), 3.0, np.float32))
        for _ in range(4):
            b.run(b.norm(512, 0), b.norm(1024, 512, record=3), b.norm(1536, 1024))
        np.testing.assert_allclose(b.gpu.read(1536, 64).view(np.float32), 1.0, rtol=1e-3)
        assert b.counts() == {"launched": 12} and len(caplog.records) == 1


def test_captures_end_when_they_take_all_that_was_set_aside_and_begin_anew_when_they_are_forgotten(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(graphs, "MOST_PROGRAMS", 2)
    with bed() as b, caplog.at_level(logging.WARNING, "twinpilots.runtime.graphs"):
        b.runtime.recorder.most = 2
        b.gpu.write(0, np.full((2, WIDTH), 3.0, np.float32))
        for _ in range(4):  # three parts: two captures fit
            b.run(b.norm(512, 0, record=3), b.norm(1024, 512, record=4), b.norm(1536, 1024))
        np.testing.assert_allclose(b.gpu.read(1536, 64).view(np.float32), 1.0, rtol=1e-3)
        assert b.counts() == {"launched": 3 + 3, "captured": 2, "replayed": 2 * 3} and b.gpu.launches["graph_bytes"] == 2 * MIB
        assert "take 2 MiB of the card" in caplog.text and len(caplog.records) == 1
        b.runtime.recorder.sizes.clear()  # a stand-in's memory comes back when it is told to
        for number in (1, 2):
            for _ in range(2):
                b.run(b.norm(512 * number, 0))
        assert b.counts()["captured"] == 3 and len(caplog.records) == 1, "the second program made room; the first found none"


def test_what_captures_take_is_what_the_card_lost_beside_torchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved = [60 << 30], [4 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    captures = CudaGraphs(torch.device("cuda:0"))
    assert captures.room() and captures.taken_bytes == 0, "whatever was there before"
    free[0] -= 100 * MIB
    assert captures.room() and captures.taken_bytes == 100 * MIB
    free[0], reserved[0] = free[0] - (1 << 30), reserved[0] + (1 << 30)
    assert captures.room() and captures.taken_bytes == 100 * MIB, "torch's own is under torch's limit"
    free[0] -= 21 * MIB
    assert not captures.room() and captures.taken_bytes == 121 * MIB, "before the 128 MiB are passed, not after"
    free[0] += 1 << 30
    assert captures.room() and captures.taken_bytes == 0


def test_the_time_of_a_replay_is_dealt_out_as_the_launches_took_it() -> None:
    replays = Replays(RecordingGraphs())
    machine = Machine(np.zeros(1 << 14, np.uint8), None)
    words = Batch([Seq(1, 3, 0, (0,))]).words
    machine._host[: words.nbytes] = words.view(np.uint8)
    machine.begin(0)
    insns = decode(np.stack([insn(Op.NORM)] * 3))
    code = replays.code(b"three", lambda: insns, lambda _: True)
    launched, replayed = np.zeros((3, 3), np.int64), np.zeros((3, 3), np.int64)
    assert replays.run(machine, code, code.parts[0], launched, lambda _: True, lambda _: True)
    launched[:] = [[0, 10, 20], [20, 21, 51], [51, 52, 112]]  # 10, 30 and 60 of 100
    replays.tell()
    assert not replays.run(machine, code, code.parts[0], replayed, lambda _: True, lambda _: True)
    replayed[0, :2], replayed[2, 2] = (900, 1000), 3000  # what the queue marks
    replays.tell()
    assert replayed.tolist() == [[900, 1000, 1200], [1200, 1200, 1800], [1800, 1800, 3000]]


def test_times_of_passes_stay_in_order_through_captures() -> None:
    with bed() as b:
        program = [b.norm(512, 0), b.norm(1024, 512), b.norm(1536, 1024)]
        for _ in range(4):
            times = b.run(*program, times=True)
            assert times is not None and (np.diff(times.reshape(-1)) >= 0).all() and times[-1, 2] > times[0, 1]
        assert b.counts()["replayed"] == 9


@pytest.mark.parametrize("case", ["llama/float32/hand-0", "gemma2/float32/hand-1"])
def test_replayed_passes_generate_the_same_tokens(case: str) -> None:
    gpu, events = CudaGpu(0, GraphRuntime()), list[Any]()
    run_tokens(TokenTask(device="cuda:0", cases=(case,)), events.append, gpu)
    assert events[-1]["ok"] is True, events[-1]["detail"]
    assert gpu.launches["replayed"] > gpu.launches["captured"] > 0, gpu.launches


def test_replayed_passes_give_the_same_bits_and_a_wrong_replay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpu-check's own comparison."""

    class Alone(GraphRuntime):
        def graphs(self) -> None:
            return None

    assert "instructions replayed" in compare(CudaGpu(0, Alone()), CudaGpu(0, GraphRuntime()), PLAN_SEEDS[1])
    capture = RecordingGraphs.capture
    monkeypatch.setattr(RecordingGraphs, "capture", lambda self, launch: (lambda: None) if capture(self, launch) else None)
    with pytest.raises(AssertionError, match=r"other tokens|logits of passes"):
        compare(CudaGpu(0, Alone()), CudaGpu(0, GraphRuntime()), PLAN_SEEDS[1])


def test_the_shape_of_a_pass_leaves_out_nothing_but_how_many_words_there_are() -> None:
    words = Batch([Seq(1, 3, 0, (0,))]).words
    memory = np.zeros(1 << 14, np.uint8)
    machine = Machine(memory, None)

    def shape(word: int, change: int) -> tuple[int, ...]:
        changed = words.copy()
        changed[word] += change
        memory[: words.nbytes] = changed.view(np.uint8)
        machine.begin(0)
        return machine.batch.shape

    same = shape(0, 0)
    assert [word for word in range(Meta.HEADER) if shape(word, 1) == same] == [Meta.NUM_WORDS]
