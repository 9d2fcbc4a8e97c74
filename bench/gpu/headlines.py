"""The figures that the programme is for, out of the rows of its cells. Pure functions."""

from __future__ import annotations

import statistics
from typing import Sequence

GOALS = {
    "8B, 4k, 5 %, tight memory: throughput over stock": ">= 2.5",
    "8B, 4k, 5 %, ample memory: throughput over stock": ">= 0.98",
    "text only: throughput over stock": ">= 0.99",
    "text only: inter-token latency over stock": "<= 1.01",
    "selection, share of time to first token, 4k": "< 0.02",
    "selection, share of time to first token, 16k": "< 0.02",
}
"""What they should come to. Goals, not results."""


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
    """By name, None where a side was not measured; :data:`GOALS` has the goals that some of them have."""

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
