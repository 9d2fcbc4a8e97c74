"""One prefill's scoring: the asking text's queries are stashed chunk by chunk, scores come with the last chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

import torch
from tgvkv_kernels.select.api import view_units

from ..device import upload
from ..errors import NeverScoredError
from ..kv.store import UnitStore
from ..kv.views import KeptUnits
from ..types import Span
from .policy import LayerInputs, LayerScores, Model, Policy


@dataclass
class Scores:
    """What a finished grounding knows: ``scores [L, V]``, ``layer_mass [L]``, float32, and the policy's extras."""

    scores: torch.Tensor
    layer_mass: torch.Tensor
    extras: Mapping[str, torch.Tensor]


@dataclass
class Kept:
    """Kept columns of ``[L, V]`` scores: ``columns [N]`` int32 ascending within a layer, ``layer_ptr [L+1]`` int32."""

    columns: torch.Tensor
    layer_ptr: torch.Tensor

    def mask(self, vision_tokens: int) -> torch.Tensor:
        """``[L, V]`` bool."""
        layers = self.layer_ptr.shape[0] - 1
        device = self.columns.device
        layer = torch.repeat_interleave(
            torch.arange(layers, device=device), self.layer_ptr.diff().long(), output_size=self.columns.shape[0]
        )
        kept = torch.zeros(layers, vision_tokens, dtype=torch.bool, device=device)
        kept[layer, self.columns.long()] = True
        return kept


@dataclass(frozen=True)
class Located:
    """Where a prompt's text and vision tokens lie: positions and slots ``[T]``, ``[V]`` int64 on the device."""

    text: torch.Tensor
    vision: torch.Tensor
    text_slots: torch.Tensor
    vision_slots: torch.Tensor


class Grounding:
    """Scores of the vision tokens in ``spans`` by the text at ``text_positions``, one layer at a time.

    The stash is bounded by the ``cap`` that the policy was given (``--tgvkv-grounding-cap`` rows a layer).

    Args:
        spans: vision spans held in full, ascending, at least one.
        text_positions: ``[T]`` of :meth:`Policy.query_positions`, at least one.
        new_text: logical ``[start, end)`` of the prefill, kept with the views for traces and reuse.
        model: layers, heads, and the sum over ranks.
        policy: how layers are scored.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        text_positions: torch.Tensor,
        new_text: tuple[int, int],
        model: Model,
        policy: Policy,
    ):
        self.spans, self.text_positions, self.new_text = spans, text_positions, new_text
        self.vision_positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        self._model, self._policy = model, policy
        self._where: Located | None = None
        self._stash: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(model.layers)]
        self._done: list[LayerScores | None] = [None] * model.layers

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Which rows of a chunk ``[start, end)`` are grounding text (offsets from ``start``), int64 on the host."""
        inside = (self.text_positions >= start) & (self.text_positions < end)
        return self.text_positions[inside] - start

    def locate(self, page_row: torch.Tensor) -> None:
        """Say where the prompt's tokens lie, once for all layers, with the last chunk and before its first layer.

        Args:
            page_row: ``[n]`` the request's page-table row (slot of each logical position); only the text and vision
                positions of this grounding are read.
        """
        text, vision = (upload(at, page_row.device) for at in (self.text_positions, self.vision_positions))
        self._where = Located(text, vision, page_row[text].long(), page_row[vision].long())

    @property
    def where(self) -> Located:
        """Raises NeverScoredError before :meth:`locate`."""
        if self._where is None:
            raise NeverScoredError("a prompt is to be scored before anybody said where its tokens lie; call locate()")
        return self._where

    def add(self, layer: int, q: torch.Tensor, lse_e: torch.Tensor) -> None:
        """Stash a chunk's text rows, memory of their own: ``q [t, Hq, D]`` after rotary, ``lse_e [t, Hq]`` natural."""
        if q.shape[0]:
            self._stash[layer].append((q, lse_e))

    def finish_layer(self, layer: int, store: UnitStore, scale: float) -> None:
        """Score one layer once all its text rows are stashed and :meth:`locate` was called. scale: softmax scale."""
        chunks = zip(*self._stash[layer], strict=True)
        q, lse_e = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in chunks)
        self._stash[layer] = []
        at = self.where
        units = (store.units_of(slots, layer) for slots in (at.text_slots, at.vision_slots))
        inputs = LayerInputs(q, lse_e, at.text, at.vision, *units, store=store, scale=scale, model=self._model)
        self._done[layer] = self._policy.score_layer(inputs)

    def kept_units(self, kept: Kept, store: UnitStore) -> KeptUnits:
        """The units of a choice over all of this grounding's spans, in the slots that :meth:`locate` was told."""
        units = view_units(kept.columns, kept.layer_ptr, self.where.vision_slots, store.slots)
        positions = self.where.vision[kept.columns.long()].to(torch.int32)
        return KeptUnits([(span.start, span.end) for span in self.spans], positions, units, kept.layer_ptr)

    @property
    def complete(self) -> bool:
        return all(layer is not None for layer in self._done)

    def result(self) -> Scores:
        """All layers' results; raises NeverScoredError if a layer has none."""
        missing = [layer for layer, done in enumerate(self._done) if done is None]
        if missing:
            raise NeverScoredError(f"layers {missing} were never scored; selection needs all of them")
        extras = {
            name: torch.stack([layer.extras[name] for layer in self._done]) for name in self._done[0].extras
        }
        scores, mass = ([getattr(layer, name) for layer in self._done] for name in ("scores", "mass"))
        return Scores(torch.stack(scores), torch.stack(mass), extras)
