"""Reclaim: pack the views that still matter, free the rest of a full span (rules 3-4), and evict nodes after that."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .nodes import Node
from .views import View

if TYPE_CHECKING:
    from .radix import SpanTree


@dataclass
class Plan:
    """What reclaiming one full span would do; views in a fixed order (ranks agree).

    Attributes:
        pack: index views to keep: those in use, and of each branch the deepest.
        drop: views that another one supersedes; a packed one (the span was healed since) gives its slots back.
        gain: slots that become free.
    """

    span: Node
    pack: list[View]
    drop: list[View]
    gain: int


class Reclaimer:
    """Frees slots of one :class:`SpanTree`, full vision spans before any node."""

    def __init__(self, tree: "SpanTree"):
        self._tree = tree
        self._gain: int | None = 0

    def changed(self) -> None:
        """Forget the cached gain: a lock, a user, a view or a value changed."""
        self._gain = None

    # -- what could be freed -------------------------------------------------------------------------------------

    def _plan(self, span: Node, locked_only: bool = False) -> Plan | None:
        """How to reclaim a span, or None if packing would free nothing.

        What dropped views give is not weighed against the packing: it may lie on unlocked nodes, and what
        :meth:`locked_gain` promises must not depend on those.
        """
        views = [view for view in span.span_views if view.node.lock_ref or not locked_only]
        views.sort(key=lambda view: (view.node.last_access, view.node.start, view.grounding))
        drop = [view for view in views if not view.users and any(_supersedes(other, view) for other in views)]
        pack = [view for view in views if not view.packed and view not in drop]
        room = len(span) - sum(self._tree.store.slots_for(len(view)) for view in pack)
        given = sum(len(view.block) for view in drop if view.block is not None)
        return Plan(span, pack, drop, room + given) if room > 0 else None

    def locked_gain(self) -> int:
        """Slots that locked spans can still give once every unlocked node is gone."""
        if self._gain is None:
            spans = (span for span in self._tree.full_spans if span.lock_ref and span.unpinned)
            plans = (self._plan(span, locked_only=True) for span in spans)
            self._gain = sum(plan.gain for plan in plans if plan is not None)
        return self._gain

    def _plans(self) -> list[Plan]:
        """Plans for every span whose reclaim would free something, least recently used first."""
        spans = (span for span in self._tree.full_spans if span.unpinned and span.span_views)
        plans = [plan for plan in map(self._plan, spans) if plan is not None]
        return sorted(plans, key=lambda plan: (plan.span.last_access, plan.span.start))

    # -- freeing -------------------------------------------------------------------------------------------------

    def reclaim(self, plan: Plan) -> int:
        """Pack views into the span's first slots, free the others and what dropped views held; returns how many.

        All sources are read before any target is written (:meth:`UnitStore.move`), so that it needs no free memory.
        """
        tree, store, span = self._tree, self._tree.store, plan.span
        slots, held, used = span.value, tree.total, 0
        for view in plan.drop:
            tree.drop_view(view)
        source, target = [], []
        for view in plan.pack:
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
        return held - tree.total

    def _reclaim_until(self, slots: int) -> int:
        freed = 0
        for plan in self._plans():
            if freed >= slots:
                break
            freed += self.reclaim(plan)
        return freed

    def _drop_until(self, slots: int) -> int:
        """Drop unlocked nodes, least recently used first, as stock SGLang does."""
        freed, tree = 0, self._tree
        heap = [_turn(node) for node in tree.leaves]
        heapq.heapify(heap)
        while heap and (freed < slots or _hollow(heap[0][-1])):
            node = heapq.heappop(heap)[-1]
            parent = node.parent
            freed += tree.drop_leaf(node)
            if parent in tree.leaves:
                heapq.heappush(heap, _turn(parent))
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
        plans, freed = self._plans(), 0
        held = sum(len(plan.span) for plan in plans)
        for plan in plans:
            if held <= slots:
                break
            held -= len(plan.span)
            freed += self.reclaim(plan)
        return freed


def _hollow(leaf: Node) -> bool:
    """True for a reclaimed span of which nothing is left: neither slots nor, below or on it, a view."""
    return leaf.value is None and not leaf.views


def _turn(leaf: Node) -> tuple:
    """Sort key for dropping: hollow spans at once, the others least recently used first."""
    return (not _hollow(leaf), leaf.last_access, leaf.start, id(leaf), leaf)


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
