"""What the scheduler's own work in the prefix cache costs: our tree and evictor beside stock SGLang's RadixCache.

    python -m bench.tree

No server and no model: two caches are filled with finished conversations (a shared system prompt, one image, a
question, an answer), each about its own picture (``own``) or all about one (``one``), and ``--running`` more are under
way. Then follow-ups are admitted and timed call by call: match, lock, how much is evictable, insert, unlock, evict for
one slot. Stock's column is empty where stock has no such operation. ``evictable`` follows a change each time, so that
it includes what the change left to do. SGLang's allocator is left out on both sides.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.common import RESULTS, header, write_json
from bench.tree_caches import Load, Ours, Stock, Stopwatch

PERCENTILES = (50, 99)


@dataclass(frozen=True)
class Row:
    """One operation: how often it was timed, and its median and 99th percentile in microseconds."""

    pictures: str
    conversations: int
    operation: str
    calls: int
    tgvkv_us: list[float]
    stock_us: list[float] | None


def time_one(make: type, load: Load, bar: tqdm) -> dict[str, list[float]]:
    """Microseconds of every call, by operation, on a freshly filled cache."""
    cache, watch = make(load), Stopwatch()
    for conversation in range(load.conversations + load.running):
        cache.open(conversation, finish=conversation < load.conversations)
        bar.update()
    order = np.random.default_rng(load.seed).permutation(load.conversations)[: load.admissions]
    gc.collect()
    gc.freeze()  # as SGLang's scheduler does once it has warmed up
    for conversation in order:
        cache.admit(int(conversation), watch)
        bar.update()
    cache.rest(load, watch)
    gc.unfreeze()
    return watch.times


def measure(sizes: list[int], running: int, admissions: int, seed: int) -> list[Row]:
    loads = [
        Load(size, one_picture, min(running, size), max(1, min(admissions, size // 4)), seed)
        for one_picture in (False, True)
        for size in sizes
    ]
    rows = []
    total = 2 * sum(load.conversations + load.running + load.admissions for load in loads)
    with tqdm(total=total, unit="conversation") as bar:
        for load in loads:
            pictures = "one" if load.one_picture else "own"
            times = {}
            for make in (Ours, Stock):
                bar.set_description(f"{make.__name__.lower()}, {load.conversations} conversations, {pictures} picture")
                times[make] = time_one(make, load, bar)
            for operation, ours in times[Ours].items():
                stock = times[Stock].get(operation)
                figures = percentiles(ours), percentiles(stock) if stock else None
                rows.append(Row(pictures, load.conversations, operation, len(ours), *figures))
    return rows


def percentiles(values: list[float]) -> list[float]:
    return [round(float(np.percentile(values, p)), 1) for p in PERCENTILES]


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="microseconds a call: median (99th percentile)")
    for name in ("pictures", "conversations", "operation", "tgvkv", "stock"):
        table.add_column(name, justify="left" if name in ("pictures", "operation") else "right")
    before = None
    for row in rows:
        if before not in (None, (row.pictures, row.conversations)):
            table.add_section()
        before = (row.pictures, row.conversations)
        table.add_row(row.pictures, f"{row.conversations:,}", row.operation, cell(row.tgvkv_us), cell(row.stock_us))
    console.print(table)


def cell(figures: list[float] | None) -> str:
    return "-" if figures is None else f"{figures[0]:,.0f} ({figures[1]:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--running", type=int, default=256, help="conversations under way, at most")
    parser.add_argument("--admissions", type=int, default=200, help="timed follow-ups, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "tree-cpu.json")
    args = parser.parse_args()
    rows = measure(args.conversations, args.running, args.admissions, args.seed)
    show(rows, Console())
    settings = {"conversations": args.conversations, "running": args.running, "admissions": args.admissions}
    write_json(args.out, {**header(), "settings": settings, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
