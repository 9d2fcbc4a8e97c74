"""How a prefill attends and what it selects, settled by the prefix that it was matched with (rules 1, 3 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Sequence

import torch

from ..kv.nodes import View
from ..kv.radix import Match
from ..kv.views import ViewTable
from ..selection.policy import Policy
from ..types import Span


@dataclass(frozen=True)
class PrefillPlan:
    """What one prefill attends through and selects.

    Attributes:
        start: first logical position that is computed anew.
        prompt_len: tokens of the prompt; what a prefill computes after them was generated before a retraction.
        policy, cap: which of the new tokens ask, and how many at most.
        prefix_views: views that prefill attends through, for prefix spans that are not in full.
        kept_views: views that decode will attend through without a new selection (of reclaimed spans, or of this very
            prompt answered before).
        select: vision spans in full (cached or about to be computed) that get a new view, ascending.
    """

    start: int
    prompt_len: int
    policy: Policy
    cap: int
    prefix_views: tuple[View, ...] = ()
    kept_views: tuple[View, ...] = ()
    select: tuple[Span, ...] = ()

    @cached_property
    def text(self) -> torch.Tensor:
        """``[T]`` int64 positions of the text that grounds the selection; empty: this prefill selects nothing."""
        return self.policy.query_positions(self.select, self.start, self.prompt_len, self.cap)

    @cached_property
    def table(self) -> ViewTable | None:
        """What prefill attends through in place of prefix spans."""
        return ViewTable(self.prefix_views) if self.prefix_views else None

    @property
    def budgeted_tokens(self) -> int:
        """The prompt's tokens, less the spans that keep the view they have."""
        return self.prompt_len - sum(len(view.span) for view in self.kept_views)


def plan_prefill(
    match: Match, vision: Sequence[Span], prompt_len: int, policy: Policy, cap: int, resume: Sequence[View]
) -> PrefillPlan:
    """Plan the prefill of a prompt with the spans ``vision`` after ``match``.

    Args:
        resume: the views of a retracted request. If the tree still holds them all it goes on with those, as if nothing
            had happened. An image that it had in full may be gone by now; of that it gets the view that was matched.
    """
    if match.length >= prompt_len and resume and _all_there(resume, match):
        own = {view.span for view in resume}
        views = (*resume, *(view for view in match.views if view.span not in own))
        return PrefillPlan(match.length, prompt_len, policy, cap, views, views)
    viewed = tuple(match.views)
    kept = viewed + tuple(match.replay)
    settled = {view.span.start for view in kept}
    select = tuple(span for span in vision if span.start not in settled)
    return PrefillPlan(match.length, prompt_len, policy, cap, viewed, kept, select)


def _all_there(views: Sequence[View], match: Match) -> bool:
    path = set(match.path)
    return all(view.node in path and view in view.span.span_views for view in views)
