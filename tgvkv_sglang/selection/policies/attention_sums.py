"""Attention that vision tokens receive, summed over queries: what most of the field's policies start from."""

from __future__ import annotations

from typing import Sequence

import torch
from tgvkv_kernels.batch_scores.api import batch_vision_scores

from ...types import Span
from ..policy import BlockScores, Independent, LayerBlock
from ..tgv import text_after_vision


def attention_sums(block: LayerBlock) -> BlockScores:
    """``score_v = sum_t A[t, v]``, A the mean over query heads; a layer's mass is the sum of its scores."""
    store, model = block.store, block.model
    ones = torch.ones_like(block.lse_b2[..., 0])
    layers = block.first, store.slots, block.scale
    scores, mass = batch_vision_scores(
        block.plan, block.q, block.lse_b2, ones, store.k_flat, block.vision_slots, *layers, total_q_heads=model.heads
    )
    return BlockScores(*model.sums(scores, mass), [{} for _ in block.requests])


class AttentionSums(Independent):
    """A policy that asks with the new text and goes by sums of attention; others refine it."""

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, cap)

    def score(self, block: LayerBlock) -> BlockScores:
        return attention_sums(block)
