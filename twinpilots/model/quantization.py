"""Which weights are kept in which format: the one place that decides it.

Owns the rule of ``quantization="int8" | "int4" | "int4-fast"``, what stays as its file has it, and the user's exceptions (``keep``). Pure: shapes and names in,
a `ModelSpec` with formats out. Knows nothing of files, bytes or kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import lcm
from typing import cast

from twinpilots.config import Quantization
from twinpilots.errors import UserError
from twinpilots.model.spec import INPUT_SPLIT, LayerSpec, ModelSpec, OpName
from twinpilots.model.weight_format import FORMATS, FormatName

EMBED = "embed"
Stored = Mapping[str, FormatName]  # by weight ("3.q_proj", "lm_head", "embed"): the format it is quantised in; all others are native


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``layers``: the format of the linears of all layers. ``shared``: of k_proj and v_proj where several query heads share a KV head: few weights, of which
    each one's error is in several heads. ``ends``: of lm_head and the embedding table, which cost the most quality per byte."""

    layers: FormatName
    shared: FormatName
    ends: FormatName


# Norms and biases are fp32 and position tables native under every rule, and so is a weight whose shape has no whole blocks (`WeightFormat.fits`).
RULES: dict[Quantization, Rule] = {
    "int8": Rule(layers="q8_0", shared="q8_0", ends="q8_0"),
    "int4": Rule(layers="q4_1", shared="q8_0", ends="q8_0"),
    "int4-fast": Rule(layers="q4_1", shared="q8_0", ends="q8_0"),
}


def quantized_spec(spec: ModelSpec, stored: Stored, quantization: Quantization | None, keep: Sequence[str] = ()) -> ModelSpec:
    """``spec`` with the formats that its weights are kept in, given those that its files have them in.

    UserError when ``quantization`` can change nothing at all. ``keep``: patterns of weights that stay native, e.g. "lm_head", "*.down_proj", "0.*"; UserError
    for one that no quantised weight matches.
    """
    kept = keeps_stored(stored, quantization)
    formats = {}
    for name in weight_names(spec):
        held, wanted = stored.get(name), _wanted(spec, name, quantization)
        chosen = held if held in kept or _is_no_larger(held, wanted, quantization) else wanted
        if chosen is not None and fits(spec, name, chosen):
            formats[name] = chosen
    if quantization is not None and not formats:
        raise UserError(f"{spec.name} has no weight whose rows are whole blocks of {quantization}'s formats; leave --quantization out")
    return with_formats(spec, _without(formats, keep), fast=quantization == "int4-fast")


def keeps_stored(stored: Stored, quantization: Quantization | None) -> frozenset[FormatName]:
    """The formats whose weights stay as the file has them: all without ``quantization``; q8_0 under int8; under int4 all of a 4-bit file's."""
    present = frozenset(stored.values())
    if quantization is None:
        return present
    if quantization == "int8":
        return present & {"q8_0"}
    four_bits = sum(FORMATS[chosen].bits == 4 for chosen in stored.values())
    return present if 2 * four_bits > len(stored) else frozenset()


def _is_no_larger(held: FormatName | None, wanted: FormatName | None, quantization: Quantization | None) -> bool:
    """Whether a stored weight stays under int4 also where its file has few of 4 bits: made anew it would be no smaller, and twice rounded."""
    if held is None or wanted is None or quantization == "int8":
        return False
    return FORMATS[held].bytes_per_weight <= FORMATS[wanted].bytes_per_weight


def weight_names(spec: ModelSpec) -> tuple[str, ...]:
    """Every weight that may be quantised: the ops by layer and name, lm_head, and the embedding table (with tied embeddings, lm_head stands for it)."""
    return (*(weight_name(op.layer, op.name) for op in spec.ops(64)), *(() if spec.tied else (EMBED,)))


def weight_name(layer: int, op: str) -> str:
    return op if layer < 0 else f"{layer}.{op}"


def with_formats(spec: ModelSpec, formats: Stored, *, fast: bool) -> ModelSpec:
    """``spec`` with exactly these quantised weights. Cuts along the inputs fall between blocks of all formats."""
    layers: list[dict[OpName, FormatName]] = [{} for _ in spec.layers]
    for name, chosen in formats.items():
        layer, _, op = name.rpartition(".")
        if layer:
            layers[int(layer)][cast(OpName, op)] = chosen
    blocks = [FORMATS[chosen].block for layer in layers for op, chosen in layer.items() if op in INPUT_SPLIT]
    made: dict[tuple[LayerSpec, tuple[tuple[OpName, FormatName], ...]], LayerSpec] = {}
    changed = []
    for before, quantized in zip(spec.layers, layers, strict=True):
        key = before, tuple(quantized.items())
        changed.append(made.setdefault(key, replace(before, formats=key[1])))
    return replace(
        spec, layers=tuple(changed), head_format=formats.get("lm_head"), embed_format=formats.get(EMBED), input_block=lcm(1, *blocks),
        fast_activations=fast and bool(formats),
    )  # fmt: skip


def _wanted(spec: ModelSpec, name: str, quantization: Quantization | None) -> FormatName | None:
    """What the rule makes of a weight."""
    if quantization is None:
        return None
    rule, op = RULES[quantization], name.rpartition(".")[2]
    if op == name:
        return rule.ends
    return rule.shared if op in ("k_proj", "v_proj") and spec.num_kv_heads < spec.num_heads else rule.layers


def fits(spec: ModelSpec, name: str, chosen: FormatName) -> bool:
    """Whether this weight's shape can be kept in this format."""
    op = name.rpartition(".")[2]
    inputs = {"o_proj": spec.q_size, "down_proj": spec.intermediate_size, "fc2": spec.intermediate_size}.get(op, spec.hidden_size)
    return FORMATS[chosen].fits(inputs, spec.hidden_size, "in" if op in INPUT_SPLIT else "out")


def _without(formats: Stored, keep: Collection[str]) -> Stored:
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in formats):
            known = "nothing is quantised" if not formats else f"quantised are {', '.join(list(formats)[:4])}, ..., {list(formats)[-1]}"
            raise UserError(f"--keep {pattern} matches no quantised weight; {known}")
    return {name: chosen for name, chosen in formats.items() if not any(fnmatchcase(name, pattern) for pattern in keep)}
