"""SnapKV (arXiv 2404.14469): attention of an observation window, pooled over neighbours."""

from __future__ import annotations

from typing import Sequence

import torch

from ...types import Span
from ..policy import BlockScores, LayerBlock, parts_of
from ..tgv import text_after_vision
from .attention_sums import AttentionSums, attention_sums

WINDOW = 64
KERNEL = 5


class SnapKv(AttentionSums):
    """``score_v`` = mean over five neighbours of ``sum_t A[t, .]``, t the last 64 tokens of the new text.

    Neighbours are of the same image, and where it ends they count as 0. The original takes the last 64 tokens whatever
    they are and keeps them all; here they are text, which is always kept.
    """

    budget = "uniform"

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, min(cap, WINDOW))

    def score(self, block: LayerBlock) -> BlockScores:
        sums = attention_sums(block)
        lengths = [len(span) for request in block.requests for span in request.spans]
        pooled = [
            torch.nn.functional.avg_pool1d(sums.scores[None, :, part], KERNEL, 1, KERNEL // 2)[0]
            for part in parts_of(lengths)
        ]
        return BlockScores(torch.cat(pooled, 1), sums.mass, sums.extras)
