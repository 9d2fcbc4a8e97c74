"""What is kept of one request with vision while it is served. Keyed by the request, never by its row in a batch."""

from __future__ import annotations

from enum import Enum, auto
from typing import Sequence

import torch

from ..config import TgvConfig
from ..errors import NeverScoredError
from ..kv.nodes import View
from ..kv.radix import Match
from ..kv.views import ViewTable
from ..registry import load_budget_rule, load_policy, load_scope
from ..selection.choose import Choice, Quota
from ..selection.grounding import Grounding
from ..selection.policy import Merging
from ..types import Span
from .plan import PrefillPlan, plan_prefill


class Phase(Enum):
    """Where a request stands. A retraction leads from any of them to GONE, and the next match to PLANNED again."""

    PLANNED = auto()
    """Its prefix is matched (as often as SGLang likes); what its prefill does follows from the last match."""
    SCORING = auto()
    """A chunk of its prefill was prepared: the plan stands, and vision is scored if there is a selection to make. After
    the last chunk its grounding has chosen, and decode may go through that; the tree does not know of it yet."""
    DECODING = auto()
    """Its views hang on the tree, and decode attends through them."""
    GONE = auto()
    """It finished, was aborted or retracted, and uses nothing. A decode step under way may still read its table."""


class RequestState:
    """Spans, views and scoring of one request with vision.

    Attributes:
        rid: the client's request id (a label; never a path).
        config: the request's configuration (retention below 1, otherwise there is no state).
        trace: write a trace at each selection.
        vision: all vision spans of the prompt, ascending.
        prompt_len: tokens of the prompt (generated tokens of a retracted request lie after it).
        phase: see :class:`Phase`.
        grounding: scoring of the running prefill, or None when nothing is to be selected.
        views: views in use; empty unless DECODING.
        policy: how its vision tokens are scored.
        selections: number of selections made, for trace names.
        selection_failed: a selection of this request could not be made; it decodes on those images in full.
    """

    def __init__(self, rid: str, config: TgvConfig, trace: bool, vision: Sequence[Span], prompt_len: int):
        self.rid, self.config, self.trace = rid, config, trace
        self.vision, self.prompt_len = vision, prompt_len
        self.phase = Phase.GONE
        self.grounding: Grounding | None = None
        self.views: list[View] = []
        self.selections = 0
        self.selection_failed = False
        self.policy, self._rule = load_policy(config.policy), load_budget_rule(config.rule)
        self._scope = load_scope(config.scope)
        self._match: Match | None = None
        self._plan: PrefillPlan | None = None
        self._resume: list[View] = []
        self._page_row: torch.Tensor | None = None
        self._decode_table: ViewTable | None = None

    # -- prefill -------------------------------------------------------------------------------------------------

    def matched(self, match: Match) -> None:
        """The prefix is ``match``, until it is matched again or its prefill begins."""
        self.phase, self._match, self._plan = Phase.PLANNED, match, None
        self.grounding = self._decode_table = None

    @property
    def plan(self) -> PrefillPlan:
        """What follows from the last match; made when it is first asked for."""
        if self._plan is None:
            cap = self.config.grounding_cap
            self._plan = plan_prefill(self._match, self.vision, self.prompt_len, self.policy, cap, self._resume)
        return self._plan

    def begin_chunk(self, start: int) -> Grounding | None:
        """A chunk of the prefill, from position ``start`` on, is about to run; returns what it is to be scored by.

        After a retraction a prefill runs on past the prompt, and a chunk may hold generated tokens alone: None, as for
        a prefill that selects nothing.
        """
        if self.phase is Phase.PLANNED:
            self.phase = Phase.SCORING
        if self.grounding is None and len(self.plan.text):
            quota = Quota(self._scope, self.config.exact_retention, self.plan.budgeted_tokens)
            how = self.policy, self._rule, quota
            self.grounding = Grounding(self.rid, self.plan.select, self.plan.text, *how)
        return self.grounding if start < self.prompt_len else None

    def choose(self) -> Choice:
        """What the finished prefill selected on the device.

        Raises:
            SelectionError: its scores cannot be selected on.
        """
        if self.grounding is None:
            raise NeverScoredError(f"no layer was scored, {len(self.plan.text)} tokens of text should have been")
        return self.grounding.choice()

    # -- what attention goes through -----------------------------------------------------------------------------

    def table(self, decode: bool) -> ViewTable | None:
        """What the next forward attends through instead of the spans in the request's row.

        A decode step may be launched before the scheduler has seen the prefill's result; it goes through what was
        chosen on the device, which the tree's views will equal.
        """
        if not decode:
            return self.plan.table
        if self._decode_table is None and self.phase in (Phase.PLANNED, Phase.SCORING):
            chosen = self.grounding.chosen if self.grounding is not None else None
            if isinstance(self.policy, Merging):
                chosen = None  # what it keeps is not there yet: such a step attends to the spans in full
            parts = [*self.plan.kept_views, *([chosen.units] if chosen is not None else [])]
            self._decode_table = ViewTable(parts) if parts else None
        return self._decode_table

    # -- decode and the end --------------------------------------------------------------------------------------

    def decode_through(self, views: list[View], page_row: torch.Tensor) -> None:
        """The prefill ended: decode attends to these views and, in full, to all that they do not stand for.

        Args:
            page_row: the request's page-table row, to be cleared where a span is reclaimed.
        """
        self._settle(views)
        self.views, self._page_row, self.phase = views, page_row, Phase.DECODING

    def finish_through(self, views: list[View]) -> None:
        """It finished with its prefill. A decode step under way may need its table; nothing is in use."""
        self._settle(views)
        self.phase = Phase.GONE

    def _settle(self, views: list[View]) -> None:
        self._resume = views
        self._decode_table = ViewTable(views) if views else None
        self.grounding = None

    def leave(self) -> list[View]:
        """The request leaves (finished, aborted or retracted); returns the views it was using."""
        used, self.views = self.views, []
        self.grounding = self._page_row = None
        self.phase = Phase.GONE
        return used

    def span_reclaimed(self, start: int, end: int) -> None:
        """The full slots of ``[start, end)`` are gone: the page-table row must not point at them."""
        if self._page_row is not None:
            self._page_row[start:end] = 0
