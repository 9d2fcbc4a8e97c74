"""How the cells of a part are measured: its servers, one cell after the other, a row in the results for each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Callable, Iterator, Sequence

from bench.client import hold_chats
from bench.common import ROOT, Store, header
from bench.figures import Turn, error_messages, first_tokens, window
from bench.gpu.equality import measure_equal
from bench.gpu.programme import Cell, Part, ServerSpec
from bench.gpu.servers import Setup, information, running
from bench.soak import Plan, soak
from bench.soak_check import TOLERANCES
from bench.traffic import Load
from tgvkv_sglang.testing.server import Server

FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,pstate"
MARGIN_S = 3.0
LIMIT_S = 120.0
"""What a cell may take beyond twice its time before it is given up."""
WARM_UP_S = 60.0
"""Longest time one of a server's first requests may take: Triton kernels and torch.compile are built in them."""


class HungError(Exception):
    """A measurement did not end (no TimeoutError, which HTTP clients would take for one of theirs)."""


@dataclass
class Context:
    """What a measurement may use: the part's servers, the cell's own (None where it needs none), and the results."""

    setup: Setup
    servers: dict[str, Server]
    server: Server | None
    store: Store


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """HungError after ``seconds``, wherever the block is. In the main thread only."""

    def ring(*_: object) -> None:
        raise HungError(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


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


def run_load(server: Server, load: Load, seconds: float) -> list[Turn]:
    server.flush()
    return hold_chats(server.url, load.chats(), load.users, seconds=seconds).turns


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
    return {"rows": len(rows), "wrong": wrong, "file": name, "said": said[-400:]}


def measure_load(cell: Cell, context: Context) -> dict[str, Any]:
    seconds = max(cell.load.ramp + 2.0, cell.seconds - MARGIN_S)
    row = window(run_load(context.server, cell.load, seconds), cell.load.ramp, seconds)
    if not row["answer_tokens"]:
        raise RuntimeError(f"no answers: {row['error_messages']}")
    return {**row, "server": information(context.server)}


def measure_first_token(cell: Cell, context: Context) -> dict[str, Any]:
    row = first_tokens(run_load(context.server, cell.load, cell.seconds - MARGIN_S))
    if not row["requests"]:
        raise RuntimeError(f"too few answers: {row['error_messages']}")
    return row


def measure_soak(cell: Cell, context: Context) -> dict[str, Any]:
    """Two thirds of the time the soak's traffic, the rest comparing its answers with a fresh server's."""
    busy, rest = 2 * cell.seconds / 3, cell.seconds / 3 - MARGIN_S
    tolerance = TOLERANCES["float32" if context.setup.cpu else "bfloat16"]
    plan = Plan(seconds=busy, flush_every=max(5.0, busy / 4), replays=None, replay_seconds=rest, tolerance=tolerance)
    found = soak(context.server, plan).as_dict()
    return {**found, "failures": [failure[:1000] for failure in found["failures"]]}


MEASURES: dict[str, Callable[[Cell, Context], dict[str, Any]]] = {
    "environment": measure_environment,
    "kernels": measure_kernels,
    "all-kernels": measure_kernels,
    "load": measure_load,
    "ttft": measure_first_token,
    "equal": lambda cell, context: measure_equal(context.servers, cell.server),
    "soak": measure_soak,
}


def needed(part: Part, cells: Sequence[Cell]) -> list[ServerSpec]:
    """The servers that these cells are measured on (what equal answers are compared with included), in order."""
    names = {cell.server for cell in cells if cell.server}
    if any(cell.kind == "equal" for cell in cells):
        names |= {"demo", "demo-stock"}
    return [server for server in part.servers if server.name in names]


def warm_up(server: Server, cells: Sequence[Cell]) -> str | None:
    """One request of every kind, so that nothing is compiled while it is measured; returns what went wrong."""
    loads = {(cell.load.images, cell.load.side, (cell.load.retention or 1.0) < 1.0): cell.load
             for cell in cells if cell.load}  # fmt: skip
    for load in loads.values():
        one = islice(replace(load, answer=(12, 12), seed=10**6).chats(), 1)
        held = hold_chats(server.url, one, 1, seconds=WARM_UP_S)
        if not held.finished:
            return f"warm-up: {error_messages(held.turns) or f'no answer in {WARM_UP_S:.0f} s'}\n{server.log_tail()}"
    return None


def measure_cell(part: Part, cell: Cell, context: Context) -> None:
    """Measure one cell and write its row: figures, or why there are none."""
    row, began = part.settings(cell), time.monotonic()
    try:
        with time_limit(2 * cell.seconds + LIMIT_S):
            row["figures"] = MEASURES[cell.kind](cell, context)
    except Exception as error:  # one cell's failure must not cost the others their turn
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
        if context.server is not None:
            row["server_log"] = context.server.log_tail()
    row["seconds"] = round(time.monotonic() - began, 1)
    row["measured"] = {**header(), "commit": context.setup.commit}
    context.store.add(part.key(cell), row)
    print(f"  {part.name}/{cell.name}: {row['seconds']} s {row.get('error', '')}"[:300], flush=True)


def measure_part(part: Part, cells: Sequence[Cell], setup: Setup, store: Store) -> None:
    """Start what the cells need, measure them in order, stop everything."""
    began = time.monotonic()
    with running(needed(part, cells), setup) as (alive, failed):
        for name, server in list(alive.items()):
            if trouble := warm_up(server, [cell for cell in cells if cell.server == name]):
                failed[name] = trouble
                del alive[name]
        facts = {"warm_after_s": round(time.monotonic() - began, 1), "failed": failed}
        if alive or failed:
            store.note(parts={**store.content.get("parts", {}), part.name: facts})
        for cell in cells:
            if cell.server in failed:
                trouble = f"server {cell.server} did not start: see parts"
                store.add(part.key(cell), part.settings(cell) | {"error": trouble})
            else:
                measure_cell(part, cell, Context(setup, alive, alive.get(cell.server), store))
