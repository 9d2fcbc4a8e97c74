"""One life of a request, from its matched prefix to its leaving, in the order that ownership of slots demands.

A request's page-table row, before and after :meth:`Lifecycle.chunk` and :meth:`Lifecycle.end_prefill`::

    |<-- the tree's, locked -->|<-- the request's own ----------------->|<- unused ->|
    0                    protected_len                              computed       row's end
    |  prefix from the cache   |  whole spans  |  tail of a cut image   |
                               |<-- insert --->|<- private until its   ->|
                               |               |   last chunk has run    |

    after:  slots of the inserted part are the tree's; where the tree had the same tokens already, the row now shows
    the tree's slots and the request's duplicates are freed; 0 stands where a span is reclaimed (a view stands for it).

Text and whole pictures go to the tree; a picture that a chunk cuts in two stays private, because a vision span is one
node. Prompt and generated text are inserted apart: a view hangs on the node where the prompt (its grounding) ends.
"""

from __future__ import annotations

from typing import Callable, Protocol, Sequence

import numpy as np
import torch

from ..errors import SelectionError
from ..kv.evictor import Evictor
from ..kv.matching import whole_prefix
from ..kv.nodes import Node, View
from ..kv.radix import Inserted, Match, SpanTree
from ..namespace import Namespace
from ..selection.choose import Choice
from ..selection.policy import Merging
from .merging import merged
from .state import Phase, RequestState


class Holder(Protocol):
    """What a server keeps of one running request, under whatever names it has for it.

    Attributes:
        namespace: with whom the request shares KV.
        state: None for a request that nothing is selected for (no vision, or retention 1.0).
        node: the tree node that it has locked; None before its first match.
        protected_len: tokens at the front of its row whose slots the tree owns.
        page_row: its row of the page table, integers; written to through this attribute.
    """

    namespace: Namespace
    state: RequestState | None
    node: Node | None
    protected_len: int
    page_row: torch.Tensor


class Witness(Protocol):
    """Who is told of selections. Nothing that it does may fail the request."""

    def selected(self, holder: Holder, choice: Choice) -> None:
        """A selection was made; ``holder.state.grounding`` has its scores."""

    def failed(self, state: RequestState, error: SelectionError) -> None:
        """A selection could not be made: the request goes on without views of those spans."""


class Lifecycle:
    """What happens to requests, to the tree and to slots, on behalf of a server.

    Args:
        tree: the span tree. evictor: its evictor.
        witness: told of selections.
        allocate: that many free slots, int64, evicting for them if need be; None: there are not so many.
        reclaimable_slots: most slots that reclaimable full spans may hold; None: no limit.
    """

    def __init__(
        self,
        tree: SpanTree,
        evictor: Evictor,
        witness: Witness,
        allocate: Callable[[int], torch.Tensor | None],
        reclaimable_slots: int | None = None,
    ):
        self.tree, self.evictor = tree, evictor
        self._witness, self._allocate, self._reclaimable_slots = witness, allocate, reclaimable_slots

    def admit(self, namespace: Namespace, state: RequestState | None, ids: np.ndarray, limit: int) -> Match:
        """Match a request's prefix. Asked for as often as the server likes; the last match counts.

        Nothing is made that a second call would throw away: the prefill is planned when its first chunk is prepared.

        Args:
            ids: ``[n]`` int64 all tokens, as the tree knows them. limit: at most this many may be reused.
        """
        match = self.tree.match(namespace, ids, limit, namespace.evicts)
        if state is not None:
            state.matched(match)
        return match

    def chunk(self, holder: Holder, ids: np.ndarray, computed: int) -> None:
        """A middle chunk was scheduled: give its whole spans to the tree, keep a picture's tail private.

        Args:
            ids: ``[n]`` all tokens of the prefill. computed: how many of them have KV in the row.
        """
        length = whole_prefix(ids, computed, holder.namespace.evicts)
        if length > holder.protected_len:
            self._relock(holder, self._insert(holder, ids[:length]).node)
        self.trim()

    def end_prefill(self, holder: Holder, ids: np.ndarray) -> None:
        """The last chunk has run: insert the prompt, select, and let decode go through the views.

        Args:
            ids: ``[n]`` all tokens that have KV in the row, the prompt first.
        """
        inserted, views = self._insert_prompt(holder, ids)
        self._relock(holder, inserted.node)
        if holder.state is not None:
            views = self._merged(holder.state, views)
            holder.state.decode_through(views, holder.page_row)
            self.tree.use(views, holder.state)
        self.trim()

    def finish(self, holder: Holder, ids: np.ndarray) -> None:
        """The request is answered: its tokens go to the tree, its views stay with the conversation.

        It may finish with its first token, before :meth:`end_prefill`; or before its last chunk ran.
        """
        state = holder.state
        if state is not None and state.phase is not Phase.DECODING:
            inserted, views = self._insert_prompt(holder, ids)
            self._relock(holder, inserted.node)
            state.finish_through(self._merged(state, views))
        else:
            self._insert(holder, ids)
        self._leave(holder)

    def drop(self, holder: Holder, computed: int) -> None:
        """The request is aborted or retracted: the slots of its own are freed, its views stay on the tree."""
        self.tree.release(holder.page_row[holder.protected_len : computed].to(torch.int64))
        self._leave(holder)

    def trim(self) -> None:
        """Hold no more reclaimable full spans than allowed."""
        if self._reclaimable_slots is not None and self.tree.full_spans:
            self.evictor.trim(self._reclaimable_slots)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _insert(self, holder: Holder, ids: np.ndarray) -> Inserted:
        """Give the slots of the row's front to the tree and point the row at the tree's slots."""
        state, length, owned_from = holder.state, len(ids), holder.protected_len
        grounding = (state.plan.start, state.prompt_len) if state is not None else None
        slots = holder.page_row[:length].to(torch.int64)
        inserted = self.tree.insert(holder.namespace, ids, slots, owned_from, holder.namespace.evicts, grounding)
        holder.page_row[owned_from:length] = inserted.slots[owned_from:].to(holder.page_row.dtype)
        holder.protected_len = max(owned_from, length)
        return inserted

    def _insert_prompt(self, holder: Holder, ids: np.ndarray) -> tuple[Inserted, list[View]]:
        """Insert a finished prefill; returns the views decode will use, new ones if a selection was planned."""
        state = holder.state
        if state is None:
            return self._insert(holder, ids), []
        inserted = self._insert(holder, ids[: state.prompt_len])
        gone_before_last_chunk = len(ids) < state.prompt_len  # the one reason for scores to be missing
        new = [] if gone_before_last_chunk else self._select(holder, inserted)
        if len(ids) > state.prompt_len:
            inserted = self._insert(holder, ids)
        return inserted, [*state.plan.kept_views, *new]

    def _select(self, holder: Holder, inserted: Inserted) -> Sequence[View]:
        """Views of the spans that the prefill scored, on the node where its prompt ends; none if it scored nothing."""
        state = holder.state
        if not len(state.plan.text):
            return []
        try:
            choice = state.choose()
        except SelectionError as error:
            self._witness.failed(state, error)
            return []
        self._witness.selected(holder, choice)
        state.selections += 1
        nodes, views, at = inserted.span_nodes(), [], 0
        for span in state.plan.select:
            node, kept = nodes[span.start], choice.part(at, len(span))
            view = View(node, (state.plan.start, state.prompt_len), *kept, node.value, self.tree.store)
            views.append(self.tree.attach(view, inserted.node))
            at += len(span)
        return views

    def _merged(self, state: RequestState, views: Sequence[View]) -> list[View]:
        """Under a merging policy a new view gets slots of its own, once its path is locked and before its span may be
        reclaimed: what is merged does not depend on when memory runs short. Without room the view is dropped."""
        if not isinstance(state.policy, Merging):
            return list(views)
        kept = []
        for view in views:
            if view.packed or not len(view):
                kept.append(view)
                continue
            block = self._allocate(self.tree.store.slots_for(len(view)))
            if block is None:
                self._witness.failed(state, SelectionError(f"no {len(view)} units are free to merge into"))
                self.tree.drop_view(view)
                continue
            units = self.tree.store.dense_units(block, len(view))
            self.tree.store.put(units, *merged(view, state.plan.select, state.grounding.chosen.scores,
                                               state.policy, self.tree.store))  # fmt: skip
            self.tree.pack(view, block, units)
            kept.append(view)
        return kept

    def _relock(self, holder: Holder, node: Node) -> None:
        """Hold ``node`` instead of what the request held, unless that is deeper: the views it replays hang there."""
        if not holder.node.is_below(node):
            self.tree.lock(node)
            self.tree.unlock(holder.node)
            holder.node = node

    def _leave(self, holder: Holder) -> None:
        if holder.state is not None:
            self.tree.disuse(holder.state.leave(), holder.state)
        if holder.node is not None:
            self.tree.unlock(holder.node)
        self.trim()
