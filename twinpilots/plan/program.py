"""The linear program behind the solver (docs: the program of who computes what): shares of every op, KV placement, pass times.

Owns `Program` (its data), `solve_program` and `Shares` (its answer). Times are given, not computed: knows nothing of profiles, plans or units.

Per phase k (a pass of given tokens) and op i, with r the resident, s the streamed and c the CPU's share of all its rows, g, a, t the KV's share on the GPU,
on the host attended by the CPU, on the host streamed to the GPU:

    r_i + s_ik + c_ik = 1        g + a_k + t_k = 1        c_ik <= y_bk for the op's block b        the MLP pair shares one c
    link    T_k >= (sum w_i s_ik + KV_k t_k) / B_up            link out  T_k >= newKV_k t_k / B_down
    cpu     T_k >= sum cpu_ik c_ik + attention_cpu_k a_k + fixed_cpu_k + d_cpu * link_k
    gpu     T_k >= sum gpu_ik (1 - c_ik) + attention_gpu_k (g + t_k) + fixed_gpu_k + d_gpu * link_k
    chain   T_k >= (sum of e over stages + sum_b handoff_b y_bk) / m + (1 - 1 / m) R,   e >= the stage's CPU time, e >= its GPU time,
            R >= all CPU time, R >= all GPU time: with m micro-batches, 1 / m of every stage stands alone at its ends
    memory  sum w_i r_i + g KV <= gpu budget,   sum w_i (1 - r_i) - D + (1 - g) KV <= host budget
    minimise sum_k passes_k T_k

Where part of the weights may lie on the disk, D = sum w_i d_i bytes do; as every row asks for that sum alone, it is one column, D <= sum w_i (1 - r_i) and
D <= disk budget. Then T_k >= D / B_disk, and of plans that wait for the disk alike the one that does the rest soonest is wanted: T'_k >= all but the disk's
row, T_k >= T'_k, and the objective has LITTLE T'_k as well. What is read is written to host memory: cpu has d_cpu D / B_up, too.

DRAM's limit is in the profiled op times and in d, the work that a processor loses per second of copying (1 - 1 / copy_slowdown).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from twinpilots.stray_output import muted

INFINITE = float("inf")
LITTLE = 1e-3
Resource = Literal["cpu", "gpu", "link", "link_out", "chain", "disk"]  # what bounds a phase's time from below; chain: one stage waiting for another
MLP_PAIRS = (("gate_up_proj", "down_proj"), ("fc1", "fc2"))
# Stages follow one another when there is one micro-batch; ops of one stage may run side by side on the two devices.
STAGES: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("attention",), ("o_proj",), ("gate_up_proj", "down_proj", "fc1", "fc2"), ("lm_head",))
BLOCKS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj", "fc1", "fc2"), "head": ("lm_head",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PhaseTerms:
    """One kind of pass. Seconds of every op over all its layers when one device computes all of it; ``attention_*`` over all sequences and layers.

    ``handoff_s[block]``: what it costs per pass that the CPU takes part in a block at all. ``cpu_attention``/``streamed_kv`` allow a and t.
    """

    passes: float
    cpu_s: Mapping[str, float]
    gpu_s: Mapping[str, float]
    attention_cpu_s: float
    attention_gpu_s: float
    kv_bytes: float  # read by attention
    streamed_kv_bytes: float  # over the link, if all KV were host KV that is streamed
    new_kv_bytes: float
    fixed_cpu_s: float = 0.0
    fixed_gpu_s: float = 0.0
    handoff_s: Mapping[str, float] | None = None
    cpu_attention: bool = True
    streamed_kv: bool = True
    micro_batches: int = 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes of every op over all its layers, and the link. ``link_drag``: seconds that (CPU, GPU) lose per second that the link works.

    ``host_fixed`` names ops whose rows lie on the host even when resident (a tied head).
    """

    op_bytes: Mapping[str, float]
    up_bytes_per_s: float
    down_bytes_per_s: float
    link_drag: tuple[float, float] = (0.0, 0.0)
    host_fixed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What may lie on the disk, and how fast it comes from there."""

    budget_bytes: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """``resident`` and ``gpu_kv`` freeze r and g; with a frozen r there are no memory rows, and the disk is left out."""

    machine: Machine
    phases: tuple[PhaseTerms, ...]
    gpu_budget_bytes: float
    host_budget_bytes: float
    kv_capacity_bytes: float
    resident: Mapping[str, float] | None = None
    gpu_kv: float | None = None
    disk: Disk | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseShares:
    seconds: float
    streamed: Mapping[str, float]
    cpu: Mapping[str, float]
    host_cpu_kv: float
    host_streamed_kv: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The optimum. ``seconds``: all passes."""

    seconds: float
    resident: Mapping[str, float]
    gpu_kv: float
    phases: tuple[PhaseShares, ...]


class _Rows:
    """Collects columns (with bounds) and sparse rows ``low <= a x <= high`` and solves."""

    def __init__(self, relaxed: bool) -> None:
        self.relaxed = relaxed
        self.low: list[float] = []
        self.high: list[float] = []
        self.binary: list[int] = []
        self.rows: list[list[tuple[int, float]]] = []
        self.row_low: list[float] = []
        self.row_high: list[float] = []
        self.names: list[tuple[int, Resource] | None] = []

    def column(self, low: float = 0.0, high: float = 1.0, *, binary: bool = False) -> int:
        self.low.append(low)
        self.high.append(high)
        self.binary.append(int(binary and not self.relaxed))
        return len(self.low) - 1

    def row(self, terms: Iterable[tuple[int, float]], low: float, high: float, name: tuple[int, Resource] | None = None) -> None:
        self.rows.append(list(terms))
        self.row_low.append(low)
        self.row_high.append(high)
        self.names.append(name)

    def matrix(self, objective: Mapping[int, float]) -> Matrix:
        from scipy.sparse import csr_array

        counts = np.cumsum([0, *(len(row) for row in self.rows)])
        columns = [column for row in self.rows for column, _ in row]
        values = [value for row in self.rows for _, value in row]
        cost = np.zeros(len(self.low))
        for column, value in objective.items():
            cost[column] = value
        return Matrix(
            cost=cost, a=csr_array((values, columns, counts), shape=(len(self.rows), len(self.low))), row_low=np.array(self.row_low),
            row_high=np.array(self.row_high), low=np.array(self.low), high=np.array(self.high), binary=np.array(self.binary), names=tuple(self.names),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The program as numbers: minimise ``cost`` x subject to ``row_low <= a x <= row_high`` and ``low <= x <= high``. ``names`` says of the rows that
    bound a phase's time from below which phase (by its place) and which resource they speak for."""

    cost: np.ndarray
    a: Any  # scipy.sparse
    row_low: np.ndarray
    row_high: np.ndarray
    low: np.ndarray
    high: np.ndarray
    binary: np.ndarray
    names: tuple[tuple[int, Resource] | None, ...]

    def minimise(self) -> np.ndarray | None:
        """The optimal point, or None when there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        # HiGHS says so, whatever its options, when it mends a point of whole numbers; relaxed programs have none, and most programs are relaxed.
        with muted(b"HighsMip") if self.binary.any() else nullcontext():
            found = milp(
                self.cost, integrality=self.binary, bounds=Bounds(self.low, self.high),
                constraints=LinearConstraint(self.a, self.row_low, self.row_high), options={"mip_rel_gap": 1e-4},
            )  # fmt: skip
        return None if found.x is None else np.asarray(found.x)


def program_matrix(program: Program) -> Matrix:
    """The program as numbers; programs that differ in numbers only have the same columns and rows in the same order."""
    return _assemble(program, relaxed=False).matrix


def solve_program(program: Program, *, relaxed: bool = False) -> Shares | None:
    """The optimum, or None when memory does not suffice. ``relaxed`` lets y be fractional: quicker, enough to rank the grid.

    Solved with the longest op as the unit of time: the solver's tolerances are absolute, and passes of small models take microseconds.
    """
    unit_s = max(1e-12, *(seconds for phase in program.phases for seconds in (*phase.cpu_s.values(), *phase.gpu_s.values())))
    made = _assemble(_in_units(program, unit_s), relaxed=relaxed)
    point = made.matrix.minimise()
    if point is None:
        return None
    answers = tuple(replace(answer, seconds=answer.seconds * unit_s) for answer in (phase.answer(point) for phase in made.phases))
    return Shares(
        seconds=sum(terms.passes * answer.seconds for terms, answer in zip(program.phases, answers, strict=True)),
        resident={name: float(point[column]) for name, column in made.resident.items()}, gpu_kv=float(point[made.gpu_kv]), phases=answers,
    )  # fmt: skip


def _in_units(program: Program, unit_s: float) -> Program:
    """The program with times in units of ``unit_s``."""
    machine = replace(
        program.machine, up_bytes_per_s=program.machine.up_bytes_per_s * unit_s, down_bytes_per_s=program.machine.down_bytes_per_s * unit_s
    )  # fmt: skip
    disk = None if program.disk is None else replace(program.disk, bytes_per_s=program.disk.bytes_per_s * unit_s)
    return replace(program, machine=machine, disk=disk, phases=tuple(_phase_in_units(phase, unit_s) for phase in program.phases))


def _phase_in_units(terms: PhaseTerms, unit_s: float) -> PhaseTerms:
    def each(seconds: Mapping[str, float]) -> dict[str, float]:
        return {name: value / unit_s for name, value in seconds.items()}

    return replace(
        terms, cpu_s=each(terms.cpu_s), gpu_s=each(terms.gpu_s), attention_cpu_s=terms.attention_cpu_s / unit_s, fixed_cpu_s=terms.fixed_cpu_s / unit_s,
        attention_gpu_s=terms.attention_gpu_s / unit_s, fixed_gpu_s=terms.fixed_gpu_s / unit_s, handoff_s=each(terms.handoff_s or {}),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Assembled:
    matrix: Matrix
    resident: Mapping[str, int]
    gpu_kv: int
    phases: tuple[_Phase, ...]


def _assemble(program: Program, *, relaxed: bool) -> _Assembled:
    rows = _Rows(relaxed)
    frozen = program.resident
    resident = {name: rows.column(*((frozen[name],) * 2 if frozen else (0.0, 1.0))) for name in program.machine.op_bytes}
    gpu_kv = rows.column(*((program.gpu_kv,) * 2 if program.gpu_kv is not None else (0.0, 1.0)))
    on_disk = rows.column(0.0, program.disk.budget_bytes / _scale(program)) if frozen is None and program.disk is not None else None
    if frozen is None:
        _memory_rows(program, rows, resident, gpu_kv, on_disk)
    phases = tuple(_Phase(program, place, rows, resident, gpu_kv, on_disk) for place in range(len(program.phases)))
    cost = {column: part * phase.terms.passes for phase in phases for column, part in phase.cost.items()}
    return _Assembled(matrix=rows.matrix(cost), resident=resident, gpu_kv=gpu_kv, phases=phases)


def _scale(program: Program) -> float:
    """The unit of bytes: keeps coefficients near 1 for the solver."""
    return max(program.kv_capacity_bytes, *program.machine.op_bytes.values())


def _memory_rows(program: Program, rows: _Rows, resident: Mapping[str, int], gpu_kv: int, on_disk: int | None) -> None:
    scale = _scale(program)
    used = [(resident[name], size / scale) for name, size in program.machine.op_bytes.items()]
    rows.row([*used, (gpu_kv, program.kv_capacity_bytes / scale)], -INFINITE, program.gpu_budget_bytes / scale)
    saved = [(resident[name], size / scale) for name, size in program.machine.op_bytes.items() if name not in program.machine.host_fixed]
    everything = program.kv_capacity_bytes + sum(program.machine.op_bytes.values())
    spared = [(gpu_kv, program.kv_capacity_bytes / scale), *([(on_disk, 1.0)] if on_disk is not None else [])]
    rows.row([*saved, *spared], (everything - program.host_budget_bytes) / scale, INFINITE)
    if on_disk is not None:
        rows.row([*saved, (on_disk, 1.0)], -INFINITE, sum(program.machine.op_bytes[name] for name in program.machine.op_bytes
                                                         if name not in program.machine.host_fixed) / scale)  # fmt: skip


class _Phase:
    """The columns and rows of one phase."""

    def __init__(self, program: Program, place: int, rows: _Rows, resident: Mapping[str, int], gpu_kv: int, on_disk: int | None) -> None:
        self.program, self.place, self.terms, self.rows, self.gpu_kv, self.on_disk = program, place, program.phases[place], rows, gpu_kv, on_disk
        terms = self.terms
        self.time = self.without_disk = rows.column(0.0, INFINITE)
        self.cost = {self.time: 1.0}
        if on_disk is not None:
            self._disk_row(on_disk)
        self.streamed = {name: rows.column() for name in program.machine.op_bytes}
        self.cpu = {name: rows.column() for name in program.machine.op_bytes}
        self.host_cpu = rows.column(0.0, float(terms.cpu_attention))
        self.host_streamed = rows.column(0.0, float(terms.streamed_kv))
        for name in program.machine.op_bytes:
            rows.row([(resident[name], 1.0), (self.streamed[name], 1.0), (self.cpu[name], 1.0)], 1.0, 1.0)
        rows.row([(gpu_kv, 1.0), (self.host_cpu, 1.0), (self.host_streamed, 1.0)], 1.0, 1.0)
        for first, second in MLP_PAIRS:
            if first in self.cpu and second in self.cpu:
                rows.row([(self.cpu[first], 1.0), (self.cpu[second], -1.0)], 0.0, 0.0)
        self.in_use = self._switches()
        self._devices()
        self._link_rows()
        self._chain()

    def _disk_row(self, on_disk: int) -> None:
        """A column more: the pass's time, of which the rows of everything but the disk ask no more than before."""
        assert self.program.disk is not None
        self.time = self.rows.column(0.0, INFINITE)
        self.cost = {self.time: 1.0, self.without_disk: LITTLE}
        self.rows.row([(self.time, 1.0), (self.without_disk, -1.0)], 0.0, INFINITE)
        per_byte_s = _scale(self.program) / self.program.disk.bytes_per_s
        self.rows.row([(self.time, 1.0), (on_disk, -per_byte_s)], 0.0, INFINITE, (self.place, "disk"))

    def _switches(self) -> dict[str, int]:
        """Columns y: whether the CPU takes part in a block, where that costs something."""
        made = {}
        for block, seconds in (self.terms.handoff_s or {}).items():
            members = [name for name in BLOCKS[block] if name in self.cpu]
            if seconds > 0 and members:
                made[block] = self.rows.column(0.0, 1.0, binary=True)
                for name in members:
                    self.rows.row([(made[block], 1.0), (self.cpu[name], -1.0)], 0.0, INFINITE)
        return made

    def _link(self) -> list[tuple[int, float]]:
        """Seconds of the link towards the GPU."""
        up = self.program.machine.up_bytes_per_s
        weights = [(self.streamed[name], size / up) for name, size in self.program.machine.op_bytes.items()]
        return [*weights, (self.host_streamed, self.terms.streamed_kv_bytes / up)]

    def _at_least(self, resource: Resource, seconds: Iterable[tuple[int, float]], fixed_s: float = 0.0) -> None:
        """T >= seconds + fixed."""
        self.rows.row([(self.without_disk, 1.0), *((column, -value) for column, value in seconds)], fixed_s, INFINITE, (self.place, resource))

    def _cpu_s(self, names: Iterable[str]) -> list[tuple[int, float]]:
        return [(self.cpu[name], self.terms.cpu_s[name]) for name in names]

    def _gpu_s(self, names: Iterable[str]) -> tuple[list[tuple[int, float]], float]:
        """gpu_i (1 - c_i) as columns and a constant."""
        chosen = list(names)
        return [(self.cpu[name], -self.terms.gpu_s[name]) for name in chosen], sum(self.terms.gpu_s[name] for name in chosen)

    def _gpu_attention(self) -> list[tuple[int, float]]:
        return [(self.gpu_kv, self.terms.attention_gpu_s), (self.host_streamed, self.terms.attention_gpu_s)]

    def _handoffs(self) -> list[tuple[int, float]]:
        return [(column, (self.terms.handoff_s or {})[block]) for block, column in self.in_use.items()]

    def _devices(self) -> None:
        terms, names = self.terms, self.program.machine.op_bytes
        drag_cpu, drag_gpu = ([(column, value * drag) for column, value in self._link()] for drag in self.program.machine.link_drag)
        if self.on_disk is not None:  # written at the disk's pace
            drag_cpu = [*drag_cpu, (self.on_disk, self.program.machine.link_drag[0] * _scale(self.program) / self.program.machine.up_bytes_per_s)]
        self._at_least("cpu", _merged([*self._cpu_s(names), (self.host_cpu, terms.attention_cpu_s), *drag_cpu]), terms.fixed_cpu_s)
        columns, constant = self._gpu_s(names)
        self._at_least("gpu", _merged([*columns, *self._gpu_attention(), *drag_gpu]), constant + terms.fixed_gpu_s)

    def _link_rows(self) -> None:
        program, terms = self.program, self.terms
        self._at_least("link", self._link())
        self._at_least("link_out", [(self.host_streamed, terms.new_kv_bytes / program.machine.down_bytes_per_s)])

    def _chain(self) -> None:
        alone = 1.0 / self.terms.micro_batches
        stages = []
        for stage in STAGES:
            names = [name for name in stage if name in self.cpu]
            if not names and stage != ("attention",):
                continue
            e = self.rows.column(0.0, INFINITE)
            stages.append((e, alone))
            on_cpu = self._cpu_s(names) if names else [(self.host_cpu, self.terms.attention_cpu_s)]
            on_gpu, constant = self._gpu_s(names) if names else (self._gpu_attention(), 0.0)
            self.rows.row([(e, 1.0), *((column, -value) for column, value in on_cpu)], 0.0, INFINITE)
            self.rows.row([(e, 1.0), *((column, -value) for column, value in on_gpu)], constant, INFINITE)
        handoffs = [(column, alone * seconds) for column, seconds in self._handoffs()]
        self._at_least("chain", [*stages, *handoffs, *self._together(1.0 - alone)], self.terms.fixed_gpu_s)

    def _together(self, part: float) -> list[tuple[int, float]]:
        """The column R, the busier device's time, with coefficient ``part``."""
        if not part:
            return []
        names = list(self.program.machine.op_bytes)
        busier = self.rows.column(0.0, INFINITE)
        columns, constant = self._gpu_s(names)
        on_cpu = [*self._cpu_s(names), (self.host_cpu, self.terms.attention_cpu_s)]
        self.rows.row([(busier, 1.0), *((column, -value) for column, value in on_cpu)], 0.0, INFINITE)
        self.rows.row([(busier, 1.0), *((column, -value) for column, value in [*columns, *self._gpu_attention()])], constant, INFINITE)
        return [(busier, part)]

    def answer(self, point: np.ndarray) -> PhaseShares:
        return PhaseShares(
            seconds=float(point[self.time]),
            streamed={name: float(point[column]) for name, column in self.streamed.items()},
            cpu={name: float(point[column]) for name, column in self.cpu.items()},
            host_cpu_kv=float(point[self.host_cpu]), host_streamed_kv=float(point[self.host_streamed]),
        )  # fmt: skip


def _merged(terms: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """One coefficient per column."""
    total: dict[int, float] = {}
    for column, value in terms:
        total[column] = total.get(column, 0.0) + value
    return list(total.items())
