"""What a scoring policy is: which text asks, and what one layer's attention makes of each vision token.

A policy is one class in one file; its name is a line in :mod:`tgvkv_sglang.registry`, or an entry point of another
package. It never decides how much is kept (a budget rule does), and never touches text (which is always kept).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Mapping, Protocol, Sequence

import torch

from ..kv.store import UnitStore
from ..types import Span

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Model:
    """The served model as scoring sees it.

    Attributes:
        layers: layers of this server.
        heads: query heads of the whole model (all tensor-parallel ranks).
        reduce: sums a tensor over tensor-parallel ranks; identity on one rank.
    """

    layers: int
    heads: int
    reduce: Reduce = lambda tensor: tensor


@dataclass(frozen=True)
class LayerInputs:
    """One layer of a finished prefill, as far as this rank's heads see it.

    Attributes:
        q: ``[T, Hq, D]`` queries of the text that asks, after rotary embedding.
        lse_e: ``[T, Hq]`` natural log-sum-exp of their attention rows, so that ``A = exp(q.k * scale - lse_e)``.
        text_positions, vision_positions: ``[T]``, ``[V]`` int64 logical positions, on the device. A query sees what
            stands at its own position and before.
        text_units, vision_units: ``[T]``, ``[V]`` where their K and V lie in ``store``.
        store: the KV pool.
        scale: softmax scale.
        model: number of heads in all, and the sum over ranks.
    """

    q: torch.Tensor
    lse_e: torch.Tensor
    text_positions: torch.Tensor
    vision_positions: torch.Tensor
    text_units: torch.Tensor
    vision_units: torch.Tensor
    store: UnitStore
    scale: float
    model: Model


@dataclass(frozen=True)
class LayerScores:
    """What a policy says of one layer, the same on every rank.

    Attributes:
        scores: ``[V]`` float32, higher = keep.
        mass: 0-dim float32, >= 0: what the layer weighs when the budget is shared out.
        extras: further tensors for traces, by name.
    """

    scores: torch.Tensor
    mass: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Policy(Protocol):
    """How vision tokens are scored. Stateless: one object serves all requests of a process."""

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        """Positions of the new tokens whose queries the policy wants.

        Args:
            spans: vision spans in full, ascending.
            start, end: logical range of the prefill's new tokens.
            cap: at most this many.

        Returns:
            int64 ``[T]`` on the host, ascending, in ``[start, end)``; empty: nothing is selected.
        """

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        """Score one layer, once, when all of the prefill's K and V are in the pool."""
