"""From a line of the file to what the engine takes, and what such lines are like on average.

Owns the seeds of requests that bring none, and the workload that a plan is made for. Knows nothing of outputs or of what is in flight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from twinpilots.batch.source import BatchLine, read_line
from twinpilots.errors import RequestError
from twinpilots.expected_work import mean_workload, rounded
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.openai.prompts import EncodedPrompt, encode_request
from twinpilots.plan.workload import Workload
from twinpilots.request import SamplingParams

MOST_AT_ONCE = 256  # sequences at once that a plan is looked for, where the user names no number
MAX_SEQUENCES = 4096  # of one line: all of them are in flight together
GUESSED_TOKENS = 256  # the length of an answer that nothing limits, for planning


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A line, ready for the engine: its prompts, each with its own parameters. ``longest``: tokens of its longest sequence at its end."""

    line: BatchLine
    prompts: list[EncodedPrompt]
    params: list[SamplingParams]
    longest: int


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """``limit``: the longest sequence that the model or the user allows, in tokens. ``seed``: the run's. ``created``: when the run first started (seconds since
    1970); chat templates that write today's date write that day's, so that a run over midnight is one run."""

    tokenizer: Tokenizer | None
    defaults: SamplingParams
    limit: int
    seed: int
    created: int

    def ready(self, line: int, data: bytes | None) -> Ready:
        """The request in a line. RequestError says why there is none."""
        found = read_line(line, data, self.defaults)
        params = found.request.params
        if found.request.num_choices > MAX_SEQUENCES:
            raise RequestError(f"the request asks for {found.request.num_choices} outputs, {MAX_SEQUENCES} are allowed; split it", param="n")
        dated = {**(found.request.template_options or {}), "strftime_now": datetime.fromtimestamp(self.created).strftime}
        prompts = encode_request(replace(found.request, template_options=dated), self.tokenizer)
        for prompt in prompts:
            if len(prompt.ids) >= self.limit:
                raise RequestError(f"the prompt has {len(prompt.ids)} tokens, the limit is {self.limit} with the output; shorten it", param="prompt")
        each = [replace(params, seed=request_seed(self.seed, line, number)) if _needs_seed(params) else params for number in range(len(prompts))]
        longest = max(self.end_of(len(prompt.ids), params) for prompt in prompts)
        if self.tokenizer is None:  # there is no text to give
            found = replace(found, request=replace(found.request, return_token_ids=True))
        return Ready(line=found, prompts=prompts, params=each, longest=longest)

    def end_of(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Tokens of such a sequence at its end, at most."""
        return self.limit if params.max_tokens is None else min(self.limit, num_prompt_tokens + params.max_tokens)


def _needs_seed(params: SamplingParams) -> bool:
    return not params.is_greedy and params.seed in (None, -1)


def request_seed(seed: int, line: int, number: int) -> int:
    """The seed of a request that brings none: by its place in the file, so that neither a restart nor a shard changes its output."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {line} {number}".encode(), digest_size=7).digest(), "little")


def workload_of(sample: Sequence[Ready], num_left: int, max_num_seqs: int | None, limit: int) -> Workload:
    """What ``num_left`` requests like those of the sample are: the plan goes by their mean lengths, as pages are shared."""
    lengths = [
        (len(prompt.ids), min(limit - len(prompt.ids), GUESSED_TOKENS if params.max_tokens is None else params.max_tokens), params.n)
        for ready in sample
        for prompt, params in zip(ready.prompts, ready.params, strict=True)
    ]
    num_sequences = max(1, round(num_left * sum(times for _, _, times in lengths) / len(sample)))
    return mean_workload(lengths, num_sequences, limit=limit, max_num_seqs=max_num_seqs or MOST_AT_ONCE)


def lengths_to_hold(sample: Sequence[Ready], limit: int) -> list[int]:
    """The longest sequences that a plan should hold, best first: where memory is too small for the longest of the sample, most of it will do."""
    lengths = sorted(ready.longest for ready in sample)
    wanted = (lengths[-1], lengths[len(lengths) * 9 // 10], lengths[len(lengths) // 2], lengths[0])
    return list(dict.fromkeys(length for exact in wanted for length in (min(limit, rounded(exact)), exact)))
