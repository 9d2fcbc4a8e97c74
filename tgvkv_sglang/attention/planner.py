"""What a batch attends through, planned outside its forward; the same for every attention library.

A library's backend asks for a :class:`Step` (or goes row by row), leaves the step's holes out of its index rows,
attends, and merges the step's views with its output by its LSE (``merge.py``); what it must say is the LSE's base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch

from ..kv.store import UnitStore
from ..selection.policy import Model
from ..selection.scoring import Ask, PrefillScoring
from .batch_tables import BatchUnits, FixedUnits, Holes, Tables, row_requests, stamp_of, units_in
from .rows import Attendees, Row, prefill_row


@dataclass
class Step:
    """What one forward of a batch with vision needs beyond the stock path.

    Attributes:
        holes, units: positions of each request that views stand for (of all rows of a captured graph, padding
            included), and the views' units; both None when no request has a view.
        row_requests: ``[R]`` request of each query row in a prefill; None in decode (row ``b`` is request ``b``).
        scoring: what the batch's requests score in this forward, or None.
    """

    holes: Holes | None = None
    units: BatchUnits | None = None
    row_requests: torch.Tensor | None = None
    scoring: PrefillScoring | None = None


class _Latest:
    """The last thing that was made, with what it was made from: made anew only when that changes."""

    def __init__(self) -> None:
        self._stamp: Any = None
        self._made: Any = None

    def of(self, stamp: Any, make: Callable[[], Any]) -> Any:
        if self._stamp is None or stamp != self._stamp:
            self._made, self._stamp = make(), stamp
        return self._made


class ViewPlanner:
    """Tables of the batches of one backend.

    Args:
        store: the KV pool. model: how groundings are scored. stash_bytes: see :class:`PrefillScoring`.
        page_table: ``[requests, context]`` integers, slot of each logical position (SGLang's ``req_to_token``).
    """

    def __init__(self, store: UnitStore, model: Model, page_table: torch.Tensor, stash_bytes: int):
        self._store, self._model, self._page_table, self._stash_bytes = store, model, page_table, stash_bytes
        self._decode, self._graph = _Latest(), _Latest()
        self._batch: Attendees | None = None
        self._tables: Tables | None = None
        self._fixed: FixedUnits | None = None

    # -- rows ----------------------------------------------------------------------------------------------------

    def prefill_rows(self, attendees: Attendees, prefixes: Sequence[int], lengths: Sequence[int]) -> list[Row]:
        """Rows of a prefill batch; groundings are begun. Per request, tokens before this forward and with it."""
        rows, at = [], 0
        for attendee, prefix, length in zip(attendees, prefixes, lengths, strict=True):
            rows.append(prefill_row(attendee, at, int(prefix), int(length)))
            at = rows[-1].end
        return rows

    def scoring(self, rows: Sequence[Row], page_rows: Sequence[int]) -> PrefillScoring | None:
        """What the rows score, if any does. page_rows: each request's row of the page table."""
        asks = [
            Ask(row.grounding, row.text + row.start, page_row, row.last_chunk)
            for row, page_row in zip(rows, page_rows, strict=True)
            if row.scores
        ]
        if not asks:
            return None
        return PrefillScoring(asks, self._page_table, self._store, self._model, self._stash_bytes)

    # -- steps ---------------------------------------------------------------------------------------------------

    def prefill(self, rows: Sequence[Row], page_rows: Sequence[int]) -> Step | None:
        """What a prefill's rows need beyond the stock path; None: nothing."""
        tables, device = [row.table for row in rows], self._store.device
        step = Step(scoring=self.scoring(rows, page_rows))
        if any(table is not None for table in tables):
            step.holes, step.units = Holes.of(tables, device), BatchUnits.of(tables, self._store.layers, device)
            step.row_requests = row_requests([row.end - row.start for row in rows], device)
        return step if step.scoring is not None or step.units is not None else None

    def decode_tables(self, attendees: Attendees) -> Tables | None:
        """What the requests of a decode batch attend through; None when no request has a view.

        Asked for several times before a forward, with the same list, and answered once.
        """
        if attendees is not self._batch:
            tables = [one.table(decode=True) if one is not None else None for one in attendees]
            self._tables = tables if any(table is not None for table in tables) else None
            self._batch = attendees
        return self._tables

    def decode(self, attendees: Attendees) -> Step | None:
        """A decode step outside a graph. Made anew only when the batch or a view has changed."""
        tables = self.decode_tables(attendees)
        return None if tables is None else self._decode.of(stamp_of(tables), lambda: self._step_of(tables))

    def _step_of(self, tables: Tables) -> Step:
        device = self._store.device
        return Step(Holes.of(tables, device), BatchUnits.of(tables, self._store.layers, device))

    # -- decode graphs -------------------------------------------------------------------------------------------

    def make_graph_tables(self, max_batch: int) -> None:
        """Tables at fixed addresses, which captured graphs read.

        They hold what *packed* views of a whole pool can need: a slot of the pool is one unit in each layer.
        """
        store = self._store
        self._fixed = FixedUnits(store.layers, max_batch, store.layers * store.slots, store.device)

    def graph_units(self, attendees: Attendees) -> tuple[int, int]:
        """Units of a decode batch's views, and how many the graphs' tables hold. Where many share a span in full it may
        be fewer."""
        return units_in(self.decode_tables(attendees) or ()), self._fixed.capacity

    def graph_step(self, tables: Tables, batch: int) -> Step:
        """A decode step of a graph for ``batch`` requests; what ``tables`` leaves over is padding."""
        padded = [*tables, *[None] * (batch - len(tables))]
        return Step(self._graph.of(stamp_of(padded), lambda: self._load(padded)), self._fixed)

    def _load(self, tables: Tables) -> Holes:
        self._fixed.load(BatchUnits.of(tables, self._store.layers, self._store.device))
        return Holes.of(tables, self._store.device)
