"""`twinpilots bench`: side by side on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from twinpilots.commands import options

DEFAULT_POLICIES = ("auto", "stream", "cpu", "layer-split", "twinpilots")


def register(subparsers: Any) -> None:
    """Add the command and its kinds to the parser."""
    parser = subparsers.add_parser("bench", help="compare policies on this machine", description="Measure side by side on this machine.", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    throughput = kinds.add_parser(
        "throughput", help="tokens/s of the policies in alternating rounds", allow_abbrev=False,
        description="Tokens/s of the policies, each in a process of its own with the same cores, in alternating rounds.",
    )  # fmt: skip
    throughput.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = throughput.add_argument_group("benchmark")
    group.add_argument(
        "--policies", type=options.policy_list, default=DEFAULT_POLICIES, metavar="A,B", help=f"the contenders (default: {','.join(DEFAULT_POLICIES)})"
    )
    group.add_argument("--num-prompts", type=options.positive_int, default=16, metavar="N", help="sequences of one round (default: 16)")
    group.add_argument("--input-len", type=options.positive_int, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    group.add_argument("--output-len", type=options.positive_int, default=32, metavar="N", help="tokens to generate (default: 32)")
    group.add_argument("--rounds", type=options.positive_int, default=5, metavar="N", help="rounds, after one to warm up (default: 5)")
    group.add_argument("--reload", action="store_true", help="keep one contender in memory at a time; for models that fit only once")
    options.add_trace_flags(throughput)
    options.add_llm_flags(throughput, policy=False)
    options.add_output_flags(throughput)
    throughput.set_defaults(run=run_throughput)


def run_throughput(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run the rounds; print the table or return the document."""
    from twinpilots.benchmarks import throughput

    return throughput.run(args)
