"""`twinpilots bench`: side by side on this machine."""

from __future__ import annotations

import argparse
from typing import Any

from twinpilots.commands import options

DEFAULT_POLICIES = ("auto", "stream", "cpu", "layer-split", "twinpilots")
# The same words as hardware.kernel_bench.KERNELS and kernels.native.ISA_NAMES (a test compares them): importing those would slow --help.
KERNELS = ("linear-out", "linear-in", "mlp-block", "decode-attention", "prefill-attention")
ISAS = ("portable", "avx2", "avx512", "avx512vnni", "amx")
MOST_TOKENS = 4096


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
    _register_kernels(kinds)
    _register_serve(kinds)


def _register_serve(kinds: Any) -> None:
    parser = kinds.add_parser(
        "serve", help="the server beside the offline engine", allow_abbrev=False,
        description="Throughput of a server under concurrent streams beside the offline engine's, and inter-token times while a long prompt is prefilled.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--concurrency", type=options.positive_int, default=32, metavar="N", help="clients at once (default: 32)")
    group.add_argument("--each", type=options.positive_int, default=3, metavar="N", help="requests that each sends, one after another (default: 3)")
    group.add_argument("--input-len", type=options.positive_int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    group.add_argument("--output-len", type=options.positive_int, default=32, metavar="N", help="tokens to generate (default: 32)")
    group.add_argument("--streams", type=options.positive_int, default=4, metavar="N", help="streams that a long prompt may disturb (default: 4)")
    group.add_argument("--long-prompt", type=options.positive_int, default=4096, metavar="N", help="tokens of the long prompt (default: 4096)")
    group.add_argument("--long-output-len", type=options.positive_int, default=900, metavar="N", help="tokens of each of those streams (default: 900)")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:N or emulated:PRESET (default: auto)")
    options.add_output_flags(parser)
    parser.set_defaults(run=run_serve)


def _register_kernels(kinds: Any) -> None:
    parser = kinds.add_parser(
        "kernels", help="each kernel of the CPU beside this machine's limits", allow_abbrev=False,
        description="Time, GB/s, GFLOP/s and the percentage of the limit of each kernel of the CPU pilot, with the limits measured in the same run.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", nargs="?", help="measure in this model's widths (default: 4096 x 11008, 32 heads on 8 KV heads of 128)")
    group = parser.add_argument_group("benchmark")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    group.add_argument("--formats", type=name_list, metavar="A,B", help="weight and KV formats, or all (default: those that can be made on load)")
    group.add_argument("--kernels", type=kernel_list, default=KERNELS, metavar="A,B", help=f"of {', '.join(KERNELS)} (default: all)")
    group.add_argument("--tokens", type=token_list, metavar="N,N", help="rows of activations; linears only then (default: 1 to 512, and attention)")
    group.add_argument("--threads", type=options.positive_int, metavar="N", help="threads of the CPU pilot (default: physical cores)")
    group.add_argument("--isa", choices=ISAS, help="use this instruction set (default: the fastest of this machine)")
    group.add_argument("--seconds", type=options.positive_int, default=75, metavar="N", help="time to spend on measuring, about (default: 75)")
    options.add_output_flags(parser)
    parser.set_defaults(run=run_kernels)


def name_list(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must be names separated by commas, each once")
    return names


def kernel_list(text: str) -> tuple[str, ...]:
    """Comma-separated kernels, each once."""
    names = name_list(text)
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown kernel {unknown[0]!r}; known: {', '.join(KERNELS)}")
    return names


def token_list(text: str) -> tuple[int, ...]:
    """Comma-separated numbers of tokens, each once."""
    counts = tuple(options.positive_int(name) for name in name_list(text))
    if max(counts) > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{max(counts)} tokens are too many, the most is {MOST_TOKENS}")
    return counts


def run_throughput(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run the rounds; print the table or return the document."""
    from twinpilots.benchmarks import throughput

    return throughput.run(args)


def run_kernels(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure the kernels; print the table or return the document."""
    from twinpilots.benchmarks import kernels

    return kernels.run(args)


def run_serve(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure server and engine; print the comparison or return the document."""
    from twinpilots.benchmarks import serving

    return serving.run(args, ["--device", args.device])
