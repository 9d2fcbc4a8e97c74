"""From answers to figures. Pure functions; shares are 0..1, intervals are 95 %."""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np

from bench.quality.boards import Chat

Z = 1.959964
RESAMPLES = 10_000


def mark(chats: Sequence[Chat], answers: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """A run as it is stored: a string a turn and figure, so that a file of many runs stays short.

    Returns:
        ``exact``: of each turn "1" or "0" by chat; ``words``: "right/all" by chat. A missing or surplus word is wrong.
    """
    turns = range(len(chats[0].turns))
    exact, words = [], []
    for turn in turns:
        pairs = [(chat.turns[turn].answer_words, said[turn].split()) for chat, said in zip(chats, answers, strict=True)]
        exact.append("".join(str(int(wanted == got)) for wanted, got in pairs))
        words.append(" ".join(f"{_right(*pair)}/{max(map(len, pair))}" for pair in pairs))
    return {"exact": exact, "words": words}


def _right(wanted: list[str], got: list[str]) -> int:
    return sum(a == b for a, b in zip(wanted, got, strict=False))


def exact_of(run: dict) -> np.ndarray:
    """``[chats, turns]`` of 0 and 1."""
    return np.array([[int(mark) for mark in turn] for turn in run["exact"]]).T


def word_share(run: dict, turn: int | None = None) -> float:
    """Share of words that are right, of one turn or all."""
    marks = [mark for i, row in enumerate(run["words"]) if turn in (None, i) for mark in row.split()]
    right, words = np.array([tuple(map(int, mark.split("/"))) for mark in marks]).sum(0)
    return float(right / words)


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Interval of a share of so many independent trials; never empty, not even at 0 or 1."""
    spread = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    low, high = ((share + Z**2 / (2 * trials) + sign * spread) / (1 + Z**2 / trials) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def share_of(run: dict, turn: int | None = None) -> tuple[float, float, float]:
    """Exact answers of one turn, or of all: share and interval. Over all turns the interval counts chats as trials,
    because the answers of one chat depend on each other: it is too wide rather than too narrow."""
    exact = exact_of(run)
    share = float((exact if turn is None else exact[:, turn]).mean())
    return share, *wilson(share, len(exact))


def paired(run: dict, other: dict) -> tuple[float, float, float]:
    """How much larger a run's share is than another's on the same chats, with an interval: chats are resampled."""
    difference = (exact_of(run) - exact_of(other)).mean(1)
    drawn = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.percentile(difference[drawn].mean(1), (2.5, 97.5))
    return float(difference.mean()), float(low), float(high)
