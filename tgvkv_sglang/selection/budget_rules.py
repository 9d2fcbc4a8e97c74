"""What a layer weighs when the kept tokens are shared out (``--tgvkv-budget``); how many that are, a scope says."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol, Sequence

import torch

from .policy import BlockScores, LayerBlock


class BudgetRule(Protocol):
    """Weights of layers; stateless, on the device, without reading from it."""

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        """``[l, S]`` float32 >= 0: what the block's layers weigh for each of S requests; the same on every rank."""

    def settle(self, weights: torch.Tensor, retentions: Sequence[Fraction]) -> torch.Tensor:
        """The weights of all L layers, ``[L, S]``, once all are known. retentions: of the S requests."""


class Tvb:
    """The paper's text-vision budgeting: a layer weighs its policy's mass (of `tgv`: from text to vision)."""

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        return scores.mass

    def settle(self, weights: torch.Tensor, retentions: Sequence[Fraction]) -> torch.Tensor:
        return weights
