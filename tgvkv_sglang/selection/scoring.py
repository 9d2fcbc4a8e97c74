"""One prefill batch's scoring: queries are stashed layer by layer, scored in blocks of layers, chosen from at the end.

For L layers that is L launches and six more, eight when a prompt came in several chunks, however many requests score by
the paper's policy. A second block of layers costs four to six more, a second policy as many as it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Sequence

import torch
from tgvkv_kernels.batch_scores.plan import ScorePlan
from tgvkv_kernels.stash_rows.api import stash_rows

from ..device import upload
from ..kv.store import UnitStore
from .choose import Scored, choose
from .grounding import Grounding, Piece
from .policy import BlockScores, LayerBlock, Model, parts_of


@dataclass(frozen=True)
class Ask:
    """One request's share of a forward that it scores in.

    Attributes:
        grounding: what it is scored with.
        rows: ``[t]`` int64 on the host, rows of the batch whose queries are asked for.
        page_row: the request's row of the page table.
        last: its prompt ends in this forward.
    """

    grounding: Grounding
    rows: torch.Tensor
    page_row: int
    last: bool

    @property
    def whole(self) -> bool:
        """False if a chunk's queries never came, as in a prefill replayed from a graph: then nothing is chosen."""
        return self.grounding.stashed + len(self.rows) == len(self.grounding.asked.text)

    @property
    def by(self) -> tuple[int, int]:
        """Policy and rule; each is one object in a process."""
        return id(self.grounding.policy), id(self.grounding.rule)


@dataclass
class _Group:
    """Requests that one policy scores, all of whose queries are there.

    Attributes:
        stashed: of each request, this forward's part of the stash. text_slots, vision_slots: ``[T]``, ``[V]``.
        scores, weights: of the blocks of layers so far.
    """

    asks: list[Ask]
    stashed: list[slice]
    text_slots: torch.Tensor
    vision_slots: torch.Tensor
    plan: ScorePlan
    scores: list[BlockScores] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)


class PrefillScoring:
    """What a forward's requests score. Made before the forward; :meth:`add` once a layer, ascending.

    Args:
        asks: requests that stash or end their prompt in this forward.
        page_table: ``[requests, context]`` int32, slot of each logical position, contiguous.
        store: the KV pool. model: layers, heads and reductions over ranks.
        stash_bytes: a block of layers takes as many as fit into it, at least one.
    """

    def __init__(self, asks: Sequence[Ask], page_table: torch.Tensor, store: UnitStore, model: Model, stash_bytes: int):
        self._store, self._model = store, model
        self._dtype = model.dtype or store.k_flat.dtype
        ends = sorted((ask for ask in asks if ask.last and ask.whole), key=lambda ask: ask.by)
        self._others = [ask for ask in asks if not ask.last]
        self._held: list[list[Piece]] = [[] for _ in self._others]
        rows = [ask.rows for ask in (*ends, *self._others)]
        self._parts = parts_of(list(map(len, rows)))
        text, vision = ([getattr(ask.grounding.asked, kind) + ask.page_row * page_table.shape[1] for ask in ends]
                        for kind in ("text", "vision"))  # fmt: skip
        count, tokens, keys = (sum(map(len, some)) for some in (rows, text, vision))
        packed = upload(torch.cat([*rows, torch.arange(count), *text, *vision]), page_table.device)
        self._rows, self._targets, places = packed.split([count, count, tokens + keys])
        slots = page_table.take(places) if ends else places
        self._groups = self._grouped(ends, *slots.split([tokens, keys]))
        row_bytes = model.rank_heads * (store.k_flat.shape[-1] * self._dtype.itemsize + 4)
        layer_bytes = count * row_bytes + sum(group.plan.layer_bytes for group in self._groups)
        self._block = min(model.layers, max(1, stash_bytes // layer_bytes)) if layer_bytes else model.layers
        self._first = self._next = 0

    def _grouped(self, ends: list[Ask], text_slots: torch.Tensor, vision_slots: torch.Tensor) -> list[_Group]:
        groups, stashed, text, vision = [], iter(self._parts), 0, 0
        keys = self._store.k_flat
        for _, same in groupby(ends, key=lambda ask: ask.by):
            asks = list(same)
            positions = [[getattr(ask.grounding.asked, kind) for ask in asks] for kind in ("text", "vision")]
            plan = ScorePlan(*positions, self._model.rank_heads, *keys.shape[1:], self._dtype, keys.device)
            slots = text_slots[text : text + plan.text.keys], vision_slots[vision : vision + plan.vision.keys]
            groups.append(_Group(asks, [next(stashed) for _ in asks], *slots, plan))
            text, vision = text + plan.text.keys, vision + plan.vision.keys
        return groups

    def add(self, layer: int, q: torch.Tensor, lse_b2: torch.Tensor, scale: float) -> None:
        """One layer's attention has run.

        Args:
            q: ``[R, Hq, D]`` the batch's queries after rotary. lse_b2: ``[R, Hq]`` LSE of their rows, base 2.
            scale: softmax scale.
        """
        if layer != self._next:  # a layer was missed: nothing is chosen
            return
        if layer == self._first:
            layers = min(self._block, self._model.layers - layer)
            self._q = q.new_empty(layers, len(self._rows), *q.shape[1:])
            self._lse = q.new_empty(layers, len(self._rows), q.shape[1], dtype=torch.float32)
        at = layer - self._first
        stash_rows(q, lse_b2, self._rows, self._targets, self._q[at], self._lse[at])
        self._next += 1
        if at + 1 == len(self._q):
            self._end_block(scale)
        if self._next == self._model.layers:
            self._end()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _end_block(self, scale: float) -> None:
        """Score a block of layers, and hold the queries of requests whose prompt goes on."""
        for group in self._groups:
            asked = [ask.grounding.asked for ask in group.asks]
            stash, slots = self._stash(group), (group.text_slots, group.vision_slots)
            block = LayerBlock(asked, group.plan, self._first, *stash, *slots, self._store, scale, self._model)
            grounding = group.asks[0].grounding
            scores = grounding.policy.score(block)
            group.scores.append(scores)
            weights = grounding.rule.weigh(block, scores)
            group.weights.append(weights if weights is scores.mass else weights + 0 * scores.mass)  # NaN stays NaN
        for held, part in zip(self._held, self._parts[len(self._parts) - len(self._others) :], strict=True):
            piece = self._q[:, part], self._lse[:, part]
            held.append(piece if len(self._q) == self._model.layers else tuple(tensor.clone() for tensor in piece))
        self._first = self._next

    def _stash(self, group: _Group) -> Piece:
        """All queries of a group's requests in this block, one request after the other; a copy unless they lie so."""
        whole = len(self._groups) == 1 and not self._others
        if whole and all(ask.grounding.earlier is None for ask in group.asks):
            return self._q, self._lse
        layers, parts = slice(self._first, self._next), []
        for ask, part in zip(group.asks, group.stashed, strict=True):
            if ask.grounding.earlier is not None:
                parts.append(tuple(tensor[layers] for tensor in ask.grounding.earlier))
            parts.append((self._q[:, part], self._lse[:, part]))
        return tuple(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))

    def _end(self) -> None:
        """All layers are scored: choose for every request whose prompt ends here."""
        for ask, held in zip(self._others, self._held, strict=True):
            ask.grounding.keep(*(_joined(tensors, 0) for tensors in zip(*held, strict=True)))
        if not self._groups:
            return
        asks, scored = [ask for group in self._groups for ask in group.asks], self._scored()
        spans, quotas = [ask.grounding.asked.spans for ask in asks], [ask.grounding.quota for ask in asks]
        for ask, chosen in zip(asks, choose(scored, spans, quotas, self._store), strict=True):
            ask.grounding.chosen, ask.grounding.earlier = chosen, None

    def _scored(self) -> Scored:
        """Of all blocks and groups."""
        whole: list[list[torch.Tensor]] = []
        extras = []
        for group in self._groups:
            retentions = [ask.grounding.quota.retention for ask in group.asks]
            weights = group.asks[0].grounding.rule.settle(_joined(group.weights, 0), retentions)
            scores, mass = (_joined([getattr(b, name) for b in group.scores], 0) for name in ("scores", "mass"))
            whole.append([group.asks[0].grounding.policy.settle(scores), mass, weights])
            extras += [_joined_extras([block.extras[i] for block in group.scores]) for i in range(len(group.asks))]
        scores, mass, weights = (_joined(tensors, 1) for tensors in zip(*whole, strict=True))
        return Scored(scores, mass, weights, extras, _joined([group.vision_slots for group in self._groups], 0))


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _joined_extras(blocks) -> dict[str, torch.Tensor]:
    return {name: _joined([block[name] for block in blocks], 0) for name in blocks[0]}
