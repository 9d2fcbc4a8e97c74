"""How a prefill attends and what it selects, decided when its prefix is matched (rules 1, 3 and 5)."""

from __future__ import annotations

from ..kv.nodes import View
from ..kv.radix import Match
from .state import PrefillPlan, RequestState


def plan_prefill(state: RequestState, match: Match) -> PrefillPlan:
    """How a prefill after ``match`` attends and what it selects (rules 1, 3 and 5)."""
    resumed = _resumable(state, match)
    if resumed:
        views = tuple(resumed)
        return PrefillPlan(start=match.length, prefix_views=views, kept_views=views)
    viewed = tuple(match.views)
    kept = viewed + tuple(match.replay)
    settled = {view.span.start for view in kept}
    select = tuple(span for span in state.vision if span.start not in settled)
    return PrefillPlan(start=match.length, prefix_views=viewed, kept_views=kept, select=select)


def _resumable(state: RequestState, match: Match) -> list[View]:
    """A retracted request's own views, if the tree still holds them all: it goes on as if nothing had happened.

    An image that it had in full may be gone by now; of that it gets the view that the match found.
    """
    if match.length < state.prompt_len or not state.resume:
        return []
    path = set(match.path)
    if not all(view.node in path and view in view.span.span_views for view in state.resume):
        return []
    own = {view.span for view in state.resume}
    return state.resume + [view for view in match.views if view.span not in own]
