"""Flags that several commands share, and the checks of their values.

Owns the translation of the command line into `LLM` and `SamplingParams` arguments. Knows nothing of what the commands do with them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinpilots.errors import UserError

if TYPE_CHECKING:
    from twinpilots.api import LLM
    from twinpilots.request import RequestOutput, SamplingParams

# The same words as plan.plan.POLICIES and model.families.DTYPES (a test compares them): importing those would slow --help.
POLICIES = ("auto", "twinpilots", "flexgen", "hetegen", "layer-split", "stream", "cpu", "resident")
KV_DTYPES = ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16", "int8")
DTYPES = ("auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4", "int4-fast")
LLM_ARGUMENTS = (
    "model", "tokenizer", "revision", "dtype", "quantization", "device", "gpu_memory", "host_memory", "max_model_len",
    "max_num_seqs", "kv_cache_dtype", "policy", "plan", "threads", "seed", "deterministic", "unit_rows", "strict", "keep",
    "enable_prefix_caching",
)  # fmt: skip
MODEL_HELP = "directory, .gguf file, hub id, smollm2-135m, gemma-3-270m, or dummy:NAME"


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, minimum=1)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, minimum=0)


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number of at least 0")
    return value


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return value


def size(text: str) -> int:
    """Bytes from "8GiB", "512KiB", "24GB" or a plain number."""
    from twinpilots.units import parse_bytes

    try:
        return parse_bytes(text)
    except (ValueError, UserError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def policy_list(text: str) -> tuple[str, ...]:
    """Comma-separated policies, each once."""
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown policy {unknown[0]!r}; known: {', '.join(POLICIES)}")
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a policy twice")
    return names


def _whole(text: str, *, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is too small, the least is {minimum}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """--json and --debug, which every command has."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, everything else on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_format_flags(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """What the weights are kept in."""
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="weights in memory (default: as stored)")
    group.add_argument("--quantization", choices=QUANTIZATIONS, help="quantise the weights when loading (docs/quantization.md)")
    group.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="weights not to quantise, e.g. lm_head or '*.down_proj' (repeatable)")


def add_planning_flags(parser: argparse.ArgumentParser, *, policy: bool = True) -> None:
    """The LLM arguments that shape a plan, with or without running it; ``policy`` False where the policies are what is compared."""
    group = parser.add_argument_group("model and limits")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    add_format_flags(group)
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:N or emulated:PRESET (default: auto)")
    group.add_argument(
        "--gpu-memory", type=size, metavar="SIZE", help="most memory to use on the card, all included, e.g. 8GiB (default: what is free, less a margin)"
    )
    group.add_argument("--host-memory", type=size, metavar="SIZE", help="limit of host memory (default: what is available)")
    group.add_argument("--max-model-len", type=positive_int, metavar="N", help="longest prompt plus output, in tokens")
    group.add_argument("--max-num-seqs", type=positive_int, metavar="N", help="most sequences at once")
    group.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto", help="KV cache in memory (default: as the weights)")
    if policy:
        group.add_argument("--policy", choices=POLICIES, default="auto", metavar="NAME", help=f"who computes what: {', '.join(POLICIES)} (default: auto)")
    group.add_argument("--strict", action="store_true", help="tensors in the model's files that nothing uses are an error, not a warning")
    group.add_argument("--unit-rows", type=positive_int, metavar="N", help="unit of a split, in rows (default: 64)")


def add_llm_flags(parser: argparse.ArgumentParser, *, policy: bool = True) -> None:
    """Every argument of `LLM`, with dashes; without ``policy`` neither that nor a hand-set plan."""
    add_planning_flags(parser, policy=policy)
    group = parser.add_argument_group("running")
    group.add_argument("--tokenizer", metavar="PATH", help="tokenizer of another model")
    if policy:
        group.add_argument("--plan", type=Path, metavar="FILE", help="run this hand-set plan (JSON)")
    group.add_argument("--threads", type=positive_int, metavar="N", help="threads of the CPU pilot (default: physical cores, less the driver's)")
    group.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="seed of sampling and of dummy weights (default: 0)")
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="prompts that begin alike share what was computed (default: on)"
    )
    group.add_argument("--deterministic", action="store_true", help="one frozen split: a request gives the same bits alone, batched and after a restart")


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The SamplingParams that are asked for in a terminal; what is not given comes from the model's generation_config.json."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=positive_int, default=max_tokens, metavar="N", help=f"most tokens to generate (default: {max_tokens})")
    group.add_argument("--temperature", type=non_negative_float, metavar="X", help="0 is greedy (default: the model's, else 1)")
    group.add_argument("--top-p", type=fraction, metavar="X", help="keep the likeliest tokens up to this probability")
    group.add_argument("--top-k", type=non_negative_int, metavar="N", help="keep the N likeliest tokens; 0 keeps all")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")


def add_trace_flags(parser: argparse.ArgumentParser) -> None:
    """--trace and how much of a run it keeps."""
    group = parser.add_argument_group("trace")
    group.add_argument("--trace", type=new_file, metavar="FILE", help="write the measured and predicted timeline of passes (open it in Perfetto)")
    group.add_argument(
        "--trace-passes", type=positive_int, default=32, metavar="N", help="passes in the trace: the first quarter of them and the last (default: 32)"
    )


def new_file(text: str) -> Path:
    """A file that can be written: found out before anything is loaded."""
    from twinpilots.trace import check_writable

    try:
        check_writable(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `LLM` that the flags of `add_llm_flags` stand for."""
    return {name: getattr(args, name) for name in LLM_ARGUMENTS if hasattr(args, name)}


def open_llm(args: argparse.Namespace, **more: Any) -> LLM:
    """The `LLM` that the flags describe; use it as a context manager. ``more``: arguments that have no flag."""
    from twinpilots.api import LLM

    with arguments_are_the_users():
        return LLM(**llm_arguments(args), **more)


def sampling_params(args: argparse.Namespace, llm: LLM, **more: Any) -> SamplingParams:
    """The model's own defaults, overridden by the flags that were given."""
    from dataclasses import replace

    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k") if getattr(args, name) is not None}
    with arguments_are_the_users():
        return replace(llm.get_default_sampling_params(), max_tokens=args.max_tokens, ignore_eos=args.ignore_eos, **given, **more)


@contextlib.contextmanager
def arguments_are_the_users() -> Iterator[None]:
    """Inside, a ValueError of our Python interface is the user's mistake: an argument that came from the command line."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def started(outputs: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
    """``outputs`` with its first item already drawn: what is wrong with the request shows now, as the user's mistake; anything later is not."""
    with arguments_are_the_users():
        first = next(outputs, None)
    return outputs if first is None else itertools.chain([first], outputs)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; all but the first flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join(line(row) for row in cells)
