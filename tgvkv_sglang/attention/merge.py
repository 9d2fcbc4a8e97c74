"""The view part of attention next to a library's dense part: one kernel, which merges in place by LSE (base 2)."""

from __future__ import annotations

import torch
from tgvkv_kernels.view_attention.api import view_attention

from ..kv.store import UnitStore
from .planner import Step


def merge_views(
    q: torch.Tensor, out: torch.Tensor, lse_b2: torch.Tensor, step: Step, layer: int, store: UnitStore, scale: float
) -> None:
    """Add the views' part to the dense part, in place; nothing to do where no request of the batch has a unit.

    Args:
        q: ``[R, Hq, D]``. out: ``[R, Hq, D]`` the dense part, then the whole row. lse_b2: ``[R, Hq]`` float32 its LSE,
            base 2, likewise.
        scale: softmax scale.
    """
    if step.units is None or step.units.units.shape[0] == 0:
        return
    k_factor, v_factor = store.factors[layer]
    view_attention(
        q,
        store.k_flat,
        store.v_flat,
        step.units.units,
        step.units.indptr[layer, : len(step.holes.hidden) + 1],
        step.row_requests,
        scale * k_factor,
        out,
        lse_b2,
        v_scale=v_factor,
    )
