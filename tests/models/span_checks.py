"""Pictures anywhere in a prompt, and several of them: one selection over all spans, compared like any other."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from PIL import Image

from tests.models.checks import RETENTION, TOKENS, Bench, assert_selected, pictures
from tgvkv_sglang.testing.images import make_image

ROOM = 150
"""Slots that are left for a question and its answer where a prompt is to have as many pictures as fit."""


def _alone(bench: Bench, rid: str, text: str, images: Sequence[Image.Image]) -> np.ndarray:
    """One prompt on a flushed server: what it keeps, and that decode reads that; returns what was kept, bool [L, V]."""
    bench.server.flush()
    turn = bench.conversation(rid, bench.ask(rid, text, images), text, images)
    kept = assert_selected(bench, rid, turn)
    assert turn.assert_attention(None, kept) == TOKENS - 1
    return kept


def question_before(bench: Bench) -> None:
    _alone(bench, "before", bench.family.prompt("What is in the corner? {}"), pictures(bench.family, 1, 40))


def question_between(bench: Bench) -> None:
    text = bench.family.prompt("{}Is it red? {}And this?")
    _alone(bench, "between", text, pictures(bench.family, 2, 50))


def many(bench: Bench) -> int:
    """Thirty small pictures, or as many as the pool has room for."""
    size = bench.family.small or bench.family.sizes[0]
    around = len(bench.layout(bench.family.prompt(""), []))
    one = len(bench.layout(bench.family.prompt("{} "), [make_image(60, *size)])) - around
    count = min(30, (bench.server.tokens - ROOM) // one)
    text = bench.family.prompt("{} " * count + "How many?")
    images = [make_image(60 + i, *size) for i in range(count)]
    kept = _alone(bench, "many", text, images)
    assert kept.sum() == round(RETENTION * kept.size) and (kept.sum(1) <= kept.shape[1]).all()
    return count


def last(bench: Bench) -> str:
    """The picture ends the prompt. A token that closes it asks; where there is none, all of the picture is read."""
    text, images = "Look: " + bench.family.image, pictures(bench.family, 1, 100)
    if not bench.layout(text, images)[-1]:
        _alone(bench, "last", text, images)
        return "closed"
    bench.server.flush()
    turn = bench.conversation("last", bench.ask("last", text, images), text, images)
    assert not bench.traced("last")
    turn.assert_attention(None, None)
    return "open"


def later(bench: Bench) -> None:
    """A picture in a later turn: the new text selects from it and, afresh, from the earlier one that is still whole."""
    first = bench.family.prompt("{}Name it.")
    second = bench.family.prompt("{}Name it.", "A circle.", "{}And this?")
    images = pictures(bench.family, 2, 110)
    bench.server.flush()
    one = bench.conversation("later-1", bench.ask("later-1", first, images[:1]), first, images[:1])
    two = bench.conversation("later-2", bench.ask("later-2", second, images), second, images, one)
    kept = assert_selected(bench, "later-2", two)
    assert kept.shape[1] == two.vision.sum() > one.vision.sum()
    two.assert_attention(None, kept)


def anywhere(bench: Bench) -> str:
    question_before(bench)
    question_between(bench)
    later(bench)
    return f"{many(bench)} pictures; the last token {last(bench)}"
