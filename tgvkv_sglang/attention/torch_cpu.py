"""Attention over dense slots plus views, in plain torch (the CPU path, and the meaning of the GPU path)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..kv.store import UnitStore
from ..kv.views import ViewTable


@dataclass
class Keys:
    """Keys that one request's queries may see in one layer, all int64 on the KV's device.

    Attributes:
        units: ``[N]`` flat unit ids. positions: ``[N]`` their logical positions in the prompt.
    """

    units: torch.Tensor
    positions: torch.Tensor


class KeyRows:
    """Dense slots of one request, without its viewed spans; per layer completed by the view's units.

    Args:
        row: ``[n]`` any int dtype, the request's page-table row (slots by logical position; entries in viewed spans are
            ignored).
        table: views that stand for spans of the row, or None.
    """

    def __init__(self, row: torch.Tensor, table: ViewTable | None, store: UnitStore):
        self._row, self._table, self._store = row, table, store
        dense = torch.ones(len(row), dtype=torch.bool, device=row.device)
        for start, end in table.spans if table else ():
            dense[start:end] = False
        self._positions = dense.nonzero()[:, 0]
        self._slots = row[self._positions].to(torch.int64)

    def layer(self, layer: int) -> Keys:
        """What is seen in layer ``layer`` (0 is the first in the pool): dense positions ascending, then the views'."""
        units = self._store.units_of(self._slots, layer)
        if self._table is None:
            return Keys(units, self._positions)
        view_units, view_positions = self._table.layer(layer)
        return Keys(torch.cat([units, view_units]), torch.cat([self._positions, view_positions.long()]))


def visible(query_positions: torch.Tensor, keys: Keys) -> torch.Tensor:
    """Causal mask ``[T, N]`` bool, True = visible: a query sees keys at its own position and before.

    Args:
        query_positions: ``[T]`` logical positions, int64 on any device.
    """
    return keys.positions[None, :] <= query_positions.to(keys.positions.device)[:, None]


def attend(q: torch.Tensor, keys: Keys, store: UnitStore, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Softmax attention of some queries over ``keys``.

    Args:
        q: ``[T, Hq, D]`` after rotary embedding; K and V are read in its dtype. Hq is a multiple of the KV heads.
        mask: ``[T, N]`` bool, True = visible; None: every key is visible to every query.
        scale: softmax scale.

    Returns:
        ``[T, Hq, Dv]`` in q's dtype.
    """
    k = store.k_flat[keys.units].movedim(0, 1).to(q.dtype)
    v = store.v_flat[keys.units].movedim(0, 1).to(q.dtype)
    out = scaled_dot_product_attention(
        q.movedim(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[0]
    )
    return out[0].movedim(1, 0)


def row_lse_e(q: torch.Tensor, keys: Keys, store: UnitStore, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Natural log-sum-exp of each query's scaled logits over the keys it sees, float32 ``[T, Hq]``.

    Args: as in :func:`attend`; each query must see a key.
    """
    k = store.k_flat[keys.units].float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("thd,nhd->thn", q.float(), k) * scale
    return logits.masked_fill(~mask[:, None, :], float("-inf")).logsumexp(-1)
