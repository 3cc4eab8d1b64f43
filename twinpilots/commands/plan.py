"""`twinpilots plan`: who would compute what, and how fast that would be, without running anything."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options
from twinpilots.progress import Progress

if TYPE_CHECKING:
    from twinpilots.hardware.profile import HardwareProfile
    from twinpilots.model.spec import ModelSpec
    from twinpilots.plan.solver import Solution

PLOT_ENDINGS = (".png", ".svg", ".html")


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "plan", help="show who would compute what and how fast", allow_abbrev=False,
        description="Plan a model for this machine or any other, without weights: placement, memory, predicted tokens/s, bounds, all policies.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = parser.add_argument_group("workload and hardware")
    group.add_argument("--hardware", metavar="NAME", help="demo, t4, a10g, rtx-3060, rtx-4090, a6000, h100 or a JSON file (default: this machine's profile)")
    group.add_argument("--input-len", type=options.positive_int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    group.add_argument("--output-len", type=options.positive_int, default=128, metavar="N", help="tokens to generate (default: 128)")
    group.add_argument(
        "--disk", type=options.size, default=0, metavar="SIZE",
        help="how many bytes of the model may lie on the disk, e.g. 500GB; planned and predicted only: this version does not run such plans (default: none)",
    )  # fmt: skip
    group.add_argument("--plot", type=plot_file, metavar="FILE", help="also draw policies and a pass (.png, .svg or .html)")
    options.add_planning_flags(parser)
    options.add_output_flags(parser)
    parser.set_defaults(run=run, max_num_seqs=8)


def plot_file(text: str) -> Path:
    """A file name whose ending names a format we draw."""
    path = Path(text)
    if path.suffix not in PLOT_ENDINGS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(PLOT_ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the directory of {text!r} does not exist")
    return path


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Print the plan, or return its document."""
    document = plan_document(args)
    from twinpilots.plan.report import plan_text

    if args.plot is not None:
        from twinpilots.plan.picture import plot

        plot(document, args.plot)
    if args.json:
        return document
    print(plan_text(document))
    return None


def plan_document(args: argparse.Namespace) -> dict[str, Any]:
    """Solve for the model, hardware, workload and limits of the command line."""
    from twinpilots.commands.models import check_lengths, hardware, limit_bytes, model_spec
    from twinpilots.config import KV_DTYPES
    from twinpilots.errors import LimitError
    from twinpilots.plan.draft import size_text
    from twinpilots.plan.workload import Limits, Workload

    spec = model_spec(args.model, revision=args.revision, dtype=args.dtype, quantization=args.quantization, keep=args.keep, strict=args.strict)
    check_lengths(args, spec)
    profile = hardware(args.hardware, args.device, args.model, spec)
    limits = Limits(
        gpu_bytes=limit_bytes(args.gpu_memory, profile.gpu_memory_bytes, "--gpu-memory", profile.name),
        host_bytes=limit_bytes(args.host_memory, profile.host_memory_bytes, "--host-memory", profile.name),
        disk_bytes=args.disk,
    )
    from twinpilots.plan.report import plan_document  # the planner and scipy load only once the input is known to be good
    from twinpilots.plan.solver import least_disk, solve

    fixed: dict[str, Any] = {
        "policy": args.policy, "unit_rows": args.unit_rows, "kv_dtype": KV_DTYPES[args.kv_cache_dtype], "max_model_len": args.max_model_len,
    }  # fmt: skip

    def solved(num_seqs: int) -> tuple[Solution, Workload]:
        workload = Workload(num_requests=num_seqs, input_len=args.input_len, output_len=args.output_len, max_num_seqs=num_seqs)
        try:
            return solve(spec, profile, workload, limits, **fixed), workload
        except LimitError as error:
            need = None if limits.disk_bytes else least_disk(spec, profile, workload, limits, **fixed)
            if need is None:
                raise
            raise LimitError(f"{error}; or see what it would do with part of it on the disk: --disk {size_text(need)}") from None

    solution, workload = solved(args.max_num_seqs)
    document = plan_document(solution, spec, profile, workload, limits)
    if args.plot is not None:
        document |= figures(spec, profile, solution, args.max_num_seqs, lambda num_seqs: solved(num_seqs)[0])
    return document


def figures(spec: ModelSpec, profile: HardwareProfile, solution: Solution, num_seqs: int, solved: Callable[[int], Solution]) -> dict[str, Any]:
    """What the picture shows beside the document: one pass, and every policy at smaller batches, one more solve for each."""
    from twinpilots.plan.figures import batch_figures, batch_points, pass_figures

    *smaller, _ = batch_points(num_seqs)
    points = []
    with Progress("planning", total=len(smaller), unit="batches") as bar:
        for count in smaller:
            points.append((count, solved(count)))
            bar.update()
    return {**pass_figures(spec, profile, solution), **batch_figures([*points, (num_seqs, solution)])}
