"""Finding the vision spans of a prompt, whatever its model's processor left behind.

Every model's multimodal tokens carry pad ids, so the runs of pad ids are the one source that never fails; the
processor's offsets only tell which of them are audio (which is treated as text: it is never evicted).
"""

from __future__ import annotations

from typing import Iterable

import numpy as np

from .types import Span, SpanKind

# SGLang replaces every multimodal token by an id of at least this value; equal ids are one item.
VISION_PAD_BASE = 1_000_000


def vision_runs(ids: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs ``[start, end)`` of equal vision pad ids, ascending."""
    vision = ids >= VISION_PAD_BASE
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
