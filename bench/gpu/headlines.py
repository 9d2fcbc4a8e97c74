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


def headlines(rows: Sequence[dict]) -> dict[str, float | None]:
    """By name, None where a side was not measured; :data:`GOALS` has the goals that some of them have."""

    def against_stock(part: str, load: str) -> float | None:
        ours, stock = _row(rows, part, f"{load} at 0.05"), _row(rows, part, f"{load} on stock")
        return _ratio(ours, stock, "answer_tokens_per_s")

    def text(name: str) -> float | None:
        sides = ([_row(rows, "qwen-ample", f"text{again} on {side}") for side in ("tgvkv", "stock")]
                 for again in ("", ", again"))  # fmt: skip
        ratios = [_ratio(ours, stock, name) for ours, stock in sides]
        return None if None in ratios else round(statistics.fmean(ratios), 4)

    def first_token(size: str, bottom: str) -> float | None:
        ours, other = (_row(rows, "qwen-ample", f"first token, {size} {side}") for side in ("at 0.05", bottom))
        return _ratio(ours, other, "ttft_p50_ms")

    found = {f"{model}, {size}, 5 %, {memory} memory: throughput over stock": against_stock(*where)
             for memory in ("tight", "ample") for model, size, where in (
                 *(("8B", size, (f"qwen-{memory}", size)) for size in ("4k", "1k", "16k")),
                 ("7B", "4k", ("mistral", f"{memory}, 4k")))}  # fmt: skip
    found["text only: throughput over stock"] = text("answer_tokens_per_s")
    found["text only: inter-token latency over stock"] = text("itl_p50_ms")
    for size in ("4k", "16k"):
        ratio = first_token(size, "at 1")
        found[f"selection, share of time to first token, {size}"] = None if ratio is None else round(ratio - 1, 4)
    found["time to first token over stock, 4k, retention 0.05"] = first_token("4k", "on stock")
    return found
