"""How many prompt tokens a pass may bring while others wait for their next token.

Owns `Pacer`: it learns from the passes themselves what a decoding pass takes and what each prompt token adds, and keeps a mixed pass within a multiple of the
former. Where weights stream, prompt tokens cost next to nothing and the budget is large; where compute is the limit, a long prompt comes in small
pieces. Pure: no clock. Knows nothing of schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_RATIO = 2.5  # a mixed pass by a decoding one: under three, because a prompt's later tokens cost more than its earlier ones
NEWEST = 0.25  # weight of the newest pass in the means
LEAST_TOKENS = 16  # a prompt always gets on
FIRST_TOKENS = 64  # before anything is known


@dataclass(slots=True)
class Pacer:
    """``decode_s``: a pass of decoding sequences alone. ``token_s``: what a prompt token adds to it."""

    decode_s: float | None = None
    token_s: float | None = None

    def observe(self, seconds: float, num_prompt_tokens: int, num_decoding: int) -> None:
        """Take in one pass."""
        if not num_prompt_tokens:
            self.decode_s = seconds if self.decode_s is None else self.decode_s + NEWEST * (seconds - self.decode_s)
        elif num_decoding and self.decode_s is not None:
            self._add_token_s(max(0.0, seconds - self.decode_s) / num_prompt_tokens)
        elif not num_decoding:
            self._add_token_s(seconds / num_prompt_tokens)

    def _add_token_s(self, token_s: float) -> None:
        self.token_s = token_s if self.token_s is None else self.token_s + NEWEST * (token_s - self.token_s)

    def budget(self, num_prompts: int, num_decoding: int) -> int:
        """Prompt tokens of the next pass, if anybody decodes in it: more when more wait for their first token than for their next one."""
        return round(self.prompt_tokens * max(1.0, num_prompts / max(1, num_decoding)))

    @property
    def prompt_tokens(self) -> int:
        """The budget while few prompts wait."""
        if self.decode_s is None or self.token_s is None:
            return FIRST_TOKENS
        if self.token_s <= 0:
            return 1 << 20
        return max(LEAST_TOKENS, round((MOST_RATIO - 1.0) * self.decode_s / self.token_s))
