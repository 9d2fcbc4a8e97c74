"""Scope ``total`` against the published code's formula: equal where text fits, different where we mean to be."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle.published import SINKS, keep
from tests.unit.selection.random_prompt import LAYERS, N, Prompt
from tgvkv_sglang.types import Span

IMAGE = Span(SINKS, 15)
TEXT = N - len(IMAGE)


def published(prompt: Prompt, removed: float, first: int = IMAGE.start, tokens: int = len(IMAGE)) -> np.ndarray:
    attention = np.stack([prompt.dense(layer, np.tri(N))[0].mean(0) for layer in range(LAYERS)])
    return keep(attention, first, tokens, removed)


def ours(prompt: Prompt, retention: str, spans=(IMAGE,)) -> np.ndarray:
    """Bool ``[L, n]``: all text, and what was chosen."""
    grounding = prompt.ground([], scope="total", retention=retention, spans=list(spans))
    kept = np.ones((LAYERS, N), dtype=bool)
    kept[:, grounding.asked.vision] = grounding.choice().mask()
    return kept


@pytest.mark.parametrize("retention", ["0.6", "0.7", "0.8", "0.9", "1.0"])
def test_what_is_kept_equals_the_published_code_wherever_text_fits(retention):
    compared = over = 0
    for seed in range(20):
        prompt = Prompt(seed)
        want, got = published(prompt, 1 - float(retention)), ours(prompt, retention)
        for theirs, mine in zip(want, got, strict=True):
            if theirs.sum() >= TEXT:
                assert theirs.tolist() == mine.tolist()
                compared += 1
                over += theirs.all()
    assert compared >= 40
    assert over or retention != "1.0", "layers above 100 % are among them: their surplus is lost"


def test_text_that_does_not_fit_is_evicted_there_and_kept_here():
    seen = 0
    for seed in range(20):
        prompt = Prompt(seed)
        for theirs, mine in zip(published(prompt, 0.7), ours(prompt, "0.3"), strict=True):
            if theirs.sum() < TEXT:
                assert mine.sum() == TEXT and not mine[IMAGE.start : IMAGE.end].any()
                assert not theirs[IMAGE.end :].all() and theirs[-1] and theirs[:SINKS].all()
                seen += 1
    assert seen >= 20


def test_text_between_images_is_taken_for_vision_there():
    """Two images of 5: there, the 3 words between them stand in the second image's place, and its end is "text"."""
    spans = [Span(SINKS, 9), Span(12, 17)]
    prompt = Prompt(3)
    theirs, mine = published(prompt, 0.3, tokens=10), ours(prompt, "0.7", spans)
    assert mine[:, 9:12].all() and not theirs[:, 9:12].all()
    assert theirs[:, 14:17].all() and not mine[:, 14:17].all()


def test_an_image_among_the_first_four_tokens_is_partly_untouchable_there():
    span = Span(1, 15)
    found = 0
    for seed in range(20):
        theirs = published(Prompt(seed), 0.45, first=1, tokens=len(span))
        mine = ours(Prompt(seed), "0.55", [span])
        assert theirs[:, 1:SINKS].all()
        found += not mine[:, 1:SINKS].all()
    assert found
