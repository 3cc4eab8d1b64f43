"""`balance` finds the best placement of whole operations: against exhaustive search, exact integer programming, and its own relaxation."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpilots.plan import balance, fractional_makespan

TIMES = st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.integers(0, 20).map(float))
# Figure 6 of the TwinPilots paper (SYSTOR 2024): q, k, v, attention, out, mlp1, mlp2 of one OPT-30B layer, ms
FIGURE_6_CPU = (4.6, 4.6, 4.6, 3.5, 4.6, 18.0, 18.0)
FIGURE_6_GPU = (7.9, 7.9, 7.9, 12.0, 7.9, 31.5, 31.5)


def _makespan(cpu, gpu, device) -> float:
    return max(sum(c for c, d in zip(cpu, device, strict=True) if d), sum(g for g, d in zip(gpu, device, strict=True) if not d))


def _exact_integer(cpu: list[int], gpu: list[int]) -> int:
    """Least makespan by dynamic programming over the CPU's total: best GPU total for each."""
    best = np.full(sum(cpu) + 1, np.inf)
    best[0] = 0
    for c, g in zip(cpu, gpu, strict=True):
        on_cpu = np.full_like(best, np.inf)
        on_cpu[c:] = best[: len(best) - c]
        best = np.minimum(best + g, on_cpu)
    return int(np.maximum(np.arange(len(best)), best).min())


def test_the_papers_layer() -> None:
    result = balance(FIGURE_6_CPU, FIGURE_6_GPU)
    assert result.makespan_s == pytest.approx(39.4)
    assert sum(FIGURE_6_GPU) == pytest.approx(106.6)
    assert result.device[3] == 1  # attention on the CPU
    assert sum(result.device[:3]) + result.device[4] == 3  # three of q, k, v, out, which cost the same
    assert sum(result.device[5:]) == 1  # one of the two MLP halves
    assert fractional_makespan(FIGURE_6_CPU, FIGURE_6_GPU) == pytest.approx(36.627, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TIMES, TIMES), max_size=10))
def test_no_placement_is_better(times: list[tuple[float, float]]) -> None:
    cpu, gpu = [c for c, _ in times], [g for _, g in times]
    result = balance(cpu, gpu)
    best = min(_makespan(cpu, gpu, device) for device in itertools.product((0, 1), repeat=len(times)))
    assert result.makespan_s == pytest.approx(_makespan(cpu, gpu, result.device), rel=1e-12)
    assert result.makespan_s <= best * (1 + 1e-6)
    assert fractional_makespan(cpu, gpu) <= best * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=11, max_size=64))
def test_no_placement_of_many_small_integers_is_better(times: list[tuple[int, int]]) -> None:
    cpu, gpu = [c for c, _ in times], [g for _, g in times]
    assert balance(cpu, gpu).makespan_s == _exact_integer(cpu, gpu)


def _families(rng: np.random.Generator, n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What makes partition hard: equal or nearly equal ratios, constant offsets, huge integers, powers, heavy tails."""
    u, wide = rng.random(n), np.exp(3 * rng.normal(size=n))
    big, power = rng.integers(1, 10**12, n).astype(float), 1.3 ** np.arange(n)
    return {
        "independent": (u, rng.random(n)), "equal": (u, u), "threefold": (u, 3 * u), "offset": (u, u + 0.1), "opposed": (u, 1.1 - u),
        "ones": (np.ones(n), np.ones(n)),
        "integers": (big, big), "doubling": (2.0 ** np.arange(n), 2.0 ** np.arange(n)), "powers": (power, power * (1 + 0.01 * u)), "tails": (wide, wide),
        "odd one out": (np.r_[n / 2, u[1:]], np.r_[n / 2, u[1:]]), "layers": (np.tile(FIGURE_6_CPU, 10)[:n], np.tile(FIGURE_6_GPU, 10)[:n]),
        "tiny and huge": (1e-9 * u, 1e9 * u),
    }  # fmt: skip


@pytest.mark.parametrize("n", [15, 33, 64])
def test_hard_instances_are_quick_and_never_far_from_their_relaxation(n: int) -> None:
    for name, (cpu, gpu) in _families(np.random.default_rng(n), n).items():
        start = time.process_time()
        result = balance(list(cpu), list(gpu))
        seconds = time.process_time() - start
        largest = float(np.minimum(cpu, gpu).max())
        assert fractional_makespan(cpu, gpu) * (1 - 1e-9) <= result.makespan_s <= fractional_makespan(cpu, gpu) + largest, name
        assert seconds < 2.0, f"{name}: {seconds:.2f} s"


def test_equal_operations_split_as_evenly_as_whole_ones_can() -> None:
    assert balance([1.0] * 63, [1.0] * 63).makespan_s == 32
    assert balance([3.0] * 61, [3.0] * 61).makespan_s == 93


def test_a_dense_instance_reaches_its_relaxation() -> None:
    cpu = list(np.random.default_rng(1).random(64))
    assert balance(cpu, cpu).makespan_s <= fractional_makespan(cpu, cpu) * (1 + 1e-6)


def test_no_operations_and_free_operations() -> None:
    assert balance([], []).device == ()
    assert balance([], []).makespan_s == 0.0
    assert balance([0.0, 5.0, 0.0], [3.0, 0.0, 0.0]).makespan_s == 0.0
    assert balance([0.0, 5.0], [3.0, 0.0]).device == (1, 0)
    assert fractional_makespan([0.0], [0.0]) == 0.0


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_any_magnitude(scale: float) -> None:
    result = balance([c * scale for c in FIGURE_6_CPU], [g * scale for g in FIGURE_6_GPU])
    assert result.makespan_s == pytest.approx(39.4 * scale)


@pytest.mark.parametrize(
    "cpu, gpu, message",
    [
        ([1.0], [], "got 1 and 0"),
        ([-1.0], [1.0], r"cpu_s\[0\] .* got -1.0"),
        ([1.0, 1.0], [1.0, float("nan")], r"gpu_s\[1\] .* got nan"),
        ([float("inf")], [1.0], r"cpu_s\[0\] .* got inf"),
        ([1.0] * 65, [1.0] * 65, "at most 64 operations, got 65"),
    ],
)
def test_bad_times_are_refused_by_name(cpu: list[float], gpu: list[float], message: str) -> None:
    for solver in (balance, fractional_makespan):
        with pytest.raises(ValueError, match=message):
            solver(cpu, gpu)
