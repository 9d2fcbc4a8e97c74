"""Concurrent multi-turn visual chats against a live server, or against ours and stock SGLang one after the other.

    python -m bench.load                                   # ours and stock, same pool, tiny random model, CPU
    python -m bench.load --users 2 4 8 --rate 0.5 1        # closed loop with 2, 4, 8 users, then Poisson arrivals
    python -m bench.load --url http://127.0.0.1:30000      # a server that is already running

Every run is written at once, under a key made of its settings; a run that is there already is not repeated (``--fresh``
repeats all). Results: ``<out>.json`` (everything), ``<out>.csv`` (one row a run), ``<out>.png``.
"""

from __future__ import annotations

import argparse
import csv
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Iterator

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.client import hold_chats
from bench.common import RESULTS, STOCK, Arm, Store, header, key_of, ours, serve, stand_in_model
from bench.figures import error_messages, summarise
from bench.traffic import Picture, Traffic, plan_chats

FIGURES = (
    ("requests", "requests"), ("errors", "errors"), ("ttft_p50_ms", "time to first token p50 (ms)"),
    ("ttft_p90_ms", "p90"), ("ttft_p99_ms", "p99"), ("itl_p50_ms", "inter-token latency p50 (ms)"),
    ("itl_p90_ms", "p90"), ("itl_p99_ms", "p99"), ("answer_tokens_per_s", "answer tokens/s"),
    ("goodput_per_s", "goodput under the SLO (requests/s)"), ("cached_share", "cached share of prompts"),
    ("follow_ups_resident_share", "follow-ups found resident"), ("resident", "chats resident at the end"),
)  # fmt: skip


def settings(arm: Arm, pool: int | None, slo: tuple[float, float], traffic: Traffic) -> dict[str, Any]:
    """What a run is, and its key is made of: a server (by name and flags), its pool, the SLO (ms) and the traffic."""
    load = f"{traffic.rate:g} chats/s" if traffic.rate else f"{traffic.users} users"
    return {"server": arm.name, "load": load, "flags": list(arm.flags), "pool": pool, "slo_ttft_ms": slo[0],
            "slo_itl_ms": slo[1], **asdict(traffic)}  # fmt: skip


def measure(url: str, run: dict[str, Any], traffic: Traffic) -> dict[str, Any]:
    """Flush the server, hold the chats, and return one row."""
    # The server flushes when it is idle, which it is a moment after its last answer.
    reply = requests.post(url + "/flush_cache", params={"timeout": 30}, timeout=60)
    if not reply.ok:
        raise RuntimeError(f"{url} did not flush its cache ({reply.status_code}): is somebody else using it?")
    with tqdm(total=traffic.chats * traffic.turns, desc=f"{run['server']}, {run['load']}", unit="turn") as bar:
        held = hold_chats(url, plan_chats(traffic), traffic.at_once, resident=True, progress=bar.update)
    row = summarise(held.turns, held.seconds, run["slo_ttft_ms"] / 1000, run["slo_itl_ms"] / 1000)
    found = {"resident": held.resident, "error_messages": error_messages(held.turns)}
    return {**run, **row, **found, "measured": header()}


def warm_up(url: str, traffic: Traffic) -> None:
    """A short chat about no planned image, so that the first measured request does not pay for lazy imports."""
    warm = replace(traffic, users=1, chats=1, turns=2, think=0, rate=0, seed=traffic.seed + 1_000_003)
    unseen = (Picture(10**6, traffic.side),)
    hold_chats(url, [replace(chat, pictures=unseen) for chat in plan_chats(warm)], 1)


@contextmanager
def _server(arm: Arm, args: argparse.Namespace) -> Iterator[str]:
    if args.url:
        yield args.url.rstrip("/")
        return
    with stand_in_model(args.model) as model:
        print(f"starting {arm.name}, {args.pool} slots (a minute or more)")
        with serve(arm, model, args.pool) as server:
            yield server.url


def planned(args: argparse.Namespace) -> list[tuple[Arm, list[Traffic]]]:
    """The traffic of each run, by server, in order."""
    names = ("chats", "turns", "think", "reuse", "side", "max_tokens", "seed")
    traffic = Traffic(**{name: getattr(args, name) for name in names})
    loads = [replace(traffic, users=users) for users in args.users]
    loads += [replace(traffic, rate=rate) for rate in args.rate]
    arms = [Arm(args.url, ())] if args.url else [arm for arm in (STOCK, ours(args.retention))
                                                 if arm.name.split("-")[0] in args.arms]  # fmt: skip
    return [(arm, loads) for arm in arms]


def write_table(path: Path, runs: dict[str, dict]) -> None:
    """One row a run, of what fits a table."""
    rows = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in runs.values()]
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict], console: Console) -> None:
    """A table a load, the servers side by side."""
    for load in dict.fromkeys(row["load"] for row in rows):
        mine = [row for row in rows if row["load"] == load]
        table = Table(load, *[row["server"] for row in mine])
        for name, title in FIGURES:
            table.add_row(title, *["-" if row[name] is None else str(row[name]) for row in mine])
        console.print(table)


def arguments() -> argparse.ArgumentParser:
    traffic = Traffic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="*", default=[2, 6], help="closed loop: chats at once, a run each")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="Poisson: chats per second, a run each")
    parser.add_argument("--chats", type=int, default=traffic.chats)
    parser.add_argument("--turns", type=int, default=traffic.turns)
    parser.add_argument("--think", type=float, default=traffic.think, help="mean think time in seconds")
    parser.add_argument("--reuse", type=float, default=traffic.reuse, help="share of chats about an earlier image")
    parser.add_argument("--side", type=int, default=traffic.side, help="side of the images in pixels")
    parser.add_argument("--max-tokens", type=int, default=traffic.max_tokens)
    parser.add_argument("--seed", type=int, default=traffic.seed)
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0)
    parser.add_argument("--arms", nargs="+", choices=("stock", "tgvkv"), default=["stock", "tgvkv"])
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--pool", type=int, default=1000, help="slots of each server's pool")
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: a tiny random model)")
    parser.add_argument("--url", help="measure this running server instead of starting any")
    parser.add_argument("--out", type=Path, default=RESULTS / "load-cpu.json")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are there already")
    return parser


def main() -> None:
    args = arguments().parse_args()
    store, keys = Store(args.out, args.fresh), []
    for arm, loads in planned(args):
        slo, pool = (args.slo_ttft_ms, args.slo_itl_ms), None if args.url else args.pool
        runs = {key_of(run): (run, load) for load in loads for run in [settings(arm, pool, slo, load)]}
        keys += runs
        left = {key: run for key, run in runs.items() if key not in store.done}
        if not left:
            continue
        with _server(arm, args) as url:
            warm_up(url, loads[0])
            for key, (run, load) in left.items():
                store.add(key, measure(url, run, load))
                write_table(args.out.with_suffix(".csv"), store.runs)
    rows = [store.runs[key] for key in keys]
    show(rows, Console())
    try:
        from bench.plots import plot_load
    except ImportError as error:
        print(f"no plot ({error}); pip install 'tgvkv-sglang[bench]'")
        return
    plot_load(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
