"""`twinpilots profile`: measure this machine and keep the result."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options
from twinpilots.errors import UserError
from twinpilots.progress import Progress

if TYPE_CHECKING:
    from twinpilots.hardware.profile import HardwareProfile


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "profile", help="measure this machine and keep the result", allow_abbrev=False,
        description="Measure this machine's processors, memory and link (under a minute on a small box) and keep the result for planning.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", nargs="?", help="measure in the shapes and weight type of this model (default: a typical one)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    options.add_format_flags(parser)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:N or emulated:PRESET (default: auto)")
    parser.add_argument("--threads", type=options.positive_int, metavar="N", help="threads of the CPU pilot (default: physical cores, less the driver's)")
    parser.add_argument("--quick", action="store_true", help="seconds instead: the preset that is most like this machine, scaled to a few measured rates")
    parser.add_argument("--forget", action="store_true", help="instead of measuring: remove what earlier runs have learned of this machine's speed")
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure and store; print the rates or return the profile. With --forget: remove histories."""
    from twinpilots.commands.models import model_spec
    from twinpilots.history import forget
    from twinpilots.profiling import TYPICAL_MODEL, measure_machine, measure_scaled_machine

    if args.forget:
        if args.model:
            raise UserError("--forget takes no MODEL: it removes the histories of all models on this machine")
        removed = forget()
        if args.json:
            return {"schema": 1, "removed": removed}
        print(f"{removed} histories removed; the measured profiles stay")
        return None
    spec = model_spec(args.model or TYPICAL_MODEL, revision=args.revision, dtype=args.dtype, quantization=args.quantization, keep=args.keep)
    if args.quick:
        profile = measure_scaled_machine(args.device, spec, threads=args.threads)
    else:
        with Progress("profile", unit="steps") as bar:
            profile = measure_machine(args.device, spec, threads=args.threads, progress=lambda step: bar.update(note=step))
    if args.json:
        return {"schema": 1, "profile": json.loads(profile.to_json())}
    print(profile_text(profile))
    return None


def profile_text(profile: HardwareProfile) -> str:
    """The rates that matter most, each with its unit."""
    from twinpilots.units import format_bytes

    lines = [f"{profile.name}; {profile.source}"]
    for title, processor in (("CPU", profile.cpu), ("GPU" + (" (emulated)" if profile.emulated else ""), profile.gpu)):
        if processor is not None:
            lines.append(
                f"{title}: reads {processor.read_bytes_per_s / 1e9:.1f} GB/s, computes {processor.flops_per_s / 1e9:.0f} GFLOP/s, "
                f"{processor.copy_slowdown:.2f}x slower beside a busy link"
            )
    if profile.link is not None:
        link = profile.link
        lines.append(f"link: {link.up_bytes_per_s / 1e9:.2f} GB/s up, {link.down_bytes_per_s / 1e9:.2f} GB/s down, hand-off {link.handoff_s * 1e6:.0f} us")
        lines.append(f"GPU memory: {format_bytes(profile.gpu_memory_bytes)}")
    lines.append(f"host memory: {format_bytes(profile.host_memory_bytes)}, {profile.cpu_cores} cores for the CPU pilot")
    return "\n".join(lines)
