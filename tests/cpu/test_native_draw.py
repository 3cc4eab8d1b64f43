"""The native draw is its numpy twin to the last bit: on random and odd rows, on every instruction set, also for a number right at a token's edge."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpu.native_twin import native
from twinpilots.request import SamplingParams
from twinpilots.runtime.choice import choice_of, draw_slowly, kept_probabilities

PARAMS = [
    SamplingParams(), SamplingParams(temperature=0.3), SamplingParams(temperature=40.0), SamplingParams(top_p=0.9),
    SamplingParams(temperature=1.7, top_p=0.999),
    SamplingParams(top_p=1e-9), SamplingParams(top_p=1.0 - 2**-53), SamplingParams(top_k=1), SamplingParams(top_k=20, top_p=0.8), SamplingParams(top_k=5000),
    SamplingParams(min_p=0.05), SamplingParams(min_p=0.02, top_k=40, top_p=0.95, temperature=1.3),
]  # fmt: skip
LAST = float(np.nextafter(1.0, 0.0))


def uniforms(row: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> list[float]:
    """Some anywhere, and those at which one token's share ends and the next one's begins."""
    edges = np.cumsum(kept_probabilities(row, params))
    at = edges[rng.integers(0, len(edges), 12)] / edges[-1]
    return [0.0, LAST, *rng.random(4), *(min(LAST, float(each)) for each in [*at, *np.nextafter(at, 0.0)])]


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 700, 6001])
def test_draws_are_the_twins(isa: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for kind in range(5):
        row = rng.standard_normal(vocab, np.float32) * np.float32([0.01, 1.0, 8.0, 60.0, 4.0][kind])
        if kind == 4:
            row = np.round(row)  # many equals
            row[rng.integers(0, vocab, vocab // 3)] = -np.inf
            row[rng.integers(0, vocab)] = 1.0
        for params in PARAMS:
            choice = choice_of(params)
            for uniform in uniforms(row, params, rng):
                assert native().draw(row, choice, uniform) == draw_slowly(row, params, uniform), (kind, params, uniform)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(isa: int, odd: float) -> None:
    row = np.zeros(300, np.float32)
    row[77] = odd
    assert native().draw(row, choice_of(SamplingParams()), 0.5) == -1
    assert native().draw(np.full(70, -np.inf, np.float32), choice_of(SamplingParams()), 0.5) == -1
