"""Whose request it is: among whom the engine shares its time fairly.

Owns the rule. Knows nothing of queues. vLLM, SGLang and TGI serve first come, first served, or by a priority that the client sets, and tell no clients
apart; the fair schedulers built on them (S-LoRA's virtual token counter) share by adapter or by key. Ours: keys where there are several, since a client
cannot choose its key; else what a request says of its user, as those who share one key or need none trust each other; else the machine it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sender:
    """Where a request came from: the number of the key among the server's (None: none was needed), and the address."""

    key: int | None
    address: str

    def client(self, num_keys: int, user: str | None) -> str:
        """A name for the client. ``user``: the body's field."""
        if num_keys > 1 and self.key is not None:
            return f"key {self.key}"
        return f"user {user}" if user else f"address {self.address}"
