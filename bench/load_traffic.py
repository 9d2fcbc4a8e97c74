"""The traffic of a load run: who asks what about which image, and when. A function of its settings and seed alone."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

WORDS = (
    *("red", "blue", "what", "where", "which", "picture", "corner", "left", "circle", "count"),
    *("name", "the", "of", "in", "is", "there", "describe", "second"),
)


@dataclass(frozen=True)
class Traffic:
    """Settings of one run.

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

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class PlannedChat:
    """One chat: when it may start (seconds), its image, its questions, and the think time before each of them."""

    number: int
    start: float
    image: int
    questions: tuple[str, ...]
    pauses: tuple[float, ...]


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
        questions = tuple(
            " ".join(rng.choices(WORDS, k=rng.randint(3, 8))) + f" {number}.{turn}?" for turn in range(traffic.turns)
        )
        pauses = (
            0.0,
            *(rng.expovariate(1 / traffic.think) if traffic.think else 0.0 for _ in range(traffic.turns - 1)),
        )
        chats.append(PlannedChat(number, clock, image, questions, pauses))
    return chats
