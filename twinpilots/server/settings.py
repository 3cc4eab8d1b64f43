"""What a server may take on: the limits of requests, queue and time, validated once.

Owns `ServerSettings`. Knows nothing of HTTP or engines.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """``model_names``: the names a request may give, the first is what replies carry. ``api_keys``: any of them opens; none: no key is needed.
    ``max_waiting``: sequences accepted beyond those that run at once; more get 429. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body_bytes: int = 8 << 20
    max_choices: int = 128  # prompts x n of one request
    max_logprobs: int = 20
    body_timeout_s: float = 30.0
    request_timeout_s: float = 3600.0
    drain_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError("model_names must name the model at least once")
        if not all(self.api_keys):
            raise ValueError("an API key must not be empty; leave it out to serve without a key")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be at least 0 and at most 65535, got {self.port}")
        for field in fields(self):
            least = 0 if field.name in ("port", "max_logprobs", "drain_timeout_s") else 1
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
