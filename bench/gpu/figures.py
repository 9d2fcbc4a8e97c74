"""Figures of one cell, from its turns. Pure functions; times in seconds since the cell began."""

from __future__ import annotations

import statistics
from typing import Any, Sequence

from bench.stats import Turn, percentiles


def tokens_within(turn: Turn, begin: float, end: float) -> int:
    """Answer tokens that arrived in ``[begin, end)``."""
    counts = [0, *turn.tokens]
    return sum(
        counts[i + 1] - counts[i] for i, arrival in enumerate(turn.arrivals) if begin <= arrival < end
    )  # fmt: skip


def concurrency(turns: Sequence[Turn], begin: float, end: float) -> float:
    """Requests that were generating (between their first and last token), on average over ``[begin, end)``."""
    overlap = 0.0
    for turn in turns:
        if turn.arrivals:
            overlap += max(0.0, min(turn.arrivals[-1], end) - max(turn.arrivals[0], begin))
    return overlap / (end - begin)


def load_figures(turns: Sequence[Turn], begin: float, end: float) -> dict[str, Any]:
    """Throughput, latencies and concurrency of the window ``[begin, end)``.

    Requests cut off at ``end`` count for what they got until then. A time to first token counts where the token came;
    in a closed loop with more users than fit, it is mostly the wait for a place.

    Raises:
        ValueError: the window is empty.
    """
    if not end > begin:
        raise ValueError(f"the window must have a length, got [{begin!r}, {end!r})")
    seen = [turn for turn in turns if turn.error is None and turn.arrivals]
    first = [turn for turn in seen if begin <= turn.arrivals[0] < end]
    prompt = sum(turn.prompt_tokens for turn in first)
    answer = sum(tokens_within(turn, begin, end) for turn in seen)
    return {
        "window_s": round(end - begin, 2),
        "requests_started": len(first),
        "errors": sum(turn.error is not None for turn in turns),
        "answer_tokens": answer,
        "answer_tokens_per_s": round(answer / (end - begin), 1),
        "prompt_tokens_per_s": round(prompt / (end - begin), 1),
        "concurrency": round(concurrency(seen, begin, end), 2),
        **percentiles("ttft", [turn.first_token for turn in first]),
        **percentiles("itl", [gap for turn in seen for gap in turn.between_tokens(begin, end)]),
        "cached_share": round(sum(turn.cached_tokens for turn in first) / prompt, 4) if prompt else None,
        "error_messages": sorted({turn.error for turn in turns if turn.error})[:5],
    }


def first_token_figures(turns: Sequence[Turn]) -> dict[str, Any]:
    """Time to first token of requests sent one after the other; the first two are warm-up and left out."""
    good = [turn.first_token for turn in turns[2:] if turn.error is None and turn.arrivals]
    return {
        "requests": len(good),
        "errors": sum(turn.error is not None for turn in turns),
        **percentiles("ttft", good),
        "ttft_mean_ms": round(1000 * statistics.fmean(good), 3) if good else None,
        "ttft_standard_error_ms": (
            round(1000 * statistics.stdev(good) / len(good) ** 0.5, 3) if len(good) > 1 else None
        ),
        "error_messages": sorted({turn.error for turn in turns if turn.error})[:5],
    }


def _row(rows: Sequence[dict], part: str, cell: str) -> dict | None:
    """The figures of a cell that was measured, or None."""
    found = [row["figures"] for row in rows if (row["part"], row["cell"]) == (part, cell) and row.get("figures")]
    return found[-1] if found else None


def _ratio(top: dict | None, bottom: dict | None, name: str) -> float | None:
    if not top or not bottom or not top.get(name) or not bottom.get(name):
        return None
    return round(top[name] / bottom[name], 4)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 4) if len(known) == len(values) and known else None


def _overhead(with_selection: dict | None, without: dict | None) -> float | None:
    ratio = _ratio(with_selection, without, "ttft_p50_ms")
    return None if ratio is None else round(ratio - 1, 4)


def headlines(rows: Sequence[dict]) -> dict[str, float | None]:
    """The figures that the project has goals for, None where a side was not measured.

    Goals (goals, not results): tight 2.5 or more; ample 0.98 or more; scoring below 0.02; text within 0.01 of 1.
    """

    def against_stock(part: str, load: str, suffix: str = "0.05") -> float | None:
        ours, stock = _row(rows, part, f"{load} at {suffix}"), _row(rows, part, f"{load} on stock")
        return _ratio(ours, stock, "answer_tokens_per_s")

    def text(name: str, again: str) -> float | None:
        sides = (_row(rows, "qwen-ample", f"text{again} on {side}") for side in ("tgvkv", "stock"))
        return _ratio(*sides, name)

    first_4k, first_16k = (
        [_row(rows, "qwen-ample", f"first token, {size} {side}") for side in ("at 0.05", "at 1", "on stock")]
        for size in ("4k", "16k")
    )
    return {
        "8B, 4k, 5 %, tight memory: throughput over stock": against_stock("qwen-tight", "4k"),
        "8B, 4k, 5 %, ample memory: throughput over stock": against_stock("qwen-ample", "4k"),
        "8B, 1k, 5 %, tight memory: throughput over stock": against_stock("qwen-tight", "1k"),
        "8B, 16k, 5 %, tight memory: throughput over stock": against_stock("qwen-tight", "16k"),
        "8B, 1k, 5 %, ample memory: throughput over stock": against_stock("qwen-ample", "1k"),
        "8B, 16k, 5 %, ample memory: throughput over stock": against_stock("qwen-ample", "16k"),
        "7B, 4k, 5 %, tight memory: throughput over stock": against_stock("mistral", "tight, 4k"),
        "7B, 4k, 5 %, ample memory: throughput over stock": against_stock("mistral", "ample, 4k"),
        "text only: throughput over stock": _mean([text("answer_tokens_per_s", again) for again in ("", ", again")]),
        "text only: inter-token latency over stock": _mean([text("itl_p50_ms", again) for again in ("", ", again")]),
        "selection, share of time to first token, 4k": _overhead(first_4k[0], first_4k[1]),
        "selection, share of time to first token, 16k": _overhead(first_16k[0], first_16k[1]),
        "time to first token over stock, 4k, retention 0.05": _ratio(first_4k[0], first_4k[2], "ttft_p50_ms"),
    }
