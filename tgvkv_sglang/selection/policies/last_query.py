"""Attention of the last query alone, as FastV (arXiv 2403.06764) and others rank vision tokens."""

from __future__ import annotations

from typing import Sequence

import torch

from ...types import Span
from ..tgv import text_after_vision
from .attention_sums import AttentionSums


class LastQuery(AttentionSums):
    """``score_v = A[t, v]`` of the prompt's last text token t."""

    budget = "uniform"

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        return text_after_vision(spans, start, end, 1)
