"""TGV-KV (arXiv 2606.03075): vision tokens ranked by text-weighted attention (TWR), layers weighed by mass (TVB)."""

from __future__ import annotations

from typing import Sequence

import torch
from tgvkv_kernels.batch_scores.api import batch_text_weights, batch_vision_scores

from ..types import Span
from .policy import BlockScores, Independent, LayerBlock


def text_after_vision(spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
    """The last ``cap`` new text tokens after the first vision token, int64 ``[T]``; without vision none.

    Tokens that the cap drops neither weigh nor score.
    """
    if not spans:
        return torch.empty(0, dtype=torch.int64)
    text = torch.ones(end, dtype=torch.bool)
    text[: max(start, spans[0].start)] = False
    for span in spans:
        text[span.start : min(span.end, end)] = False
    return text.nonzero()[:, 0][-cap:]


class Tgv(Independent):
    """The paper's policy: ``score_v = sum_t w_t A[t, v]``, ``mass = sum_{t,v} A[t, v]``, A the mean over query heads.

    ``w_t`` is the attention that text token t gets from the text at and after it, per query that sees it. No attention
    matrix over the prompt is kept: A is recomputed for the text rows from q, K and their log-sum-exp.
    """

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, cap)

    def score(self, block: LayerBlock) -> BlockScores:
        store, model = block.store, block.model
        layers = block.first, store.slots, block.scale
        stash = block.plan, block.q, block.lse_b2
        options = {"total_q_heads": model.heads, "k_scales": store.k_scales}
        weights = batch_text_weights(*stash, store.k_flat, block.text_slots, *layers, **options)
        (weights,) = model.sums(weights)
        scores, mass = batch_vision_scores(*stash, weights, store.k_flat, block.vision_slots, *layers, **options)
        scores, mass = model.sums(scores, mass)
        return BlockScores(scores, mass, [{"text_weights": weights[:, part]} for part in block.text_parts])
