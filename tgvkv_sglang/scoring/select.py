"""From scores and budgets to the kept positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from tgvkv_kernels.select.api import select

from ..errors import SelectionError
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


def usable_masses(scores: torch.Tensor, layer_mass: torch.Tensor) -> list[float]:
    """The layers' masses on the host, once all scores and masses are known to be numbers that a choice can rest on.

    Reads the device once: masses and the check of the scores come in one copy.

    Args:
        scores: ``[L, V]`` float. layer_mass: ``[L]`` float.

    Raises:
        SelectionError: a score is not finite, or a mass is negative or not finite; names the layers.
    """
    finite = torch.isfinite(scores).all(1)
    masses = torch.where(finite, layer_mass.double(), math.nan).tolist()
    bad = [layer for layer, mass in enumerate(masses) if not (math.isfinite(mass) and mass >= 0)]
    if bad:
        raise SelectionError(f"scores of layers {bad} are not finite numbers (of {len(masses)} layers)")
    return masses


def keep_top(scores: torch.Tensor, budget: Sequence[int]) -> torch.Tensor:
    """Keep the ``budget[l]`` highest scores of each layer; ties go to the lower position.

    Args:
        scores: ``[L, V]``, higher = keep, finite (:func:`usable_masses` has checked them).
        budget: L integers in 0..V.

    Returns:
        ``[L, V]`` bool.
    """
    return Kept(*select(scores.float(), budget=budget)).mask(scores.shape[1])


def keep_top_on_device(scores: torch.Tensor, layer_mass: torch.Tensor, retention) -> Kept:
    """``scope=vision`` without a word from the device: budgets and choice are made there, their total is known here.

    Budgets come from float64 shares snapped to 2**-30, so they equal :func:`layer_budgets` unless two remainders are
    closer than that. What is not finite cannot be refused here: such scores count as lowest and such masses as 0, so
    that a choice of the right size comes out for the one step that is under way (see :func:`usable_masses`).

    Args:
        scores: ``[L, V]`` float32. layer_mass: ``[L]``. retention: exact, in (0, 1].
    """
    total = vision_total(scores.shape[0], scores.shape[1], retention)
    return Kept(*select(scores, layer_mass.nan_to_num(0.0, 0.0, 0.0), total))
