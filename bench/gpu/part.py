"""Measure cells of one part of the GPU programme, in a process of its own (run_all.py starts it).

python -m bench.gpu.part qwen-tight --cells "4k at 0.05" "4k on stock" --seconds 210 --results DIR --work DIR
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

from bench.common import ROOT, header
from bench.gpu import environment, figures, results
from bench.gpu.client import ask_once, run_load
from bench.gpu.programme import Cell, Part, ServerSpec, cpu_programme, gpu_programme
from bench.gpu.servers import Servers, Setup, information
from bench.gpu.stress import measure_equal, measure_soak

MARGIN = 5.0
WARM_UP_S = 60.0
"""Longest time one of a server's first requests may take: Triton kernels and torch.compile are built in them."""
TOGETHER_S = 3.0


@dataclass
class Context:
    """What a measurement may use."""

    setup: Setup
    servers: Servers | None
    results: Path
    commit: str
    seconds: float


def measure_kernels(cell: Cell, context: Context) -> dict[str, Any]:
    """bench/gpu/kernels.py; its rows go to a file of their own."""
    name = "gpu-kernels.json" if cell.kind == "kernels" else "gpu-kernels-all.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "kernels.py"), "--commit", context.commit]
    command += ["--out", str(context.results / name), *(["--main"] if cell.kind == "kernels" else [])]
    said = environment.output(*command, timeout=context.seconds)
    path = context.results / name
    if not path.is_file():
        return {"skipped" if context.setup.cpu else "error": said[-2000:]}
    content = json.loads(path.read_text())
    rows = content["rows"]
    views = [row.get("share_of_roof") for row in rows if row["kernel"] == "view_attention" and not row.get("wrong")]
    return {
        "rows": len(rows),
        "wrong": [f"{row['kernel']} {row['shape']}" for row in rows if row.get("wrong")],
        "view_attention_best_share_of_roof": max((share for share in views if share is not None), default=None),
        "file": name,
        "said": said[-400:],
    }


def _server(cell: Cell, context: Context):
    return context.servers.alive[cell.server]


def measure_load(cell: Cell, context: Context) -> dict[str, Any]:
    server = _server(cell, context)
    server.flush()
    seconds = max(cell.load.ramp + 2.0, min(cell.seconds, context.seconds) - MARGIN / 2)
    turns = run_load(server.url, cell.load, cell.name, seconds)
    row = figures.load_figures(turns, cell.load.ramp, seconds)
    if not row["answer_tokens"]:
        raise RuntimeError(f"no answers: {row['error_messages']}")
    return {**row, "server": information(server)}


def measure_first_token(cell: Cell, context: Context) -> dict[str, Any]:
    server = _server(cell, context)
    server.flush()
    seconds = min(cell.seconds, context.seconds) - MARGIN / 2
    return figures.first_token_figures(run_load(server.url, cell.load, cell.name, seconds))


MEASURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "environment": lambda cell, context: environment.facts(context.seconds - MARGIN),
    "kernels": measure_kernels,
    "all-kernels": measure_kernels,
    "load": measure_load,
    "ttft": measure_first_token,
    "equal": lambda cell, context: measure_equal(context.servers.alive, cell.server),
    "soak": lambda cell, context: measure_soak(
        _server(cell, context), context.seconds - MARGIN, "float32" if context.setup.cpu else "bfloat16"
    ),
}


def needed(part: Part, cells: list[Cell]) -> list[ServerSpec]:
    """The servers that these cells are measured on (what equal answers are compared with included), in order."""
    names = {cell.server for cell in cells if cell.server}
    if any(cell.kind == "equal" for cell in cells):
        names |= {"demo", "demo-stock"}
    return [server for server in part.servers if server.name in names]


def warm_up(part: Part, cells: list[Cell], servers: Servers) -> None:
    """On each server one request of every kind it will be asked, then several at once: all servers at the same time.

    Nothing is to be compiled while it is measured. A server that does not answer is a failed one.
    """

    def warm(name: str) -> str | None:
        loads = {(c.load.images, c.load.side, (c.load.retention or 1.0) < 1.0): c.load
                 for c in cells if c.server == name and c.load}  # fmt: skip
        url = servers.alive[name].url
        try:
            for load in loads.values():
                ask_once(url, replace(load, answer=(12, 12), seed=10**6), "warm-up", WARM_UP_S)
            for load in list(loads.values())[:1]:
                together = replace(load, users=min(load.users, 8), answer=(12, 24), seed=10**6 + 1)
                run_load(url, together, "warm-up", TOGETHER_S)
        except (RuntimeError, TimeoutError) as error:
            return f"warm-up: {type(error).__name__}: {error}\n{servers.alive[name].log_tail()}"
        return None

    with ThreadPoolExecutor(max(1, len(servers.alive))) as pool:
        names = list(servers.alive)
        for name, trouble in zip(names, pool.map(warm, names), strict=True):
            if trouble is not None:
                servers.failed[name] = trouble
                del servers.alive[name]


def run_cells(part: Part, cells: list[Cell], seconds: float, setup: Setup, out: Path, commit: str) -> None:
    """Measure ``cells`` in order while the time lasts; every row is written at once."""
    deadline = time.monotonic() + seconds
    store = results.Results(out)
    if not setup.cpu:
        setup = replace(setup, extra_flags=(*setup.extra_flags, *environment.needed_flags(store.rows)))
    with ExitStack() as stack:
        servers = None
        if specs := needed(part, cells):
            allowed = seconds - sum(cell.seconds for cell in cells[:1])
            servers = stack.enter_context(Servers(specs, setup, max(30.0, allowed)))
            warm_up(part, cells, servers)
            warm = round(seconds - (deadline - time.monotonic()), 1)
            store.part(part.name, {"started_in_s": servers.seconds, "warm_after_s": warm, "failed": servers.failed})
        for cell in cells:
            left = deadline - time.monotonic()
            row = {"part": part.name, "cell": cell.name, "kind": cell.kind, "settings": results.settings(part, cell)}
            if left < min(cell.seconds, 10.0) or (cell.load and left < cell.load.ramp + 2 * MARGIN):
                store.drop(f"{part.name}/{cell.name}", f"{left:.0f} s left of the part's time")
                continue
            if cell.server and (trouble := servers.trouble(cell.server)):
                store.add(part.key(cell), row | {"error": trouble})
                continue
            began = time.monotonic()
            try:
                context = Context(setup, servers, out, commit, min(cell.seconds + MARGIN, left))
                row["figures"] = MEASURES[cell.kind](cell, context)
            except Exception as error:  # one cell's failure must not cost the others their turn
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                if cell.server:
                    row["server_log"] = servers.alive[cell.server].log_tail()
            row["seconds"] = round(time.monotonic() - began, 1)
            row["measured"] = {**header(), "commit": commit}
            store.add(part.key(cell), row)
            print(f"  {part.name}/{cell.name}: {row['seconds']} s {row.get('error', '')}"[:300], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--cells", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--commit", default="not given")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--server-flag", action="append", default=[])
    parser.add_argument("--server-env", action="append", default=[])
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped on the way out
    programme = {part.name: part for part in (cpu_programme() if args.cpu else gpu_programme())}
    part = programme[args.part]
    cells = [cell for cell in part.cells if cell.name in args.cells]
    env = dict(pair.split("=", 1) for pair in args.server_env)
    setup = Setup(args.cpu, args.work, tuple(args.server_flag), env)
    run_cells(part, cells, args.seconds, setup, args.results, args.commit)


if __name__ == "__main__":
    main()
