"""How many conversations stay resident in a pool that holds a tenth of their images: ours over stock SGLang.

    python -m bench.resident

Opens N conversations, each about its own image, one after another. Then asks each of them a follow-up, and counts
those whose first prompt is still served from the radix cache (``cached_tokens`` >= its length). The follow-ups go to
the youngest conversation first: an LRU cache that is asked oldest first drops each conversation just before its turn,
and would count 0 however many it held (``--order oldest`` shows that).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Callable

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.common import RESULTS, STOCK, header, ours, serve, stand_in_model, write_json
from tgvkv_sglang.testing.images import GRID, make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Server

QUESTION = "What is it?"
FOLLOW_UP = "More?"


def count_resident(
    server: Server, conversations: int, side: int, retention: float | None, order: str, progress: Callable[[], None]
) -> tuple[int, int, float]:
    """(resident conversations, tokens of one first prompt, cached share of the follow-ups) on a flushed server."""
    server.flush()
    opened = []
    for seed in range(conversations):
        image, text = make_image(seed, side, side), chat(about_images(QUESTION))
        first = server.generate(text, [image], max_new_tokens=4, retention=retention)
        opened.append((seed, first.text, first.meta["prompt_tokens"]))
        progress()
    resident = cached = asked = 0
    for seed, answer, length in reversed(opened) if order == "youngest" else opened:
        text = chat(about_images(QUESTION), answer, FOLLOW_UP)
        again = server.generate(text, [make_image(seed, side, side)], max_new_tokens=1, retention=retention)
        resident += again.cached >= length
        cached, asked = cached + again.cached, asked + again.meta["prompt_tokens"]
        progress()
    return resident, opened[0][2], cached / asked


def pool_size(conversations: int, vision_tokens: int, share: float) -> int:
    """Slots that hold ``share`` of all the images in full."""
    return math.ceil(conversations * vision_tokens * share)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a server and retention: ``resident`` of ``conversations`` were still cached when asked again.

    ``cached_share`` (0..1) is the cached part of all follow-ups' prompt tokens; the counts are in slots and tokens.
    """
    vision = (args.side // GRID) ** 2
    pool = args.pool or pool_size(args.conversations, vision, args.share)
    rows = []
    with stand_in_model(args.model) as model:
        plans = [(STOCK, [None]), (ours(args.retention[0]), args.retention)]
        steps = 2 * args.conversations * sum(len(retentions) for _, retentions in plans)
        with tqdm(total=steps, unit="request") as bar:
            for arm, retentions in plans:
                bar.set_description(f"starting {arm.name}")
                with serve(arm, model, pool) as server:
                    for retention in retentions:
                        name = arm.name if retention is None else f"tgvkv {retention:g}"
                        bar.set_description(name)
                        found, length, share = count_resident(
                            server, args.conversations, args.side, retention, args.order, bar.update
                        )
                        rows.append({
                            "name": name, "retention": retention or 1.0, "pool": pool,
                            "conversations": args.conversations, "vision_tokens": vision,
                            "first_prompt_tokens": length, "resident": found, "cached_share": share,
                        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    stock = rows[0]["resident"]
    table = Table(title="{conversations} conversations, each with its own image of {vision_tokens} vision tokens; "
                        "a pool of {pool} slots".format_map(rows[0]))  # fmt: skip
    for name in ("server", "resident conversations", "over stock", "cached share of follow-ups"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = f"{row['resident'] / stock:.1f} x" if stock else "-"
        table.add_row(row["name"], str(row["resident"]), ratio, f"{row['cached_share']:.0%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--side", type=int, default=16 * GRID, help="side of the square images in pixels (16*32 = 256"
                        " vision tokens)")  # fmt: skip
    parser.add_argument("--retention", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--share", type=float, default=0.1, help="share of all images that the pool holds in full")
    parser.add_argument("--pool", type=int, help="slots, instead of --share")
    parser.add_argument("--order", choices=("youngest", "oldest"), default="youngest")
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: a tiny random model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "resident-cpu.json")
    args = parser.parse_args()
    rows = measure(args)
    show(rows, Console())
    stock = rows[0]["resident"]
    ratios = {row["name"]: round(row["resident"] / stock, 2) for row in rows[1:]} if stock else {}
    write_json(args.out, {**header(), "order": args.order, "rows": rows, "over_stock": ratios})


if __name__ == "__main__":
    main()
