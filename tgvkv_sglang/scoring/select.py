"""From scores and budgets to the kept positions."""

from __future__ import annotations

from typing import Sequence

import torch

from .budget import total_budget, vision_budget


def layer_budgets(
    masses: Sequence[float], *, vision_tokens: int, tokens: int, retention, scope: str
) -> list[int]:
    """Kept vision tokens per layer for either scope (see :mod:`tgvkv_sglang.scoring.budget`)."""
    if scope == "total":
        return total_budget(masses, vision_tokens, tokens, retention)
    return vision_budget(masses, vision_tokens, retention)


def keep_top(scores: torch.Tensor, budget: Sequence[int]) -> torch.Tensor:
    """Keep the ``budget[l]`` highest scores of each layer; ties go to the lower position.

    Args:
        scores: ``[L, V]``, higher = keep, finite.
        budget: L integers in 0..V.

    Returns:
        ``[L, V]`` bool.

    Raises:
        ValueError: scores hold a NaN or an infinity (a wrong kernel must not look like a choice).
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("selection scores are not finite; refusing to evict on them")
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return rank < torch.as_tensor(budget, device=scores.device)[:, None]
