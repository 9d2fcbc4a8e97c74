"""What we keep about one request while SGLang serves it. Keyed by the request, never by its row in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch

from ..config import TgvConfig
from ..kv.nodes import View
from ..kv.store import UnitStore
from ..kv.views import KeptUnits, ViewTable
from ..scoring.select import Kept, keep_top_on_device
from ..types import Span
from .grounding import Grounding, Reduce, grounding_positions


@dataclass(frozen=True)
class PrefillPlan:
    """What one prefill will attend through and select, decided when its prefix is matched.

    Attributes:
        start: first logical position that is computed anew.
        prefix_views: views that prefill attends through, for prefix spans that are not in full.
        kept_views: views that decode will attend through without a new selection (of reclaimed spans, or of this very
            prompt answered before).
        select: vision spans in full (cached or about to be computed) that get a new view, ascending.
    """

    start: int = 0
    prefix_views: tuple[View, ...] = ()
    kept_views: tuple[View, ...] = ()
    select: tuple[Span, ...] = ()


class RequestState:
    """Spans, views and scoring of one request with vision.

    Attributes:
        rid: the client's request id (a label; never a path).
        config: the request's configuration (retention below 1, otherwise there is no state).
        trace: write a trace at each selection.
        vision: all vision spans of the prompt, ascending.
        prompt_len: tokens of the prompt (generated tokens of a retracted request lie after it).
        plan: how the running prefill attends and selects.
        grounding: scoring of the running prefill, or None when nothing is to be selected.
        views: views that decode attends through; empty until the prefill ends.
        settled: the prefill has ended, and ``views`` is what decode attends through.
        resume: views to go on with after a retraction.
        selections: number of selections made, for trace names.
        selection_failed: a selection of this request could not be made; it decodes on those images in full.
        early: the choice made on the device before the scheduler saw the prefill's result, or None.
    """

    def __init__(self, rid: str, config: TgvConfig, trace: bool, vision: list[Span], prompt_len: int):
        self.rid, self.config, self.trace = rid, config, trace
        self.vision, self.prompt_len = vision, prompt_len
        self.plan = PrefillPlan()
        self.grounding: Grounding | None = None
        self.views: list[View] = []
        self.resume: list[View] = []
        self.zero_row: Callable[[int, int], None] | None = None
        self.selections = 0
        self.prefill_table: ViewTable | None = None
        self.decode_table: ViewTable | None = None
        self.selection_failed = False
        self.early: Kept | None = None
        self._early_units: KeptUnits | None = None
        self._early_table: ViewTable | None = None
        self._text: torch.Tensor | None = None
        self.settled = False

    def begin(self, plan: PrefillPlan) -> None:
        """A prefill (the first one, or one after a retraction) will follow this plan."""
        self.plan, self.grounding, self.decode_table = plan, None, None
        self.early = self._early_units = self._early_table = None
        self._text, self.settled = None, False
        self.prefill_table = ViewTable(plan.prefix_views) if plan.prefix_views else None

    def grounding_text(self) -> torch.Tensor:
        """``[T]`` positions of the text that grounds the planned selection; empty: this prefill selects nothing."""
        if self._text is None:
            plan = self.plan
            self._text = grounding_positions(plan.select, plan.start, self.prompt_len, self.config.grounding_cap)
        return self._text

    def begin_grounding(self, layers: int, heads: int, reduce: Reduce) -> Grounding | None:
        """Scoring of the planned selection, made with the prefill's first chunk; None when there is none."""
        if self.grounding is None and len(self.grounding_text()):
            new_text = (self.plan.start, self.prompt_len)
            self.grounding = Grounding(self.plan.select, self.grounding_text(), new_text, layers, heads, reduce)
        return self.grounding

    def select_early(self, store: UnitStore) -> None:
        """Choose on the device as soon as the last layer is scored, so that decode need not wait (zero bubble)."""
        scores = self.grounding.result()
        self.early = keep_top_on_device(scores.scores, scores.layer_mass, self.config.exact_retention)
        self._early_units = self.grounding.kept_units(self.early, store)

    def table(self, decode: bool) -> ViewTable | None:
        """What the next forward attends through instead of the spans in the request's row.

        A decode step may be launched before the scheduler has seen the prefill's result (zero bubble); it goes through
        the early selection, which the tree's views will equal.
        """
        if not decode:
            return self.prefill_table
        if self.settled:
            return self.decode_table
        if self._early_table is None:
            parts = [*self.plan.kept_views, *([self._early_units] if self._early_units is not None else [])]
            self._early_table = ViewTable(parts) if parts else None
        return self._early_table

    def decode_through(self, views: list[View]) -> None:
        """The prefill ended: decode attends to these views and, in full, to all that they do not stand for."""
        self.views = self.resume = views
        self.decode_table = ViewTable(views) if views else None
        self.settled = True
        self.grounding = self.early = self._early_units = self._early_table = None

    def stop(self) -> list[View]:
        """The request leaves (finished, aborted or retracted); returns the views it was using."""
        used, self.views = self.views, []
        self.zero_row = self.grounding = None
        return used

    def span_reclaimed(self, start: int, end: int) -> None:
        """The full slots of ``[start, end)`` are gone: the request's page-table row must not point at them."""
        if self.zero_row is not None:
            self.zero_row(start, end)
