"""Reclaim: pack the views that still matter, free the rest of a full span (rules 3-4), and evict nodes after that."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import torch

from .nodes import Node
from .views import View

if TYPE_CHECKING:
    from .radix import SpanTree


class Reclaimer:
    """Frees slots of one :class:`SpanTree`, full vision spans before any node."""

    def __init__(self, tree: "SpanTree"):
        self._tree = tree
        self._gain: int | None = 0

    def changed(self) -> None:
        """Forget the cached gain: a lock, a user, a view or a value changed."""
        self._gain = None

    # -- what could be freed -------------------------------------------------------------------------------------

    def _packed_size(self, views: list[View]) -> int:
        return sum(self._tree.store.slots_for(len(view)) for view in views)

    def locked_gain(self) -> int:
        """Slots that locked spans can still give once every unlocked node is gone."""
        if self._gain is None:
            self._gain = sum(
                max(0, len(span) - self._packed_size(self._mattering(span, locked_only=True)))
                for span in self._tree.full_spans
                if span.lock_ref and span.unpinned
            )
        return self._gain

    def _mattering(self, span: Node, locked_only: bool = False) -> list[View]:
        """Index views to keep: those in use, and of each branch the deepest. In a fixed order (ranks agree)."""
        views = [view for view in span.span_views if not locked_only or view.node.lock_ref]
        kept = [
            view
            for view in views
            if not view.packed and (view.users or not any(_supersedes(other, view) for other in views))
        ]
        return sorted(kept, key=lambda view: (view.node.last_access, view.node.start, view.grounding))

    def _reclaimable(self) -> list[tuple[Node, list[View], int]]:
        """(span, views to pack, slots gained) of every span whose reclaim would free something, oldest first."""
        rows = []
        for span in self._tree.full_spans:
            if span.unpinned and span.span_views:
                views = self._mattering(span)
                gain = len(span) - self._packed_size(views)
                if gain > 0:
                    rows.append((span, views, gain))
        return sorted(rows, key=lambda row: (row[0].last_access, row[0].start))

    # -- freeing -------------------------------------------------------------------------------------------------

    def reclaim(self, span: Node, views: list[View]) -> int:
        """Pack ``views`` into the span's first slots, free the others; returns the number freed.

        All sources are read before any target is written (:meth:`UnitStore.move`), so that it needs no free memory.
        """
        tree, store, slots = self._tree, self._tree.store, span.value
        for view in [v for v in span.span_views if not v.packed and v not in views]:
            span.span_views.discard(view)
            view.node.views.remove(view)
        source, target, used = [], [], 0
        for view in views:
            block = slots[used : used + store.slots_for(len(view))].clone()
            units = store.dense_units(block, len(view))
            source.append(view.units)
            target.append(units)
            view.moved_to(block, units)
            tree.grow(view.node, len(block))
            used += len(block)
        if used:
            store.move(torch.cat(source), torch.cat(target))
        for user in span.users:
            user.span_reclaimed(span.start, span.end)
        span.value = None
        tree.full_spans.discard(span)
        tree.grow(span, -len(span))
        tree.release(slots[used:])
        return len(slots) - used

    def _reclaim_until(self, slots: int) -> int:
        freed = 0
        for span, views, _ in self._reclaimable():
            if freed >= slots:
                break
            freed += self.reclaim(span, views)
        return freed

    def _drop_until(self, slots: int) -> int:
        """Drop unlocked nodes, least recently used first, as stock SGLang does."""
        freed, tree = 0, self._tree
        heap = [(node.last_access, node.start, id(node), node) for node in tree.leaves]
        heapq.heapify(heap)
        while heap and freed < slots:
            node = heapq.heappop(heap)[-1]
            parent = node.parent
            freed += tree.drop_leaf(node)
            if parent in tree.leaves:
                heapq.heappush(heap, (parent.last_access, parent.start, id(parent), parent))
        return freed

    def evict(self, slots: int) -> int:
        freed = self._reclaim_until(slots)
        if freed < slots:
            freed += self._drop_until(slots - freed)
        if freed < slots:  # views of dropped branches no longer stand in the way of a locked span
            freed += self._reclaim_until(slots - freed)
        return freed

    def trim(self, slots: int) -> int:
        """Reclaim until the slots that reclaimable full spans hold are at most ``slots``."""
        rows, freed = self._reclaimable(), 0
        held = sum(len(span) for span, _, _ in rows)
        for span, views, _ in rows:
            if held <= slots:
                break
            held -= len(span)
            freed += self.reclaim(span, views)
        return freed


def _supersedes(other: View, view: View) -> bool:
    """True if a conversation that could continue on ``view`` will rather continue on ``other``.

    A view on a locked path yields only to one that is locked too: unlocked branches may be dropped at any time, and
    what :meth:`Reclaimer.locked_gain` promises must not depend on them.
    """
    if other is view:
        return False
    if other.node is view.node:
        return bool(other.users) or view.node.views.index(other) > view.node.views.index(view)
    return other.node.is_below(view.node) and (other.node.lock_ref > 0 or view.node.lock_ref == 0)
