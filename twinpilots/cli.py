"""The terminal: `twinpilots COMMAND`.

Owns the parser's frame, exit codes and the one-line form of errors. Each command is a module of `twinpilots.commands` with `register(subparsers)`;
it imports what it needs when it runs, so that `--help` is instant.

Exit codes: 0 ok; 2 bad usage, bad input, an unavailable device or a limit that cannot be met; 130 interrupted; 1 anything else.
With ``--json`` stdout carries exactly one JSON document; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from twinpilots import __version__
from twinpilots.commands import bench, chat, doctor, generate, plan, profile, run_batch, serve
from twinpilots.commands import eval as evaluate
from twinpilots.errors import TwinPilotsError, UserError

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
COMMANDS = (generate, chat, plan, profile, doctor, bench, evaluate, run_batch, serve)
# An unreadable or missing file that the user named is bad input; any other OSError is not.
INPUT_OS_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = OneLineParser(prog="twinpilots", description="Large language models that do not fit in GPU memory, on one box.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"twinpilots {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=OneLineParser)
    for command in COMMANDS:
        command.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` defaults to the process's arguments."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as exit_request:
        return exit_request.code if isinstance(exit_request.code, int) else EXIT_FAILURE
    try:
        with _messages_to_stderr():
            _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_went_away()
    except Exception as error:  # noqa: BLE001  the last line of defence: one line instead of a traceback
        return _report(error, debug=args.debug)
    return EXIT_OK


def _run(args: argparse.Namespace) -> None:
    if not args.json:
        args.run(args)
        sys.stdout.flush()
        return
    with _stdout_kept_clean():
        document: dict[str, Any] = args.run(args)
    json.dump(document, sys.stdout, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _report(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        text, code = str(error), EXIT_USAGE
    elif isinstance(error, INPUT_OS_ERRORS) and error.filename is not None:
        text, code = f"{error.filename}: {error.strerror}", EXIT_USAGE
    elif isinstance(error, TwinPilotsError | OSError | MemoryError):
        text, code = str(error) or type(error).__name__, EXIT_FAILURE
    else:
        text, code = f"internal error: {type(error).__name__}: {error} (--debug shows where)", EXIT_FAILURE
    print(f"error: {_one_line(text)}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _reader_went_away() -> int:
    """`twinpilots ... | head`: nobody reads on; end quietly, and keep the interpreter's last flush from complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILURE


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Whatever is printed meanwhile goes to stderr, also by libraries in C that know only file descriptor 1 (the LP solver prints now and then)."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _messages_to_stderr() -> Iterator[None]:
    """Warnings and log records as one plain line each; restored afterwards, since `main` may be called inside another program."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"warning: {_one_line(str(message))}", file=sys.stderr)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("twinpilots")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
