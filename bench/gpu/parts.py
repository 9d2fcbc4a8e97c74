"""How a part is measured: its servers, one cell after the other, a row in the results for each."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Iterator, Sequence

from bench.client import Held, hold_chats
from bench.common import Store, header
from bench.figures import error_messages
from bench.gpu.measure import FIRST_ANSWER_S, MEASURES, UNTIMED, Context
from bench.gpu.programme import OURS, Cell, Part, ServerSpec
from bench.gpu.servers import Setup, running
from bench.traffic import Load
from tgvkv_sglang.testing.server import Server

LIMIT_S = 120.0
"""What a cell may take beyond twice its time before it is given up."""
CROWD_SIDE = 256
"""Pictures of the warm-up with all users at once, at most: kernels depend on how many there are, not on their size."""
FAILURES = 2
"""After as many failures of ours the run ends: what follows would fail too, and the machine's time is dear."""


class HungError(Exception):
    """A measurement did not end (no TimeoutError, which HTTP clients would take for one of theirs)."""


class RunEndedError(Exception):
    """It is not worth going on."""


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


def needed(part: Part, cells: Sequence[Cell]) -> list[ServerSpec]:
    """The servers that these cells are measured on, in order; all of the part's for the smoke cell."""
    names = {cell.server for cell in cells}
    return [server for server in part.servers if server.name in names or any(cell.kind == "smoke" for cell in cells)]


def warm_up(server: Server, loads: Sequence[Load]) -> str | None:
    """So that nothing is compiled while it is measured; returns what went wrong.

    One request of every kind, which may be slow and is asked once more if it fails, then all users at once.
    """

    def ask(load: Load, users: int, seed: int) -> Held:
        short = replace(load, users=users, questions=1, answer=(12, 12), seed=seed)
        return hold_chats(server.url, islice(short.chats(), users), users, seconds=FIRST_ANSWER_S)

    for load in {(load.images, load.side, (load.retention or 1.0) < 1.0): load for load in loads}.values():
        held = ask(load, 1, UNTIMED)
        if not held.finished:
            held = ask(load, 1, UNTIMED + 1)
        if not held.finished:
            trouble = error_messages(held.turns) or f"no answer in {FIRST_ANSWER_S:.0f} s"
            return f"warm-up: {trouble}\n{server.log_tail()}"
    if loads:
        crowd = max(loads, key=lambda load: load.users)
        ask(replace(crowd, side=min(crowd.side, CROWD_SIDE)), crowd.users, UNTIMED)
    return None


def measure_cell(part: Part, cell: Cell, context: Context) -> dict[str, Any]:
    """Measure one cell and write its row, which it returns: figures, or why there are none."""
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
    print(f"  {part.name}/{cell.name}: {row['seconds']} s {row.get('error', '')}"[:1000], flush=True)
    return row


def measure_part(part: Part, cells: Sequence[Cell], setup: Setup, store: Store, failures: list[str]) -> None:
    """Start what the cells need, measure them in order, stop everything.

    Args:
        failures: of ours, in this run so far; added to.

    Raises:
        RunEndedError: the smoke part failed, or ours did for the second time.
    """
    began, clock = time.monotonic(), time.time()
    with running(needed(part, cells), setup) as (alive, failed):
        for name, server in list(alive.items()):
            if trouble := warm_up(server, [cell.load for cell in cells if cell.load and cell.server == name]):
                failed[name] = trouble
                del alive[name]
        facts = {"warm_after_s": round(time.monotonic() - began, 1), "failed": failed}
        if alive or failed:
            store.note(parts={**store.content.get("parts", {}), part.name: facts})
        for name, trouble in failed.items():
            last_line = trouble.strip().splitlines()[-1][:300]
            blame(part, name, f"server {name} did not start: {last_line}", setup, failures)
        for cell in cells:
            if cell.server in failed:
                trouble = f"server {cell.server} did not start, or died: see parts and its log"
                store.add(part.key(cell), part.settings(cell) | {"error": trouble})
                continue
            server = alive.get(cell.server)
            row = measure_cell(part, cell, Context(setup, alive, server, store, clock))
            if server is not None and not server.alive():
                failed[cell.server] = server.log_tail()
            if "error" in row:
                blame(part, cell.server, f"{cell.name}: {row['error']}", setup, failures)


def blame(part: Part, server: str, what: str, setup: Setup, failures: list[str]) -> None:
    """Count a failure if it is ours; RunEndedError where the run should end with it."""
    smoke = any(cell.kind == "smoke" for cell in part.cells)
    if smoke or (server and part.server(server).backend == OURS):
        failures.append(f"{part.name}, {what}")
    if smoke or len(failures) >= FAILURES:
        logs = setup.work / "servers"
        raise RunEndedError("the run ends here: " + "\n".join(failures) + f"\nthe servers' logs are in {logs}")
