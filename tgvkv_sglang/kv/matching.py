"""How far a matched path may be reused: pure functions of its nodes. Rule numbers are those of docs/design.md.

``steps`` are the (node, matched tokens) of a walk from the root; only the last may be matched in part.
"""

from __future__ import annotations

import numpy as np

from ..spans import vision_runs
from .nodes import Node, View


def whole_prefix(ids: np.ndarray, length: int, atomic: bool) -> int:
    """The largest ``n <= length`` that does not cut a vision run of ``ids`` (the whole prompt) in two."""
    if atomic:
        for start, end in vision_runs(ids):
            if start < length < end:
                return start
    return length


def views_on_path(steps, length: int, deep: Node | None) -> dict[Node, View]:
    """The deepest view of each span among nodes matched whole within ``length`` (or on ``deep``)."""
    usable: dict[Node, View] = {}
    for node, matched in steps:
        if matched == len(node) and (node.end <= length or node is deep):
            usable.update((view.span, view) for view in node.views)
    return usable


def whole_spans(steps, length: int) -> int:
    return next((node.start for node, _ in steps if node.atom and node.start < length < node.end), length)


def covered(steps, length: int, usable: dict[Node, View]) -> int:
    """Cut before the first span that is neither in full nor viewed on the path (rule 5)."""
    for node, _ in steps:
        if node.atom and node.end <= length and node.value is None and node not in usable:
            return node.start
    return length


def replays(deep: Node | None, full: list[Node]) -> bool:
    """The very same prompt was answered before, and its views cover all that is in full."""
    return deep is not None and {view.span for view in deep.views} >= set(full)


def grounding_floor(steps, length: int, deep: Node | None) -> int:
    """Where to cut so that a question is grounded in all of its own words.

    A match that ends inside the text that grounded somebody else's prefill would leave this request's selection to
    the remaining words only. It is cut back to where that text began, unless the prompt is exactly the same
    (``deep``), or no span before it is in full (then nothing is selected).
    """
    node = next((node for node, _ in steps if node.start < length <= node.end), None)
    full = [n for n, _ in steps if n.atom and n.end <= length and n.value is not None]
    if node is None or node.atom or node.grounding_start is None or not full:
        return length
    if replays(deep, full):
        return length
    if length == node.end and node.views:
        return length
    last_span = max(n.end for n, _ in steps if n.atom and n.end <= length)
    return min(length, max(node.grounding_start, last_span))
