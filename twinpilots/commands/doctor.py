"""`twinpilots doctor`: what is here, what is missing, what that costs."""

from __future__ import annotations

import argparse
from typing import Any

from twinpilots.commands import options


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "show what is here, what is missing and what that costs"
    parser = subparsers.add_parser("doctor", help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Print one line per finding, or return the document."""
    from twinpilots.doctor import examine, report_document, report_text

    findings = examine()
    if args.json:
        return report_document(findings)
    print(report_text(findings))
    return None
