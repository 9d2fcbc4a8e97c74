"""TGV-KV (arXiv 2606.03075): vision tokens ranked by text-weighted attention (TWR), layers weighed by mass (TVB)."""

from __future__ import annotations

from typing import Sequence

import torch
from tgvkv_kernels.text_weights.api import text_weights
from tgvkv_kernels.vision_scores.api import vision_scores

from ..types import Span
from .policy import LayerInputs, LayerScores


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


class Tgv:
    """The paper's policy: ``score_v = sum_t w_t A[t, v]``, ``mass = sum_{t,v} A[t, v]``, A the mean over query heads.

    ``w_t`` is the attention that text token t gets from the text at and after it, per query that sees it. No attention
    matrix over the prompt is kept: A is recomputed for the text rows from q, K and their log-sum-exp.
    """

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, cap)

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        store, heads, reduce = layer.store, layer.model.heads, layer.model.reduce
        keys = store.k_flat[layer.text_units]
        weights = reduce(text_weights(layer.q, keys, layer.lse_e, layer.scale, total_q_heads=heads))
        scores, mass = vision_scores(
            layer.q,
            layer.lse_e,
            weights,
            store.k_flat,
            layer.vision_units,
            layer.text_positions,
            layer.vision_positions,
            layer.scale,
            total_q_heads=heads,
        )
        summed = reduce(torch.cat([scores, mass[None]]))
        return LayerScores(summed[:-1], summed[-1], {"text_weights": weights})
