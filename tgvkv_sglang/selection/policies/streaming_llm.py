"""StreamingLLM (arXiv 2309.17453): the first tokens and the latest ones."""

from __future__ import annotations

import torch

from ...device import upload
from ..policy import BlockScores, LayerBlock
from .attention_sums import AttentionSums, attention_sums

SINKS = 4
FIRST = 2.0**25  # above any position


class StreamingLlm(AttentionSums):
    """``score_v`` = position, and the prompt's first four tokens (mostly text, which is always kept) above all."""

    budget = "uniform"

    def score(self, block: LayerBlock) -> BlockScores:
        sums = attention_sums(block)
        positions = torch.cat([request.vision for request in block.requests]).float()
        scores = upload(torch.where(positions < SINKS, FIRST, positions), sums.scores.device)
        return BlockScores(scores.expand_as(sums.scores), sums.mass, sums.extras)
