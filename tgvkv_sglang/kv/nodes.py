"""Nodes of the span tree and the views that hang on them."""

from __future__ import annotations

from itertools import accumulate
from typing import Hashable, Protocol, Sequence

import numpy as np
import torch
from tgvkv_kernels.select.api import view_units

from ..device import to_device
from .store import UnitStore
from .views import KeptUnits


class SpanUser(Protocol):
    """A running request that decodes through views; told when a span's full slots go away."""

    def span_reclaimed(self, start: int, end: int) -> None: ...


class Node:
    """A run of tokens with their slots.

    Attributes:
        key: ``[n]`` int64 token ids. start: logical position of the first.
        value: ``[n]`` int64 slots; None for a vision span whose full slots were reclaimed.
        atom: the node is one whole vision span and never splits.
        serial: counts the nodes of a tree as they are made, so that every rank breaks ties alike.
        lock_ref: running requests whose prefix runs through this node.
        through: those of them that attend to this vision span through a view, not through ``value``.
        views: views whose grounding ends where this node ends, the oldest first.
        span_views: (vision node) every view of this span, wherever it hangs.
        below: of each span, how many children have views of it, on themselves or further down (see ``branches.py``).
        locked_below: the same, of locked nodes only.
        edge: this node's key among its parent's children.
        grounding_start: where the prefill that made this text began its new text; None for generated text.
    """

    __slots__ = (
        "key", "value", "parent", "children", "atom", "start", "serial", "lock_ref", "last_access", "through", "views",
        "span_views", "below", "locked_below", "grounding_start", "edge",
    )  # fmt: skip

    def __init__(
        self,
        key: np.ndarray,
        value: torch.Tensor | None,
        parent: "Node | None" = None,
        edge: Hashable = None,
        start: int = 0,
        atom: bool = False,
        serial: int = 0,
    ):
        self.key, self.value, self.start, self.atom, self.serial = key, value, start, atom, serial
        self.parent, self.edge = parent, edge
        self.children: dict[Hashable, Node] = {}
        self.lock_ref = 0
        self.last_access = 0
        self.through: set[SpanUser] = set()
        self.views: list[View] = []
        self.span_views: set[View] = set()
        self.below: dict[Node, int] = {}
        self.locked_below: dict[Node, int] = {}
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
        return self.lock_ref == len(self.through)

    @property
    def age(self) -> tuple[int, int, int]:
        """Sort key, least recently used first; no two nodes of a tree are equal."""
        return self.last_access, self.start, self.serial

    def views_of(self, span: "Node") -> "list[View]":
        """The views of ``span`` that hang here, the oldest first."""
        return [view for view in self.views if view.span is span]

    def is_below(self, other: "Node") -> bool:
        """True if this node is a strict descendant of ``other``."""
        node = self.parent
        while node is not None and node.start >= other.start:
            if node is other:
                return True
            node = node.parent
        return False


class View(KeptUnits):
    """Kept units of one vision span for one grounding.

    While ``block`` is None the units point into the span's full slots (*index view*); afterwards they lie in the
    view's own slots (*packed view*).

    Args:
        span: tree node of the vision span.
        grounding: logical ``[start, end)`` of the prefill's new text that scored the span.
        columns: ``[N]`` int32 on the device of ``slots``, the kept tokens of each layer, counted from the span's start.
        counts: kept tokens of each layer.
        slots: ``[len(span)]`` the span's full slots.
        store: where those slots lie.
    """

    __slots__ = ("span", "node", "grounding", "readers", "block")

    def __init__(
        self,
        span: Node,
        grounding: tuple[int, int],
        columns: torch.Tensor,
        counts: Sequence[int],
        slots: torch.Tensor,
        store: UnitStore,
    ):
        layer_ptr = to_device([0, *accumulate(counts)], slots.device)
        units = view_units(columns, layer_ptr, slots, store.slots)
        super().__init__([(span.start, span.end)], columns, units, layer_ptr, counts)
        self.span = span
        self.node: Node | None = None
        self.grounding = grounding
        self.readers = 0
        self.block: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.block is not None

    def moved_to(self, block: torch.Tensor, units: torch.Tensor) -> None:
        """Record that the units now lie in ``block``; tables built from the old ids are stale."""
        self.block, self.units = block, units
        self.version += 1


def shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading equal ids."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
