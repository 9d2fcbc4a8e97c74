"""Ours: a vision token is worth what the one head and word that want it most make of it."""

from __future__ import annotations

from typing import Sequence

import torch
from tgvkv_kernels.batch_scores.api import batch_peak_scores

from ...types import Span
from ..policy import BlockScores, Independent, LayerBlock
from ..tgv import text_after_vision


class Peak(Independent):
    """``score_v = max over heads h and new text t of A_h[t, v]``; a layer's mass is ``sum_{t,v} A[t, v]``.

    A sum ranks background that all heads look at a little above what one head looks at, and one sharp head is what
    reads. A maximum is also exact: the same to the bit in any order, over any chunks and ranks.
    """

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, cap)

    def score(self, block: LayerBlock) -> BlockScores:
        scores, mass = peaks(block, block.lse_b2)
        (mass,) = block.model.sums(mass)
        return BlockScores(block.model.reduce_max(scores), mass, [{} for _ in block.requests])


def peaks(block: LayerBlock, lse_b2: torch.Tensor, power: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's scores ``[l, V]`` and masses ``[l, S]``, with another log-sum-exp than the block's perhaps."""
    store, layers = block.store, (block.first, block.store.slots, block.scale)
    return batch_peak_scores(
        block.plan, block.q, lse_b2, store.k_flat, block.vision_slots, *layers,
        power=power, total_q_heads=block.model.heads,
    )  # fmt: skip
