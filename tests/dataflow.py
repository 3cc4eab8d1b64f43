"""A toy machine that runs task lists on real numbers: every buffer starts as NaN, packets carry tagged rows, devices share nothing but what is copied.

Tokens: one per (micro-batch, group). The arithmetic of norms, attention and KV is a stand-in of the same dataflow, so that a stale, missing or
misplaced value changes the logits. `Machine.reference` computes the same model directly.
"""

from __future__ import annotations

from collections import deque
from random import Random

import numpy as np

from tests.random_plans import Case
from twinpilots.plan.tasks import AHEAD, NUM_GROUPS, QUEUES, Schedule, Task

POISON = -1


class Machine:
    """The memories of both devices and the weights of one case; ``run`` executes one task of pass ``number``."""

    def __init__(self, case: Case, schedule: Schedule, passes: int) -> None:
        self.case, self.schedule, spec = case, schedule, case.spec
        rng = np.random.default_rng(7)
        self.rows = [(mb, group) for mb, groups in enumerate(case.shape) for group in range(NUM_GROUPS) if groups[group]]
        self.ops = {(op.layer, op.name): op for op in spec.ops(case.plan.unit_rows)}
        self.weights = {key: rng.normal(size=(op.rows, op.row_elements)) / op.row_elements**0.5 for key, op in self.ops.items()}
        self.bias = {key: rng.normal(size=op.width if op.split_dim == "in" else op.rows) for key, op in self.ops.items()}
        self.tags = {key: 1 + 1000 * number + np.arange(op.rows) for number, (key, op) in enumerate(self.ops.items())}
        self.embedded = rng.normal(size=(passes, len(self.rows), spec.hidden_size))
        self.past = rng.normal(size=(spec.num_layers, len(self.rows), spec.kv_size))
        widths = {
            "x": spec.hidden_size, "h": spec.hidden_size, "qkv": spec.q_size + 2 * spec.kv_size, "attn": spec.q_size, "act": spec.intermediate_size,
            "part": spec.hidden_size, "peer": spec.hidden_size, "head": spec.hidden_size, "logits": spec.vocab_size,
        }  # fmt: skip
        self.buffers = {f"{space}.{name}": np.full((len(self.rows), width), np.nan) for space in ("gpu", "host") for name, width in widths.items()}
        self.kv = {name: self.past.copy() for name in ("gpu.kv", "host.kv")}
        self.staging, self.kv_slots = (np.full((2, len(self.rows), spec.kv_size), np.nan) for _ in range(2))
        self.ring, self.host_staging = np.full(case.plan.ring_bytes, POISON), np.full(case.plan.staging_bytes, POISON)
        self.logits: list[np.ndarray] = []

    def run(self, task: Task, number: int) -> None:
        getattr(self, f"_{task.kind}")(task, number)

    def _where(self, task: Task) -> list[int]:
        if task.logit_rows:
            return list(range(len(self.rows)))
        return [i for i, (mb, group) in enumerate(self.rows) if task.mb in (-1, mb) and task.glo <= group < task.ghi]

    def _embed(self, task: Task, number: int) -> None:
        where = self._where(task)
        self.buffers[task.dst][where] = self.embedded[number][where]

    def _norm(self, task: Task, number: int) -> None:
        self.buffers[task.dst][self._where(task)] = norm(self.buffers[task.src][self._where(task)])

    def _matrix(self, task: Task) -> np.ndarray:
        """The rows that the task multiplies with; a row from the ring must be there, whole."""
        key, op = (task.layer, task.op), self.ops[task.layer, task.op]
        split = self.case.bucket.splits[task.layer][task.op]
        home = max(split.gpu, split.rows - self.case.plan.on_disk(*key))
        edges = {"resident": (0, split.resident), "ring": (split.resident, split.gpu), "host": (split.gpu, home), "staged": (home, split.rows)}[task.source]
        assert edges[0] <= task.row0 < task.row1 <= edges[1], "a task computes rows that do not lie there"
        if task.source in ("ring", "staged"):
            expected = np.repeat(self.tags[key][task.row0 : task.row1], op.row_bytes)
            found = (self.ring if task.source == "ring" else self.host_staging)[task.ring_lo : task.ring_lo + len(expected)]
            assert (found == expected).all(), f"{task.source} bytes {task.ring_lo}.. do not hold rows of {key}"
        return self.weights[key][task.row0 : task.row1]

    def _linear(self, task: Task, number: int) -> None:
        where, key, width = self._where(task), (task.layer, task.op), self.ops[task.layer, task.op].width
        matrix, source = self._matrix(task), self.buffers[task.src][where]
        out = source @ matrix[:, :width].T + self.bias[key][task.row0 : task.row1]
        if task.op == "gate_up_proj":
            out = np.tanh(out) * (source @ matrix[:, width:].T)
        self.buffers[task.dst][where, task.dst_col : task.dst_col + task.row1 - task.row0] = out
        if task.op == "lm_head" and task.queue == "cpu":
            assert task.dst == "host.logits"

    def _linear_in(self, task: Task, number: int) -> None:
        where = self._where(task)
        part = self.buffers[task.src][where, task.src_col : task.src_col + task.row1 - task.row0] @ self._matrix(task)
        self.buffers[task.dst][where] = part + (self.buffers[task.dst][where] if task.accumulate else 0)

    def _pages(self, task: Task, name: str) -> np.ndarray:
        return self.staging[task.slot] if name.startswith("gpu.staging") else self.kv[name][task.layer]

    def _rope_append(self, task: Task, number: int) -> None:
        where, spec = self._where(task), self.case.spec
        qkv = self.buffers[task.src]
        qkv[where, : spec.q_size] = np.sin(qkv[where, : spec.q_size])
        self._pages(task, task.dst)[where] += qkv[where, spec.q_size : spec.q_size + spec.kv_size] * qkv[where, spec.q_size + spec.kv_size :]

    def _attend(self, task: Task, number: int) -> None:
        where, spec = self._where(task), self.case.spec
        space = task.dst.split(".")[0]
        self.buffers[task.dst][where] = attend(self.buffers[f"{space}.qkv"][where, : spec.q_size], self._pages(task, task.src)[where])

    def _add(self, task: Task, number: int) -> None:
        where = self._where(task)
        total = sum(self.buffers[term][where] for term in task.terms) + (self.bias[task.layer, task.bias] if task.bias else 0)
        self.buffers[task.dst][where] += norm(total) if task.norm else total

    def _send(self, task: Task, number: int) -> None:
        where, columns = self._where(task), slice(task.src_col, task.src_col + task.columns)
        assert task.src_col == task.dst_col
        self.buffers[task.dst][where, columns] = self.buffers[task.src][where, columns]

    _recv = _send

    def _load(self, task: Task, number: int) -> None:
        """Rows whose home is the disk come out of the staging ring: from where the pass's reads have put them."""
        packet = self.schedule.packets[task.packet]
        staged = {(s.layer, s.op, s.row0): (read.ring_lo + s.offset, s) for read in self.schedule.reads for s in read.segments}
        for segment in packet.segments:
            key, low = (segment.layer, segment.op), packet.ring_lo + segment.offset
            assert segment.offset + segment.num_bytes <= packet.num_bytes and packet.ring_lo == task.ring_lo and packet.num_bytes == task.columns
            home = self.ops[key].rows - self.case.plan.on_disk(*key)
            assert segment.row1 <= home or segment.row0 >= home, "a segment comes from one place"
            moved = np.repeat(self.tags[key][segment.row0 : segment.row1], self.ops[key].row_bytes)
            if segment.row0 >= home:
                at, of_read = staged[segment.layer, segment.op, segment.row0]
                assert of_read.row1 == segment.row1
                moved = self.host_staging[at : at + segment.num_bytes]
            self.ring[low : low + segment.num_bytes] = moved

    def _read(self, task: Task, number: int) -> None:
        read = self.schedule.reads[task.packet]
        assert read.ring_lo == task.ring_lo and read.num_bytes == task.columns
        for segment in read.segments:
            key, low = (segment.layer, segment.op), read.ring_lo + segment.offset
            assert segment.offset + segment.num_bytes <= read.num_bytes
            assert segment.row0 >= self.ops[key].rows - self.case.plan.on_disk(*key), "a read brings rows whose home is host memory"
            self.host_staging[low : low + segment.num_bytes] = np.repeat(self.tags[key][segment.row0 : segment.row1], self.ops[key].row_bytes)

    def _load_kv(self, task: Task, number: int) -> None:
        where = self._where(task)
        self.staging[task.slot] = np.nan  # the pages of one micro-batch use the whole slot
        self.staging[task.slot][where] = (self.kv_slots[task.slot] if self.case.plan.kv_on_disk else self.kv["host.kv"][task.layer])[where]

    def _store_kv(self, task: Task, number: int) -> None:
        where = self._where(task)
        (self.kv_slots[task.slot] if self.case.plan.kv_on_disk else self.kv["host.kv"][task.layer])[where] = self.staging[task.slot][where]

    def _read_kv(self, task: Task, number: int) -> None:
        self.kv_slots[task.slot] = np.nan
        self.kv_slots[task.slot][self._where(task)] = self.kv["host.kv"][task.layer][self._where(task)]

    def _write_kv(self, task: Task, number: int) -> None:
        self.kv["host.kv"][task.layer][self._where(task)] = self.kv_slots[task.slot][self._where(task)]

    def _poison(self, task: Task, number: int) -> None:
        self.ring[task.ring_lo : task.ring_lo + task.columns] = POISON

    def reference(self, number: int) -> np.ndarray:
        """The logits of pass ``number`` by the model's plain arithmetic; call in order of passes, on a machine of its own."""
        spec, x = self.case.spec, self.embedded[number].copy()
        first, second = ("gate_up_proj", "down_proj") if spec.gated_mlp else ("fc1", "fc2")
        for layer in range(spec.num_layers):

            def out(name: str, source: np.ndarray, layer: int = layer) -> np.ndarray:
                return source @ self.weights[layer, name][:, : self.ops[layer, name].width].T + self.bias[layer, name]

            h = norm(x)
            q = np.sin(out("q_proj", h))
            self.past[layer] += out("k_proj", h) * out("v_proj", h)
            x += post(spec.post_norms, attend(q, self.past[layer]) @ self.weights[layer, "o_proj"] + (self.bias[layer, "o_proj"] if spec.o_bias else 0))
            h = norm(x)
            act = out(first, h)
            if spec.gated_mlp:
                act = np.tanh(act) * (h @ self.weights[layer, first][:, self.ops[layer, first].width :].T)
            x += post(spec.post_norms, act @ self.weights[layer, second] + (self.bias[layer, second] if spec.mlp_bias else 0))
        return norm(x) @ self.weights[-1, "lm_head"].T + self.bias[-1, "lm_head"]


def attend(q: np.ndarray, pages: np.ndarray) -> np.ndarray:
    return np.tanh(q) + np.tile(pages, (1, q.shape[1] // pages.shape[1]))


def norm(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.abs(x).mean(-1, keepdims=True))


def post(use: bool, x: np.ndarray) -> np.ndarray:
    return norm(x) if use else x


def run_serially(case: Case, schedule: Schedule) -> np.ndarray:
    """Logits of one pass, tasks in list order."""
    machine = Machine(case, schedule, 1)
    for task in schedule.tasks:
        machine.run(task, 0)
    return machine.buffers["host.logits"]


def run_shuffled(case: Case, schedule: Schedule, passes: int, random: Random) -> list[np.ndarray]:
    """Logits of each pass, tasks in a random order that queues and waits allow; link_in and the disk may run one pass ahead, all else is fenced."""
    machine, count = Machine(case, schedule, passes), len(schedule.tasks)
    queues = {name: deque((number, task) for number in range(passes) for task in schedule.queue(name)) for name in QUEUES if schedule.queue(name)}
    done: set[int] = set()
    left = [sum(task.kind not in AHEAD for task in schedule.tasks)] * passes  # weight loads and reads aside, whose consumers are among the rest
    logits = []

    def ready(number: int, task: Task) -> bool:
        fence = number - (2 if task.kind in AHEAD else 1)
        if fence >= 0 and left[fence]:
            return False
        targets = ((number - wait.previous) * count + wait.task for wait in task.waits)
        return all(target < 0 or target in done for target in targets)

    weights = {name: random.choice([1, 5, 25]) for name in queues}  # some queues early, some late
    while any(queues.values()):
        open_ = [name for name, queue in queues.items() if queue and ready(*queue[0])]
        assert open_, "deadlock"
        number, task = queues[random.choices(open_, [weights[name] for name in open_])[0]].popleft()
        machine.run(task, number)
        done.add(number * count + task.index)
        left[number] -= task.kind not in AHEAD
        if not left[number] and len(logits) == number:
            logits.append(machine.buffers["host.logits"].copy())
    return logits


def reference(case: Case, schedule: Schedule, passes: int) -> list[np.ndarray]:
    machine = Machine(case, schedule, passes)
    return [machine.reference(number) for number in range(passes)]
