"""Measure cells of one part of the GPU programme, in a process of its own (run_all.py starts it).

python -m bench.gpu.part qwen-tight --cells "4k at 0.05" "4k on stock" --seconds 210 --results DIR --work DIR
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

from bench.common import ROOT, header
from bench.gpu import figures, results
from bench.gpu.client import run_load
from bench.gpu.programme import Cell, Part, ServerSpec, cpu_programme, gpu_programme
from bench.gpu.servers import Servers, Setup, information, log_end
from bench.gpu.stress import measure_equal, measure_soak

MARGIN = 5.0
WARM_UP_S = 25.0
"""Longest time a server's first requests may take: SGLang's Triton kernels and torch.compile are built in them."""


@dataclass
class Context:
    """What a measurement may use."""

    setup: Setup
    servers: Servers | None
    results: Path
    commit: str
    seconds: float


def _output(*command: str, timeout: float = 30.0, env: dict[str, str] | None = None) -> str:
    """What a command prints, or why it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr)[-4000:].strip()


def measure_environment(cell: Cell, context: Context) -> dict[str, Any]:
    """Facts of the machine, and what ``tgvkv doctor`` says on it."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,pstate"
    return {
        "gpu": _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv"),
        "nvcc": _output(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", "--version")[-120:],
        "gcc": _output("gcc", "--version").split("\n")[0],
        "disk": shutil.disk_usage("/")._asdict(),
        "doctor": _output(sys.executable, "-m", "tgvkv_sglang.cli.main", "doctor", timeout=max(5, context.seconds - 5)),
    }


def measure_kernels(cell: Cell, context: Context) -> dict[str, Any]:
    """bench/gpu/kernels.py; its rows go to a file of their own."""
    name = "gpu-kernels.json" if cell.kind == "kernels" else "gpu-kernels-all.json"
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "kernels.py"), "--commit", context.commit]
    command += ["--out", str(context.results / name), *(["--main"] if cell.kind == "kernels" else [])]
    said = _output(*command, timeout=context.seconds)
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
    return {**figures.load_figures(turns, cell.load.ramp, seconds), "server": information(server)}


def measure_first_token(cell: Cell, context: Context) -> dict[str, Any]:
    server = _server(cell, context)
    server.flush()
    seconds = min(cell.seconds, context.seconds) - MARGIN / 2
    return figures.first_token_figures(run_load(server.url, cell.load, cell.name, seconds))


MEASURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "environment": measure_environment,
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
    """On each server a few requests of the kinds it will be asked, so that nothing is compiled while it is measured."""
    for name, server in servers.alive.items():
        loads = {(c.load.images, c.load.retention): c.load for c in cells if c.server == name and c.load}
        for number, load in enumerate(loads.values()):
            short = replace(load, users=min(load.users, 8), answer=(12, 24), seed=10**6 + number)
            run_load(server.url, replace(short, users=1), "warm-up alone", 2.0 if number else WARM_UP_S / 2)
            run_load(server.url, short, "warm-up together", 2.0)


def run_cells(part: Part, cells: list[Cell], seconds: float, setup: Setup, out: Path, commit: str) -> None:
    """Measure ``cells`` in order while the time lasts; every row is written at once."""
    deadline = time.monotonic() + seconds
    store = results.Results(out)
    with ExitStack() as stack:
        servers = None
        if specs := needed(part, cells):
            allowed = seconds - sum(cell.seconds for cell in cells[:1])
            servers = stack.enter_context(Servers(specs, setup, max(30.0, allowed)))
            store.part(part.name, {"started_in_s": servers.seconds, "failed": servers.failed})
            warm_up(part, cells, servers)
        for cell in cells:
            left = deadline - time.monotonic()
            row = {"part": part.name, "cell": cell.name, "kind": cell.kind, "settings": results.settings(part, cell)}
            if left < min(cell.seconds, 10.0) or (cell.load and left < cell.load.ramp + 2 * MARGIN):
                store.drop(f"{part.name}/{cell.name}", f"{left:.0f} s left of the part's time")
                continue
            if cell.server and cell.server not in servers.alive:
                store.add(part.key(cell), row | {"error": f"server {cell.server} did not start: see parts"})
                continue
            began = time.monotonic()
            try:
                context = Context(setup, servers, out, commit, min(cell.seconds + MARGIN, left))
                row["figures"] = MEASURES[cell.kind](cell, context)
            except Exception as error:  # one cell's failure must not cost the others their turn
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                if cell.server:
                    row["server_log"] = log_end(servers.alive[cell.server])
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
