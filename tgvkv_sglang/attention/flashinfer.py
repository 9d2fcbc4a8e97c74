"""The view part of attention next to FlashInfer's dense part. LSE in base 2, FlashInfer's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tgvkv_kernels.dense_rows.api import dense_rows
from tgvkv_kernels.view_attention.api import view_attention

from ..kv.store import UnitStore
from .batch_tables import BatchUnits, Holes
from .rows import Row


@dataclass
class Step:
    """What one forward of a batch with vision needs beyond the stock path.

    Attributes:
        holes, units: positions of each request that views stand for (of all rows of a captured graph, padding
            included), and the views' units; both None when no request has a view.
        row_requests: ``[R]`` request of each query row in a prefill; None in decode (row ``b`` is request ``b``).
        scoring: requests that score in this forward, each with the batch rows of its grounding text ``[t]`` int64.
    """

    holes: Holes | None = None
    units: BatchUnits | None = None
    row_requests: torch.Tensor | None = None
    scoring: list[tuple[Row, torch.Tensor]] = field(default_factory=list)


def dense_indices(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    holes: Holes,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> None:
    """Write the slots of every request without its holes, one after the other, and their bounds (FlashInfer's form)."""
    dense_rows(
        req_to_token,
        req_pool_indices,
        seq_lens,
        holes.start,
        holes.end,
        holes.indptr,
        kv_indices=kv_indices,
        kv_indptr=kv_indptr,
    )


def merge_views(
    q: torch.Tensor,
    out: torch.Tensor,
    lse_b2: torch.Tensor,
    step: Step,
    layer: int,
    store: UnitStore,
    scale: float,
) -> None:
    """Add the views' part to the dense part, in place; nothing to do where no request of the batch has a unit.

    Args:
        q: ``[R, Hq, D]``. out: ``[R, Hq, D]`` the dense part, then the whole row. lse_b2: ``[R, Hq]`` float32 its LSE,
            base 2, likewise.
    """
    if step.units is None or step.units.units.shape[0] == 0:
        return
    view_attention(
        q,
        store.k_flat,
        store.v_flat,
        step.units.units,
        step.units.indptr[layer, : len(step.holes.hidden) + 1],
        step.row_requests,
        scale,
        out,
        lse_b2,
    )
