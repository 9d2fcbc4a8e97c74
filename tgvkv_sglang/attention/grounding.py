"""One prefill's scoring: text queries are stashed chunk by chunk, scores come out with the last chunk.

No attention matrix over the prompt is kept: with q, K and the row's log-sum-exp, ``A = exp(q.k*scale - lse)`` is
recomputed for the text rows (docs/design.md "Selection"). The stash is bounded by ``grounding_cap`` rows a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from tgvkv_kernels.select.api import view_units
from tgvkv_kernels.text_weights.api import text_weights
from tgvkv_kernels.vision_scores.api import vision_scores

from ..errors import UnscoredLayerError
from ..kv.store import UnitStore
from ..kv.views import KeptUnits
from ..scoring.select import Kept
from ..types import Span
from .upload import upload

Reduce = Callable[[torch.Tensor], torch.Tensor]


def grounding_positions(spans: Sequence[Span], start: int, end: int, cap: int) -> torch.Tensor:
    """Positions of the text that grounds a selection: the last ``cap`` new text tokens after the first vision token.

    Args:
        spans: vision spans in full, ascending; only the first one's start matters for "after".
        start, end: logical range of the prefill's new tokens.
        cap: at most this many, the last ones. Tokens dropped by the cap neither weigh nor score.

    Returns:
        int64 ``[T]`` ascending, empty when there is no such text.
    """
    if not spans:
        return torch.empty(0, dtype=torch.int64)
    text = torch.ones(end, dtype=torch.bool)
    text[: max(start, spans[0].start)] = False
    for span in spans:
        text[span.start : min(span.end, end)] = False
    return text.nonzero()[:, 0][-cap:]


@dataclass
class Scores:
    """What a finished grounding knows: ``text_weights [L, T]``, ``scores [L, V]``, ``layer_mass [L]``, all float32."""

    text_weights: torch.Tensor
    scores: torch.Tensor
    layer_mass: torch.Tensor


class Grounding:
    """Scores of the vision tokens in ``spans`` by the text at ``text_positions``, one layer at a time.

    Args:
        spans: vision spans held in full, ascending, at least one.
        text_positions: ``[T]`` from :func:`grounding_positions`, at least one.
        new_text: logical ``[start, end)`` of the prefill, kept with the views for traces and reuse.
        layers: number of layers.
        heads: query heads of the whole model (all tensor-parallel ranks).
        reduce: sums a tensor over tensor-parallel ranks; identity on one rank.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        text_positions: torch.Tensor,
        new_text: tuple[int, int],
        layers: int,
        heads: int,
        reduce: Reduce | None = None,
    ):
        self.spans = spans
        self.text_positions = text_positions
        self.vision_positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        self.new_text = new_text
        self._heads = heads
        self._reduce = reduce or (lambda tensor: tensor)
        self._stash: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]
        self._done: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = [None] * layers

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Which rows of a chunk ``[start, end)`` are grounding text (offsets from ``start``), int64 on the host."""
        inside = (self.text_positions >= start) & (self.text_positions < end)
        return self.text_positions[inside] - start

    def locate(self, row: torch.Tensor) -> None:
        """Say where the prompt's tokens lie, once for all layers, with the last chunk.

        Args:
            row: ``[n]`` the request's page-table row (slot of each logical position); only the text and vision
                positions of this grounding are read.
        """
        self._text, self._vision = (
            upload(at, row.device) for at in (self.text_positions, self.vision_positions)
        )
        self._text_slots, self.vision_slots = row[self._text].long(), row[self._vision].long()

    def add(self, layer: int, q: torch.Tensor, lse_e: torch.Tensor) -> None:
        """Stash a chunk's text rows: ``q [t, Hq, D]`` after rotary embedding, ``lse_e [t, Hq]`` natural log."""
        if q.shape[0]:
            self._stash[layer].append((q, lse_e))

    def finish_layer(self, layer: int, store: UnitStore, scale: float) -> None:
        """Score one layer once all its text rows are stashed and :meth:`locate` was called. scale: softmax scale."""
        chunks = zip(*self._stash[layer], strict=True)
        q, lse_e = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in chunks)
        self._stash[layer] = []
        keys = store.k_flat[store.units_of(self._text_slots, layer)]
        w = self._reduce(text_weights(q, keys, lse_e, scale, total_q_heads=self._heads))
        units = store.units_of(self.vision_slots, layer)
        scores, mass = vision_scores(
            q, lse_e, w, store.k_flat, units, self._text, self._vision, scale, total_q_heads=self._heads
        )
        packed = self._reduce(torch.cat([scores, mass[None]]))
        self._done[layer] = (w, packed[:-1], packed[-1])

    def kept_units(self, kept: Kept, store: UnitStore) -> KeptUnits:
        """The units of a choice over all of this grounding's spans, in the slots that :meth:`locate` was told."""
        units = view_units(kept.columns, kept.layer_ptr, self.vision_slots, store.slots)
        positions = self._vision[kept.columns.long()].to(torch.int32)
        return KeptUnits([(span.start, span.end) for span in self.spans], positions, units, kept.layer_ptr)

    @property
    def complete(self) -> bool:
        return all(layer is not None for layer in self._done)

    def result(self) -> Scores:
        """All layers' results; raises UnscoredLayerError if a layer was never scored."""
        missing = [layer for layer, done in enumerate(self._done) if done is None]
        if missing:
            raise UnscoredLayerError(f"layers {missing} were never scored; selection needs all of them")
        w, scores, mass = zip(*self._done, strict=True)
        return Scores(torch.stack(w), torch.stack(scores), torch.stack(mass))
