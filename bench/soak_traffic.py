"""Seeded traffic of the soak: chats over shared images, and requests that a server must refuse."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Iterator

from bench.traffic import words
from tgvkv_sglang.testing.images import GRID, make_image, make_pair
from tgvkv_sglang.testing.prompts import IMAGE, chat
from tgvkv_sglang.testing.server import Server

SIDES = ((6, 6), (8, 8), (6, 8), (4, 6))
RETENTIONS = (None, 0.2, 1.0)
OPENINGS = ("", "Look: ", "Here is a picture.\n")


@lru_cache(maxsize=None)
def shared_image(number: int):
    """Image ``number``; 0 and 1 differ in one pixel, and several have equal token counts."""
    if number < 2:
        return make_pair(0)[number]
    columns, rows = SIDES[number % len(SIDES)]
    return make_image(number, columns * GRID, rows * GRID)


def vision_tokens(number: int) -> int:
    image = shared_image(number)
    return (image.width // GRID) * (image.height // GRID)


def text_tokens(text: str) -> int:
    """Tokens of a text under the stand-in model's tokenizer: one a byte, one a special token."""
    return len(re.sub(r"<\|\w+\|>", "#", text).encode())


@dataclass
class Request:
    """One ``/generate`` request of the soak.

    Attributes:
        images: numbers of the shared images, in order.
        retention: the request's own retention; None means the server's.
        turn: 0 for the first turn of a chat.
    """

    text: str
    images: tuple[int, ...]
    retention: float | None
    turn: int
    max_new_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return text_tokens(self.text) + sum(vision_tokens(number) - 1 for number in self.images)

    @property
    def first_image_end(self) -> int | None:
        """Logical position just after the first image's tokens; None without an image."""
        if not self.images:
            return None
        return text_tokens(self.text.split("<|image_pad|>")[0]) + vision_tokens(self.images[0])

    def body(self, rid: str | None = None, **extra) -> dict:
        images = [shared_image(number) for number in self.images]
        body = Server.body(self.text, images, self.max_new_tokens, rid, retention=self.retention)
        return {**body, **extra}


@dataclass
class Chat:
    """A conversation: :meth:`ask` makes the next request, :meth:`answer` takes the server's text."""

    rng: random.Random
    images_in_all: int
    turns: int = 0
    said: list[str] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turns = self.rng.choice((1, 1, 2, 3, 4))
        self.retention = self.rng.choice(RETENTIONS)
        self.visual = self.rng.random() < 0.85

    def _question(self) -> str:
        return words(self.rng, 2, 6) + f" {self.rng.randint(0, 9999)}?"

    def requests(self) -> Iterator[Request]:
        """The turns; the caller calls :meth:`answer` between them."""
        for turn in range(self.turns):
            new = 0
            if self.visual:
                new = self.rng.choice((1, 1, 1, 2)) if turn == 0 else int(self.rng.random() < 0.15)
            self.shown += [self.rng.randrange(self.images_in_all) for _ in range(new)]
            pictures = " and ".join([IMAGE] * new)
            self.said.append(self.rng.choice(OPENINGS) * bool(new) + pictures + self._question())
            yield Request(chat(*self.said), tuple(self.shown), self.retention, turn, self.rng.randint(4, 24))

    def answer(self, text: str) -> None:
        self.said.append(text)


def refused(rng: random.Random, pool: int) -> tuple[str, dict, set[int]]:
    """(kind, body, allowed HTTP statuses) of a request that must be refused and must harm nobody else."""
    kind = rng.choice(("longer than the context", "longer than the pool", "broken image", "bad option"))
    body = Server.body(chat("Hello"), ())
    if kind == "longer than the context":
        return kind, Server.body(chat("word " * 4000), ()), {400}
    if kind == "longer than the pool":
        return kind, Server.body(chat("word " * (pool // 5 + 100)), ()), {400}
    if kind == "broken image":
        body = Server.body(chat(IMAGE + "What?"), ())
        junk = rng.choice(("data:image/png;base64,iVBORw0KGgoAAAANSUhEUg==", "data:image/png;base64,!!!", "no image"))
        return kind, {**body, "image_data": [junk]}, set(range(400, 600))
    name, value = rng.choice((("tgvkv_retention", 0), ("tgvkv_retention", "x"), ("tgvkv_retnetion", 0.1)))
    body["sampling_params"]["custom_params"] = {name: value}
    return kind, body, {400}
