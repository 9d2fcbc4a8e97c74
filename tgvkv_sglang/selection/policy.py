"""What a scoring policy is: which tokens ask, and what their attention makes of each vision token.

A policy is one class in one file; its name is a line in :mod:`tgvkv_sglang.registry`, or an entry point of another
package. It never decides how much is kept (a budget rule does), and never touches text (which is always kept).

All requests of a prefill batch that end their prompt in it are scored together, in blocks of layers, once the blocks'
attention has run. A policy in plain torch inherits from :class:`LayerByLayer` and writes ``score_layer`` alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Callable, Mapping, Protocol, Sequence, runtime_checkable

import torch
from tgvkv_kernels.batch_scores.plan import ScorePlan

from ..device import upload
from ..kv.store import UnitStore
from ..types import Span

Reduce = Callable[[torch.Tensor], torch.Tensor]


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Model:
    """The served model as scoring sees it.

    Attributes:
        layers: layers of this server.
        heads: query heads of the whole model (all tensor-parallel ranks). ranks: how many those are.
        reduce, reduce_max: sum and maximum of a tensor over tensor-parallel ranks; identity on one rank.
        dtype: of its queries; None: that of the KV pool.
    """

    layers: int
    heads: int
    reduce: Reduce = _identity
    reduce_max: Reduce = _identity
    ranks: int = 1
    dtype: torch.dtype | None = None

    @property
    def rank_heads(self) -> int:
        """Query heads of this rank."""
        return self.heads // self.ranks

    def sums(self, *parts: torch.Tensor) -> Sequence[torch.Tensor]:
        """The parts, all ``[l, ...]`` of one dtype, summed over ranks in one collective."""
        if self.reduce is _identity:
            return parts
        lengths = [part.shape[1] for part in parts]
        return self.reduce(torch.cat(parts, 1)).split(lengths, 1)


@dataclass(frozen=True)
class Asked:
    """One request as scoring sees it: whose queries were kept, and what they choose from. All on the host.

    Attributes:
        name: stays the same for the request's whole life and on every rank (not a path: clients may write it).
        text: ``[T]`` int64 ascending logical positions of the queries (what ``Policy.query_positions`` answered).
        vision: ``[V]`` int64 ascending logical positions of the vision tokens.
        spans: the vision spans that those come from, ascending.
    """

    name: str
    text: torch.Tensor
    vision: torch.Tensor
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class LayerInputs:
    """One layer of one request's finished prefill, as far as this rank's heads see it.

    Attributes:
        request: whose. layer: index of the layer, 0 is the server's first.
        q: ``[T, Hq, D]`` queries that were asked for, after rotary embedding.
        lse_e: ``[T, Hq]`` natural log-sum-exp of their attention rows, so that ``A = exp(q.k * scale - lse_e)``.
        text_positions, vision_positions: ``[T]``, ``[V]`` int64 logical positions, on the device. A query sees what
            stands at its own position and before.
        text_units, vision_units: ``[T]``, ``[V]`` where their K and V lie in ``store``.
        store: the KV pool; its ``keys`` are K as the model made it.
        scale: softmax scale.
        model: number of heads in all, and reductions over ranks.
    """

    request: Asked
    layer: int
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
    """What a policy says of one layer of one request, the same on every rank.

    Attributes:
        scores: ``[V]`` float32, higher = keep.
        mass: 0-dim float32, >= 0: what the layer weighs when the budget is shared out.
        extras: further tensors for traces, by name.
    """

    scores: torch.Tensor
    mass: torch.Tensor
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerBlock:
    """Some layers of a prefill batch, of all its requests that one policy scores; this rank's heads.

    Tokens lie one request after the other: T queries and V vision tokens in all, of S requests.

    Attributes:
        requests: the S requests. plan: their lengths and positions as the kernels take them.
        first: index of the block's first layer.
        q: ``[l, T, Hq, D]`` contiguous, after rotary embedding. lse_b2: ``[l, T, Hq]`` float32, base 2.
        text_slots, vision_slots: ``[T]``, ``[V]`` int32 slots, on the device.
        store, scale, model: as in :class:`LayerInputs`.
    """

    requests: Sequence[Asked]
    plan: ScorePlan
    first: int
    q: torch.Tensor
    lse_b2: torch.Tensor
    text_slots: torch.Tensor
    vision_slots: torch.Tensor
    store: UnitStore
    scale: float
    model: Model

    @property
    def layers(self) -> int:
        return self.q.shape[0]

    @cached_property
    def text_parts(self) -> list[slice]:
        """Each request's queries."""
        return parts_of([len(request.text) for request in self.requests])

    @cached_property
    def vision_parts(self) -> list[slice]:
        """Each request's vision tokens."""
        return parts_of([len(request.vision) for request in self.requests])

    @cached_property
    def _positions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        device = self.q.device
        return [(upload(request.text, device), upload(request.vision, device)) for request in self.requests]

    def inputs(self, layer: int, request: int) -> LayerInputs:
        """The ``layer``-th of this block for the ``request``-th of its requests."""
        text, vision = self.text_parts[request], self.vision_parts[request]
        index = self.first + layer
        units = (self.store.units_of(s, index) for s in (self.text_slots[text], self.vision_slots[vision]))
        q, lse_e = self.q[layer, text], self.lse_b2[layer, text] * math.log(2)
        return LayerInputs(self.requests[request], index, q, lse_e, *self._positions[request], *units,
                           store=self.store, scale=self.scale, model=self.model)  # fmt: skip


@dataclass(frozen=True)
class BlockScores:
    """What a policy says of a :class:`LayerBlock`, the same on every rank.

    A request's values have the same bits whatever other requests are in the batch.

    Attributes:
        scores: ``[l, V]`` float32, higher = keep. mass: ``[l, S]`` float32, >= 0, not finite where a score is not.
        extras: of each request, further tensors ``[l, ...]`` for traces, by name.
    """

    scores: torch.Tensor
    mass: torch.Tensor
    extras: Sequence[Mapping[str, torch.Tensor]]


class Policy(Protocol):
    """How vision tokens are scored. Stateless: one object serves all requests of a process.

    Attributes:
        budget: name of the budget rule that it goes with unless another is asked for (``--tgvkv-budget own``).
    """

    budget: str

    def query_positions(self, spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
        """Positions of the new tokens whose queries the policy wants.

        Args:
            spans: vision spans in full, ascending.
            start, end: logical range of the prefill's new tokens.
            cap: at most this many.

        Returns:
            int64 ``[T]`` on the host, ascending, in ``[start, end)``; empty: nothing is selected.
        """

    def score(self, block: LayerBlock) -> BlockScores:
        """Score some layers, once, when all of their K and V are in the pool."""

    def settle(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores of all L layers, ``[L, V]``, once all are known: where layers learn from each other."""


@runtime_checkable
class Merging(Protocol):
    """A policy that also changes what is kept: its views own KV of their own, from the moment they are made.

    One that has no room for it fails like a selection (the request decodes on the whole image).
    """

    def merge(
        self, k: torch.Tensor, v: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer's kept tokens of one span.

        Args:
            k, v: ``[V, Hkv, D]`` of the span's tokens, of this rank. scores: ``[V]``. kept: ``[n]`` int64 ascending.

        Returns:
            ``[n, Hkv, D]`` each, in their dtypes.
        """


class Independent:
    """What most policies share: the paper's budgets, and layers that know nothing of each other."""

    budget = "tvb"

    def settle(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


class LayerByLayer(Independent, ABC):
    """A policy in plain torch: it scores one layer of one request at a time, in :meth:`score_layer`."""

    @abstractmethod
    def score_layer(self, layer: LayerInputs) -> LayerScores:
        """Score one layer of one request."""

    def score(self, block: LayerBlock) -> BlockScores:
        """See :class:`Policy`. Dozens of small launches a layer and request: for comparisons, not for load."""
        done = [
            [self.score_layer(block.inputs(layer, request)) for layer in range(block.layers)]
            for request in range(len(block.requests))
        ]
        scores = torch.cat([torch.stack([layer.scores.float() for layer in own]) for own in done], 1)
        mass = torch.stack([torch.stack([_mass(layer) for layer in own]) for own in done], 1)
        extras = [{name: torch.stack([layer.extras[name] for layer in own]) for name in own[0].extras} for own in done]
        return BlockScores(scores, mass, extras)


def _mass(layer: LayerScores) -> torch.Tensor:
    return torch.where(torch.isfinite(layer.scores).all(), layer.mass.float(), math.nan)


def parts_of(lengths: Sequence[int]) -> list[slice]:
    """Where pieces of these lengths lie, one after the other."""
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
