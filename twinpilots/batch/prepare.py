"""From a line of the file to what the engine takes, and what such lines are like on average.

Owns the seeds of requests that bring none, and the workload that a plan is made for. Knows nothing of outputs or of what is in flight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from twinpilots.batch.source import BatchLine, read_line
from twinpilots.errors import RequestError
from twinpilots.model.tokenizer import Tokenizer
from twinpilots.openai.prompts import EncodedPrompt, encode_request
from twinpilots.plan.workload import Workload
from twinpilots.request import SamplingParams

MOST_AT_ONCE = 256  # sequences at once that a plan is looked for, where the user names no number
MAX_SEQUENCES = 4096  # of one line: all of them are in flight together
GUESSED_TOKENS = 256  # the length of an answer that nothing limits, for planning
LEN_STEP = 32  # lengths are rounded up to this, so that a slightly longer request needs no other plan


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A line, ready for the engine: its prompts, each with its own parameters. ``longest``: tokens of its longest sequence at its end."""

    line: BatchLine
    prompts: list[EncodedPrompt]
    params: list[SamplingParams]
    longest: int


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """``limit``: the longest sequence that the model or the user allows, in tokens. ``seed``: the run's."""

    tokenizer: Tokenizer | None
    defaults: SamplingParams
    limit: int
    seed: int

    def ready(self, line: int, data: bytes | None) -> Ready:
        """The request in a line. RequestError says why there is none."""
        found = read_line(line, data, self.defaults)
        params = found.request.params
        if found.request.num_choices > MAX_SEQUENCES:
            raise RequestError(f"the request asks for {found.request.num_choices} outputs, {MAX_SEQUENCES} are allowed; split it", param="n")
        prompts = encode_request(found.request, self.tokenizer)
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
    sizes = [
        (len(prompt.ids), min(limit - len(prompt.ids), GUESSED_TOKENS if params.max_tokens is None else params.max_tokens))
        for ready in sample
        for prompt, params in zip(ready.prompts, ready.params, strict=True)
        for _ in range(params.n)
    ]
    num_sequences = max(1, round(num_left * len(sizes) / len(sample)))
    inputs, outputs = (sum(size[i] for size in sizes) / len(sizes) for i in (0, 1))
    seq_len = min(limit, max(2, rounded(round(inputs + outputs))))
    input_len = max(1, min(round(inputs), seq_len - 1))
    most = min(num_sequences, max_num_seqs or MOST_AT_ONCE)
    return Workload(num_requests=num_sequences, input_len=input_len, output_len=seq_len - input_len, max_num_seqs=most)


def lengths_to_hold(sample: Sequence[Ready], limit: int) -> list[int]:
    """The longest sequences that a plan should hold, best first: where memory is too small for the longest of the sample, most of it will do."""
    lengths = sorted(ready.longest for ready in sample)
    wanted = (lengths[-1], lengths[len(lengths) * 9 // 10], lengths[len(lengths) // 2], lengths[0])
    return list(dict.fromkeys(length for exact in wanted for length in (min(limit, rounded(exact)), exact)))


def rounded(tokens: int) -> int:
    """Up to a multiple of `LEN_STEP`."""
    return -(-tokens // LEN_STEP) * LEN_STEP
