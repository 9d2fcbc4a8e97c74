"""The one frozen configuration object, and how a request's own options change it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Iterable, Mapping

from .errors import ConfigError
from .registry import BUDGETS, OWN, SCOPES, policy_names, rule_name

RECLAIMS = ("pressure", "eager")
REQUEST_OPTIONS = ("tgvkv_retention", "tgvkv_policy", "tgvkv_budget", "tgvkv_trace")


def parse_retention(value: Any, where: str) -> float:
    """Return ``value`` as a retention in (0, 1], or raise ConfigError naming ``where`` it came from."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} must be a number with 0 < retention <= 1, got {value!r}")
    if not math.isfinite(value) or not 0 < value <= 1:
        raise ConfigError(f"{where} must satisfy 0 < retention <= 1, got {value!r}")
    return float(value)


def _one_of(value: Any, allowed: Iterable[str], flag: str) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class TgvConfig:
    """What one server (or one request) asks for.

    Attributes:
        retention: kept share of the vision KV, averaged over layers, 0 < retention <= 1. 1.0 is stock SGLang.
        scope: ``vision`` shares out ``layers * retention * vision tokens``; ``total`` is the paper's rule.
        reclaim: ``pressure`` frees full spans when memory is needed; ``eager`` right after selection.
        policy: how vision tokens are scored. budget: what a layer weighs when the kept tokens are shared out; ``own``
            is the rule that the policy names (:attr:`rule`).
        full_budget: largest share of the pool that may be held as reclaimable full spans, 0..1.
        grounding_cap: at most this many of the last new text tokens ground a selection.
        stash_mib: device memory for their queries, MiB: bounds how many layers are scored at once, and a request's
            grounding tokens (:meth:`within`).
        trace_dir: directory for selection traces, or None.
    """

    retention: float = 0.1
    scope: str = "vision"
    reclaim: str = "pressure"
    policy: str = "tgv"
    budget: str = OWN
    full_budget: float = 1.0
    grounding_cap: int = 4096
    stash_mib: int = 512
    trace_dir: str | None = None

    def __post_init__(self) -> None:
        parse_retention(self.retention, "--tgvkv-retention")
        _one_of(self.scope, SCOPES, "--tgvkv-scope")
        _one_of(self.reclaim, RECLAIMS, "--tgvkv-reclaim")
        _one_of(self.policy, policy_names(), "--tgvkv-policy")
        _one_of(self.budget, BUDGETS, "--tgvkv-budget")
        if isinstance(self.full_budget, bool) or not isinstance(self.full_budget, (int, float)):
            raise ConfigError(f"--tgvkv-full-budget must be a number in [0, 1], got {self.full_budget!r}")
        if not 0 <= self.full_budget <= 1:
            raise ConfigError(f"--tgvkv-full-budget must be in [0, 1], got {self.full_budget!r}")
        for name in ("grounding_cap", "stash_mib"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"--tgvkv-{name.replace('_', '-')} must be an integer >= 1, got {value!r}")

    @property
    def evicts(self) -> bool:
        """False when every request of this configuration takes the stock path."""
        return self.retention < 1.0

    @property
    def exact_retention(self) -> Fraction:
        """The retention as the decimal the user wrote (0.1 is one tenth, not its binary neighbour)."""
        return Fraction(str(self.retention))

    @property
    def rule(self) -> str:
        """Name of the budget rule."""
        return rule_name(self.budget, self.policy)

    @property
    def stash_bytes(self) -> int:
        return self.stash_mib * 2**20

    def within(self, token_bytes: int) -> "TgvConfig":
        """This configuration with as many grounding tokens as the stash holds.

        Args:
            token_bytes: what the queries of one token take in all layers and of all heads.

        Raises:
            ConfigError: not even one token fits.
        """
        fits = self.stash_bytes // token_bytes
        if not fits:
            raise ConfigError(
                f"--tgvkv-stash-mib {self.stash_mib} holds no token of this model ({token_bytes} bytes each): give more"
            )
        return replace(self, grounding_cap=min(self.grounding_cap, fits))

    @property
    def reclaimable_share(self) -> float:
        """Largest share of the pool that reclaimable full spans may hold: eager is a budget of nothing."""
        return 0.0 if self.reclaim == "eager" else self.full_budget


@dataclass(frozen=True)
class RequestOptions:
    """A request's own options, validated. None means the server's."""

    retention: float | None = None
    policy: str | None = None
    budget: str | None = None
    trace: bool = False

    @classmethod
    def from_custom_params(cls, custom_params: Mapping[str, Any] | None) -> "RequestOptions":
        """Read ``tgvkv_*`` keys of a request's ``custom_params``.

        Raises:
            ConfigError: a ``tgvkv_*`` key is unknown, or its value cannot be used.
        """
        if not isinstance(custom_params, Mapping):
            return cls()
        ours = {k: v for k, v in custom_params.items() if isinstance(k, str) and k.startswith("tgvkv_")}
        unknown = sorted(set(ours) - set(REQUEST_OPTIONS))
        if unknown:
            raise ConfigError(f"custom_params has no option {unknown[0]!r}; use one of {', '.join(REQUEST_OPTIONS)}")
        retention = ours.get("tgvkv_retention")
        if retention is not None:
            retention = parse_retention(retention, "custom_params['tgvkv_retention']")
        for name, allowed in (("policy", policy_names()), ("budget", BUDGETS)):
            if ours.get(f"tgvkv_{name}") is not None:
                _one_of(ours[f"tgvkv_{name}"], allowed, f"custom_params['tgvkv_{name}']")
        trace = ours.get("tgvkv_trace", False)
        if not isinstance(trace, bool):
            raise ConfigError(f"custom_params['tgvkv_trace'] must be true or false, got {trace!r}")
        return cls(retention, ours.get("tgvkv_policy"), ours.get("tgvkv_budget"), trace)

    def apply(self, config: TgvConfig) -> TgvConfig:
        own = {name: getattr(self, name) for name in ("retention", "policy", "budget")}
        own = {name: value for name, value in own.items() if value is not None}
        return replace(config, **own) if own else config
