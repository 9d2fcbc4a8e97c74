"""Policies, budget rules and scopes by name: those that come with the package, and those of other packages.

Another package registers a policy under its name in the entry-point group ``tgvkv.policies``; the object it names is
called without arguments and returns a :class:`tgvkv_sglang.selection.policy.Policy`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import ConfigError

GROUP = "tgvkv.policies"
_POLICY_FILES = "tgvkv_sglang.selection.policies"
POLICIES = {
    "tgv": "tgvkv_sglang.selection.tgv:Tgv",
    "peak": f"{_POLICY_FILES}.peak:Peak",
    "peak4": f"{_POLICY_FILES}.peak4:Peak4",
    "peak-last": f"{_POLICY_FILES}.peak_last:PeakLast",
    "uniform-attention": f"{_POLICY_FILES}.uniform_attention:UniformAttention",
    "last-query": f"{_POLICY_FILES}.last_query:LastQuery",
    "vl-cache": f"{_POLICY_FILES}.vl_cache:VlCache",
    "snapkv": f"{_POLICY_FILES}.snapkv:SnapKv",
    "pyramidkv": f"{_POLICY_FILES}.pyramidkv:PyramidKv",
    "h2o": f"{_POLICY_FILES}.h2o:H2o",
    "streamingllm": f"{_POLICY_FILES}.streaming_llm:StreamingLlm",
    "lightkv": f"{_POLICY_FILES}.lightkv:LightKv",
    "random": f"{_POLICY_FILES}.random:Random",
}
_RULE_FILE = "tgvkv_sglang.selection.budget_rules"
BUDGET_RULES = {
    "tvb": f"{_RULE_FILE}:Tvb",
    "uniform": f"{_RULE_FILE}:Uniform",
    "pyramid": f"{_RULE_FILE}:Pyramid",
    "vl-cache": f"{_RULE_FILE}:VlCache",
}
OWN = "own"
"""In the place of a budget rule's name: the one that the policy names."""
BUDGETS = (OWN, *BUDGET_RULES)
SCOPES = {
    "vision": "tgvkv_sglang.selection.budget:VisionScope",
    "total": "tgvkv_sglang.selection.budget:TotalScope",
}


@lru_cache(maxsize=1)
def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def policy_names() -> tuple[str, ...]:
    """What ``--tgvkv-policy`` takes in this environment, our own first. A name of ours cannot be taken over."""
    return (*POLICIES, *sorted(_others().keys() - POLICIES.keys()))


@lru_cache(maxsize=None)
def load_policy(name: str) -> Any:
    """The policy of that name, made once a process.

    Raises:
        ConfigError: there is none, or the package that offers it cannot give it.
    """
    if name in POLICIES:
        return _load(POLICIES[name])()
    point = _others().get(name)
    if point is None:
        raise ConfigError(f"--tgvkv-policy must be one of {', '.join(policy_names())}, got {name!r}")
    try:
        policy = point.load()()
    except Exception as error:
        raise ConfigError(f"--tgvkv-policy {name}: {point.value} cannot be loaded ({error!r}); mend it or leave it out"
                          ) from error  # fmt: skip
    methods = ("query_positions", "score", "settle")
    missing = [method for method in methods if not callable(getattr(policy, method, None))]
    if missing:
        raise ConfigError(f"--tgvkv-policy {name}: {point.value} has no method {missing[0]}; see docs/policies.md")
    if getattr(policy, "budget", None) not in BUDGET_RULES:
        rules = ", ".join(BUDGET_RULES)
        raise ConfigError(f"--tgvkv-policy {name}: the attribute budget of {point.value} must be one of {rules}")
    return policy


def refresh() -> None:
    """Look for other packages' policies anew: what the import path holds has changed."""
    _others.cache_clear()
    load_policy.cache_clear()


def rule_name(budget: str, policy: str) -> str:
    """The budget rule that ``--tgvkv-budget`` means with a policy."""
    return load_policy(policy).budget if budget == OWN else budget


@lru_cache(maxsize=None)
def load_budget_rule(name: str) -> Any:
    """The :class:`~tgvkv_sglang.selection.budget_rules.BudgetRule` of ``--tgvkv-budget``, made once a process."""
    return _load(BUDGET_RULES[name])()


@lru_cache(maxsize=None)
def load_scope(name: str) -> Any:
    """The :class:`~tgvkv_sglang.selection.budget.Scope` of ``--tgvkv-scope``, made once a process."""
    return _load(SCOPES[name])()


def _load(where: str) -> Any:
    module, name = where.split(":")
    return getattr(import_module(module), name)
