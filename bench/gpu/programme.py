"""What the GPU programme measures, in which order, and how long each piece takes. Data and arithmetic only.

A part is a set of servers that are started together and the cells measured on them: starting a server takes a minute or
two, so the sides of a comparison live side by side and are measured in turn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Collection, Sequence

from bench.common import key_of
from bench.traffic import Load

OURS = "tgvkv"


@dataclass(frozen=True)
class ServerSpec:
    """One server of a part: a model of :mod:`bench.gpu.models`, ``--attention-backend``, slots of the KV pool, flags.

    ``backend`` is empty for what SGLang picks on this machine. ``checked``: SGLang checks its memory in every batch
    (strict, slow); never where speed is measured.
    """

    name: str
    model: str
    backend: str
    pool: int
    flags: tuple[str, ...] = ()
    checked: bool = False


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: how it is measured: a key of ``measure.MEASURES``.
        seconds: what it takes. priority: 0 first; all sides of a comparison have the same.
        server: name of the server of its part; empty for a cell that needs none.
    """

    name: str
    kind: str
    seconds: float
    priority: int
    server: str = ""
    load: Load | None = None


@dataclass(frozen=True)
class Part:
    """Servers started together (``start_seconds`` until all are warm) and the cells measured on them, in order."""

    name: str
    cells: tuple[Cell, ...]
    servers: tuple[ServerSpec, ...] = ()
    start_seconds: float = 0.0

    def __post_init__(self) -> None:
        names = {server.name for server in self.servers}
        unknown = [cell.name for cell in self.cells if cell.server and cell.server not in names]
        if unknown:
            raise ValueError(f"part {self.name}: no such server for cell(s) {', '.join(unknown)}")

    def server(self, name: str) -> ServerSpec:
        return next(server for server in self.servers if server.name == name)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What a result says about how it was measured; its key is made of this."""
        server = asdict(self.server(cell.server)) if cell.server else None
        load = {**asdict(cell.load), "vision_tokens": cell.load.vision_tokens} if cell.load else None
        return {"part": self.name, "cell": cell.name, "kind": cell.kind, "server": server, "load": load}

    def key(self, cell: Cell) -> str:
        return key_of(self.settings(cell))


Choice = dict[str, tuple[Cell, ...]]
"""Cells to measure by part, in running order; parts with nothing to measure are left out."""


def part_seconds(part: Part, cells: Sequence[Cell]) -> float:
    """What these cells of a part take, the start of its servers included."""
    return sum(cell.seconds for cell in cells) + (part.start_seconds if cells else 0.0)


def choose(parts: Sequence[Part], seconds: float, done: Collection[str] = ()) -> Choice:
    """Cells that are not in ``done`` (keys): the first priority's, and each further one's that still fits whole."""
    chosen: Choice = {}
    for last in sorted({cell.priority for part in parts for cell in part.cells}):
        more = {part.name: tuple(cell for cell in part.cells if cell.priority <= last and part.key(cell) not in done)
                for part in parts}  # fmt: skip
        if sum(part_seconds(part, more[part.name]) for part in parts) > seconds:
            break
        chosen = {name: cells for name, cells in more.items() if cells}
    return chosen


STOCKS = {"stock-flashinfer": "stock (flashinfer)", "stock-choice": "stock (SGLang's choice)"}
"""Stock servers and their rows' names. tgvkv is FlashInfer's backend, subclassed; on Hopper SGLang picks fa3."""
CPU_STOCKS = {"stock-torch": "stock (torch_native)"}


def _servers(model: str, pool: int, stocks: dict[str, str]) -> tuple[ServerSpec, ...]:
    """Ours (retention by request; 5 % where a request has none) and stock SGLang with everything on."""
    backends = {"stock-flashinfer": "flashinfer", "stock-torch": "torch_native", "stock-choice": ""}
    ours = ServerSpec(OURS, model, OURS, pool, ("--tgvkv-retention", "0.05"))
    return ours, *(ServerSpec(name, model, backends[name], pool) for name in stocks)


def _sides(name: str, kind: str, seconds: float, priority: int, load: Load, stocks: dict[str, str],
           retentions: Sequence[float | None] = (0.05,)) -> list[Cell]:  # fmt: skip
    """A load at each retention on our server, and on the stock ones with the requests of the first."""
    cells = []
    for i, retention in enumerate(retentions):
        side = f"on {OURS}" if retention is None else f"at {retention:g}"
        own = replace(load, retention=retention, seed=load.seed + i)
        cells.append(Cell(f"{name} {side}", kind, seconds, priority, OURS, own))
    return cells + [Cell(f"{name} on {side}", kind, seconds, priority, server, load) for server, side in stocks.items()]


CHATS = Load(users=32, questions=2, answer=(1000, 3000), ramp=25.0)
PAGES = replace(CHATS, images=4, questions=3)
SINGLE = Load(users=64, ramp=20.0)
ONE_TOKEN = Load(users=1, answer=(1, 1), ramp=0.0)
ASK_AGAIN = replace(ONE_TOKEN, questions=40)
TEXT_ONLY = Load(users=32, images=0, text=1024, answer=(128, 384), ramp=4.0)
SMOKE = ("--tgvkv-retention", "0.1", "--decode-log-interval", "1")
SOAK = ("--tgvkv-retention", "0.1", "--chunked-prefill-size", "64")


def _checks(stock: str, smoke_seconds: float, soak_seconds: float, start: float) -> tuple[Part, Part]:
    """What must be right before anything is timed, and the soak with memory checks after every batch."""
    smoke = Part("smoke", (Cell("smoke", "smoke", smoke_seconds, 0, "demo"),), (
        ServerSpec("demo-stock", "demo", stock, 4000),
        ServerSpec("demo", "demo", OURS, 4000, SMOKE, True),
    ), start)  # fmt: skip
    soak = Part("soak", (Cell("soak", "soak", soak_seconds, 4, "soak"),),
                (ServerSpec("soak", "stand-in", OURS, 1000, SOAK, True),), start)  # fmt: skip
    return smoke, soak


def gpu_programme() -> tuple[Part, ...]:
    """The programme for one GPU of 141 GB, the most important figures first; up to priority 4 it fits 20 minutes."""
    model = "qwen3-vl-8b"
    smoke, soak = _checks("flashinfer", 30, 75, 45)
    short = Part("short-memory", (
        *_sides("chats", "load", 88, 1, CHATS, STOCKS),
        *_sides("chats of 16k", "load", 88, 5, PAGES, STOCKS),
        *_sides("chats", "load", 60, 6, replace(CHATS, seed=1), {}, (0.1, 0.2, 1.0)),
        *_sides("single questions", "load", 45, 7, SINGLE, STOCKS),
    ), _servers(model, 40_960, STOCKS), 120)  # fmt: skip
    ample = Part("ample-memory", (
        *_sides("chats", "load", 45, 2, replace(CHATS, users=10, ramp=10.0), STOCKS),
        *_sides("text", "load", 12, 3, TEXT_ONLY, STOCKS, (None,)),
        *_sides("text, again", "load", 12, 3, replace(TEXT_ONLY, seed=1), STOCKS, (None,)),
        *_sides("first token", "ttft", 9, 3, ONE_TOKEN, STOCKS, (0.05, 1.0)),
        *_sides("follow-up, 1 at once", "follow-up", 7, 3, ASK_AGAIN, STOCKS, (0.05, 1.0)),
        *_sides("follow-up, 8 at once", "follow-up", 9, 3, replace(ASK_AGAIN, users=8), STOCKS, (0.05, 1.0)),
        *_sides("first token, 16k", "ttft", 12, 8, replace(ONE_TOKEN, images=4), STOCKS, (0.05, 1.0)),
    ), _servers(model, 100_000, STOCKS), 120)  # fmt: skip
    return (
        Part("environment", (Cell("environment", "environment", 25, 0),)),
        smoke,
        short,
        ample,
        Part("kernels", (Cell("kernels, the main ones", "kernels", 90, 3),)),
        soak,
        Part("more-kernels", (Cell("kernels, all", "all-kernels", 240, 9),)),
    )


def cpu_programme() -> tuple[Part, ...]:
    """The same kinds of cells with tiny sizes on CPU servers: it tries the machinery and measures nothing."""
    load = Load(users=2, side=128, text=8, answer=(4, 8), ramp=2.0)
    one = replace(load, users=1, answer=(1, 1), ramp=0.0)
    smoke, soak = _checks("torch_native", 300, 90, 240)
    return (
        Part("environment", (Cell("environment", "environment", 60, 0),)),
        smoke,
        Part("small", (
            *_sides("chats", "load", 10, 1, replace(load, questions=2), CPU_STOCKS, (0.05, 1.0)),
            *_sides("text", "load", 8, 3, replace(load, images=0), CPU_STOCKS, (None,)),
            *_sides("first token", "ttft", 8, 3, one, CPU_STOCKS),
            *_sides("follow-up, 2 at once", "follow-up", 8, 3, replace(one, users=2, questions=4), CPU_STOCKS),
        ), _servers("small", 2000, CPU_STOCKS), 240),
        Part("kernels", (Cell("kernels, the main ones", "kernels", 30, 3),)),
        soak,
    )  # fmt: skip
