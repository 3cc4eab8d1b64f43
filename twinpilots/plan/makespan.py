"""The paper's placement problem: each operation on one of two devices so that the later device finishes as early as possible.

Owns: `balance` (whole operations, NP-complete, solved to 1e-6) and `fractional_makespan` (its relaxation). Knows nothing of models or devices.

Method: Nemhauser-Ullmann lists of undominated (CPU seconds, GPU seconds) for two halves of the operations, pruned by the relaxation of everything not
in the list (vectorised), joined by binary search. Lists that grow too long are thinned to one state per cell; the loss is accounted for, and the
length is raised until the answer is proven to be within tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_OPERATIONS = 64
TOLERANCE = 5e-7  # relative; half of what is promised, the rest is for rounding
LIST_LENGTHS = (1 << 9, 1 << 13, 1 << 17, 1 << 20)
FEW = 16  # a list this many times shorter than allowed is worth continuing
Floats = NDArray[np.float64]
Masks = NDArray[np.uint64]


@dataclass(frozen=True)
class Balance:
    """``device[i]`` is 0 when operation i runs on the GPU, 1 on the CPU; ``makespan_s`` is the later device's total."""

    device: tuple[int, ...]
    makespan_s: float


def balance(cpu_s: Sequence[float], gpu_s: Sequence[float]) -> Balance:
    """Minimise max(sum cpu_i * device_i, sum gpu_i * (1 - device_i)) (TwinPilots, SYSTOR 2024): optimal to 1e-6 relative for up to 64 operations.

    Raises ValueError for negative, NaN or infinite times, lists of unequal length and more than 64 operations.
    """
    _check(cpu_s, gpu_s)
    pairs = list(zip(cpu_s, gpu_s, strict=True))
    scale = max((min(pair) for pair in pairs), default=0.0)
    # Each operation where it is faster: at most twice the optimum. Whoever takes longer than that on a device is not there in any optimum.
    limit = math.fsum(min(pair) / scale for pair in pairs) * (1 + 1e-9) if scale else 0.0
    device = [int(cpu < gpu) for cpu, gpu in pairs]
    open_ = [i for i, (cpu, gpu) in enumerate(pairs) if scale and 0 < cpu <= limit * scale and 0 < gpu <= limit * scale]
    if open_:
        fixed = [i for i in range(len(pairs)) if i not in set(open_)]
        base = (math.fsum(cpu_s[i] / scale for i in fixed if device[i]), math.fsum(gpu_s[i] / scale for i in fixed if not device[i]))
        problem = _Problem(np.array([cpu_s[i] / scale for i in open_]), np.array([gpu_s[i] / scale for i in open_]), base)
        for i, on_cpu in zip(open_, problem.solve(), strict=True):
            device[i] = on_cpu
    return Balance(tuple(device), _makespan(cpu_s, gpu_s, device))


def fractional_makespan(cpu_s: Sequence[float], gpu_s: Sequence[float]) -> float:
    """The makespan when operations may be cut: the bound that no placement of whole operations beats. Errors as `balance`.

    The operations that the CPU does best, compared with the GPU, go there; the one where both devices finish together is cut.
    """
    _check(cpu_s, gpu_s)
    pairs = sorted(zip(cpu_s, gpu_s, strict=True), key=lambda pair: pair[0] / pair[1] if pair[1] else math.inf)
    on_gpu = [0.0]  # GPU seconds of the last 0, 1, 2, ... operations
    for _, gpu in reversed(pairs):
        on_gpu.append(on_gpu[-1] + gpu)
    on_cpu = 0.0
    for i, (cpu, gpu) in enumerate(pairs):
        after = on_gpu[len(pairs) - i - 1]
        if on_cpu + cpu >= after:
            if cpu + gpu == 0:
                return max(on_cpu, after)
            share = gpu / (cpu + gpu)  # written without differences: any magnitudes
            return on_cpu * share + (after + gpu) * (1 - share if cpu > gpu else cpu / (cpu + gpu))
        on_cpu += cpu
    return on_cpu


def _check(cpu_s: Sequence[float], gpu_s: Sequence[float]) -> None:
    if len(cpu_s) != len(gpu_s):
        raise ValueError(f"balance needs one CPU and one GPU time per operation, got {len(cpu_s)} and {len(gpu_s)}")
    if len(cpu_s) > MAX_OPERATIONS:
        raise ValueError(f"balance takes at most {MAX_OPERATIONS} operations, got {len(cpu_s)}; group equal layers first")
    for name, times in (("cpu_s", cpu_s), ("gpu_s", gpu_s)):
        for i, value in enumerate(times):
            if not (0 <= value < math.inf):
                raise ValueError(f"{name}[{i}] must be a finite time of at least 0, got {value}")


def _makespan(cpu_s: Sequence[float], gpu_s: Sequence[float], device: Sequence[int]) -> float:
    on_cpu = math.fsum(cpu for cpu, where in zip(cpu_s, device, strict=True) if where)
    on_gpu = math.fsum(gpu for gpu, where in zip(gpu_s, device, strict=True) if not where)
    return max(on_cpu, on_gpu)


class _Frontier:
    """The undominated (CPU, GPU) totals of some operations when they may be cut: a convex line from all-GPU to all-CPU, best ratios first."""

    def __init__(self, cpu: Floats, gpu: Floats) -> None:
        order = np.argsort(cpu / gpu, kind="stable")
        self.cpu = np.concatenate([[0.0], np.cumsum(cpu[order])])
        self.gpu = np.concatenate([np.cumsum(gpu[order][::-1])[::-1], [0.0]])
        self.difference = self.cpu - self.gpu  # ascending along the line

    def bound(self, cpu: Floats, gpu: Floats) -> Floats:
        """The least makespan of states (cpu, gpu) when the operations of this line are added to them, cut as is best."""
        wanted = gpu - cpu
        on_cpu = np.interp(wanted, self.difference, self.cpu)
        on_gpu = np.interp(wanted, self.difference, self.gpu)
        bound: Floats = np.maximum(cpu + on_cpu, gpu + on_gpu)
        return bound


@dataclass(slots=True)
class _States:
    """Undominated totals of a subset of the operations, CPU ascending and GPU descending; ``mask`` bit i: operation i of the subset is on the CPU."""

    cpu: Floats = field(default_factory=lambda: np.zeros(1))
    gpu: Floats = field(default_factory=lambda: np.zeros(1))
    mask: Masks = field(default_factory=lambda: np.zeros(1, np.uint64))
    loss: float = 0.0  # an unthinned list's best answer is better by this at most

    def keep(self, chosen: NDArray[np.intp] | NDArray[np.bool_]) -> None:
        self.cpu, self.gpu, self.mask = self.cpu[chosen], self.gpu[chosen], self.mask[chosen]


class _Problem:
    """Operations with positive times of like magnitudes, added to what the devices do already (``base``: CPU, GPU)."""

    def __init__(self, cpu: Floats, gpu: Floats, base: tuple[float, float]) -> None:
        self.cpu, self.gpu, self.base = cpu, gpu, base
        self.lower = float(_Frontier(cpu, gpu).bound(np.array([base[0]]), np.array([base[1]]))[0])
        self.weight = cpu / cpu.sum() + gpu / gpu.sum()
        self.best = math.inf
        self.answer = [0] * len(cpu)

    def solve(self) -> list[int]:
        """Device by operation: longer and longer lists until the best answer is proven good enough (the last length is proof for all but freaks)."""
        order = np.argsort(-self.weight, kind="stable")
        middle = len(order) // 2
        # large and small operations apart suits lists that the bound empties, alternating ones suit lists that must be joined
        cuts = ((order[:middle], order[middle:]), (order[0::2], order[1::2]))
        for length in LIST_LENGTHS:
            for halves in cuts:
                if self._proven(halves, length):
                    return self.answer
        return self.answer

    def _proven(self, halves: tuple[NDArray[np.intp], NDArray[np.intp]], length: int) -> bool:
        """Improve the answer with lists of this length; whether nothing can be better by more than the tolerance."""
        left = self._states(halves[0], length)
        if len(left.cpu) * FEW <= length:  # few states go on through the other half: the bound then knows them, a list of its own would not
            left, right = self._states(halves[1], length, left, halves[0]), _States()
            halves = (np.concatenate(halves), halves[1][:0])
        else:
            right = self._states(halves[1], length)
        self._join(left, right, halves)
        self._polish()
        return self.best <= self.lower * (1 + TOLERANCE) or _loss(left, right) <= TOLERANCE * self.best

    def _states(self, half: NDArray[np.intp], length: int, states: _States | None = None, before: NDArray[np.intp] | None = None) -> _States:
        """The list of one half, large operations first; or ``states`` of the operations ``before``, continued through it."""
        states, before = states or _States(), half[:0] if before is None else before
        rest = np.ones(len(self.cpu), bool)
        rest[before] = False
        for i in sorted(range(len(half)), key=lambda i: -self.weight[half[i]]):
            item = half[i]
            rest[item] = False
            _extend(states, float(self.cpu[item]), float(self.gpu[item]), np.uint64(1 << (len(before) + i)))
            bound = _Frontier(self.cpu[rest], self.gpu[rest]).bound(states.cpu + self.base[0], states.gpu + self.base[1])
            states.keep(bound < self.best * (1 - TOLERANCE / 4))
            _thin(states, length)
        return states

    def _join(self, left: _States, right: _States, halves: tuple[NDArray[np.intp], NDArray[np.intp]]) -> None:
        """The best pair of a left and a right state: for each left one, the right ones on both sides of an even finish."""
        if not len(left.cpu) or not len(right.cpu):
            return
        cpu, gpu = left.cpu + self.base[0], left.gpu + self.base[1]
        place = np.searchsorted(right.cpu - right.gpu, gpu - cpu)
        for partner in (np.minimum(place, len(right.cpu) - 1), np.maximum(place - 1, 0)):
            total = np.maximum(cpu + right.cpu[partner], gpu + right.gpu[partner])
            i = int(np.argmin(total))
            if total[i] < self.best:
                self.best = float(total[i])
                for half, mask in ((halves[0], int(left.mask[i])), (halves[1], int(right.mask[partner[i]]))):
                    for bit, item in enumerate(half):
                        self.answer[item] = mask >> bit & 1

    def _polish(self) -> None:
        """Move one operation, or exchange two, while that helps: what thinning blurred by a small operation comes right at once."""
        device = np.array(self.answer, bool)
        while True:
            cpu = self.base[0] + self.cpu[device].sum()
            gpu = self.base[1] + self.gpu[~device].sum()
            to_cpu, to_gpu = np.where(device, -self.cpu, self.cpu), np.where(device, self.gpu, -self.gpu)
            moved = np.maximum(cpu + to_cpu[:, None] + to_cpu, gpu + to_gpu[:, None] + to_gpu)
            np.fill_diagonal(moved, np.maximum(cpu + to_cpu, gpu + to_gpu))
            first, second = divmod(int(np.argmin(moved)), len(device))
            if moved[first, second] >= self.best * (1 - 1e-12):
                return
            self.best = float(moved[first, second])
            for i in {first, second}:
                device[i] = not device[i]
            self.answer = [int(on_cpu) for on_cpu in device]


def _loss(left: _States, right: _States) -> float:
    """How much better than the best answer the optimum may be: an empty list alone proves that nothing better remains."""
    empty = [states.loss for states in (left, right) if not len(states.cpu)]
    return min(empty, default=left.loss + right.loss)


def _extend(states: _States, cpu: float, gpu: float, bit: np.uint64) -> None:
    """Both placements of one more operation, merged; dominated states dropped."""
    cpus = np.concatenate([states.cpu, states.cpu + cpu])
    gpus = np.concatenate([states.gpu + gpu, states.gpu])
    order = np.argsort(cpus, kind="stable")  # two sorted runs: a merge
    gpus = gpus[order]
    least_before = np.concatenate([[np.inf], np.minimum.accumulate(gpus)[:-1]])
    kept = order[gpus < least_before]
    masks = np.concatenate([states.mask, states.mask | bit])
    gpus = np.concatenate([states.gpu + gpu, states.gpu])
    states.cpu, states.gpu, states.mask = cpus[kept], gpus[kept], masks[kept]


def _thin(states: _States, length: int) -> None:
    """At most ``length`` states: of each cell of the CPU axis the last, which has the least GPU time and at most a cell more CPU time."""
    if len(states.cpu) <= length:
        return
    low, high = float(states.cpu[0]), float(states.cpu[-1])
    cell = (high - low) / (length - 1)
    number = ((states.cpu - low) / cell).astype(np.int64)
    states.keep(np.flatnonzero(np.concatenate([number[1:] != number[:-1], [True]])))
    states.loss += cell
