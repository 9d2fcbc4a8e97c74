"""What is compared: policies, budget rules, retentions and ways to reclaim, and which of them a plan measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Iterator

from tgvkv_sglang.registry import POLICIES

FULL, FLOOR, EVIDENCE = "full", "floor", "evidence"
RETENTIONS = ("0.5", "0.2", "0.1", "0.05", "0.02", "0.01")
SWEPT = ("tgv", "peak", "peak-last", "last-query", "random")
RULES = ("uniform", "pyramid", "vl-cache")
AT = "0.05"


@dataclass(frozen=True, order=True)
class Cell:
    """One way to answer.

    Attributes:
        policy: a policy's name, ``full`` (all of the KV) or ``floor`` (decode sees none of the picture).
        retention: as text, so that keys and tables agree. budget: ``own`` or a rule. reclaim: of the server.
    """

    policy: str
    retention: str = AT
    budget: str = "own"
    reclaim: str = "pressure"

    @property
    def title(self) -> str:
        if self.policy in (FULL, FLOOR):
            return self.policy
        rule = "" if self.budget == "own" else f" + {self.budget}"
        return self.policy + rule

    def options(self) -> dict[str, Any]:
        """The request's ``custom_params``."""
        if self.policy == FULL:
            return {"tgvkv_retention": 1.0}
        if self.policy == FLOOR:  # rounds to no unit at all
            return {"tgvkv_retention": 1e-9}
        return {"tgvkv_retention": float(self.retention), "tgvkv_policy": self.policy, "tgvkv_budget": self.budget}

    def settings(self) -> dict[str, str]:
        return asdict(self)


ALL, NONE = Cell(FULL, "1"), Cell(FLOOR, "0")


def cell(policy: str, *way: str) -> Cell:
    """A cell of the command line; the bounds are each one cell, whatever the rest says."""
    return {FULL: ALL, FLOOR: NONE}.get(policy) or Cell(policy, *way)


def default_plan() -> Iterator[Cell]:
    """All policies at 5 %, some at every retention, budget rules for two, both ways to reclaim."""
    yield from (ALL, NONE, Cell(EVIDENCE))
    yield from (Cell(policy) for policy in POLICIES)
    for policy in SWEPT:
        yield from (Cell(policy, retention) for retention in RETENTIONS)
    for policy in ("tgv", "peak-last"):
        yield from (Cell(policy, budget=rule) for rule in RULES)
    yield from (Cell(policy, reclaim="eager") for policy in (*SWEPT, EVIDENCE))


def full_plan() -> Iterator[Cell]:
    """Everything: every policy with every rule at every retention, both ways to reclaim (many hours)."""
    yield from (ALL, NONE)
    for reclaim in ("pressure", "eager"):
        for retention in RETENTIONS:
            yield Cell(EVIDENCE, retention, reclaim=reclaim)
            for policy in POLICIES:
                yield from (Cell(policy, retention, rule, reclaim) for rule in ("own", "tvb", *RULES))


def unique(cells: Iterator[Cell]) -> list[Cell]:
    return list(dict.fromkeys(cells))
