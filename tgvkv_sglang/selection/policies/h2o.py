"""H2O (arXiv 2306.14048), its prefill: tokens that received most attention."""

from __future__ import annotations

import math
from typing import Sequence

import torch
from tgvkv_kernels.batch_scores.reference import attention_chunks

from ...types import Span
from ..policy import LayerByLayer, LayerInputs, LayerScores


class H2o(LayerByLayer):
    """``score_v = sum_t A[t, v]`` over **all** new tokens from the first vision token on, vision tokens too (and v
    itself); a layer's mass is the sum of its scores.

    Those are a whole prompt's queries: of a longer one than the stash holds, the last tokens ask. A later turn has new
    tokens alone. Its recent window lies in the text, which is always kept.
    """

    budget = "uniform"

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return torch.arange(max(start, spans[0].start), end)[-cap:] if spans else torch.empty(0, dtype=torch.int64)

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        keys = layer.store.k_flat[layer.vision_units]
        visible = layer.vision_positions[None, :] <= layer.text_positions[:, None]
        chunks = attention_chunks(layer.q, layer.lse_e / math.log(2), keys, visible, layer.scale)
        scores = layer.model.reduce(sum(attention.sum((0, 1)) for _, attention in chunks) / layer.model.heads)
        return LayerScores(scores, scores.sum())
