"""From scores and budgets to the kept positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from tgvkv_kernels.select.api import select

from ..errors import ScoreError
from .budget import total_budget, vision_budget, vision_total


def layer_budgets(
    masses: Sequence[float], *, vision_tokens: int, tokens: int, retention, scope: str
) -> list[int]:
    """Kept vision tokens per layer for either scope (see :mod:`tgvkv_sglang.scoring.budget`)."""
    if scope == "total":
        return total_budget(masses, vision_tokens, tokens, retention)
    return vision_budget(masses, vision_tokens, retention)


@dataclass
class Kept:
    """Kept columns of ``[L, V]`` scores: ``columns [N]`` int32 ascending within a layer, ``layer_ptr [L+1]`` int32."""

    columns: torch.Tensor
    layer_ptr: torch.Tensor

    def mask(self, vision_tokens: int) -> torch.Tensor:
        """``[L, V]`` bool."""
        layers = self.layer_ptr.shape[0] - 1
        device = self.columns.device
        layer = torch.repeat_interleave(
            torch.arange(layers, device=device), self.layer_ptr.diff().long(), output_size=self.columns.shape[0]
        )
        kept = torch.zeros(layers, vision_tokens, dtype=torch.bool, device=device)
        kept[layer, self.columns.long()] = True
        return kept


def check_finite(scores: torch.Tensor) -> None:
    """Raise ValueError for a NaN or an infinity: a wrong kernel must not look like a choice. Synchronises on CUDA."""
    if not bool(torch.isfinite(scores).all()):
        raise ScoreError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} selection scores are not finite; nothing is "
            "evicted on them: send the request with tgvkv_retention 1.0, and report the model and its dtype"
        )


def keep_top(scores: torch.Tensor, budget: Sequence[int]) -> torch.Tensor:
    """Keep the ``budget[l]`` highest scores of each layer; ties go to the lower position.

    Args:
        scores: ``[L, V]``, higher = keep, finite.
        budget: L integers in 0..V.

    Returns:
        ``[L, V]`` bool.

    Raises:
        ScoreError: scores hold a NaN or an infinity.
    """
    check_finite(scores)
    return Kept(*select(scores.float(), budget=budget)).mask(scores.shape[1])


def keep_top_on_device(scores: torch.Tensor, layer_mass: torch.Tensor, retention) -> Kept:
    """``scope=vision`` without a word from the device: budgets and choice are made there, their total is known here.

    Budgets come from float64 shares snapped to 2**-30, so they equal :func:`layer_budgets` unless two remainders are
    closer than that.

    Args:
        scores: ``[L, V]`` float32. layer_mass: ``[L]``. retention: exact, in (0, 1].
    """
    total = vision_total(scores.shape[0], scores.shape[1], retention)
    return Kept(*select(scores, layer_mass, total))
