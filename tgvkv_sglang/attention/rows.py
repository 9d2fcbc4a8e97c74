"""What each request of a batch does in one forward: attend through views, score, or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch

from ..kv.store import UnitStore
from ..kv.views import ViewTable
from .grounding import Grounding
from .state import RequestState

Begin = Callable[[RequestState], Grounding | None]


@dataclass
class Row:
    """One request of a batch: query rows ``[start, end)``, logical positions ``[prefix, length)``.

    Attributes:
        state: the request's state; None for a request on the stock path.
        table: views that it attends through, or None.
        text: ``[t]`` int64 on the host, its grounding rows in this forward, from ``start``; None: nothing to score.
        last_chunk: the prompt ends in this forward, and the vision is scored.
    """

    state: RequestState | None
    start: int
    end: int
    prefix: int
    length: int
    table: ViewTable | None = None
    text: torch.Tensor | None = None
    last_chunk: bool = False


def plan_prefill_rows(
    states: Sequence[RequestState | None], prefixes: Sequence[int], lengths: Sequence[int], begin: Begin
) -> list[Row]:
    """Rows of a prefill batch. ``begin`` starts a state's grounding with its first chunk (None: nothing to select)."""
    rows, at = [], 0
    for state, prefix, length in zip(states, prefixes, lengths, strict=True):
        row = Row(state, at, at + length - prefix, int(prefix), int(length))
        if state is not None:
            row.table = state.table(decode=False)
            # After a retraction a prefill runs on past the prompt, and a chunk may hold generated tokens alone.
            grounding = begin(state) if prefix < state.prompt_len else None
            if grounding is not None:
                row.last_chunk = length >= state.prompt_len
                text = grounding.rows(row.prefix, row.length)
                row.text = text if len(text) or row.last_chunk else None
        rows.append(row)
        at = row.end
    return rows


def plan_decode_rows(states: Sequence[RequestState | None], lengths: Sequence[int]) -> list[Row]:
    """Rows of a decode batch: one query each, at position ``length - 1``."""
    return [
        Row(state, i, i + 1, int(length) - 1, int(length), state.table(decode=True) if state is not None else None)
        for i, (state, length) in enumerate(zip(states, lengths, strict=True))
    ]


def stash_and_score(row: Row, layer: int, q: torch.Tensor, lse_e: torch.Tensor, store: UnitStore, scale: float) -> None:
    """Stash this chunk's grounding rows of one layer; with the last chunk score the layer.

    Args:
        q: ``[t, Hq, D]`` the grounding rows of this chunk, in memory of their own. lse_e: ``[t, Hq]`` base e.
        scale: softmax scale.
    """
    grounding = row.state.grounding
    grounding.add(layer, q, lse_e)
    if row.last_chunk:
        grounding.finish_layer(layer, store, scale)
        if row.state.config.zero_bubble and grounding.complete:
            row.state.select_early(store)
