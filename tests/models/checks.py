"""The five checks that every served family passes, each against a live server with drawn weights.

Each takes a :class:`Bench` (the family and its server) and raises AssertionError; what it returns goes into the table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
from PIL import Image

from tests.models.family import Family
from tests.models.plain import plain_answers
from tests.models.recording import Conversation, read
from tests.oracle.selection import check_kept
from tgvkv_sglang.testing.images import make_image, make_pair
from tgvkv_sglang.testing.server import Answer, Server

RETENTION = 0.25
EPS = 1e-4
"""Relative error of float32 scores against float64; decisions closer than that are excused one by one."""
LOGPROB_ATOL = 1e-4
TOKENS = 8


@dataclass
class Bench:
    """A family's checkpoint and a server of it. ``seen``: where its plugin records attention."""

    family: Family
    model: Path
    server: Server
    seen: Path

    def layout(self, text: str, images: Sequence[Image.Image]) -> np.ndarray:
        return self.family.layout(self.model, text, images)

    def ask(self, rid: str, text: str, images: Sequence[Image.Image], **more: Any) -> Answer:
        """One question, recorded and traced."""
        fields = {"rid": f"seen-{rid}", "trace": True, "logprobs": True, "max_new_tokens": TOKENS, **more}
        return self.server.generate(text, images, **fields)

    def conversation(
        self, rid: str, answer: Answer, text: str, images: Sequence[Image.Image], before: Conversation | None = None
    ) -> Conversation:
        """What :meth:`ask` recorded; ``before`` is a conversation that its cached tokens were computed in."""
        return self.recorded(rid, answer, self.layout(text, images), before)

    def recorded(
        self, rid: str, answer: Answer, layout: np.ndarray, before: Conversation | None = None
    ) -> Conversation:
        """The same for a prompt whose vision tokens, bool ``[n]``, are known."""
        assert answer.meta["prompt_tokens"] == len(layout)
        end = len(layout) + len(answer.ids) - 1
        return Conversation(layout, read(self.seen, f"seen-{rid}", end), before)

    def trace(self, rid: str) -> dict[str, np.ndarray]:
        return self.server.trace(f"seen-{rid}")[0]

    def traced(self, rid: str) -> bool:
        return (self.server.traces / f"seen-{rid}.0.npz").exists()


def pictures(family: Family, count: int, seed: int = 0) -> list[Image.Image]:
    sizes = itertools.cycle(family.sizes)
    return [make_image(seed + i, *next(sizes)) for i in range(count)]


# -- (a) retention 1.0 is stock ---------------------------------------------------------------------------------------


def stock_prompts(family: Family) -> list[dict[str, Any]]:
    """Text, one image, two images with text between, a follow-up about the image, the same image again."""
    one, two = pictures(family, 2, seed=900)
    first = family.prompt("{}What is in the corner?")
    return [
        {"text": family.prompt("Say something."), "images": []},
        {"text": first, "images": [one]},
        {"text": family.prompt("First {} then {} and which is larger?"), "images": [one, two]},
        {"text": family.prompt("{}What is in the corner?", "A circle.", "And above it?"), "images": [one]},
        {"text": family.prompt("Look: {}"), "images": [two]},
        {"text": family.prompt("{}What is it, then?"), "images": [one]},
    ]


ANSWER = 24
"""Tokens of each answer."""


def answers(family: Family, server: Server, **more: Any) -> list[tuple[list[int], int, int]]:
    """(token ids, cached tokens, prompt tokens) of the prompts, one after the other from an empty cache."""
    server.flush()
    said = [server.generate(**job, max_new_tokens=ANSWER, **more) for job in stock_prompts(family)]
    return [(answer.ids, answer.cached, answer.meta["prompt_tokens"]) for answer in said]


def equals_stock(bench: Bench, stock: list[tuple[list[int], int, int]]) -> str:
    ours = answers(bench.family, bench.server, retention=1.0)
    assert ours == [tuple(answer) for answer in stock]
    assert sum(cached for _, cached, _ in ours) > 0 and len({tuple(ids) for ids, _, _ in ours}) >= 4
    return f"{len(ours)} prompts, {sum(len(ids) for ids, _, _ in ours)} tokens"


def equals_transformers(bench: Bench) -> str:
    """The same tokens wherever transformers itself is sure; prefixes with pictures come from the cache."""
    ours = answers(bench.family, bench.server, retention=1.0)
    plain = plain_answers(bench.model, stock_prompts(bench.family), ANSWER)
    assert [ids[: len(sure)] for (ids, _, _), sure in zip(ours, plain, strict=True)] == plain
    compared = sum(len(sure) for sure in plain)
    assert compared >= 0.8 * ANSWER * len(plain) and len({tuple(sure) for sure in plain}) >= 4
    whole = bench.layout(stock_prompts(bench.family)[1]["text"], pictures(bench.family, 1, seed=900))
    assert ours[3][1] == len(whole), "the follow-up has all of the first prompt from the cache"
    return f"{len(ours)} prompts, {compared} tokens (plain transformers)"


# -- (b) and (c) what is kept, and what decode reads ------------------------------------------------------------------


def assert_selected(bench: Bench, rid: str, turn: Conversation) -> np.ndarray:
    """The trace is what float64 attention over the recorded q and K selects; returns what was kept, bool [L, V]."""
    trace, expected = bench.trace(rid), turn.select(RETENTION)
    assert trace["vision_positions"].tolist() == expected.vision_positions.tolist()
    assert trace["grounding_positions"].tolist() == expected.grounding_positions.tolist()
    np.testing.assert_allclose(trace["scores"], expected.scores, rtol=EPS)
    np.testing.assert_allclose(trace["layer_mass"], expected.layer_mass, rtol=EPS)
    check_kept(trace["kept"], expected, EPS)
    return trace["kept"]


def one_image(bench: Bench) -> str:
    """A question about one image: where its tokens are, what is kept, and that decode reads that and all text."""
    text, images = bench.family.prompt("{}What is in the corner, and above it?"), pictures(bench.family, 1)
    bench.server.flush()
    answer = bench.ask("one", text, images)
    turn = bench.conversation("one", answer, text, images)
    kept = assert_selected(bench, "one", turn)
    assert turn.assert_attention(None, kept) == TOKENS - 1
    spans = bench.trace("one")["spans"]
    return f"{turn.vision.sum()} vision tokens in {int((spans[:, 0] == 1).sum())} spans, {kept.sum()} units kept"


def follow_up(bench: Bench) -> str:
    """The second question prefills against the whole image and selects afresh."""
    texts = [bench.family.prompt("{}Name it."), bench.family.prompt("{}Name it.", "A circle.", "What is left of it?")]
    images = pictures(bench.family, 1, seed=10)
    bench.server.flush()
    first = bench.ask("turn-1", texts[0], images)
    one = bench.conversation("turn-1", first, texts[0], images)
    second = bench.ask("turn-2", texts[1], images)
    assert second.cached >= first.meta["prompt_tokens"]
    two = bench.conversation("turn-2", second, texts[1], images, one)
    assert two.start == second.cached
    kept = [assert_selected(bench, "turn-1", one), assert_selected(bench, "turn-2", two)]
    two.assert_attention(None, kept[1])
    moved = int((kept[0] != kept[1]).sum())
    assert moved > 0
    return f"{second.cached} tokens cached, {moved} units differ"


# -- (d) pictures are told apart ---------------------------------------------------------------------------------------


def two_images(bench: Bench) -> str:
    """Two images of equal size, alone and two in a prompt in both orders: everybody gets their own.

    Asked one after the other they answer as on an empty server, wherever the same tokens asked.
    """
    family, (width, height) = bench.family, bench.family.sizes[0]
    one, other = make_pair(20, width, height)
    far = make_image(21, width, height)
    text, both = family.prompt("{}Describe it."), family.prompt("{} or {}: which?")
    jobs = [(text, [one]), (text, [other]), (text, [far]), (both, [one, far]), (both, [far, one])]
    alone = []
    for i, (prompt, images) in enumerate(jobs):
        bench.server.flush()
        alone.append(bench.ask(f"alone-{i}", prompt, images))
    bench.server.flush()
    turns, cached = [], []
    for i, (prompt, images) in enumerate(jobs):
        answer = bench.ask(f"beside-{i}", prompt, images)
        before = turns[(0, 0, 0, 0, 2)[i]] if i else None
        turns.append(bench.conversation(f"beside-{i}", answer, prompt, images, before))
        cached.append(answer.cached)
        kept = assert_selected(bench, f"beside-{i}", turns[-1])
        turns[-1].assert_attention(None, kept)
        fresh, again = bench.trace(f"alone-{i}"), bench.trace(f"beside-{i}")
        if fresh["grounding_positions"].tolist() == again["grounding_positions"].tolist():
            assert answer.ids == alone[i].ids and (fresh["kept"] == again["kept"]).all()
            np.testing.assert_allclose(answer.logprobs, alone[i].logprobs, atol=LOGPROB_ATOL, rtol=0)
        else:  # text inside a cached picture (row tokens) or between cached pictures is not new, and does not ask
            assert len(images) == 2 and set(again["grounding_positions"]) < set(fresh["grounding_positions"])
    vision = np.flatnonzero(bench.layout(text, [one]))
    text_only, whole_image = int(vision[0]), int(vision[-1]) + 1
    shared = whole_image if family.item_a_picture else text_only
    assert cached == [0, text_only, text_only, shared, shared]
    scores = [bench.trace(f"alone-{i}")["scores"] for i in range(3)]
    assert np.abs(scores[0] - scores[1]).max() > 0 and scores[0].shape == scores[1].shape == scores[2].shape
    return f"{len(jobs)} prompts"


# -- (e) reclaim and going on ------------------------------------------------------------------------------------------


def reclaim(bench: Bench) -> str:
    """Chats about more pictures than fit; each goes on from the cache, whose picture is gone on the view it has."""
    family, server = bench.family, bench.server
    server.flush()
    chats, prompt = [], family.prompt("{}What is it?")
    size, vision = len(bench.layout(prompt, pictures(family, 1))), int(bench.layout(prompt, pictures(family, 1)).sum())
    count = 2 * server.tokens // size
    for i in range(count):
        image = make_image(100 + i, *family.sizes[0])
        answer = bench.ask(f"chat-{i}", prompt, [image], max_new_tokens=2)
        turn = bench.conversation(f"chat-{i}", answer, prompt, [image], chats[0][2] if chats else None)
        chats.append((image, answer, turn, assert_selected(bench, f"chat-{i}", turn)))
    packed = lost = 0
    for i in reversed(range(count)):
        image, first, turn, kept = chats[i]
        text = family.prompt("{}What is it?", "A circle.", "More?")
        answer = bench.ask(f"more-{i}", text, [image], max_new_tokens=3)
        if answer.cached < first.meta["prompt_tokens"]:
            lost += 1
            continue
        more = bench.conversation(f"more-{i}", answer, text, [image], turn)
        if bench.traced(f"more-{i}"):
            more.assert_attention(None, assert_selected(bench, f"more-{i}", more))
        else:
            more.assert_attention(kept, kept)
            packed += 1
    assert packed >= 2, f"{packed} of {count} chats went on on a view, {lost} were lost"
    server.flush()
    assert server.generate(family.prompt("Hello"), max_new_tokens=2).ids
    return f"{packed} of {count} chats on their views, {lost} lost; {vision} vision tokens each"


Check = Callable[[Bench], str]
CHECKS: dict[str, Check] = {
    "kept set": one_image,
    "follow-up": follow_up,
    "two images": two_images,
    "reclaim": reclaim,
}
"""By the column of the table; ``equals_stock`` ("stock") needs a second server's answers too."""
