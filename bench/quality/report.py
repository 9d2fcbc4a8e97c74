"""Tables and a plot of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable

from bench.quality.boards import BOARDS, TURNS
from bench.quality.cells import ALL, AT, EVIDENCE, NONE, RETENTIONS, RULES, SWEPT, Cell
from bench.quality.score import paired, share_of, word_share
from tgvkv_sglang.registry import POLICIES

Runs = dict[tuple[str, Cell], dict]
"""Finished runs by board and cell."""

BASE = "tgv"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _with_interval(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _signed(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _row(runs: Runs, board: str, cell: Cell, base: dict | None) -> list[str]:
    run = runs[board, cell]
    cells = [_with_interval(*share_of(run)), *(_percent(share_of(run, turn)[0]) for turn in range(TURNS))]
    cells.append(_percent(word_share(run)))
    cells.append("" if base is None or base is run else _signed(*paired(run, base)))
    return cells


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def policies_table(runs: Runs, board: str, retention: str = AT, reclaim: str = "pressure") -> str:
    """One row a policy, the best first, between its bounds: all of the KV, the evidence, and none."""
    cells = [Cell(policy, retention, reclaim=reclaim) for policy in POLICIES]
    done = [cell for cell in cells if (board, cell) in runs]
    done.sort(key=lambda cell: -share_of(runs[board, cell])[0])
    bounds = [ALL, Cell(EVIDENCE, retention, reclaim=reclaim)]
    order = [cell for cell in (*bounds, *done, NONE) if (board, cell) in runs]
    base = runs.get((board, Cell(BASE, retention, reclaim=reclaim)))
    head = [f"{board}, {100 * float(retention):g} %", "exact", *(f"turn {turn + 1}" for turn in range(TURNS)), "words",
            f"exact, over `{BASE}`"]  # fmt: skip
    return _markdown(head, ([cell.title, *_row(runs, board, cell, base)] for cell in order))


def retentions_table(runs: Runs, board: str) -> str:
    """Exact answers by retention, one row a policy."""
    head = [f"{board}, exact", *(f"{100 * float(retention):g} %" for retention in RETENTIONS)]
    rows = []
    for policy in SWEPT:
        found = [runs.get((board, Cell(policy, retention))) for retention in RETENTIONS]
        if any(found):
            rows.append([policy, *(_percent(share_of(run)[0]) if run else "" for run in found)])
    return _markdown(head, rows)


def rules_table(runs: Runs, board: str) -> str:
    """Exact answers at one retention, a column a budget rule."""
    head = [f"{board}, exact at {100 * float(AT):g} %", "own rule", *RULES]
    rows = []
    for policy in POLICIES:
        cells = [Cell(policy), *(Cell(policy, budget=rule) for rule in RULES)]
        if all((board, cell) in runs for cell in cells):
            rows.append([policy, *(_percent(share_of(runs[board, cell])[0]) for cell in cells)])
    return _markdown(head, rows)


def tables(runs: Runs) -> str:
    """All of them, in Markdown."""
    parts = []
    for board in dict.fromkeys(board for board, _ in runs):
        for retention in (AT, "0.02"):
            parts.append(policies_table(runs, board, retention))
        parts += [retentions_table(runs, board), rules_table(runs, board)]
        if any(cell.reclaim == "eager" and at == board for at, cell in runs):
            parts.append("Eager reclaim: later turns go on with the first turn's choice.\n\n"
                         + policies_table(runs, board, reclaim="eager"))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def plot(runs: Runs, path: Path) -> None:
    """Exact answers over retention, a panel a board, between the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(BOARDS), figsize=(11, 4), sharey=True)
    for axis, board in zip(axes, BOARDS, strict=True):
        for i, policy in enumerate(SWEPT):
            found = [(float(r), share_of(runs[board, Cell(policy, r)])) for r in RETENTIONS
                     if (board, Cell(policy, r)) in runs]  # fmt: skip
            at, shares = [100 * r for r, _ in found], [[100 * value for value in share] for _, share in found]
            axis.plot(at, [share[0] for share in shares], marker="o", color=f"C{i}", label=policy)
            axis.fill_between(at, *zip(*(share[1:] for share in shares), strict=True), color=f"C{i}", alpha=0.12)
        for cell, style in ((ALL, "-"), (NONE, ":")):
            run = runs.get((board, cell))
            if run:
                axis.axhline(100 * share_of(run)[0], color="grey", linestyle=style, label=cell.title)
        axis.set(xscale="log", title=f"{board} boards", xlabel="vision KV kept (%)")
        axis.set_xticks([100 * float(r) for r in RETENTIONS], [f"{100 * float(r):g}" for r in RETENTIONS])
        axis.minorticks_off()
    axes[0].set_ylabel("exact answers (%), all turns")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
