"""Spans: vision runs of pad ids, audio left out, and the prompt tiled without gaps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgvkv_sglang.kv.nodes import shared_prefix
from tgvkv_sglang.spans import VISION_PAD_BASE, vision_runs, vision_spans, with_text
from tgvkv_sglang.types import Span, SpanKind

A, B = VISION_PAD_BASE, VISION_PAD_BASE + 9
IDS = st.lists(st.sampled_from([1, VISION_PAD_BASE - 1, A, B]), max_size=30)


def runs_by_loop(ids):
    runs, i = [], 0
    while i < len(ids):
        j = i
        while j < len(ids) and ids[j] == ids[i]:
            j += 1
        if ids[i] >= VISION_PAD_BASE:
            runs.append((i, j))
        i = j
    return runs


@given(IDS)
def test_runs(ids):
    assert vision_runs(np.array(ids, dtype=np.int64)) == runs_by_loop(ids)


@given(IDS)
def test_spans_tile_the_prompt(ids):
    ids = np.array(ids, dtype=np.int64)
    spans = with_text(vision_spans(ids), len(ids))
    covered = [p for span in spans for p in range(span.start, span.end)]
    assert covered == list(range(len(ids)))
    for span in spans:
        assert ((ids[span.start : span.end] >= VISION_PAD_BASE) == (span.kind == SpanKind.VISION)).all()
    assert not any(a.kind == b.kind == SpanKind.TEXT for a, b in zip(spans, spans[1:], strict=False))


@given(IDS, IDS)
def test_shared_prefix(a, b):
    want = 0
    while want < min(len(a), len(b)) and a[want] == b[want]:
        want += 1
    assert shared_prefix(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)) == want


def test_adjacent_images_are_two_spans_and_audio_is_text():
    ids = np.array([1, A, A, B, B, 2, A + 1, A + 1, 3])
    assert vision_spans(ids) == [Span(1, 3), Span(3, 5), Span(6, 8)]
    assert vision_spans(ids, audio_offsets=[(6, 7)]) == [Span(1, 3), Span(3, 5)]
    assert with_text(vision_spans(ids, [(6, 7)]), 9)[-1] == Span(5, 9, SpanKind.TEXT)
    assert vision_spans(ids, audio_offsets=[(5, 5), (8, 8)]) == vision_spans(ids)


def test_the_kinds_in_a_trace():
    assert (int(SpanKind.TEXT), int(SpanKind.VISION)) == (0, 1)


@pytest.mark.parametrize("bounds", [(3, 3), (4, 3), (-1, 2)])
def test_empty_or_negative_span_is_refused(bounds):
    with pytest.raises(ValueError, match="0 <= start < end"):
        Span(*bounds)
