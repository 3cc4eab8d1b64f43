"""One contender of `bench throughput`: a process that holds one `LLM` and generates when told to.

Owns both ends of a pipe of JSON lines: `Contender` in the benchmark's process, `serve` in the child (``python -m twinpilots.benchmarks.contender``).
Requests: first ``{"llm": {...}, "prompts": [[ids]], "output_len": N}``, then ``{}`` per run, or ``{"trace": {arguments of LLM.trace}}`` for a run that is
traced; the end of input ends it.
Replies: ``{"load_s"}``, then ``{"seconds", "generated", "stats"}`` per run, or ``{"error", "user"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import IO, Any

from twinpilots.errors import DeviceLostError, UserError

GRACE_S = 10.0  # a contender closes its devices in well under this


@dataclass(frozen=True, kw_only=True)
class Run:
    """One round of one contender. ``seconds`` is the wall time of `LLM.generate`; ``stats`` are the engine's, cumulated over all its rounds."""

    seconds: float
    generated: int
    stats: Mapping[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return self.generated / self.seconds


class Contender:
    """The benchmark's end. Raises UserError from the constructor when the child's `LLM` cannot be made as asked for."""

    def __init__(self, llm_arguments: Mapping[str, Any], prompts: Sequence[Sequence[int]], output_len: int) -> None:
        # A session of its own: Ctrl-C reaches the benchmark alone, which then ends its contenders in order.
        self._child = subprocess.Popen(
            [sys.executable, "-m", "twinpilots.benchmarks.contender"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            self.load_s = float(self._ask({"llm": dict(llm_arguments), "prompts": prompts, "output_len": output_len})["load_s"])
        except BaseException:
            self.kill()
            raise

    def run(self, trace: Mapping[str, Any] | None = None) -> Run:
        """Generate once for all prompts; ``trace``: arguments of `LLM.trace` for this run."""
        return Run(**self._ask({} if trace is None else {"trace": dict(trace)}))

    def close(self) -> None:
        """Let the child close its devices and end; kill it when it does not."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._reap()

    def kill(self) -> None:
        """End the child at once, whatever it is doing; its emulated GPU, if any, goes with it."""
        self._child.kill()
        self._reap()

    def _reap(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DeviceLostError(f"a contender ended unexpectedly with exit code {self._child.wait()}; its messages are above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"]) if reply["user"] else DeviceLostError(reply["error"])
        return reply


def serve(requests: IO[str], replies: IO[str]) -> None:
    """The child's end: make the `LLM`, run when told to, until the end of input."""

    def reply(document: Mapping[str, Any]) -> None:
        replies.write(json.dumps(document) + "\n")
        replies.flush()

    try:
        _serve(json.loads(requests.readline()), requests, reply)
    except (UserError, ValueError) as error:
        reply({"error": str(error), "user": True})
    except Exception as error:  # noqa: BLE001  whatever it is, the other end must hear of it
        reply({"error": f"{type(error).__name__}: {error}", "user": False})


def _serve(setup: Mapping[str, Any], requests: IO[str], reply: Any) -> None:
    from twinpilots.api import LLM
    from twinpilots.request import SamplingParams

    began_s = time.monotonic()
    params = SamplingParams(temperature=0.0, max_tokens=setup["output_len"], ignore_eos=True)
    with LLM(**{**setup["llm"], "enable_prefix_caching": False}) as llm:  # every round computes all of its prompts
        reply({"load_s": time.monotonic() - began_s})
        for request in requests:
            traced = json.loads(request).get("trace")
            with llm.trace(**traced) if traced else nullcontext():  # what it writes is written after the time is taken
                began_s = time.monotonic()
                outputs = llm.generate(setup["prompts"], params, use_tqdm=False)
                seconds = time.monotonic() - began_s
            reply({"seconds": seconds, "generated": sum(len(output.outputs[0].token_ids) for output in outputs), "stats": llm.stats()})


def main() -> None:
    """Keep stdout for the replies alone: whatever else prints goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
