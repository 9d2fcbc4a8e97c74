"""The one place that chooses: from a grounding's scores and a budget rule to the kept tokens of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Sequence

import torch
from tgvkv_kernels.select.api import select

from ..errors import SelectionError
from .budget import BudgetRule
from .grounding import Kept, Scores


@dataclass(frozen=True)
class Choice:
    """What one grounding keeps.

    Attributes:
        kept: ``[L, V]`` bool. budget: kept tokens of each layer.
    """

    kept: torch.Tensor
    budget: list[int]


def choose(scores: Scores, rule: BudgetRule, retention: Fraction, tokens: int) -> Choice:
    """Budgets on the host, then the top scores of each layer.

    Args:
        tokens: the prompt's tokens that the budget is a share of (``scope=total``).

    Raises:
        SelectionError: a score is not finite, or a mass is negative or not finite.
    """
    masses = usable_masses(scores)
    budget = rule.per_layer(masses, scores.scores.shape[1], tokens, retention)
    return Choice(keep_top(scores.scores, budget), budget)


def choose_on_device(scores: Scores, rule: BudgetRule, retention: Fraction) -> Kept:
    """The same without a word from the device, for a rule whose total is known beforehand.

    Budgets come from float64 shares snapped to 2**-30, so they equal the host's unless two remainders are closer than
    that. What is not finite cannot be refused here: such scores count as lowest and such masses as 0, so that a choice
    of the right size comes out for the one step that is under way.
    """
    total = rule.total(*scores.scores.shape, retention)
    return Kept(*select(scores.scores, scores.layer_mass.nan_to_num(0.0, 0.0, 0.0), total))


def confirm(early: Kept, scores: Scores) -> Choice:
    """The choice that decode went through already, once its scores are known to be numbers.

    Raises:
        SelectionError: they are not.
    """
    usable_masses(scores)
    kept = early.mask(scores.scores.shape[1])
    return Choice(kept, kept.sum(1).tolist())


def usable_masses(scores: Scores) -> list[float]:
    """The layers' masses on the host, once all scores and masses are known to be numbers that a choice can rest on.

    Reads the device once: masses and the check of the scores come in one copy.

    Raises:
        SelectionError: a score is not finite, or a mass is negative or not finite; names the layers.
    """
    finite = torch.isfinite(scores.scores).all(1)
    masses = torch.where(finite, scores.layer_mass.double(), math.nan).tolist()
    bad = [layer for layer, mass in enumerate(masses) if not (math.isfinite(mass) and mass >= 0)]
    if bad:
        raise SelectionError(f"scores of layers {bad} are not finite numbers (of {len(masses)} layers)")
    return masses


def keep_top(scores: torch.Tensor, budget: Sequence[int]) -> torch.Tensor:
    """Keep the ``budget[l]`` highest scores of each layer; ties go to the lower position.

    Args:
        scores: ``[L, V]``, higher = keep, finite. budget: L integers in 0..V.

    Returns:
        ``[L, V]`` bool.
    """
    return Kept(*select(scores.float(), budget=budget)).mask(scores.shape[1])
