"""Between a sum and a peak."""

from __future__ import annotations

from ..policy import BlockScores, LayerBlock
from .peak import Peak, peaks


class Peak4(Peak):
    """``score_v = sum over heads h and new text t of A_h[t, v]^4``: its fourth root is a smooth maximum."""

    def score(self, block: LayerBlock) -> BlockScores:
        scores, mass = block.model.sums(*peaks(block, block.lse_b2, power=4))
        return BlockScores(scores, mass, [{} for _ in block.requests])
