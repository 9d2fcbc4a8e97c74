"""K and V of a view under a policy that merges what is evicted into what is kept."""

from __future__ import annotations

from typing import Sequence

import torch

from ..kv.nodes import View
from ..kv.store import UnitStore
from ..selection.policy import Merging
from ..types import Span


def merged(
    view: View, spans: Sequence[Span], scores: torch.Tensor, policy: Merging, store: UnitStore
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the view's units, in their order: ``[N, Hkv, D]`` and ``[N, Hkv, Dv]``.

    Args:
        view: an index view of one of ``spans``, which was scored with them. scores: ``[L, V]`` of all their tokens.
    """
    slots, first = view.span.value, sum(len(span) for span in spans if span.start < view.span.start)
    own = scores[:, first : first + len(slots)]
    layers = []
    for layer, kept in enumerate(view.columns.long().split(list(view.counts))):
        units = store.units_of(slots, layer)
        layers.append(policy.merge(store.k_flat[units], store.v_flat[units], own[layer], kept))
    k, v = (torch.cat(parts) for parts in zip(*layers, strict=True))
    return k, v
