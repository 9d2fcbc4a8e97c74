"""Device tables of one batch: where each request's views lie, and which positions of its row they stand for.

Two requests on a model of three layers with 100 slots (unit ``l*100 + s`` is layer ``l`` of slot ``s``). The first has
one view, of the image at positions 2..5 in slots 12..15; layer 0 keeps its positions 2 and 4, layer 1 nothing, layer 2
position 5. The second has no view:

>>> import torch
>>> from tgvkv_sglang.kv.views import KeptUnits, ViewTable
>>> cpu = torch.device("cpu")
>>> columns, units = torch.tensor([0, 2, 3]), torch.tensor([12, 14, 215])
>>> view = KeptUnits([(2, 6)], columns, units, torch.tensor([0, 2, 2, 3]))
>>> tables = [ViewTable([view]), None]
>>> holes = Holes.of(tables, cpu)  # request 0 hides one span of 4 positions, request 1 none
>>> holes.start.tolist(), holes.end.tolist(), holes.indptr.tolist(), holes.hidden
([2], [6], [0, 1, 1], [4, 0])
>>> batch = BatchUnits.of(tables, 3, cpu)  # layer by layer; in layer 0 request 0 owns units[0:2], request 1 units[2:2]
>>> batch.units.tolist(), batch.indptr.tolist()
([12, 14, 215], [[0, 2, 2], [2, 2, 2], [2, 3, 3]])

A second view, of request 1 (an image at position 0 in slots 30 and 31, of which every layer keeps position 1), stands
behind request 0's in every layer:

>>> other = KeptUnits([(0, 2)], torch.tensor([1, 1, 1]), torch.tensor([31, 131, 231]), torch.tensor([0, 1, 2, 3]))
>>> batch = BatchUnits.of([ViewTable([view]), ViewTable([other])], 3, cpu)
>>> batch.units.tolist(), batch.indptr.tolist()
([12, 14, 31, 131, 215, 231], [[0, 2, 3], [3, 3, 4], [4, 5, 6]])

A captured graph reads the same at a fixed address. This one has room for 8 units and 3 requests; the third is padding:

>>> fixed = FixedUnits(3, 3, 8, cpu)
>>> fixed.load(batch)
>>> fixed.units.tolist(), fixed.indptr.tolist()
([12, 14, 31, 131, 215, 231, 0, 0], [[0, 2, 3, 3], [3, 3, 4, 4], [4, 5, 6, 6]])

They are made outside the forward (and outside a CUDA graph) from what the host knows plus the views' own device
tensors; nothing waits for the device. The torch operations here run once when a batch's views change, not every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch

from ..device import to_device, upload
from ..kv.views import ViewTable

Tables = Sequence[ViewTable | None]


@dataclass
class Holes:
    """Positions that views stand for, of each request: ``start [H]``, ``end [H]``, ``indptr [B+1]``, int32.

    Attributes:
        hidden: per request, how many positions (host).
    """

    start: torch.Tensor
    end: torch.Tensor
    indptr: torch.Tensor
    hidden: list[int]

    @classmethod
    def of(cls, tables: Tables, device: torch.device) -> "Holes":
        spans = [table.spans if table is not None else [] for table in tables]
        indptr = [0]
        for own in spans:
            indptr.append(indptr[-1] + len(own))
        flat = [span for own in spans for span in own]
        packed = to_device([*(s for s, _ in flat), *(e for _, e in flat), *indptr], device)
        start, end, bounds = packed.split([len(flat), len(flat), len(indptr)])
        return cls(start, end, bounds, [sum(e - s for s, e in own) for own in spans])


@dataclass
class BatchUnits:
    """View units of a batch: ``units [N]`` int32, layer by layer and in it request by request; ``indptr [L, B+1]``.

    In layer ``l`` request ``b`` owns ``units[indptr[l, b]:indptr[l, b+1]]``.
    """

    units: torch.Tensor
    indptr: torch.Tensor

    @classmethod
    def of(cls, tables: Tables, layers: int, device: torch.device) -> "BatchUnits":
        parts = [(b, part) for b, table in enumerate(tables) if table is not None for part in table.parts]
        if not parts:
            return cls.empty(layers, len(tables), device)
        base, first = [0], [0] * (len(tables) + 1)  # of the parts: first unit; of the requests: first part
        for b, part in parts:
            base.append(base[-1] + len(part))
            first[b + 1] += 1
        for b in range(len(tables)):
            first[b + 1] += first[b]
        total, count = base.pop(), len(parts)
        base, first = to_device([*base, *first], device, torch.int64).split([count, len(first)])
        units = torch.cat([part.units for _, part in parts]).to(torch.int32)
        ptr = torch.stack([part.layer_ptr for _, part in parts]).to(torch.int64)  # [P, L+1]
        counts = ptr.diff(dim=1).T.flatten()  # layer-major: segment l*P + p
        source = (ptr[:, :-1] + base[:, None]).T.flatten()
        start = counts.cumsum(0) - counts
        segment = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
        order = torch.arange(total, device=device) - start[segment] + source[segment]
        bounds = torch.cat([start, start.new_full((1,), total)])
        rows = torch.arange(layers, device=device)[:, None] * count + first[None, :]
        return cls(units[order], bounds[rows].to(torch.int32))

    @classmethod
    def empty(cls, layers: int, batch: int, device: torch.device) -> "BatchUnits":
        zeros = torch.zeros(layers, batch + 1, dtype=torch.int32, device=device)
        return cls(torch.empty(0, dtype=torch.int32, device=device), zeros)


class FixedUnits(BatchUnits):
    """The same at a fixed address for a captured graph: room for ``capacity`` units and ``max_batch`` requests.

    Rows past a batch own nothing.
    """

    def __init__(self, layers: int, max_batch: int, capacity: int, device: torch.device):
        units = torch.zeros(capacity, dtype=torch.int32, device=device)
        super().__init__(units, torch.zeros(layers, max_batch + 1, dtype=torch.int32, device=device))

    @property
    def capacity(self) -> int:
        return self.units.shape[0]

    def load(self, new: BatchUnits) -> None:
        """Copy ``new`` in, on the current stream."""
        count, batch = new.units.shape[0], new.indptr.shape[1]
        self.units[:count] = new.units
        self.indptr[:, :batch] = new.indptr
        self.indptr[:, batch:] = new.indptr[:, -1:]


def row_requests(row_counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """``[R]`` int32: which request each query row of a prefill belongs to."""
    counts = torch.tensor(row_counts)
    rows = torch.repeat_interleave(torch.arange(len(row_counts), dtype=torch.int32), counts)
    return upload(rows, device)


def units_in(tables: Tables) -> int:
    """Units of a batch's views, in all layers."""
    return sum(len(part) for table in tables if table is not None for part in table.parts)


def stamp_of(tables: Tables) -> tuple:
    """Equal for two batches only if the same tables, none of them packed in between, stand in the same rows.

    Holds the tables themselves, so that a new one never passes for an old one at its address.
    """
    return tuple((table, table.stamp) if table is not None else None for table in tables)
