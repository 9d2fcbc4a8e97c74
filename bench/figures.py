"""Figures of one run, from its turns. Pure functions; times in seconds since the run began."""

from __future__ import annotations

import math
import statistics
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

    def tokens_within(self, begin: float, end: float) -> int:
        """Answer tokens that arrived in ``[begin, end)``."""
        counts = [0, *self.tokens]
        return sum(counts[i + 1] - counts[i] for i, at in enumerate(self.arrivals) if begin <= at < end)

    def meets(self, slo_first: float, slo_between: float) -> bool:
        """Whether the first token came within ``slo_first`` and the mean inter-token latency within ``slo_between``."""
        gaps = self.between_tokens()
        return self.first_token <= slo_first and (not gaps or sum(gaps) / len(gaps) <= slo_between)


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """``NAME_pXX_ms`` of values in seconds (linear interpolation), each None when there are no values."""
    if not values:
        return {f"{name}_p{p}_ms": None for p in PERCENTILES}
    return {f"{name}_p{p}_ms": round(1000 * float(np.percentile(values, p)), 2) for p in PERCENTILES}


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _answered(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.error is None and turn.arrivals]


def _latencies(first: Sequence[Turn], gaps: Sequence[float]) -> dict[str, float | None]:
    return {**percentiles("ttft", [turn.first_token for turn in first]), **percentiles("itl", gaps)}


def error_messages(turns: Sequence[Turn]) -> list[str]:
    """The first five different ones."""
    return sorted({turn.error for turn in turns if turn.error})[:5]


def summarise(turns: Sequence[Turn], seconds: float, slo_first: float, slo_between: float) -> dict[str, Any]:
    """Figures of a run of whole chats.

    Returns:
        Percentiles (linear interpolation, ms) of time to first token (``ttft``) and inter-token latency (``itl``);
        requests and answer tokens per second; goodput (requests a second that met both SLOs); the cached share of all
        prompt tokens; and the share of follow-up turns that found their chat's previous prompt in the cache.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    good = _answered(turns)
    follow_ups = [turn for turn in good if turn.before]
    prompt, cached = sum(turn.prompt_tokens for turn in good), sum(turn.cached_tokens for turn in good)
    return {
        "requests": len(turns),
        "errors": len(turns) - len(good),
        "seconds": round(seconds, 2),
        **_latencies(good, [gap for turn in good for gap in turn.between_tokens()]),
        "requests_per_s": round(len(good) / seconds, 3),
        "answer_tokens_per_s": round(sum(turn.tokens[-1] for turn in good) / seconds, 2),
        "goodput_per_s": round(sum(turn.meets(slo_first, slo_between) for turn in good) / seconds, 3),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "cached_share": _share(cached, prompt),
        "follow_ups": len(follow_ups),
        "follow_ups_resident_share": _share(
            sum(turn.cached_tokens >= turn.before for turn in follow_ups), len(follow_ups)
        ),
    }


def window(turns: Sequence[Turn], begin: float, end: float) -> dict[str, Any]:
    """Figures of ``[begin, end)`` of a run that fills the server from beginning to end.

    Requests cut off at ``end`` count for what they got until then. A time to first token counts where the token came;
    in a closed loop with more users than fit, it is mostly the wait for a place. ``concurrency`` is the mean number of
    requests between their first and last token.

    Raises:
        ValueError: the window is empty.
    """
    if not end > begin:
        raise ValueError(f"the window must have a length, got [{begin!r}, {end!r})")
    seen = _answered(turns)
    first = [turn for turn in seen if begin <= turn.arrivals[0] < end]
    prompt, answer = sum(turn.prompt_tokens for turn in first), sum(turn.tokens_within(begin, end) for turn in seen)
    overlap = sum(max(0.0, min(turn.arrivals[-1], end) - max(turn.arrivals[0], begin)) for turn in seen)
    return {
        "window_s": round(end - begin, 2),
        "requests_started": len(first),
        "errors": sum(turn.error is not None for turn in turns),
        "answer_tokens": answer,
        "answer_tokens_per_s": round(answer / (end - begin), 1),
        "prompt_tokens_per_s": round(prompt / (end - begin), 1),
        "concurrency": round(overlap / (end - begin), 2),
        **_latencies(first, [gap for turn in seen for gap in turn.between_tokens(begin, end)]),
        "cached_share": _share(sum(turn.cached_tokens for turn in first), prompt),
        "error_messages": error_messages(turns),
    }


def first_tokens(turns: Sequence[Turn], warm_up: int = 2) -> dict[str, Any]:
    """Time to first token of requests; the first ``warm_up`` are left out."""
    seen = _answered(turns[warm_up:])
    good = [turn.first_token for turn in seen]
    return {
        "requests": len(good),
        "errors": sum(turn.error is not None for turn in turns),
        **percentiles("ttft", good),
        "ttft_mean_ms": round(1000 * statistics.fmean(good), 3) if good else None,
        "ttft_standard_error_ms": (
            round(1000 * statistics.stdev(good) / len(good) ** 0.5, 3) if len(good) > 1 else None
        ),
        "cached_share": _share(sum(turn.cached_tokens for turn in seen), sum(turn.prompt_tokens for turn in seen)),
        "error_messages": error_messages(turns),
    }
