"""The figures that the programme is for, out of its cells' rows, and whether they reach the goals. Pure functions."""

from __future__ import annotations

import operator
import statistics
from typing import Sequence

from bench.gpu.programme import OURS, STOCKS

SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
EVERY_STOCK = tuple(STOCKS.values())
GOALS = {
    **{f"short memory, 4k at 5 %: throughput over {stock}": (">=", 2.5) for stock in EVERY_STOCK},
    **{f"ample memory, 4k at 5 %: throughput over {stock}": (">=", 0.98) for stock in EVERY_STOCK},
    **{f"text only: throughput over {stock}": (">=", 0.99) for stock in EVERY_STOCK},
    **{f"text only: inter-token latency over {stock}": ("<=", 1.01) for stock in EVERY_STOCK},
    "scoring, share of a fresh prefill's time to first token, 4k": ("<", 0.02),
    "scoring, share of a follow-up's time to first token, 1 at once": ("<", 0.1),
    "scoring, share of a follow-up's time to first token, 8 at once": ("<", 0.1),
    "view attention, share of the roof, B=64 kept=205": (">=", 0.8),
    "view attention, share of the roof, B=64 kept=205, one 2000": (">=", 0.8),
}
"""What they should come to. Goals, not results."""


def verdict(name: str, value: float | None) -> str:
    """``reached``, ``missed`` or ``not measured``, with the goal; empty for a figure without one."""
    if name not in GOALS:
        return ""
    sign, bound = GOALS[name]
    found = "not measured" if value is None else "reached" if SIGNS[sign](value, bound) else "missed"
    return f"{found} (goal {sign} {bound:g})"


def headlines(rows: Sequence[dict]) -> dict[str, float | None]:
    """By name, None where a side was not measured."""
    figures = {(row["part"], row["cell"]): row["figures"] for row in rows if row.get("figures")}

    def ratio(part: str, top: str, bottom: str, name: str) -> float | None:
        values = [figures.get((part, cell), {}).get(name) for cell in (top, bottom)]
        return round(values[0] / values[1], 4) if all(values) else None

    def text(stock: str, name: str) -> float | None:
        ratios = [ratio("ample-memory", f"text{again} on {OURS}", f"text{again} on {stock}", name)
                  for again in ("", ", again")]  # fmt: skip
        return None if None in ratios else round(statistics.fmean(ratios), 4)

    found: dict[str, float | None] = {}
    for stock in EVERY_STOCK:
        for where, load in (("short memory, 4k", "chats"), ("short memory, 16k", "chats of 16k"),
                            ("short memory, 4k, single questions", "single questions"),
                            ("ample memory, 4k", "chats")):  # fmt: skip
            part = where.split(",")[0].replace(" ", "-")
            sides = (f"{load} at 0.05", f"{load} on {stock}")
            found[f"{where} at 5 %: throughput over {stock}"] = ratio(part, *sides, "answer_tokens_per_s")
        found[f"text only: throughput over {stock}"] = text(stock, "answer_tokens_per_s")
        found[f"text only: inter-token latency over {stock}"] = text(stock, "itl_p50_ms")
    for name, cell in (("a fresh prefill's time to first token, 4k", "first token"),
                       ("a fresh prefill's time to first token, 16k", "first token, 16k"),
                       ("a follow-up's time to first token, 1 at once", "follow-up, 1 at once"),
                       ("a follow-up's time to first token, 8 at once", "follow-up, 8 at once")):  # fmt: skip
        share = ratio("ample-memory", f"{cell} at 0.05", f"{cell} at 1", "ttft_p50_ms")
        found[f"scoring, share of {name}"] = None if share is None else round(share - 1, 4)
        for stock in EVERY_STOCK:
            over = ratio("ample-memory", f"{cell} at 0.05", f"{cell} on {stock}", "ttft_p50_ms")
            found[f"{name.removeprefix('a ')} over {stock}"] = over
    shares = figures.get(("kernels", "kernels, the main ones"), {}).get("share_of_roof", {})
    for shape in ("B=64 kept=205", "B=64 kept=205, one 2000"):
        found[f"view attention, share of the roof, {shape}"] = shares.get(f"view_attention {shape}")
    return found
