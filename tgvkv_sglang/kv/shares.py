"""What reclaiming a full span would keep and give, summed over its views and corrected node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .branches import has_deeper
from .nodes import Node, View
from .store import UnitStore


def keep_or_drop(node: Node, span: Node) -> tuple[list[View], list[View]]:
    """The views of ``span`` on ``node`` that a reclaim of the span keeps, and those it drops as superseded.

    A view is superseded when a conversation that could go on with it will rather go on with another: with a newer one
    on the same node, with one that a running request decodes through, or with one further down. Views that a running
    request decodes through stay in any case. For example, with views of one picture on these nodes

        picture - "what?" [A] - "red" - "where?" [B, C]
                              - "blue" - "why?" [D]
                - "who?" [E]

    A goes (B, C and D lie below it), B goes (C is newer), and C, D and E stay: each continues a branch that no other
    view continues. If a request runs on "what?", A stays until a request runs further down, too: branches that nobody
    runs on may be dropped at any time (:func:`~.branches.has_deeper`).
    """
    views = node.views_of(span)
    keep = [view for view in views if view.readers] or ([] if has_deeper(node, span) else views[-1:])
    return keep, [view for view in views if view not in keep]


class Share(NamedTuple):
    """Of one span's views on one node: slots to pack the kept ones into, slots that dropped packed ones give back."""

    pack: int
    give: int
    locked: bool


@dataclass
class Sums:
    """Of all of a span's views, and of those on locked nodes alone."""

    pack: int = 0
    give: int = 0
    locked_pack: int = 0
    locked_give: int = 0

    def add(self, share: Share, sign: int) -> None:
        self.pack += sign * share.pack
        self.give += sign * share.give
        if share.locked:
            self.locked_pack += sign * share.pack
            self.locked_give += sign * share.give


class Shares:
    """The sums of every span, kept up to date by :meth:`update` in time that depends on the changed node alone."""

    def __init__(self, store: UnitStore):
        self._store = store
        self._shares: dict[Node, dict[Node, Share]] = {}  # node -> span -> share
        self._sums: dict[Node, Sums] = {}

    def of(self, span: Node) -> Sums:
        return self._sums.get(span) or Sums()

    def update(self, node: Node) -> set[Node]:
        """Count ``node`` anew; returns the spans whose sums changed."""
        if not node.views and node not in self._shares:
            return set()
        old, new = self._shares.pop(node, {}), self._count(node)
        if new:
            self._shares[node] = new
        changed = {span for span in old.keys() | new.keys() if old.get(span) != new.get(span)}
        for span in changed:
            sums = self._sums.setdefault(span, Sums())
            for shares, sign in ((old, -1), (new, 1)):
                if span in shares:
                    sums.add(shares[span], sign)
            if not span.span_views:
                del self._sums[span]
        return changed

    def _count(self, node: Node) -> dict[Node, Share]:
        shares = {}
        for span in {view.span for view in node.views}:
            keep, drop = keep_or_drop(node, span)
            pack = sum(self._store.slots_for(len(view)) for view in keep if not view.packed)
            give = sum(len(view.block) for view in drop if view.packed)
            shares[span] = Share(pack, give, node.lock_ref > 0)
        return shares
