"""Of which spans there are views further down the tree: what makes a view the deepest of its branch.

Every node counts, span by span, those of its children that have views of the span on or below them (``Node.below``),
and the same once more among locked nodes alone (``Node.locked_below``). A count that stays above 0 is no news to the
nodes above, so a change climbs as far as the nearest node that has another branch, or views of its own, and never past
the span itself. How many branches or views a span has makes no difference.
"""

from __future__ import annotations

from .nodes import Node


def count_above(node: Node, span: Node, step: int, locked: bool, changed: set[Node]) -> None:
    """``node`` begins (``step`` 1) or ceases (-1) to have views of ``span`` on or below it: count that above it.

    Args:
        locked: count among locked nodes only; a node above that is not locked (yet) passes nothing on.
        changed: receives the nodes below which the first view of ``span`` came, or the last one went.
    """
    while node is not span:
        parent = node.parent
        counts = parent.locked_below if locked else parent.below
        before = counts.pop(span, 0)
        if before + step:
            counts[span] = before + step
        if before and before + step:
            return
        changed.add(parent)
        if (locked and not parent.lock_ref) or parent.views_of(span):
            return
        node = parent


def count_views(node: Node, span: Node, step: int, changed: set[Node]) -> None:
    """The first view of ``span`` came to ``node`` (``step`` 1), or the last one left it (-1)."""
    if span not in node.below:
        count_above(node, span, step, False, changed)
    if node.lock_ref and span not in node.locked_below:
        count_above(node, span, step, True, changed)


def count_lock(node: Node, step: int, changed: set[Node]) -> None:
    """``node`` became locked (``step`` 1; its child on the locked path was counted before) or unlocked (-1)."""
    if node.views or node.locked_below:
        for span in {view.span for view in node.views}.union(node.locked_below):
            count_above(node, span, step, True, changed)


def share_counts(upper: Node, lower: Node) -> None:
    """``upper`` was split off above ``lower``: all that is below it is on or below ``lower``."""
    here = {view.span for view in lower.views}
    upper.below = dict.fromkeys(here.union(lower.below), 1)
    if lower.lock_ref:
        upper.locked_below = dict.fromkeys(here.union(lower.locked_below), 1)


def has_deeper(node: Node, span: Node) -> bool:
    """Whether a conversation that ends on ``node`` has a deeper view of ``span`` to go on with (rule 4).

    On a locked node only locked nodes count: unlocked branches may be dropped at any time, and what can be promised
    beside a running request must not depend on them.
    """
    return span in (node.locked_below if node.lock_ref else node.below)
