"""Who asks what about which pictures, and when: functions of their settings and seed alone."""

from __future__ import annotations

import base64
import io
import itertools
import random
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Iterator

import numpy as np
from PIL import Image

from tgvkv_sglang.testing.images import GRID, data_url, make_image

WORDS = (
    *("red", "blue", "what", "where", "which", "picture", "corner", "left", "circle", "count"),
    *("name", "the", "of", "in", "is", "there", "describe", "second"),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def words(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))


@dataclass(frozen=True)
class Picture:
    """A square picture: coloured cells with shapes, or plain ones as a JPEG (a large PNG takes a second to make)."""

    seed: int
    side: int
    jpeg: bool = False

    def url(self) -> str:
        if not self.jpeg:
            return data_url(make_image(self.seed, self.side, self.side))
        count = -(-self.side // GRID)
        cells = np.random.default_rng(self.seed).integers(0, 256, (count, count, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        picture = Image.fromarray(cells).resize((self.side, self.side), Image.Resampling.NEAREST)
        picture.save(buffer, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class PlannedChat:
    """One chat.

    Attributes:
        start: when it may begin, in seconds. pictures: shown with the first question.
        pauses: think time before each question. options: further fields of every request.
    """

    number: int
    start: float
    pictures: tuple[Picture, ...]
    questions: tuple[str, ...]
    pauses: tuple[float, ...]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)

    def picture_parts(self) -> list[dict]:
        return [{"type": "image_url", "image_url": {"url": picture.url()}} for picture in self.pictures]


@dataclass(frozen=True)
class Traffic:
    """Chats of several turns, some about the same images.

    Attributes:
        users: chats at once (closed loop only).
        chats: chats in all. turns: turns of each. think: mean think time between turns in seconds (exponential).
        rate: chats that arrive per second (Poisson, open loop); 0: closed loop, whoever is done starts the next.
        reuse: probability that a chat is about an image that an earlier chat was about.
        side: side of the square images in pixels. max_tokens: length of an answer at most.
    """

    users: int = 4
    chats: int = 16
    turns: int = 3
    think: float = 0.2
    rate: float = 0.0
    reuse: float = 0.3
    side: int = 384
    max_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "chats", "turns", "side", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.think < 0 or self.rate < 0 or not 0 <= self.reuse <= 1:
            raise ValueError(f"think and rate must be >= 0 and reuse in [0, 1], got {self.think!r}, {self.rate!r}, "
                             f"{self.reuse!r}")  # fmt: skip

    @property
    def at_once(self) -> int:
        """Users to hold it: Poisson arrivals wait for nobody, so every chat has one of its own."""
        return self.chats if self.rate else self.users


def plan_chats(traffic: Traffic) -> list[PlannedChat]:
    """All chats of a run, in the order of their arrival."""
    rng = random.Random(traffic.seed)
    chats, clock, images = [], 0.0, 0
    for number in range(traffic.chats):
        if traffic.rate:
            clock += rng.expovariate(traffic.rate)
        fresh = not images or rng.random() >= traffic.reuse
        image = images if fresh else rng.randrange(images)
        images += fresh
        questions = tuple(words(rng, 3, 8) + f" {number}.{turn}?" for turn in range(traffic.turns))
        pauses = (
            0.0,
            *(rng.expovariate(1 / traffic.think) if traffic.think else 0.0 for _ in range(traffic.turns - 1)),
        )
        pictures = (Picture(image, traffic.side),)
        chats.append(PlannedChat(number, clock, pictures, questions, pauses, traffic.max_tokens))
    return chats


@dataclass(frozen=True)
class Load:
    """Endless chats: ``users`` at any time, each about fresh images, answers forced to full length.

    Attributes:
        retention: of each request; None: the server's (stock SGLang has none).
        images: of ``side`` x ``side`` pixels each. questions: about them, one after the other. text: tokens of one (one
            a letter).
        answer: shortest and longest answer in tokens; drawn uniformly, so that users do not march in step.
        ramp: seconds before the figures begin, for the server to fill up.
    """

    users: int
    retention: float | None = None
    images: int = 1
    questions: int = 1
    side: int = 2048
    text: int = 64
    answer: tuple[int, int] = (512, 1536)
    ramp: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.answer
        if min(self.users, self.questions, self.text) < 1 or self.images < 0 or not 1 <= low <= high:
            raise ValueError(f"users, questions, text and answer must be positive and images >= 0, got {self!r}")

    @property
    def vision_tokens(self) -> int:
        return self.images * (self.side // GRID) ** 2

    def chats(self) -> Iterator[PlannedChat]:
        """The chats; the same at every retention, and others (about other pictures) for any other load or seed."""
        series = zlib.crc32(repr(replace(self, retention=None)).encode())
        options: dict[str, Any] = {"ignore_eos": True}
        if self.retention is not None:
            options["custom_params"] = {"tgvkv_retention": self.retention}
        for number in itertools.count():
            rng = random.Random(f"{series}-{number}")
            pictures = tuple(Picture((series << 32) + 64 * number + i, self.side, True) for i in range(self.images))
            texts = tuple("".join(rng.choices(LETTERS, k=self.text)) for _ in range(self.questions))
            pauses = (0.0,) * self.questions
            yield PlannedChat(number, 0.0, pictures, texts, pauses, rng.randint(*self.answer), options)

    def rounds(self) -> Iterator[list[PlannedChat]]:
        """The same questions, each asked by itself: a round is one of every user's, the first shows new images."""
        chats = list(itertools.islice(self.chats(), self.users))
        for number in range(self.questions):
            yield [replace(chat, questions=chat.questions[number : number + 1], pauses=(0.0,)) for chat in chats]
