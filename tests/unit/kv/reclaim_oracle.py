"""What the evictor's figures must be, counted from scratch: every view against every other view of its span."""

from __future__ import annotations

from dataclasses import dataclass

from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.radix import SpanTree


@dataclass
class Plan:
    pack: list[View]
    drop: list[View]
    gain: int


def supersedes(other: View, view: View) -> bool:
    """True if a conversation that could continue on ``view`` will rather continue on ``other``.

    A view on a locked path yields only to one that is locked too: unlocked branches may be dropped at any time.
    """
    if other is view:
        return False
    if other.node is view.node:
        return bool(other.readers) or view.node.views.index(other) > view.node.views.index(view)
    return other.node.is_below(view.node) and (other.node.lock_ref > 0 or view.node.lock_ref == 0)


def plan(tree: SpanTree, span: Node, locked_only: bool = False) -> Plan | None:
    """How to reclaim a span, or None if packing would free nothing."""
    views = [view for view in span.span_views if view.node.lock_ref or not locked_only]
    drop = [view for view in views if not view.readers and any(supersedes(other, view) for other in views)]
    pack = [view for view in views if view.block is None and view not in drop]
    room = len(span) - sum(-(-len(view) // tree.store.layers) for view in pack)
    given = sum(len(view.block) for view in drop if view.block is not None)
    return Plan(pack, drop, room + given) if room > 0 else None


def free_of_readers(node: Node) -> bool:
    return node.value is not None and node.lock_ref == len(node.through)


def reclaim_order(tree: SpanTree) -> list[tuple[Node, int]]:
    """(span, gain) of every span whose reclaim would free something, least recently used first."""
    spans = [node for node in tree.nodes() if node.atom and free_of_readers(node) and node.span_views]
    plans = [(span, plan(tree, span)) for span in spans]
    return sorted(
        ((span, made.gain) for span, made in plans if made is not None),
        key=lambda entry: (entry[0].last_access, entry[0].start),
    )


def drop_order(tree: SpanTree) -> list[Node]:
    """Unlocked leaves: those of which nothing is left, then the least recently used first."""
    leaves = [node for node in tree.nodes() if not node.children and not node.lock_ref]
    return sorted(leaves, key=lambda n: (n.value is not None or bool(n.views), n.last_access, n.start))


def evictable(tree: SpanTree) -> int:
    """All that unlocked nodes own, and what locked spans give once those are gone."""
    nodes = list(tree.nodes())
    plans = [plan(tree, n, locked_only=True) for n in nodes if n.atom and n.lock_ref and free_of_readers(n)]
    owned = sum(node.own_slots for node in nodes if not node.lock_ref)
    return owned + sum(made.gain for made in plans if made is not None)


def views_below(node: Node, locked: bool) -> dict[Node, int]:
    """Of each span, how many children have views of it on or below them (counting locked nodes alone)."""
    counts: dict[Node, int] = {}
    for child in node.children.values():
        if child.lock_ref or not locked:
            for span in {view.span for view in child.views} | views_below(child, locked).keys():
                if child is not span:
                    counts[span] = counts.get(span, 0) + 1
    return counts


def compare(evictor) -> None:
    """The evictor says what a count from scratch says."""
    tree = evictor.tree
    for node in tree.nodes():
        assert node.below == views_below(node, False) and node.locked_below == views_below(node, True)
    want = reclaim_order(tree)
    assert [(span, evictor.gain(span)) for span in evictor.spans()] == want
    assert evictor.leaves() == drop_order(tree)
    assert evictor.evictable == evictable(tree)
    for span, _ in want:
        mine, oracle = evictor.plan(span), plan(tree, span)
        assert set(mine.pack) == set(oracle.pack) and set(mine.drop) == set(oracle.drop)
        assert len(mine.pack) == len(oracle.pack) and len(mine.drop) == len(oracle.drop)
