"""LightKV in the form that a shared cache allows: what is evicted is merged into what is kept, in the view alone.

LightKV merges similar vision tokens inside windows of a picture while the prompt is prefilled, weighted by the text's
attention. KV made so depends on the text behind the picture, and no other prompt could share it. Here the same merge is
done on K and V when a view is made: the picture's own KV stays as it is, and the view owns what was merged.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ..tgv import Tgv

WINDOW = 64
"""Tokens of a window, in the order of the prompt: the size of LightKV's 8 x 8."""


class LightKv(Tgv):
    """Kept: what ``tgv`` keeps. Each evicted token is merged into the kept one of its window with the most similar K
    (cosine over all heads of the rank), weighted by the tokens' scores; without a kept token in its window it is lost.
    """

    def merge(
        self, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer's kept tokens of one span, with the others merged in.

        Args:
            k, v: ``[V, Hkv, D]`` of the span's tokens. scores: ``[V]``, higher = keep. kept: ``[n]`` int64 ascending.

        Returns:
            ``[n, Hkv, D]`` each, in their dtypes: ``(w_b x_b + sum_a w_a x_a) / (w_b + sum_a w_a)``.
        """
        if not len(kept):
            return k[kept], v[kept]
        window = torch.arange(len(k), device=k.device) // WINDOW
        direction = normalize(k.flatten(1).float(), dim=1)
        similar = direction @ direction[kept].T
        similar = similar.masked_fill(window[:, None] != window[kept], -torch.inf)
        best, nearest = similar.max(1)
        weight = scores.float().clamp_min(0)
        given = torch.where(best > -torch.inf, weight, 0.0)
        given = given.index_fill(0, kept, 0.0)
        own = weight[kept]
        total = own.index_add(0, nearest, given)
        merged = []
        for x in (k, v):
            rows = x.flatten(1).float()
            sums = (own[:, None] * rows[kept]).index_add(0, nearest, given[:, None] * rows)
            mean = torch.where(total[:, None] > 0, sums / total[:, None].clamp_min(1e-30), rows[kept])
            merged.append(mean.view(-1, *x.shape[1:]).to(x.dtype))
        return merged[0], merged[1]
