"""Who may share KV with whom: the radix namespace of a request, made from validated values, never from parsed text."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .config import TgvConfig
from .errors import ConfigError

# No client key may begin with it: keys that do are made here, from a salt and a key.
RESERVED = "\x1f"


@dataclass(frozen=True)
class Namespace:
    """Prefixes are shared within one namespace and never across two.

    Attributes:
        client_key: what tells clients apart (their ``extra_key`` and ``cache_salt``), opaque; None without either.
        adapter: LoRA adapter, or None.
        retention, scope, policy, budget: what a view in it was selected with.
    """

    client_key: str | None
    adapter: str | None
    retention: float
    scope: str
    policy: str
    budget: str

    @classmethod
    def of(cls, config: TgvConfig, client_key: str | None = None, adapter: str | None = None) -> "Namespace":
        return cls(client_key or None, adapter, config.retention, config.scope, config.policy, config.rule)

    @property
    def evicts(self) -> bool:
        """Spans are atomic where something may be evicted; retention 1.0 keeps a plain radix tree."""
        return self.retention < 1.0


class SaltedKey(str):
    """A client key that was made of a ``cache_salt`` and an ``extra_key``: ``("a", "bc")`` is not ``("ab", "c")``."""

    def __new__(cls, salt: str, key: str | None) -> "SaltedKey":
        return super().__new__(cls, RESERVED + json.dumps([salt, key or ""]))


def client_key(key: str | None) -> str | None:
    """A request's ``extra_key`` as it goes to the scheduler, plain text.

    Raises:
        ConfigError: it is no text, or could be taken for a salted key.
    """
    if key is not None and not isinstance(key, str):
        raise ConfigError(f"extra_key must be a string, got {key!r}")
    if key is not None and not isinstance(key, SaltedKey) and key.startswith(RESERVED):
        raise ConfigError(f"extra_key must not begin with the control character U+001F, got {key[:40]!r}")
    return None if key is None else str.__str__(key)
