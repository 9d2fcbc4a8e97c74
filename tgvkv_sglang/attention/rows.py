"""What each request of a batch does in one forward: attend through views, score, or neither."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Sequence

import torch

from ..kv.views import ViewTable
from ..selection.grounding import Grounding


class Attendee(Protocol):
    """A request with vision, as attention sees it."""

    prompt_len: int

    def table(self, decode: bool) -> ViewTable | None:
        """What it attends through in place of spans, in prefill or in decode."""

    def begin_chunk(self, start: int) -> Grounding | None:
        """A chunk of its prefill is about to run from ``start`` on; returns what is scored, or None."""


Attendees = Sequence[Attendee | None]


@dataclass
class Row:
    """One request of a batch: query rows ``[start, end)``, logical positions ``[prefix, length)``.

    Attributes:
        attendee: the request; None on the stock path.
        table: views that it attends through, or None.
        grounding: what it scores in this forward, or None.
        text: ``[t]`` int64 on the host, its grounding rows in this forward, from ``start``; empty unless it scores.
        last_chunk: it scores, and its prompt ends in this forward.
    """

    attendee: Attendee | None
    start: int
    end: int
    prefix: int
    length: int
    table: ViewTable | None = None
    grounding: Grounding | None = None
    text: torch.Tensor | None = None
    last_chunk: bool = False

    @property
    def scores(self) -> bool:
        return self.grounding is not None


def prefill_row(attendee: Attendee | None, start: int, prefix: int, length: int) -> Row:
    """The row of one request whose tokens ``[prefix, length)`` run in a prefill, at query row ``start``."""
    row = Row(attendee, start, start + length - prefix, prefix, length)
    if attendee is None:
        return row
    row.table = attendee.table(decode=False)
    grounding = attendee.begin_chunk(prefix)
    if grounding is not None:
        text, last = grounding.rows(prefix, length), length >= attendee.prompt_len
        if last or len(text):
            row.grounding, row.text, row.last_chunk = grounding, text, last
    return row


def decode_rows(attendees: Attendees, lengths: Sequence[int]) -> list[Row]:
    """Rows of a decode batch: one query each, at position ``length - 1``."""
    return [
        Row(one, i, i + 1, int(length) - 1, int(length), one.table(decode=True) if one is not None else None)
        for i, (one, length) in enumerate(zip(attendees, lengths, strict=True))
    ]

