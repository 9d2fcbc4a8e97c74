"""The one frozen configuration object, and how a request's own options change it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Mapping

from .errors import ConfigError
from .registry import SCOPES, load_budget_rule, policy_names

RECLAIMS = ("pressure", "eager")
REQUEST_OPTIONS = ("tgvkv_retention", "tgvkv_trace")


def parse_retention(value: Any, where: str) -> float:
    """Return ``value`` as a retention in (0, 1], or raise ConfigError naming ``where`` it came from."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{where} must be a number with 0 < retention <= 1, got {value!r}")
    if not math.isfinite(value) or not 0 < value <= 1:
        raise ConfigError(f"{where} must satisfy 0 < retention <= 1, got {value!r}")
    return float(value)


def _one_of(value: Any, allowed: tuple[str, ...], flag: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class TgvConfig:
    """What one server (or one request) asks for.

    Attributes:
        retention: kept share of the vision KV, averaged over layers, 0 < retention <= 1. 1.0 is stock SGLang.
        scope: ``vision`` shares out ``layers * retention * vision tokens``; ``total`` is the paper's rule.
        reclaim: ``pressure`` frees full spans when memory is needed; ``eager`` right after selection.
        policy: scoring policy, only ``tgv``.
        full_budget: largest share of the pool that may be held as reclaimable full spans, 0..1.
        grounding_cap: at most this many of the last new text tokens ground a selection (bounds stashed queries).
        trace_dir: directory for selection traces, or None.
        zero_bubble: select on the device inside the forward, so that decode need not wait for the scheduler.
    """

    retention: float = 0.1
    scope: str = "vision"
    reclaim: str = "pressure"
    policy: str = "tgv"
    full_budget: float = 1.0
    grounding_cap: int = 4096
    trace_dir: str | None = None
    zero_bubble: bool = False

    def __post_init__(self) -> None:
        parse_retention(self.retention, "--tgvkv-retention")
        _one_of(self.scope, SCOPES, "--tgvkv-scope")
        _one_of(self.reclaim, RECLAIMS, "--tgvkv-reclaim")
        _one_of(self.policy, policy_names(), "--tgvkv-policy")
        if isinstance(self.full_budget, bool) or not isinstance(self.full_budget, (int, float)):
            raise ConfigError(f"--tgvkv-full-budget must be a number in [0, 1], got {self.full_budget!r}")
        if not 0 <= self.full_budget <= 1:
            raise ConfigError(f"--tgvkv-full-budget must be in [0, 1], got {self.full_budget!r}")
        if isinstance(self.grounding_cap, bool) or not isinstance(self.grounding_cap, int) or self.grounding_cap < 1:
            raise ConfigError(f"--tgvkv-grounding-cap must be an integer >= 1, got {self.grounding_cap!r}")

        if not isinstance(self.zero_bubble, bool):
            raise ConfigError(f"--tgvkv-zero-bubble must be true or false, got {self.zero_bubble!r}")
        if self.zero_bubble and load_budget_rule(self.scope).total(1, 1, self.exact_retention) is None:
            raise ConfigError(
                f"--tgvkv-zero-bubble cannot be used with --tgvkv-scope {self.scope}: how much that scope keeps is not "
                "known before the scores are; leave one of the two flags out"
            )

    @property
    def evicts(self) -> bool:
        """False when every request of this configuration takes the stock path."""
        return self.retention < 1.0

    @property
    def exact_retention(self) -> Fraction:
        """The retention as the decimal the user wrote (0.1 is one tenth, not its binary neighbour)."""
        return Fraction(str(self.retention))

    @property
    def reclaimable_share(self) -> float:
        """Largest share of the pool that reclaimable full spans may hold: eager is a budget of nothing."""
        return 0.0 if self.reclaim == "eager" else self.full_budget


@dataclass(frozen=True)
class RequestOptions:
    """A request's own options, validated. ``retention`` None means the server's."""

    retention: float | None = None
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
        trace = ours.get("tgvkv_trace", False)
        if not isinstance(trace, bool):
            raise ConfigError(f"custom_params['tgvkv_trace'] must be true or false, got {trace!r}")
        return cls(retention=retention, trace=trace)

    def apply(self, config: TgvConfig) -> TgvConfig:
        return config if self.retention is None else replace(config, retention=self.retention)
