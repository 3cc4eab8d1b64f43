"""`twinpilots chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options

if TYPE_CHECKING:
    from twinpilots.api import LLM
    from twinpilots.request import SamplingParams

HELP = "/reset forgets the conversation, /exit leaves (so does the end of input)"


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "talk with a model in the terminal"
    parser = subparsers.add_parser("chat", help=text, description=f"{text.capitalize()}; {HELP}.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="the system message that opens the conversation")
    options.add_sampling_flags(parser, max_tokens=512)
    options.add_llm_flags(parser)
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Converse until /exit or the end of input; ``--json`` returns the conversation."""
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    with options.open_llm(args) as llm:
        params = options.sampling_params(args, llm)
        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        while (text := _read_line()) is not None and text != "/exit":
            if text == "/reset":
                messages = list(opening)
            elif text:
                messages.append({"role": "user", "content": text})
                messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
        return {"schema": 1, "model": args.model, "messages": messages, "stats": llm.stats()} if args.json else None


def _read_line() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    text = ""
    for output in options.started(llm.stream_chat(messages, params)):
        print(output.outputs[0].text[len(text) :], end="", flush=True)
        text = output.outputs[0].text
    print()
    return text
