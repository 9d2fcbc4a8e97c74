"""The one place that chooses: from a prefill batch's scores to the kept tokens of each request and layer.

It runs on the device at the end of the forward, for all requests at once; the host reads the outcome when it processes
the prefill's result. Columns count the vision tokens that a request chooses from, one span after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Mapping, Sequence

import numpy as np
import torch
from tgvkv_kernels.select.api import select_batch

from ..device import HostCopy, upload
from ..errors import SelectionError
from ..kv.store import UnitStore
from ..kv.views import KeptUnits
from ..types import Span
from .budget import Scope


@dataclass(frozen=True)
class Quota:
    """How much of its vision tokens a request keeps.

    Attributes:
        scope: makes integers of layers' weights. retention: exact.
        tokens: the prompt's tokens that ``--tgvkv-scope total`` keeps a share of.
    """

    scope: Scope
    retention: Fraction
    tokens: int


@dataclass(frozen=True)
class Choice:
    """What one request keeps, on the device and on the host.

    Attributes:
        columns: ``[N]`` int32 on the device, layer by layer, ascending within a layer. layer_ptr: ``[L+1]`` int32.
        host_columns, host_ptr: the same on the host.
        vision_tokens: V.
    """

    columns: torch.Tensor
    layer_ptr: torch.Tensor
    host_columns: np.ndarray
    host_ptr: np.ndarray
    vision_tokens: int

    @property
    def budget(self) -> list[int]:
        """Kept tokens of each layer."""
        return np.diff(self.host_ptr).tolist()

    def mask(self) -> np.ndarray:
        """``[L, V]`` bool."""
        kept = np.zeros((len(self.host_ptr) - 1, self.vision_tokens), dtype=bool)
        kept[np.repeat(np.arange(len(kept)), np.diff(self.host_ptr)), self.host_columns] = True
        return kept

    def part(self, first: int, tokens: int) -> tuple[torch.Tensor, list[int]]:
        """What is kept of the ``tokens`` columns from ``first`` on: columns from there, and how many in each layer."""
        if tokens == self.vision_tokens:
            return self.columns, self.budget
        inside = (self.host_columns >= first) & (self.host_columns < first + tokens)
        counts = np.diff(np.concatenate([[0], inside.cumsum()])[self.host_ptr])
        index = upload(torch.from_numpy(np.flatnonzero(inside)), self.columns.device)
        return self.columns[index] - first, counts.tolist()


@dataclass(frozen=True)
class Chosen:
    """What a finished grounding chose and why, on the device; its :class:`Choice` once the host may rely on it.

    Attributes:
        scores: ``[L, V]``, mass: ``[L]``, weights: ``[L]`` (what a layer weighed), float32; extras: the policy's.
        units: the kept tokens as they lay in the pool when they were chosen.
    """

    scores: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor
    extras: Mapping[str, torch.Tensor]
    units: KeptUnits
    copy: HostCopy
    request: int
    first: int

    def confirm(self) -> Choice:
        """The choice, once it is known that all numbers behind it are numbers. Does not wait for the device (the copy
        has arrived with the prefill's result).

        Raises:
            SelectionError: a score is not finite, or a weight is negative or not finite; names the layers.
        """
        columns, layer_ptr, weights = (tensor.numpy() for tensor in self.copy.tensors())
        own = weights[:, self.request]
        bad = np.flatnonzero(~(np.isfinite(own) & (own >= 0))).tolist()
        if bad:
            raise SelectionError(f"scores of layers {bad} are not finite numbers (of {len(own)} layers)")
        bounds = layer_ptr[self.request]
        kept = columns[self.first : self.first + bounds[-1]]
        return Choice(self.units.columns, self.units.layer_ptr, kept, bounds, self.scores.shape[1])


@dataclass(frozen=True)
class Scored:
    """Scores of a prefill batch, one request's vision tokens after the other.

    Attributes:
        scores: ``[L, V]``. mass, weights: ``[L, S]``; weights are not finite where a score or a mass is not.
        extras: of each request. vision_slots: ``[V]`` slot of each vision token.
    """

    scores: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor
    extras: Sequence[Mapping[str, torch.Tensor]]
    vision_slots: torch.Tensor


def choose(scored: Scored, spans: Sequence[Sequence[Span]], quotas: Sequence[Quota], store: UnitStore) -> list[Chosen]:
    """Choose for all requests in one launch. What is not finite counts as lowest or as 0: the choice has the right
    size, for the decode step that is under way when the host finds out.

    Waits for the device, once for the batch, if a scope's total depends on the weights.

    Args:
        spans: of each request, the vision spans it chooses from.
    """
    lens = [sum(map(len, own)) for own in spans]
    totals, budgets = _budgets(scored, lens, quotas)
    columns, layer_ptr, units = select_batch(
        scored.scores.float(), scored.weights, lens, totals, scored.vision_slots, store.slots, budgets=budgets
    )
    copy = HostCopy(columns, layer_ptr, scored.weights)
    chosen, vision, first = [], 0, 0
    for request, (own, tokens, total) in enumerate(zip(spans, lens, totals, strict=True)):
        kept = slice(first, first + total)
        bounds = [(span.start, span.end) for span in own]
        table = KeptUnits(bounds, columns[kept], units[kept], layer_ptr[request])
        numbers = scored.scores[:, vision : vision + tokens], scored.mass[:, request], scored.weights[:, request]
        chosen.append(Chosen(*numbers, scored.extras[request], table, copy, request, first))
        vision, first = vision + tokens, first + total
    return chosen


def _budgets(
    scored: Scored, lens: Sequence[int], quotas: Sequence[Quota]
) -> tuple[list[int], torch.Tensor | None]:
    """Kept tokens of each request, and ``[L, S]`` int32 of each layer if the host had to make them."""
    layers = len(scored.scores)
    totals = [quota.scope.total(layers, tokens, quota.retention) for quota, tokens in zip(quotas, lens, strict=True)]
    if None not in totals:
        return totals, None
    budgets = []
    for quota, tokens, weights in zip(quotas, lens, scored.weights.T.tolist(), strict=True):
        usable = all(math.isfinite(weight) and weight >= 0 for weight in weights)
        budgets.append(
            quota.scope.per_layer(weights, tokens, quota.tokens, quota.retention) if usable else [0] * layers
        )
    table = torch.tensor(budgets, dtype=torch.int32).T.contiguous()
    return [sum(own) for own in budgets], upload(table, scored.scores.device)
