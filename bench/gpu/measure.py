"""How each kind of cell is measured: functions of the cell and what it may use."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

from bench.client import hold_chats
from bench.common import ROOT, Store
from bench.figures import first_tokens, window
from bench.gpu.programme import Cell
from bench.gpu.servers import Setup, information
from bench.gpu.smoke import measure_smoke, triton_cache
from bench.soak import Plan, soak
from bench.soak_check import TOLERANCES
from bench.traffic import Load
from tgvkv_sglang.testing.log_text import decode_steps, retracted_requests
from tgvkv_sglang.testing.server import Server
from tgvkv_sglang.trace import read_trace

FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,pstate"
MARGIN_S = 3.0
FIRST_ANSWER_S = 180.0
"""Longest time one of a server's first requests may take: Triton kernels and torch.compile are built in them."""
UNTIMED = 10**6
"""Seed of requests that are not timed: their pictures are nobody else's."""


@dataclass
class Context:
    """What a measurement may use: the part's servers, the cell's own (None where it needs none), and the results.

    ``began``: before the servers were started, in seconds since the epoch.
    """

    setup: Setup
    servers: dict[str, Server]
    server: Server | None
    store: Store
    began: float = 0.0


def output(*command: str, timeout: float = 30.0) -> str:
    """What a command prints, or why it did not."""
    try:
        env = {**os.environ, "COLUMNS": "160"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr)[-12_000:].strip()


def measure_environment(cell: Cell, context: Context) -> dict[str, Any]:
    """GPU, tools, and what ``tgvkv doctor`` says."""
    return {
        "gpu": output("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv"),
        "nvcc": output(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", "--version")[-120:],
        "gcc": output("gcc", "--version").split("\n")[0],
        "doctor": output(sys.executable, "-m", "tgvkv_sglang.cli.main", "doctor", timeout=cell.seconds),
    }


def measure_kernels(cell: Cell, context: Context) -> dict[str, Any]:
    """triton_kernels/benchmark.py; its rows go to a file of their own."""
    name = "gpu-kernels.json" if cell.kind == "kernels" else "gpu-kernels-all.json"
    path = context.store.path.with_name(name)
    command = [sys.executable, str(ROOT / "triton_kernels" / "benchmark.py"), "--commit", context.setup.commit]
    command += ["--out", str(path), *(["--main"] if cell.kind == "kernels" else [])]
    said = output(*command, timeout=3 * cell.seconds)
    if not path.is_file():
        if context.setup.cpu:
            return {"skipped": said[-2000:]}
        raise RuntimeError(said[-2000:])
    rows = json.loads(path.read_text())["rows"]
    wrong = [f"{row['kernel']} {row['shape']}" for row in rows if row.get("wrong")]
    shares = {f"{row['kernel']} {row['shape']}": row["share_of_roof"] for row in rows if "share_of_roof" in row}
    return {"rows": len(rows), "wrong": wrong, "share_of_roof": shares, "file": name, "said": said[-400:]}


def log_figures(log: str, begin: float, end: float) -> dict[str, Any]:
    """What a server's log says of ``[begin, end)``, seconds since the epoch: means over the decode steps in it."""
    steps = [step for step in decode_steps(log) if begin <= step.at < end]
    return {
        "logged_steps": len(steps),
        "running_requests": round(statistics.fmean(step.running for step in steps), 2) if steps else None,
        "cuda_graph_share": round(statistics.fmean(step.graph for step in steps), 4) if steps else None,
        "retracted_requests": sum(count for at, count in retracted_requests(log) if begin <= at < end),
    }


def units_of_a_request(server: Server, load: Load) -> int | None:
    """Units of one request's views over all layers, from the trace of a request that is not timed; None: no views."""
    before = set(server.traces.glob("*.npz"))
    chat = next(replace(load, questions=1, answer=(2, 2), seed=UNTIMED + 2).chats())
    options = {**chat.options, "custom_params": {**chat.options.get("custom_params", {}), "tgvkv_trace": True}}
    hold_chats(server.url, [replace(chat, options=options)], 1, seconds=FIRST_ANSWER_S)
    new = set(server.traces.glob("*.npz")) - before
    return sum(int(read_trace(path)[0]["budget"].sum()) for path in new) or None


def measure_load(cell: Cell, context: Context) -> dict[str, Any]:
    """Figures of the window at the client, and what the server's log says of it."""
    server, load = context.server, cell.load
    server.flush()
    seconds, began = max(load.ramp + 2.0, cell.seconds - MARGIN_S), time.time()
    turns = hold_chats(server.url, load.chats(), load.users, seconds=seconds).turns
    row = window(turns, load.ramp, seconds) | log_figures(server.log_text(), began + load.ramp, began + seconds)
    if not row["answer_tokens"]:
        raise RuntimeError(f"no answers: {row['error_messages']}")
    units = units_of_a_request(server, load) if load.retention is not None and load.images else None
    a_step = round(units * row["running_requests"]) if units and row["running_requests"] else None
    return {**row, "units_per_request": units, "units_per_step": a_step, "server": information(server)}


def measure_first_token(cell: Cell, context: Context) -> dict[str, Any]:
    """Questions about new pictures."""
    context.server.flush()
    chats, seconds = cell.load.chats(), cell.seconds - MARGIN_S
    return answered(first_tokens(hold_chats(context.server.url, chats, cell.load.users, seconds=seconds).turns))


def measure_follow_up(cell: Cell, context: Context) -> dict[str, Any]:
    """Other questions about pictures that are in the cache, all users' at once; the first two rounds are left out."""
    context.server.flush()
    ends, turns = time.monotonic() + cell.seconds - MARGIN_S, []
    for chats in cell.load.rounds():
        turns += hold_chats(context.server.url, chats, cell.load.users).turns
        if time.monotonic() > ends:
            break
    return answered(first_tokens(turns, warm_up=2 * cell.load.users))


def answered(row: dict[str, Any]) -> dict[str, Any]:
    if not row["requests"]:
        raise RuntimeError(f"too few answers: {row['error_messages']}")
    return row


def measure_smoke_part(cell: Cell, context: Context) -> dict[str, Any]:
    """The smoke part, and how many of our prebuilt Triton kernels the servers found."""
    found = measure_smoke(context.servers["demo"], context.servers["demo-stock"], graphs=not context.setup.cpu)
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    there, new = triton_cache(cache, context.began)
    again = {name: count for name, count in new.items() if name in there}
    print(f"  Triton's cache had {there.total()} kernels, {new.total()} were compiled; of names that it had: "
          f"{again or 'none'}", flush=True)  # fmt: skip
    return {**found, "triton_cache": {"there": dict(there), "compiled": dict(new)}}


def measure_soak(cell: Cell, context: Context) -> dict[str, Any]:
    """Two thirds of the time the soak's traffic, the rest comparing its answers with a fresh server's."""
    busy, rest = 2 * cell.seconds / 3, cell.seconds / 3 - MARGIN_S
    tolerance = TOLERANCES["float32" if context.setup.cpu else "bfloat16"]
    plan = Plan(seconds=busy, flush_every=max(5.0, busy / 4), replays=None, replay_seconds=rest, tolerance=tolerance)
    found = soak(context.server, plan).as_dict()
    return {**found, "failures": [failure[:1000] for failure in found["failures"]]}


MEASURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "environment": measure_environment,
    "smoke": measure_smoke_part,
    "kernels": measure_kernels,
    "all-kernels": measure_kernels,
    "load": measure_load,
    "ttft": measure_first_token,
    "follow-up": measure_follow_up,
    "soak": measure_soak,
}
