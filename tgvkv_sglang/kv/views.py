"""What stands for vision spans in a request's attention: kept units, and the merged table of several of them."""

from __future__ import annotations

from typing import Iterable, Sequence

import torch


class KeptUnits:
    """Units that stand for vision spans of one request, layer by layer.

    Attributes:
        spans: logical ``[start, end)`` of the spans, ascending.
        columns: ``[N]`` int32, layer by layer, ascending within a layer: the kept tokens, counted through the spans.
        units: ``[N]`` flat unit ids of the same tokens.
        layer_ptr: ``[L+1]`` int32 on the device; layer ``l`` owns ``[layer_ptr[l], layer_ptr[l+1])``.
        version: grows when the units move; tables built from older ids are stale.
    """

    __slots__ = ("spans", "columns", "units", "layer_ptr", "version", "_counts")

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        columns: torch.Tensor,
        units: torch.Tensor,
        layer_ptr: torch.Tensor,
        counts: Sequence[int] | None = None,
    ):
        self.spans = list(spans)
        self.columns, self.units, self.layer_ptr = columns, units, layer_ptr
        self.version = 0
        self._counts = counts

    def __len__(self) -> int:
        return int(self.units.numel())

    @property
    def positions(self) -> torch.Tensor:
        """``[N]`` logical positions of the units."""
        if len(self.spans) == 1:
            return self.columns + self.spans[0][0]
        return torch.cat([torch.arange(*span) for span in self.spans]).to(self.columns.device)[self.columns.long()]

    @property
    def counts(self) -> Sequence[int]:
        """Kept units of each layer, on the host (if it was not told, read once; that waits for a device)."""
        if self._counts is None:
            self._counts = self.layer_ptr.diff().tolist()
        return self._counts


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
