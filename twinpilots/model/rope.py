"""Rotary tables from configuration: default, linear, llama3, yarn, longrope.

Owns: `read_rope`, which turns one set of rope parameters into a `RopeSpec`. The formulas follow transformers' modeling_rope_utils (fp32 arithmetic
included, because a rounding of a frequency grows with the position). Knows nothing of attention or of model families.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from twinpilots.errors import CheckpointError, UnsupportedModelError
from twinpilots.model.config_reader import ConfigReader
from twinpilots.model.spec import RopeSpec

Floats = npt.NDArray[np.float32]
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_rope(rope: ConfigReader, *, rope_type: str, theta: float, rotary_dim: int, max_positions: int, original_max: int) -> RopeSpec:
    """The rotary table of ``rope``'s parameters. ``theta`` is the base, ``original_max`` the length trained before scaling (tokens)."""
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(f"{rope.where}: the rotary dimension {rotary_dim} (head_dim * partial_rotary_factor) must be even and positive")
    if theta <= 1.0:
        raise CheckpointError(f"{rope.where}: rope_theta is {theta}; it must be above 1")
    base = base_inv_freq(theta, rotary_dim)
    if rope_type == "dynamic" and rope.number("factor", 1.0) == 1.0:
        rope_type = "default"
    if rope_type == "default":
        return _table(rotary_dim, base)
    if rope_type == "linear":
        return _table(rotary_dim, base / np.float32(rope.number("factor")))
    if rope_type == "factors":  # GGUF's rope_freqs tensor: one divisor per frequency (llama3 scaling, worked out by the converter)
        factors: Floats = np.asarray(rope.numbers("factors", rotary_dim // 2), dtype=np.float32)
        return _table(rotary_dim, base / factors)
    if rope_type == "llama3":
        return _table(rotary_dim, llama3_inv_freq(base, rope, original_max))
    if rope_type == "yarn":
        return _yarn(rope, theta, rotary_dim, max_positions, original_max)
    if rope_type == "longrope":
        return _longrope(rope, base, rotary_dim, max_positions, original_max)
    raise UnsupportedModelError(f"{rope.where}: rope type '{rope_type}' is not supported; supported are {', '.join(ROPE_TYPES)}")


def base_inv_freq(theta: float, rotary_dim: int) -> Floats:
    """theta ** -(2 i / rotary_dim), rad per position (RoFormer, section 3.4.2)."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def llama3_inv_freq(inv_freq: Floats, rope: ConfigReader, original_max: int) -> Floats:
    """Llama 3.1's scaling: long wavelengths divided by ``factor``, short ones kept, a linear blend between."""
    factor, low, high = np.float32(rope.number("factor")), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise CheckpointError(f"{rope.where}: high_freq_factor {high} must be above low_freq_factor {low}")
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(original_max) / wavelength - np.float32(low)) / np.float32(high - low)
    blend = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original_max / low, inv_freq / factor, np.where(wavelength < original_max / high, inv_freq, blend))
    return scaled.astype(np.float32)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1 (YaRN, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_inv_freq(theta: float, rotary_dim: int, factor: float, original_max: int, beta_fast: float, beta_slow: float, truncate: bool) -> Floats:
    """YaRN's "NTK by parts": frequencies that turn more than ``beta_fast`` times in the trained length stay, fewer than ``beta_slow`` are divided."""

    def dimension(turns: float) -> float:
        return rotary_dim * math.log(original_max / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low if high != low else 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    base = base_inv_freq(theta, rotary_dim)
    blended: Floats = (base / np.float32(factor) * (1 - keep) + base * keep).astype(np.float32)
    return blended


def _yarn(rope: ConfigReader, theta: float, rotary_dim: int, max_positions: int, original_max: int) -> RopeSpec:
    factor = rope.optional_number("factor") or max_positions / original_max
    scale = rope.optional_number("attention_factor")
    if scale is None:
        mscale, mscale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all) if mscale and mscale_all else yarn_scale(factor)
    truncate = rope.flag("truncate", True)
    inv_freq = yarn_inv_freq(theta, rotary_dim, factor, original_max, rope.number("beta_fast", 32), rope.number("beta_slow", 1), truncate)
    return _table(rotary_dim, inv_freq, scale=scale)


def _longrope(rope: ConfigReader, base: Floats, rotary_dim: int, max_positions: int, original_max: int) -> RopeSpec:
    short = np.asarray(rope.numbers("short_factor", rotary_dim // 2), dtype=np.float32)
    long = np.asarray(rope.numbers("long_factor", rotary_dim // 2), dtype=np.float32)
    factor = rope.optional_number("factor") or max_positions / original_max
    scale = rope.optional_number("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original_max))
    return RopeSpec(rotary_dim=rotary_dim, inv_freq=_floats(base / short), long_inv_freq=_floats(base / long), scale=scale, original_max_position=original_max)


def _table(rotary_dim: int, inv_freq: Floats, scale: float = 1.0) -> RopeSpec:
    return RopeSpec(rotary_dim=rotary_dim, inv_freq=_floats(inv_freq), scale=scale)


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
