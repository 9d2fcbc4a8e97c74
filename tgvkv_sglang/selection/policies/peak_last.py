"""Ours: peaks, of which those of the last query and of the layer itself count in full."""

from __future__ import annotations

import math

import torch

from ...device import upload
from ..policy import BlockScores, LayerBlock
from .peak import Peak, peaks

EARLIER = 1 / 32
"""What the attention of a query counts that is not the prompt's last: it has not seen the whole question."""
ELSEWHERE = 1 / 8
"""What a score counts in the other layers."""


class PeakLast(Peak):
    """``p_lv = max over h, t of c_t A_lh[t, v]``, ``c_t`` 1 for the last query and 1/32 for those before it;
    ``score_lv = max(p_lv, 1/8 max over layers of p_v)``; a layer's mass is ``sum_{t,v} c_t A[t, v]``.

    What the last query looks at, with the whole question behind it, is what the answer begins with; what earlier ones
    and other layers look at fills the budget that is left. Factors are powers of two, so that no rounding comes in.
    """

    def score(self, block: LayerBlock) -> BlockScores:
        scores, mass = peaks(block, block.lse_b2 + _discount(block))
        (mass,) = block.model.sums(mass)
        return BlockScores(block.model.reduce_max(scores), mass, [{} for _ in block.requests])

    def settle(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.maximum(scores, scores.amax(0) * ELSEWHERE)


def _discount(block: LayerBlock) -> torch.Tensor:
    """``-log2 c_t``, ``[T, 1]``: added to a row's log-sum-exp, it multiplies the row's attention by ``c_t``."""
    discount = torch.full((block.plan.text.keys, 1), -math.log2(EARLIER))
    discount[[part.stop - 1 for part in block.text_parts]] = 0.0
    return upload(discount, block.q.device)
