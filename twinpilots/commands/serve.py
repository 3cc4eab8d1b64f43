"""`twinpilots serve`: a model behind OpenAI's HTTP API, with metrics and a page."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options
from twinpilots.errors import UserError

if TYPE_CHECKING:
    from twinpilots.api import LLM
    from twinpilots.server.view import Snapshot

KEY_VARIABLE = "TWINPILOTS_API_KEY"


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    text = "serve a model over HTTP, as OpenAI does"
    parser = subparsers.add_parser("serve", help=text, description=f"{text.capitalize()}: docs/server.md.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1, this machine only)")
    group.add_argument("--port", type=port, default=8000, metavar="N", help="port to listen on, 0 for any free one (default: 8000)")
    text = f"what clients must send as a bearer token (repeatable: each key is a client; default: ${KEY_VARIABLE}, else none is needed)"
    group.add_argument("--api-key", action="append", metavar="KEY", help=text)
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help="what clients call the model (repeatable; default: MODEL)")
    group = parser.add_argument_group("limits of the server")
    group.add_argument("--max-waiting", type=options.positive_int, default=256, metavar="N", help="sequences accepted beyond those that run (default: 256)")
    group.add_argument("--max-body-size", type=options.size, default=8 << 20, metavar="SIZE", help="largest request body (default: 8MiB)")
    group.add_argument("--request-timeout", type=options.positive_int, default=3600, metavar="S", help="seconds that a request may take (default: 3600)")
    group.add_argument("--drain-timeout", type=options.positive_int, default=60, metavar="S", help="seconds to finish what runs after SIGTERM (default: 60)")
    options.add_llm_flags(parser)
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def port(text: str) -> int:
    """A TCP port, or 0."""
    value = options.non_negative_int(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is too large, the most is 65535")
    return value


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Serve until a signal comes; ``--json`` returns the statistics."""
    try:
        from twinpilots.server.run import serve
        from twinpilots.server.served import EXPECTED
        from twinpilots.server.settings import ServerSettings
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'twinpilots[serve]'") from error
    keys = args.api_key if args.api_key is not None else [os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else []
    with options.arguments_are_the_users():
        settings = ServerSettings(
            host=args.host, port=args.port, api_keys=tuple(keys), model_names=tuple(args.served_model_name) or (args.model,), max_waiting=args.max_waiting,
            max_body_bytes=args.max_body_size, request_timeout_s=args.request_timeout, drain_timeout_s=args.drain_timeout,
        )  # fmt: skip

    def open_llm() -> LLM:
        return options.open_llm(args, expected=EXPECTED)

    def on_ready(snapshot: Snapshot) -> None:
        limits = snapshot.limits
        names = ", ".join(settings.model_names)
        print(f"ready: {names}, at most {limits['max_num_seqs']} sequences at once, of at most {limits['max_model_len']} tokens", file=sys.stderr, flush=True)

    stats = serve(settings, open_llm, on_listening=lambda url: print(f"listening on {url}", file=sys.stderr, flush=True), on_ready=on_ready)
    return {"schema": 1, "model": args.model, "stats": stats} if args.json else None
