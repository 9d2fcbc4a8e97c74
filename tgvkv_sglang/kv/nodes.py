"""Nodes of the span tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Hashable, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from .views import View

class SpanUser(Protocol):
    """A running request that decodes through views; told when a span's full slots go away."""

    def span_reclaimed(self, start: int, end: int) -> None: ...


class Node:
    """A run of tokens with their slots.

    Attributes:
        key: ``[n]`` int64 token ids. start: logical position of the first.
        value: ``[n]`` int64 slots; None for a vision span whose full slots were reclaimed.
        atom: the node is one whole vision span and never splits.
        lock_ref: running requests whose prefix runs through this node.
        users: those of them that attend to this vision span through a view, not through ``value``.
        views: views whose grounding ends where this node ends.
        span_views: (vision node) every view of this span, wherever it hangs.
        edge: this node's key among its parent's children.
        grounding_start: where the prefill that made this text began its new text; None for generated text.
    """

    __slots__ = (
        "key", "value", "parent", "children", "atom", "start", "lock_ref", "last_access", "users", "views",
        "span_views", "grounding_start", "edge",
    )  # fmt: skip

    def __init__(
        self,
        key: np.ndarray,
        value: torch.Tensor | None,
        parent: "Node | None" = None,
        edge: Hashable = None,
        start: int = 0,
        atom: bool = False,
    ):
        self.key, self.value, self.start, self.atom = key, value, start, atom
        self.parent, self.edge = parent, edge
        self.children: dict[Hashable, Node] = {}
        self.lock_ref = 0
        self.last_access = 0
        self.users: set[SpanUser] = set()
        self.views: list[View] = []
        self.span_views: set[View] = set()
        self.grounding_start: int | None = None

    def __len__(self) -> int:
        return len(self.key)

    @property
    def end(self) -> int:
        return self.start + len(self.key)

    @property
    def own_slots(self) -> int:
        """Slots this node owns: its full ones and the blocks of packed views that hang on it."""
        held = 0 if self.value is None else len(self.value)
        return held + sum(len(view.block) for view in self.views if view.block is not None)

    @property
    def unpinned(self) -> bool:
        """Every running request on this vision span attends through a view."""
        return self.lock_ref == len(self.users)

    def is_below(self, other: "Node") -> bool:
        """True if this node is a strict descendant of ``other``."""
        node = self.parent
        while node is not None and node.start >= other.start:
            if node is other:
                return True
            node = node.parent
        return False


def shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading equal ids."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
