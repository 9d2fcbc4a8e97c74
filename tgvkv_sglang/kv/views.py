"""Views: what one grounding kept of one vision span, and the merged table a request attends through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Sequence

import torch

if TYPE_CHECKING:
    from .nodes import Node


class KeptUnits:
    """Units that stand for vision spans of one request, layer by layer.

    Attributes:
        spans: logical ``[start, end)`` of the spans, ascending.
        positions: ``[N]`` int32 logical positions, layer-major, ascending within a layer.
        units: ``[N]`` flat unit ids of the same tokens.
        layer_ptr: ``[L+1]`` int32 on the device; layer ``l`` owns ``[layer_ptr[l], layer_ptr[l+1])``.
        version: grows when the units move; tables built from older ids are stale.
    """

    __slots__ = ("spans", "positions", "units", "layer_ptr", "version", "_counts")

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        positions: torch.Tensor,
        units: torch.Tensor,
        layer_ptr: torch.Tensor,
    ):
        self.spans = list(spans)
        self.positions, self.units, self.layer_ptr = positions, units, layer_ptr
        self.version = 0
        self._counts: list[int] | None = None

    def __len__(self) -> int:
        return int(self.units.numel())

    @property
    def counts(self) -> list[int]:
        """Kept units of each layer, on the host (read once; synchronises on CUDA)."""
        if self._counts is None:
            self._counts = self.layer_ptr.diff().tolist()
        return self._counts


class View(KeptUnits):
    """Kept units of one vision span for one grounding.

    While ``block`` is None the units point into the span's full slots (*index view*); afterwards they lie in the
    view's own slots (*packed view*).

    Args:
        span: tree node of the vision span.
        grounding: logical ``[start, end)`` of the prefill's new text that scored the span.
        kept: ``[L, len(span)]`` bool.
        slots: ``[len(span)]`` the span's full slots.
        stride: slots in the store (row stride of a layer in unit ids).
    """

    __slots__ = ("span", "node", "grounding", "users", "block")

    def __init__(self, span: "Node", grounding: tuple[int, int], kept: torch.Tensor, slots: torch.Tensor, stride: int):
        layer, offset = kept.nonzero(as_tuple=True)  # layer-major, positions ascend within a layer
        ptr = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=kept.device)
        ptr[1:] = kept.sum(1).cumsum(0)
        positions = (offset + span.start).to(torch.int32)
        super().__init__([(span.start, span.end)], positions, slots.to(torch.int64)[offset] + layer * stride, ptr)
        self.span = span
        self.node: Node | None = None
        self.grounding = grounding
        self.users = 0
        self.block: torch.Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.block is not None

    def moved_to(self, block: torch.Tensor, units: torch.Tensor) -> None:
        """Record that the units now lie in ``block``; tables built from the old ids are stale."""
        self.block, self.units = block, units
        self.version += 1


class ViewTable:
    """The views that one request attends through, and the same merged into per-layer lists.

    Attributes:
        parts: the views, ascending by their first span.
        spans: logical ``[start, end)`` of the viewed spans, ascending.
    """

    def __init__(self, parts: Iterable[KeptUnits]):
        self.parts = sorted(parts, key=lambda part: part.spans[0])
        self.spans = sorted(span for part in self.parts for span in part.spans)
        self._stamp: tuple[int, ...] | None = None

    @property
    def stamp(self) -> tuple[int, ...]:
        """Changes when a view was packed: what was derived from its unit ids is stale."""
        return tuple(part.version for part in self.parts)

    def _refresh(self) -> None:
        stamp = self.stamp
        if stamp == self._stamp:
            return
        self._stamp = stamp
        units, positions, ptr = [], [], [0]
        starts = [0] * len(self.parts)
        for layer in range(len(self.parts[0].counts)):
            for i, part in enumerate(self.parts):
                piece = slice(starts[i], starts[i] + part.counts[layer])
                units.append(part.units[piece])
                positions.append(part.positions[piece])
                starts[i] = piece.stop
            ptr.append(sum(starts))
        self._units, self._positions, self._layer_ptr = torch.cat(units), torch.cat(positions), ptr

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(unit ids, logical positions) of one layer, current even if a view was packed since.

        Positions ascend within each view; across views too, unless one of them stands for several spans.
        """
        self._refresh()
        part = slice(self._layer_ptr[layer], self._layer_ptr[layer + 1])
        return self._units[part], self._positions[part]
