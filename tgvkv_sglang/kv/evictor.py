"""Reclaim and eviction (rules 3-4): pack the views that still matter, free the rest of a full span; then drop nodes.

The evictor stands above the tree and reads which nodes changed since it last looked. What those changes do to the order
and the gains costs time that grows with the changed nodes alone (and the logarithm of how many could go), never with
the spans, leaves or conversations that are resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .nodes import Node, View
from .order import Order
from .radix import SpanTree
from .shares import Shares, keep_or_drop


@dataclass
class Plan:
    """What reclaiming one full span would do; views in a fixed order (ranks agree).

    Attributes:
        pack: index views to keep: those in use, and of each branch the deepest.
        drop: views that another one supersedes; a packed one (the span was healed since) gives its slots back.
    """

    pack: list[View]
    drop: list[View]


class Evictor:
    """Frees slots of one :class:`SpanTree`, full vision spans before any node. A tree has one evictor.

    A full span can be reclaimed when every request on it decodes through a view, it has views, and packing those to
    keep leaves slots over. What dropped views give back is not weighed against the packing: it may lie on unlocked
    nodes, and what :attr:`evictable` promises of locked spans must not depend on those.
    """

    def __init__(self, tree: SpanTree):
        self.tree = tree
        self._forget()

    def _forget(self) -> None:
        self._root = self.tree.root
        self._shares = Shares(self.tree.store)
        self._spans, self._leaves = Order(), Order()
        self._reclaimable = 0  # tokens of the spans in their order
        self._locked_gains: dict[Node, int] = {}
        self._locked_gain = 0  # their sum

    # -- following the tree --------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Look at the nodes that changed, each once."""
        if self._root is not self.tree.root:
            self._forget()
        changed, self.tree.changed = self.tree.changed, set()
        spans = set()
        for node in changed:
            self._place_leaf(node)
            spans |= self._shares.update(node)
            if node.atom:
                spans.add(node)
        for span in spans:
            self._place_span(span)

    def _place_leaf(self, node: Node) -> None:
        """A reclaimed span of which nothing is left, neither slots nor a view on or below it, goes at once."""
        if node in self.tree.leaves:
            self._leaves.put(node, (not _hollow(node), *node.age))
        else:
            self._leaves.discard(node)

    def _place_span(self, span: Node) -> None:
        sums = self._shares.of(span)
        idle = span in self.tree.full_spans and span.unpinned
        was = span in self._spans
        if idle and span.span_views and sums.pack < len(span):
            self._spans.put(span, span.age)
        else:
            self._spans.discard(span)
        self._reclaimable += len(span) * ((span in self._spans) - was)
        gain = len(span) - sums.locked_pack + sums.locked_give
        gain = gain if idle and span.lock_ref and sums.locked_pack < len(span) else 0
        self._locked_gain += gain - self._locked_gains.pop(span, 0)
        if gain:
            self._locked_gains[span] = gain

    # -- what could be freed -------------------------------------------------------------------------------------

    @property
    def evictable(self) -> int:
        """Slots that :meth:`evict` can deliver right now, exactly, those on locked nodes included."""
        self._catch_up()
        return self.tree.total - self.tree.locked + self._locked_gain

    @property
    def protected(self) -> int:
        return self.tree.total - self.evictable

    def spans(self) -> list[Node]:
        """Full spans that can be reclaimed, in the order in which they go."""
        self._catch_up()
        return list(self._spans)

    def leaves(self) -> list[Node]:
        """Unlocked leaves, in the order in which they go."""
        self._catch_up()
        return list(self._leaves)

    def gain(self, span: Node) -> int:
        """Slots that reclaiming ``span``, one of :meth:`spans`, frees."""
        self._catch_up()
        sums = self._shares.of(span)
        return len(span) - sums.pack + sums.give

    def plan(self, span: Node) -> Plan:
        plan = Plan([], [])
        for node in sorted({view.node for view in span.span_views}, key=lambda node: node.age):
            keep, drop = keep_or_drop(node, span)
            plan.pack += [view for view in keep if not view.packed]
            plan.drop += drop
        return plan

    # -- freeing -------------------------------------------------------------------------------------------------

    def reclaim(self, span: Node) -> int:
        """Pack views into the span's first slots, free the others and what dropped views held; returns how many.

        All sources are read before any target is written (:meth:`UnitStore.move`), so that it needs no free memory.
        """
        tree, store, plan = self.tree, self.tree.store, self.plan(span)
        slots, held, used = span.value, tree.total, 0
        for view in plan.drop:
            tree.drop_view(view)
        source, target = [], []
        for view in plan.pack:
            block = slots[used : used + store.slots_for(len(view))].clone()
            units = store.dense_units(block, len(view))
            source.append(view.units)
            target.append(units)
            tree.pack(view, block, units)
            used += len(block)
        if used:
            store.move(torch.cat(source), torch.cat(target))
        tree.give_up(span)
        tree.release(slots[used:])
        return held - tree.total

    def _reclaim_until(self, slots: int) -> int:
        freed = 0
        while freed < slots:
            self._catch_up()
            span = self._spans.first()
            if span is None:
                break
            freed += self.reclaim(span)
        return freed

    def _drop_until(self, slots: int) -> int:
        """Drop unlocked leaves, least recently used first, as stock SGLang does."""
        freed = 0
        while True:
            self._catch_up()
            leaf = self._leaves.first()
            if leaf is None or (freed >= slots and not _hollow(leaf)):
                return freed
            freed += self.tree.drop_leaf(leaf)

    def evict(self, slots: int) -> int:
        """Free at least ``slots`` slots if :attr:`evictable` allows; returns the number freed."""
        freed = self._reclaim_until(slots)
        if freed < slots:
            freed += self._drop_until(slots - freed)
        if freed < slots:  # views of dropped branches no longer stand in the way of a locked span
            freed += self._reclaim_until(slots - freed)
        return freed

    def trim(self, slots: int) -> int:
        """Reclaim until the slots that reclaimable full spans hold are at most ``slots``, least recently used first."""
        freed = 0
        self._catch_up()
        while self._reclaimable > slots and (span := self._spans.first()) is not None:
            freed += self.reclaim(span)
            self._catch_up()
        return freed


def _hollow(leaf: Node) -> bool:
    return leaf.value is None and not leaf.views
