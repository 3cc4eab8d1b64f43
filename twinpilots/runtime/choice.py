"""Which token is drawn from logits: temperature, min_p, top_k, top_p, and a number in [0, 1).

Owns that arithmetic, once more and for every machine: `kernels/native/choose.cpp` does the same to the last bit, so that a request's tokens depend neither on
who else is in the batch nor on whether passes are chained. Every step is one rounded operation, in one order; hence an exponential and sums of our own. Knows
nothing of sequences, generators or penalties.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from twinpilots.kernels.abi import CHOICE
from twinpilots.kernels.native import load
from twinpilots.request import SamplingParams

Row = NDArray[np.float32]
Doubles = NDArray[np.float64]
BLOCK = 64  # entries that are summed together
LOWEST = np.float32(-700.0)  # exponents from here down are nothing at all
MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, which then is in the low bits
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6


def choice_of(params: SamplingParams) -> NDArray[np.void]:
    """The CHOICE record of these parameters."""
    temperature = 0.0 if params.is_greedy else params.temperature
    return np.array((temperature, params.top_p, _log_min_p(params), params.top_k), CHOICE)


def _log_min_p(params: SamplingParams) -> float:
    return math.log(params.min_p) if params.min_p > 0.0 else -math.inf


def draw(row: Row, params: SamplingParams, uniform: float) -> int:
    """The token at ``uniform`` in [0, 1) of the cumulative distribution left by temperature, min_p, top_k and top_p. The row has a largest number."""
    native = load()
    if native is None or not row.flags.c_contiguous:
        return draw_slowly(row, params, uniform)
    return native.draw(row, choice_of(params), uniform)


def draw_slowly(row: Row, params: SamplingParams, uniform: float) -> int:
    """`draw` in numpy."""
    probs = kept_probabilities(row, params)
    sums = _block_sums(probs)
    cumulative = np.cumsum(sums)
    target = uniform * cumulative[-1]
    block = int(np.searchsorted(cumulative, target, side="right"))
    if block == len(sums):  # rounding at the very end: the last token that has any probability
        return int(np.flatnonzero(probs)[-1])
    seen = np.cumsum(np.concatenate([cumulative[block - 1 : block] if block else [0.0], probs[block * BLOCK : (block + 1) * BLOCK]]))[1:]
    beyond = np.flatnonzero(seen > target)
    return block * BLOCK + int(beyond[0] if len(beyond) else np.flatnonzero(probs[block * BLOCK : (block + 1) * BLOCK])[-1])


def kept_probabilities(row: Row, params: SamplingParams) -> Doubles:
    """[vocab], not normalised, 0 for what temperature, min_p, top_k and top_p leave out.

    As in vLLM: top_p keeps the smallest set of likeliest tokens whose probability, among what top_k left, reaches p; ties with the k-th token stay.
    """
    with np.errstate(over="ignore"):  # far below the best is far below, however far
        scaled = (row - row.max()) / np.float32(params.temperature)  # the best is 0, so no temperature overflows to +inf
    floor = np.float32(_log_min_p(params))
    if 0 < params.top_k < len(row):
        floor = max(floor, np.partition(scaled, len(row) - params.top_k)[len(row) - params.top_k])
    probs = np.zeros(len(row))
    kept = np.flatnonzero((scaled >= floor) & (scaled > LOWEST))
    probs[kept] = _exp(scaled[kept])
    if params.top_p < 1.0:
        _keep_nucleus(probs, params.top_p)
    return probs


def _exp(scaled: Row) -> Doubles:
    """exp of numbers in (-700, 0], good to about 1e-14: a power of two times a polynomial in what is left."""
    exponents = scaled.astype(np.float64)
    shifted = exponents * 1.4426950408889634 + MAGIC
    whole = shifted - MAGIC
    rest = (exponents - whole * LN2_HIGH) - whole * LN2_LOW
    value = np.full(len(rest), 1.0 / math.factorial(12))
    for power in range(11, -1, -1):
        value = value * rest + 1.0 / math.factorial(power)
    result: Doubles = value * ((shifted.view(np.int64) + 1023) << 52).view(np.float64)
    return result


def _block_sums(probs: Doubles) -> Doubles:
    """Of every 64 entries, in eight lanes folded in a fixed order."""
    lanes = np.pad(probs, (0, -len(probs) % BLOCK)).reshape(-1, 8, 8)
    sums = lanes[:, 0].copy()
    for number in range(1, 8):
        sums += lanes[:, number]
    return ((sums[:, 0] + sums[:, 4]) + (sums[:, 2] + sums[:, 6])) + ((sums[:, 1] + sums[:, 5]) + (sums[:, 3] + sums[:, 7]))


def _keep_nucleus(probs: Doubles, top_p: float) -> None:
    """In place: 0 for all but the likeliest entries before which less than ``top_p`` of the sum has been seen, lower tokens first among equals."""
    needed = top_p * np.cumsum(_block_sums(probs))[-1]
    order = np.flatnonzero(probs)
    order = order[np.argsort(-probs[order], kind="stable")]
    seen = np.cumsum(probs[order])
    probs[order[1 + int(np.searchsorted(seen, needed, side="left")) :]] = 0.0
