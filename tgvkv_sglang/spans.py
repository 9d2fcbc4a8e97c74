"""Finding the vision spans of a prompt, whatever its model's processor left behind.

Every model's multimodal tokens carry pad ids, so the runs of pad ids are the one source that never fails; the
processor's offsets only tell which of them are audio (which is treated as text: it is never evicted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

import numpy as np

from .types import Span, SpanKind

# SGLang replaces every multimodal token by an id of at least this value. Text ids lie below it and are not negative.
VISION_PAD_BASE = 1_000_000


@dataclass(frozen=True, order=True)
class PictureRun:
    """Multimodal tokens ``[start, end)`` and what stands for each of them in the tree (:func:`picture_symbol`)."""

    start: int
    end: int
    symbol: int


def picture_symbol(picture_hash: int) -> int:
    """The low 64 bits of a picture's hash as an int64 that no text token has."""
    low = picture_hash & (2**64 - 1)
    signed = low - 2**64 if low >= 2**63 else low
    return signed if not 0 <= signed < VISION_PAD_BASE else ~signed


def with_symbols(ids: np.ndarray, runs: Iterable[PictureRun]) -> np.ndarray:
    """``ids [n]`` with each run's symbol in the place of its pad id; a copy if there is a run."""
    runs = [run for run in runs if run.start < len(ids)]
    if runs:
        ids = ids.copy()
    for run in runs:
        ids[run.start : run.end] = run.symbol
    return ids


def vision_runs(ids: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs ``[start, end)`` of equal multimodal ids (pad ids or picture symbols), ascending."""
    vision = (ids >= VISION_PAD_BASE) | (ids < 0)
    if not vision.any():
        return []
    where = np.flatnonzero(vision)
    breaks = np.flatnonzero((np.diff(where) != 1) | (np.diff(ids[where]) != 0)) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(where, breaks)]


def vision_spans(ids: np.ndarray, audio_offsets: Iterable[tuple[int, int]] = ()) -> list[Span]:
    """Vision spans of a prompt, ascending.

    Args:
        ids: ``[n]`` token ids with SGLang's pad ids.
        audio_offsets: inclusive ``(start, end)`` positions of audio items.
    """
    audio = [(int(start), int(end) + 1) for start, end in audio_offsets]
    return [
        Span(start, end)
        for start, end in vision_runs(ids)
        if not any(start < audio_end and audio_start < end for audio_start, audio_end in audio)
    ]


def with_text(spans: Iterable[Span], length: int) -> list[Span]:
    """The whole prompt as text and vision spans, in order, without gaps."""
    out, at = [], 0
    for span in spans:
        if span.start > at:
            out.append(Span(at, span.start, SpanKind.TEXT))
        out.append(span)
        at = span.end
    if at < length:
        out.append(Span(at, length, SpanKind.TEXT))
    return out
