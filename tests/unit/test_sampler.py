"""Promise: tokens are drawn from the distribution that the parameters describe, by the sequence's own generator, whatever the batch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpilots.errors import TwinPilotsError
from twinpilots.request import SamplingParams, Sequence
from twinpilots.runtime.choice import draw, kept_probabilities
from twinpilots.runtime.sampler import Sampler, log_sum_exp, penalise, token_logprobs

V = 41


def make(arrival: int = 0, index: int = 0, tokens: list[int] | None = None, outputs: list[int] | None = None, **params: object) -> Sequence:
    sequence = Sequence(request_id=str(arrival), index=index, params=SamplingParams(**params), tokens=list(tokens or [1]), arrival=arrival)  # type: ignore[arg-type]
    sequence.tokens += outputs or []
    return sequence


def slow_distribution(row: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """vLLM's order in plain Python: temperature, min_p, top_k, top_p; normalised."""
    z = row.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    allowed = p >= min_p * p.max()
    if top_k > 0:
        allowed &= z >= sorted(z, reverse=True)[min(top_k, len(z)) - 1]
    p = np.where(allowed, p, 0.0)
    p /= p.sum()
    reached, kept = 0.0, np.zeros(len(p), bool)
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        if reached >= top_p or p[token] == 0.0:
            break
        kept[token] = True
        reached += p[token]
    p = np.where(kept, p, 0.0)
    return p / p.sum()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), temperature=st.floats(0.1, 5.0), min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 5, V, 3 * V]), top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
)  # fmt: skip
def test_the_kept_distribution_is_that_of_the_plain_definition(seed: int, temperature: float, min_p: float, top_k: int, top_p: float) -> None:
    row = np.random.default_rng(seed).standard_normal(V, dtype=np.float32) * 3
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    probs = kept_probabilities(row, params)
    np.testing.assert_allclose(probs / probs.sum(), slow_distribution(row, temperature, min_p, top_k, top_p), atol=1e-6)


@pytest.mark.parametrize(("spread", "top_p"), [(3.0, 0.9), (0.01, 0.9), (3.0, 0.2)])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_the_plain_definition(spread: float, top_p: float) -> None:
    row = np.random.default_rng(4).standard_normal(6000, dtype=np.float32) * np.float32(spread)
    tokens = np.flatnonzero(kept_probabilities(row, SamplingParams(top_p=top_p)))
    expected = np.flatnonzero(slow_distribution(row, 1.0, 0.0, 0, top_p))
    assert len(set(expected.tolist()) ^ set(tokens.tolist())) <= 1, "one token at the edge may fall either way in float32"


def test_draws_follow_the_probabilities() -> None:
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([draw(row, SamplingParams(), rng.random()) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.25, 0.125, 0.125], atol=0.012)
    assert draw(row, SamplingParams(), 0.0) == 0 and draw(row, SamplingParams(), np.nextafter(1.0, 0.0)) == 3
    masked = np.array([0.0, 1.0, -np.inf], np.float32)
    assert draw(masked, SamplingParams(), np.nextafter(1.0, 0.0)) == 1, "a masked token is never drawn, not even at the edge"


def test_a_sequences_draws_do_not_depend_on_the_batch() -> None:
    logits = np.random.default_rng(1).standard_normal((6, V), dtype=np.float32)
    kinds = [{"seed": 7}, {"temperature": 0.0}, {"seed": 7, "top_p": 0.8}, {}, {"seed": 8, "min_p": 0.02, "presence_penalty": 1.0}, {"top_k": 4}]
    batch = [make(i, **kind) for i, kind in enumerate(kinds)]
    together = Sampler(V, seed=3)
    found = [together.sample(logits, batch) for _ in range(5)]
    for i, kind in enumerate(kinds):
        single, lone = Sampler(V, seed=3), make(i, **kind)
        assert [single.sample(logits[i : i + 1], [lone])[0] for _ in range(5)] == [tokens[i] for tokens in found]


def test_seed_and_index_make_the_generator() -> None:
    row = np.zeros((1, V), np.float32)

    def tokens(engine_seed: int, **sequence: object) -> list[int]:
        sampler, made = Sampler(V, seed=engine_seed), make(**sequence)  # type: ignore[arg-type]
        return [sampler.sample(row, [made])[0] for _ in range(8)]

    assert tokens(0, seed=5, arrival=1) == tokens(9, seed=5, arrival=2), "a seed is the request's own"
    assert tokens(0, seed=5, index=0) != tokens(0, seed=5, index=1)
    assert tokens(0, arrival=1) != tokens(0, arrival=2) and tokens(0, arrival=1) != tokens(1, arrival=1)
    assert tokens(0, arrival=4, seed=-1) == tokens(0, arrival=4), "-1 is no seed"


def test_greedy_takes_the_lowest_of_equal_bests_and_leaves_the_logits_alone() -> None:
    logits = np.zeros((2, V), np.float32)
    logits[:, [7, 9]] = 3.0
    before = logits.copy()
    assert Sampler(V).sample(logits, [make(temperature=0.0), make(temperature=0.0, logit_bias={7: -1.0}, repetition_penalty=2.0)]) == [7, 9]
    assert (logits == before).all()


def test_penalties_by_hand() -> None:
    row = np.array([2.0, -2.0, 4.0, 1.0], np.float32)
    seen = np.array([True, True, True, False])
    counts = np.array([0, 1, 2, 0], np.int32)
    penalise(row, SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25), seen, counts)
    # prompt token: 2/2; output once: -2*2 - 0.5 - 0.25; output twice: 4/2 - 2*0.5 - 0.25; never seen: untouched
    assert row.tolist() == [1.0, -4.75, 0.75, 1.0]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
def test_a_repetition_penalty_beyond_all_measure_leaves_numbers(penalty: float) -> None:
    row, seen = np.array([3.0, -2.0, 0.0, -np.inf, 1.0], np.float32), np.array([True, True, True, True, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalise(row, SamplingParams(repetition_penalty=penalty), seen, np.zeros(5, np.int32))
        probs = kept_probabilities(row, SamplingParams(temperature=0.5))
    assert row[3] == -np.inf and np.isfinite(np.delete(row, 3)).all() and np.isfinite(probs).all()
    assert probs.argmax() == (0 if penalty < 1 else 4)


def test_penalty_counts_follow_the_growing_sequence() -> None:
    sampler, sequence = Sampler(V), make(tokens=[3], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    logits = np.zeros((1, V), np.float32)
    logits[0, :4] = [1.0, 0.9, 0.8, 1.1]
    for _ in range(6):
        sequence.tokens.append(sampler.sample(logits, [sequence])[0])
    # token 3 of the prompt is not penalised by presence; each choice falls by 4, then by 2 more
    assert sequence.output_ids == [3, 0, 1, 2, 4, 5]


def test_min_tokens_masks_every_stop_token_until_then() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, [5, 6, 7]] = [9.0, 8.0, 7.0]
    sampler = Sampler(V, eos_token_ids=(5,))
    assert sampler.sample(logits, [make(temperature=0.0, min_tokens=1, stop_token_ids=[6])]) == [7]
    assert sampler.sample(logits, [make(temperature=0.0, min_tokens=1, stop_token_ids=[6], outputs=[1])]) == [5]
    assert sampler.sample(logits, [make(temperature=0.0, min_tokens=1, ignore_eos=True)]) == [5]


def test_a_tiny_temperature_does_not_overflow() -> None:
    row = np.random.default_rng(0).standard_normal((1, V), dtype=np.float32) * 1e4
    assert Sampler(V).sample(row, [make(temperature=1e-4)]) == [int(row.argmax())]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused_and_named(bad: float) -> None:
    logits = np.zeros((3, V), np.float32)
    logits[1, 17] = bad
    for params in ({"temperature": 0.0}, {"temperature": 1.0}):
        with pytest.raises(TwinPilotsError, match="request 1 at position 0 are not finite"):
            Sampler(V).sample(logits, [make(i, **params) for i in range(3)])


def test_log_sum_exp_by_hand() -> None:
    assert log_sum_exp(np.array([1000.0, 1000.0, -np.inf], np.float32)) == pytest.approx(1000.0 + np.log(2.0))


def test_logprobs_rank_and_order() -> None:
    row = np.log(np.array([0.1, 0.4, 0.2, 0.2, 0.1], np.float32))
    found = token_logprobs(row, 4, 3)
    assert list(found) == [4, 1, 2, 3] and [rank for _, rank in found.values()] == [4, 1, 2, 2]
    np.testing.assert_allclose([np.exp(value) for value, _ in found.values()], [0.1, 0.4, 0.2, 0.2], rtol=1e-6)
    assert list(token_logprobs(row, 1, 0)) == [1] and len(token_logprobs(row, 1, -1)) == 5 and len(token_logprobs(row, 1, 99)) == 5
