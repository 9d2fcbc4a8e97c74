"""What one request's prefill is scored with, from its first chunk to its choice."""

from __future__ import annotations

from typing import Sequence

import torch

from ..errors import NeverScoredError
from ..types import Span
from .budget_rules import BudgetRule
from .choose import Choice, Chosen, Quota
from .policy import Asked, Policy

Piece = tuple[torch.Tensor, torch.Tensor]
"""Queries ``[L, t, Hq, D]`` and the log-sum-exp of their rows ``[L, t, Hq]``, base 2."""


class Grounding:
    """Scores of the vision tokens in ``spans`` by the tokens at ``text_positions``.

    Args:
        name: see :class:`Asked`.
        spans: vision spans held in full, ascending, at least one.
        text_positions: ``[T]`` of :meth:`Policy.query_positions`, at least one.
        policy: how tokens are scored. rule: what layers weigh. quota: how much is kept.

    Attributes:
        asked: the request as policies see it.
        earlier: queries of earlier chunks, of the first positions; None before there are any.
        chosen: what was chosen; None until all layers are scored.
    """

    def __init__(
        self,
        name: str,
        spans: Sequence[Span],
        text_positions: torch.Tensor,
        policy: Policy,
        rule: BudgetRule,
        quota: Quota,
    ):
        vision = torch.cat([torch.arange(span.start, span.end) for span in spans])
        self.asked = Asked(name, text_positions, vision, tuple(spans))
        self.policy, self.rule, self.quota = policy, rule, quota
        self.earlier: Piece | None = None
        self.chosen: Chosen | None = None

    @property
    def stashed(self) -> int:
        """Queries held of earlier chunks."""
        return 0 if self.earlier is None else self.earlier[0].shape[1]

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Which rows of a chunk ``[start, end)`` are asked for (offsets from ``start``), int64 on the host."""
        text = self.asked.text
        return text[(text >= start) & (text < end)] - start

    def keep(self, q: torch.Tensor, lse_b2: torch.Tensor) -> None:
        """Hold a chunk's queries ``[L, t, Hq, D]`` and LSE ``[L, t, Hq]`` until the prompt's last chunk."""
        if self.earlier is not None:
            q, lse_b2 = (torch.cat(parts, 1) for parts in zip(self.earlier, (q, lse_b2), strict=True))
        self.earlier = q, lse_b2

    def choice(self) -> Choice:
        """What was chosen, confirmed.

        Raises:
            SelectionError: its scores cannot be relied on. NeverScoredError: there are none.
        """
        if self.chosen is None:
            raise NeverScoredError(
                f"not every layer was scored with the {len(self.asked.text)} tokens that should have been"
            )
        return self.chosen.confirm()
