"""MODEL and hardware arguments as data, for the commands that plan without loading a model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from twinpilots.errors import UserError
from twinpilots.progress import Progress

if TYPE_CHECKING:
    from twinpilots.config import Quantization
    from twinpilots.hardware.profile import HardwareProfile
    from twinpilots.model.spec import ModelSpec, WeightDtype

logger = logging.getLogger(__name__)
DUMMY = "dummy:"


def model_spec(
    model: str, *, revision: str | None = None, dtype: str = "auto", quantization: Quantization | None = None, keep: Sequence[str] = (), strict: bool = False
) -> ModelSpec:  # fmt: skip
    """The spec of MODEL in the formats that it would run in; of ``dummy:NAME`` without touching a file, of any other without quantising it."""
    if model.startswith(DUMMY):
        from twinpilots.model.dummy import dummy_spec
        from twinpilots.model.quantization import quantized_spec

        if revision is not None:
            raise UserError(f"--revision {revision} was given, but {model} is not a hub id; leave it out")
        return quantized_spec(dummy_spec(model, short_dtype(dtype)), {}, quantization, keep)
    from twinpilots.model.checkpoint import open_checkpoint

    with Progress("converting", unit="tensors") as bar:
        checkpoint = open_checkpoint(model, dtype=dtype, quantization=quantization, keep=keep, revision=revision, strict=strict, progress=bar.show)
    try:
        return checkpoint.spec
    finally:
        checkpoint.close()


def short_dtype(dtype: str) -> WeightDtype | None:
    """Our name of a dtype flag's value; None for "auto"."""
    from twinpilots.model.families import DTYPES

    return None if dtype == "auto" else DTYPES[dtype]


def hardware(name: str | None, device: str, model: str, spec: ModelSpec) -> HardwareProfile:
    """The named preset or file; without one this machine's stored profile for ``device``.

    ProfileMissingError when there is none. Kinds of linears that were not measured are the nearest preset's at this machine's rates, which is said.
    """
    if name is not None:
        from twinpilots.hardware.presets import load_hardware

        return load_hardware(name)
    from twinpilots.hardware.scaled import filled
    from twinpilots.hardware.store import latest_profile
    from twinpilots.machine import resolve_device
    from twinpilots.profiling import stored_profile

    resolved = resolve_device(device)
    profile = stored_profile(resolved, spec) or latest_profile(resolved)
    missing = profile.missing(spec.rate_keys)
    if missing:
        kinds = ", ".join(sorted({key.rpartition("/")[0] for key in missing}))
        command = f"twinpilots profile {model} --device {resolved}"
        logger.warning(
            "times of %s are the nearest preset's at this machine's rates, not measured: run `%s` with the same --dtype and --quantization", kinds, command
        )
    return filled(profile)


def limit_bytes(asked: int | None, present: int, flag: str, where: str) -> int:
    """The memory limit to plan with: what was asked for, which must exist, or all there is."""
    from twinpilots.units import format_bytes

    if asked is not None and asked > present:
        raise UserError(f"{flag} {format_bytes(asked)} is more than {where} has, {format_bytes(present)}; lower it")
    return present if asked is None else asked


def check_lengths(args: argparse.Namespace, spec: ModelSpec) -> None:
    """The workload's sequences must fit the model and --max-model-len, which must fit the model."""
    if args.max_model_len is not None and args.max_model_len > spec.max_model_len:
        raise UserError(f"--max-model-len {args.max_model_len} is above the model's own limit {spec.max_model_len}; lower it")
    limit = args.max_model_len or spec.max_model_len
    if args.input_len + args.output_len > limit:
        raise UserError(f"--input-len {args.input_len} plus --output-len {args.output_len} is above the model's limit of {limit} tokens; lower them")
