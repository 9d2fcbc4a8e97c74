"""Views: what one grounding kept of one vision span, and the merged table a request attends through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable

import torch

if TYPE_CHECKING:
    from .nodes import Node


class View:
    """Kept units of one vision span for one grounding.

    While ``block`` is None the units point into the span's full slots (*index view*); afterwards they lie in the
    view's own slots (*packed view*).

    Args:
        span: tree node of the vision span.
        grounding: logical ``[start, end)`` of the prefill's new text that scored the span.
        kept: ``[L, len(span)]`` bool.
        slots: ``[len(span)]`` the span's full slots.
        units_per_layer: slots in the store (row stride of a layer in unit ids).
    """

    __slots__ = ("span", "node", "grounding", "positions", "units", "counts", "users", "block", "version")

    def __init__(self, span: "Node", grounding: tuple[int, int], kept: torch.Tensor, slots: torch.Tensor, stride: int):
        layer, offset = kept.nonzero(as_tuple=True)  # layer-major, positions ascend within a layer
        self.span = span
        self.node: Node | None = None
        self.grounding = grounding
        self.positions = (offset + span.start).to(torch.int32)
        self.units = slots.to(torch.int64)[offset] + layer * stride
        self.counts: list[int] = kept.sum(1).tolist()
        self.users = 0
        self.block: torch.Tensor | None = None
        self.version = 0

    def __len__(self) -> int:
        return int(self.units.numel())

    @property
    def packed(self) -> bool:
        return self.block is not None

    def moved_to(self, block: torch.Tensor, units: torch.Tensor) -> None:
        """Record that the units now lie in ``block``; tables built from the old ids are stale."""
        self.block, self.units = block, units
        self.version += 1


class ViewTable:
    """Several views of one request merged into per-layer lists, positions ascending.

    Attributes:
        spans: logical ``[start, end)`` of the viewed spans, ascending.
        units: ``[N]`` int64 flat unit ids, layer-major.
        positions: ``[N]`` int32 logical positions.
        layer_ptr: L+1 offsets into the two.
    """

    def __init__(self, views: Iterable[View]):
        self.views = sorted(views, key=lambda view: view.span.start)
        self.spans = [(view.span.start, view.span.end) for view in self.views]
        self._stamp: tuple[int, ...] | None = None
        self._refresh()

    def _refresh(self) -> None:
        stamp = tuple(view.version for view in self.views)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        layers = len(self.views[0].counts)
        units, positions, ptr = [], [], [0]
        starts = [0] * len(self.views)
        for layer in range(layers):
            for i, view in enumerate(self.views):
                part = slice(starts[i], starts[i] + view.counts[layer])
                units.append(view.units[part])
                positions.append(view.positions[part])
                starts[i] = part.stop
            ptr.append(sum(starts))
        self.units, self.positions, self.layer_ptr = torch.cat(units), torch.cat(positions), ptr

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit ids, logical positions) of one layer, current even if a view was packed since."""
        self._refresh()
        part = slice(self.layer_ptr[layer], self.layer_ptr[layer + 1])
        return self.units[part], self.positions[part]
