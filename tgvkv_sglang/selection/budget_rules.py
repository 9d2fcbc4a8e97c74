"""What a layer weighs when the kept tokens are shared out (``--tgvkv-budget``); how many that are, a scope says."""

from __future__ import annotations

from fractions import Fraction
from typing import Protocol, Sequence

import torch
from tgvkv_kernels.batch_scores.reference import attention_chunks

from ..device import upload
from .policy import BlockScores, LayerBlock


class BudgetRule(Protocol):
    """Weights of layers; stateless, on the device, without reading from it."""

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        """``[l, S]`` float32 >= 0: what the block's layers weigh for each of S requests; the same on every rank."""

    def settle(self, weights: torch.Tensor, retentions: Sequence[Fraction]) -> torch.Tensor:
        """The weights of all L layers, ``[L, S]``, once all are known. retentions: of the S requests."""


class _AsWeighed:
    """A layer's weight does not depend on the others'."""

    def settle(self, weights: torch.Tensor, retentions: Sequence[Fraction]) -> torch.Tensor:
        return weights


class Tvb(_AsWeighed):
    """The paper's text-vision budgeting: a layer weighs its policy's mass (of `tgv`: from text to vision)."""

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        return scores.mass


class Uniform(_AsWeighed):
    """Layers weigh alike."""

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        return torch.ones_like(scores.mass)


class Pyramid(_AsWeighed):
    """PyramidKV (arXiv 2406.02069): linear in depth, from ``2 - 1/20`` of a uniform share down to ``1/20`` of it."""

    STEEPNESS = 20

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        last = block.model.layers - 1
        low = 1 / self.STEEPNESS
        depth = torch.arange(block.first, block.first + block.layers, device=scores.mass.device) / max(last, 1)
        weights = (2 - low) * (1 - depth) + low * depth
        return weights.float()[:, None].expand_as(scores.mass)


class VlCache:
    """VL-Cache (arXiv 2410.23317): a layer weighs what share of its attention weights is not negligible.

    ``TF(A)_qj = A_qj`` if ``A_qj >= p max_j' A_qj'`` else 0, with p = 0.01; density ``d_l`` = the share of the pairs
    (query q, visible key j) where TF is not 0, mean over heads; a layer's share of an even budget of retention alpha is
    ``beta_l = clip(d_l / sum d * alpha * L, 0.01, 1)``, and the shares are made to sum up again. Queries and keys are
    those that a policy sees: its queries, and of the prompt their own tokens and the vision tokens.
    """

    THRESHOLD = 0.01
    LOWEST = 0.01

    def weigh(self, block: LayerBlock, scores: BlockScores) -> torch.Tensor:
        requests = range(len(block.requests))
        density = [torch.stack([self._density(block, layer, i) for i in requests]) for layer in range(block.layers)]
        return block.model.reduce(torch.stack(density))

    def settle(self, weights: torch.Tensor, retentions: Sequence[Fraction]) -> torch.Tensor:
        even = torch.tensor([float(r) * len(weights) for r in retentions], dtype=weights.dtype)
        even = upload(even, weights.device)
        return (weights / weights.sum(0) * even).clamp(self.LOWEST, 1.0)

    def _density(self, block: LayerBlock, layer: int, request: int) -> torch.Tensor:
        """Of this rank's heads, over all heads of the model."""
        given = block.inputs(layer, request)
        text_units, text_at = given.text_units, given.text_positions
        fresh = torch.isin(given.request.text, given.request.vision, invert=True)
        if not fresh.all():
            index = upload(fresh.nonzero()[:, 0], text_at.device)
            text_units, text_at = text_units[index], text_at[index]
        keys = given.store.k_flat[torch.cat([given.vision_units, text_units])]
        at = torch.cat([given.vision_positions, text_at])
        visible = at[None, :] <= given.text_positions[:, None]
        text = block.text_parts[request]
        rows = block.q[layer, text], block.lse_b2[layer, text]
        kept = sum(
            (attention >= self.THRESHOLD * attention.amax(-1, keepdim=True)).logical_and(visible[chunk]).sum()
            for chunk, attention in attention_chunks(*rows, keys, visible, block.scale)
        )
        return kept.float() / (visible.sum() * block.model.heads)
