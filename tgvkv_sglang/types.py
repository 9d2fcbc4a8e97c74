"""Leaf data types shared by every package. They check their invariants when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .errors import SpanError


class SpanKind(IntEnum):
    """What a span holds. The values are those written to a trace's ``spans[:, 0]``."""

    TEXT = 0
    VISION = 1


@dataclass(frozen=True, order=True)
class Span:
    """A maximal run of text, or the tokens of one image or video, at logical positions ``[start, end)``."""

    start: int
    end: int
    kind: SpanKind = SpanKind.VISION

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise SpanError(f"a span needs 0 <= start < end, got [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start
