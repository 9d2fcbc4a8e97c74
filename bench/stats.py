"""Figures of one load run, from its turns. Pure functions; times in seconds since the run began."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass
class Turn:
    """One answered (or failed) turn of a chat.

    Attributes:
        sent: when the request was sent. arrivals: when each piece of the answer came.
        tokens: tokens of the answer up to and including each piece, as the server counted them.
        prompt_tokens, cached_tokens: of the whole prompt, and how many came from the radix cache.
        before: prompt tokens of this chat's previous turn; 0 for its first.
        error: why there is no answer, or None.
    """

    chat: int
    turn: int
    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    before: int = 0
    error: str | None = None

    @property
    def first_token(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.sent

    def between_tokens(self, begin: float = -math.inf, end: float = math.inf) -> list[float]:
        """Inter-token latencies that ended in ``[begin, end)``; a piece of n tokens counts as n, each its n-th part."""
        gaps = []
        for i in range(1, len(self.arrivals)):
            new = self.tokens[i] - self.tokens[i - 1]
            if new > 0 and begin <= self.arrivals[i] < end:
                gaps += [(self.arrivals[i] - self.arrivals[i - 1]) / new] * new
        return gaps

    def meets(self, slo_first: float, slo_between: float) -> bool:
        """Whether the first token came within ``slo_first`` and the mean inter-token latency within ``slo_between``."""
        gaps = self.between_tokens()
        return self.first_token <= slo_first and (not gaps or sum(gaps) / len(gaps) <= slo_between)


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """``NAME_pXX_ms`` of values in seconds (linear interpolation), each None when there are no values."""
    if not values:
        return {f"{name}_p{p}_ms": None for p in PERCENTILES}
    return {f"{name}_p{p}_ms": round(1000 * float(np.percentile(values, p)), 2) for p in PERCENTILES}


def summarise(turns: Sequence[Turn], seconds: float, slo_first: float, slo_between: float) -> dict[str, Any]:
    """One row of figures.

    Returns:
        Percentiles (linear interpolation, ms) of time to first token (``ttft``) and inter-token latency (``itl``);
        requests and answer tokens per second; goodput (requests a second that met both SLOs); the cached share of all
        prompt tokens; and the share of follow-up turns that found their chat's previous prompt in the cache.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    good = [turn for turn in turns if turn.error is None and turn.arrivals]
    follow_ups = [turn for turn in good if turn.before]
    prompt = sum(turn.prompt_tokens for turn in good)
    return {
        "requests": len(turns),
        "errors": len(turns) - len(good),
        "seconds": round(seconds, 2),
        **percentiles("ttft", [turn.first_token for turn in good]),
        **percentiles("itl", [gap for turn in good for gap in turn.between_tokens()]),
        "requests_per_s": round(len(good) / seconds, 3),
        "answer_tokens_per_s": round(sum(turn.tokens[-1] for turn in good) / seconds, 2),
        "goodput_per_s": round(sum(turn.meets(slo_first, slo_between) for turn in good) / seconds, 3),
        "prompt_tokens": prompt,
        "cached_tokens": sum(turn.cached_tokens for turn in good),
        "cached_share": round(sum(turn.cached_tokens for turn in good) / prompt, 4) if prompt else None,
        "follow_ups": len(follow_ups),
        "follow_ups_resident_share": (
            round(sum(turn.cached_tokens >= turn.before for turn in follow_ups) / len(follow_ups), 4)
            if follow_ups
            else None
        ),
    }
