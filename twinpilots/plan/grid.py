"""All ways to split a model's ops as arrays: one dimension for every axis, along which the options lie.

Owns `Axis`, `Rows`, `Grid`, `whole_grid` and `some_of`. An array that grows while a pass is played is 1 long in a dimension until the pass comes to an op of
that axis, and grows from layer to layer with what tells the axis's options apart so far: the first layers of combinations that begin alike are played once.
Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from twinpilots.plan.plan import Split
from twinpilots.plan.tasks import Device

HEAD_LAYER = -1
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Ops that are split together, and the ways to: each option has for every layer (lm_head: for one) a split for every op."""

    names: tuple[str, ...]
    options: tuple[tuple[tuple[Split, ...], ...], ...]

    @property
    def depth(self) -> int:
        return len(self.options[0])

    @cached_property
    def prefixes(self) -> tuple[tuple[tuple[tuple[Split, ...], ...], ...], ...]:
        """By number of layers, the options as far as these layers tell them apart."""
        return (*(tuple(dict.fromkeys(option[:length] for option in self.options)) for length in range(1, self.depth)), self.options)

    def keys(self, layer: int) -> list[tuple[int, str]]:
        """Layer and name of each op."""
        return [(HEAD_LAYER if name == "lm_head" else layer, name) for name in self.names]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one op in one layer, by combination."""

    resident: Floats
    streamed: Floats
    cpu: Floats

    @staticmethod
    def of_splits(splits: Sequence[Split]) -> Rows:
        resident, streamed, cpu = np.array([(split.resident, split.streamed, split.cpu) for split in splits], dtype=float).T
        return Rows(resident=resident, streamed=streamed, cpu=cpu)

    def each(self, change: Callable[[Floats], Floats]) -> Rows:
        return Rows(resident=change(self.resident), streamed=change(self.streamed), cpu=change(self.cpu))

    @cached_property
    def gpu(self) -> Floats:
        return self.resident + self.streamed

    def of(self, device: Device) -> Floats:
        return self.cpu if device == "cpu" else self.gpu


@dataclass(frozen=True, kw_only=True)
class Grid:
    """``rows[layer, op]`` of every combination, and how arrays grow on the way: ``parents[axis, layer]`` is, of each prefix, the one a layer shorter."""

    shape: tuple[int, ...]
    axis_of: Mapping[str, int]
    rows: Mapping[tuple[int, str], Rows]
    parents: Mapping[tuple[int, int], NDArray[np.intp]]


def whole_grid(axes: Sequence[Axis]) -> Grid:
    """All combinations of the axes' options."""
    rows: dict[tuple[int, str], Rows] = {}
    parents: dict[tuple[int, int], NDArray[np.intp]] = {}
    for number, axis in enumerate(axes):
        shape = tuple(-1 if each == number else 1 for each in range(len(axes)))
        for layer, prefixes in enumerate(axis.prefixes):
            for place, key in enumerate(axis.keys(layer)):
                rows[key] = Rows.of_splits([prefix[-1][place] for prefix in prefixes]).each(lambda part, shape=shape: part.reshape(shape))  # type: ignore[misc]
            if layer:
                places = {prefix: place for place, prefix in enumerate(axis.prefixes[layer - 1])}
                parents[number, layer] = np.array([places[prefix[:-1]] for prefix in prefixes])
    axis_of = {name: number for number, axis in enumerate(axes) for name in axis.names}
    return Grid(shape=tuple(len(axis.options) for axis in axes), axis_of=axis_of, rows=rows, parents=parents)


def some_of(axes: Sequence[Axis], combinations: NDArray[np.intp]) -> Grid:
    """Only these combinations, in one dimension."""
    rows: dict[tuple[int, str], Rows] = {}
    places = np.unravel_index(combinations, tuple(len(axis.options) for axis in axes))
    for axis, chosen in zip(axes, places, strict=True):
        for layer in range(axis.depth):
            for place, key in enumerate(axis.keys(layer)):
                rows[key] = Rows.of_splits([option[layer][place] for option in axis.options]).each(lambda part, chosen=chosen: part[chosen])  # type: ignore[misc]
    return Grid(shape=(len(combinations),), axis_of=dict.fromkeys((name for axis in axes for name in axis.names), 0), rows=rows, parents={})
