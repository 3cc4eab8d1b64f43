"""Requests: what a user asks for, what they get back, and the state of each sequence on the way.

Owns `SamplingParams` (vLLM's fields, names and defaults), the output records, and `Sequence`, whose one rule drives the whole engine: a sequence's
computed tokens catch up with its tokens. Knows nothing of pages, passes, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Literal

Tier = Literal["gpu", "host"]
FinishReason = Literal["stop", "length", "abort"]
GREEDY_TEMPERATURE = 1e-5  # below this, sampling is argmax (as in vLLM)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What form the output must have, one of: ``json`` (a JSON schema, as an object or its text), ``regex``, ``choice`` (one of these texts), ``grammar``
    (Lark) and ``json_object`` (any JSON object). Names as in vLLM. Raises ValueError."""

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: SequenceABC[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None] + ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            raise ValueError(f"exactly one of json, regex, choice, grammar and json_object must be given, got {', '.join(given) or 'none'}")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            raise ValueError(f"json must be a JSON schema, as an object or its text, got {self.json!r}")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")
        if self.choice is not None and (isinstance(self.choice, str) or not self.choice or not all(isinstance(text, str) and text for text in self.choice)):
            raise ValueError(f"choice must be a list of at least one non-empty text, got {self.choice!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ValueError that names the field, the value and its range.

    ``top_k`` 0 or -1 means all tokens; ``max_tokens`` None means up to the model's length limit; ``logprobs`` k gives the k best tokens and the chosen
    one (0: the chosen one only, -1: the whole vocabulary); ``seed`` None or -1 takes the engine's seed and the request's number.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | SequenceABC[str] | None = None
    stop_token_ids: SequenceABC[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, low, high in _INT_RANGES:
            _check_int(name, getattr(self, name), low, high, optional=name in _OPTIONAL)
        for name, low_f, high_f, open_low in _FLOAT_RANGES:
            _check_float(name, getattr(self, name), low_f, high_f, open_low)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        self._check_collections()

    def _check_collections(self) -> None:
        if self.stop is not None and (not isinstance(self.stop, str | list | tuple) or not all(isinstance(s, str) and s for s in self.stop_strings)):
            raise ValueError(f"stop must be a non-empty string or a list of them, got {self.stop!r}")
        if self.stop_token_ids is not None and not hasattr(self.stop_token_ids, "__iter__"):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must be a mapping of token ids to numbers, got {self.logit_bias!r}")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(f"structured_outputs must be a StructuredOutputsParams, got {self.structured_outputs!r}")
        for token in self.stop_token_ids or ():
            _check_int("stop_token_ids", token, 0, None)
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias (token id)", token, 0, None)
            if not _is_real(bias) or math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias must map token ids to numbers below infinity, got {bias!r} for token {token}")

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @cached_property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @cached_property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @cached_property
    def changes_logits(self) -> bool:
        """Whether anything can change the order of the logits before a token is chosen."""
        return self.has_penalties or bool(self.logit_bias) or self.min_tokens > 0 or self.structured_outputs is not None


_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})
_INT_RANGES: tuple[tuple[str, int | None, int | None], ...] = (
    ("n", 1, None), ("top_k", -1, None), ("seed", None, None), ("max_tokens", 1, None), ("min_tokens", 0, None),
    ("logprobs", -1, None), ("prompt_logprobs", -1, None),
)  # fmt: skip
_FLOAT_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("presence_penalty", -2.0, 2.0, False), ("frequency_penalty", -2.0, 2.0, False), ("repetition_penalty", 0.0, math.inf, True),
    ("temperature", 0.0, math.inf, False), ("top_p", 0.0, 1.0, True), ("min_p", 0.0, 1.0, False),
)  # fmt: skip


def _is_real(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__float__")  # numpy's numbers too


def _check_int(name: str, value: Any, low: int | None, high: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer{' or None' if optional else ''}, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}")


def _check_float(name: str, value: Any, low: float, high: float, open_low: bool) -> None:
    if not _is_real(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}{')' if math.isinf(high) else ']'}, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """One token's log-softmax of the raw logits, its rank (1: the most likely) and its text (None without a tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One sequence's output so far. ``text`` is "" without a tokenizer; ``finish_reason`` is None while it runs.

    ``stop_reason`` is the stop string or stop token id that ended it (None for the end-of-sequence token).
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """All outputs of one request. ``prompt_logprobs[0]`` is None: nothing comes before the first token. ``num_cached_tokens``: of the prompt's tokens, as
    many as its first sequence found in the prefix cache."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One of a request's n sequences: its tokens, and how many of them the model has seen. Compared and hashed by identity.

    ``catch_up`` is the number of tokens that are brought in prompt chunks (the prompt; after a preemption also what was generated before it); tokens
    beyond it are decoding. ``logits_from``, when set, asks for the logits of every pending position from there on; else only the last token's are.
    ``max_len`` is the number of tokens, prompt included, at which the sequence ends.
    """

    request_id: str
    index: int
    params: SamplingParams
    tokens: list[int]
    arrival: int  # first come, first served: the order among all sequences of one client
    client: str = ""  # clients share the engine fairly (runtime.fairness)
    priority: int = 0  # lower goes first, among one client's
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    num_cached: int = 0  # tokens that it found in the prefix cache when it was last admitted
    num_seen: int = 0  # the most tokens ever computed: recomputing after a preemption is not new work
    catch_up: int = field(init=False)
    logits_from: int | None = None
    max_len: int = 0
    status: Status = Status.WAITING
    tier: Tier | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.catch_up = len(self.tokens)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def is_catching_up(self) -> bool:
        """Whether its next tokens are a prompt chunk. A single pending token costs what a decode token costs, so it counts as one."""
        return self.num_computed < self.catch_up and len(self.tokens) - self.num_computed > 1

    @property
    def first_logit(self) -> int:
        """The first pending position whose logits are wanted."""
        last = len(self.tokens) - 1
        return last if self.logits_from is None else max(self.num_computed, min(self.logits_from, last))

    def restart(self) -> None:
        """Forget what was computed: everything known so far is to be brought again, in chunks."""
        self.num_computed = 0
        self.catch_up = len(self.tokens)
