"""What the GPU programme measures, in which order, and how long each piece takes. Data and arithmetic only.

A part is a set of servers that are started together and the cells measured on them: starting a server takes a minute or
two, so the two sides of a comparison live side by side and are measured in turn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Collection, Sequence

from bench.common import key_of
from bench.traffic import Load


@dataclass(frozen=True)
class ServerSpec:
    """One server of a part: a model of :mod:`bench.gpu.models`, ``--attention-backend``, slots of the KV pool, flags.

    ``checked``: SGLang checks its memory in every batch (strict, slow); for the stress run alone.
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
        seconds: what it takes. priority: 0 first; both sides of a comparison have the same.
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


def _pair(model: str, pool: int, suffix: str = "") -> tuple[ServerSpec, ServerSpec]:
    """Ours (retention by request; 5 % where a request has none) and stock SGLang with everything on."""
    ours = ServerSpec(f"tgvkv{suffix}", model, "tgvkv", pool, ("--tgvkv-retention", "0.05"))
    return ours, ServerSpec(f"stock{suffix}", model, "flashinfer", pool)


def _loads(name: str, seconds: float, priority: int, load: Load, retentions: Sequence[float], stock: bool,
           suffix: str = "", kind: str = "load") -> list[Cell]:  # fmt: skip
    """A load at each retention on our server, and on the stock one with the requests of the first."""
    cells = [Cell(f"{name} at {retention:g}", kind, seconds, priority, f"tgvkv{suffix}",
                  replace(load, retention=retention, seed=i)) for i, retention in enumerate(retentions)]  # fmt: skip
    return [*cells, Cell(f"{name} on stock", kind, seconds, priority, f"stock{suffix}", load)] if stock else cells


def _first_tokens(name: str, seconds: float, priority: int, load: Load) -> list[Cell]:
    """Time to first token, one request at a time: with selection, without it, and on the stock server."""
    return _loads(name, seconds, priority, load, (0.05, 1.0), True, kind="ttft")


QWEN, MISTRAL = "qwen3-vl-8b", "mistral-7b"
ZERO_BUBBLE = "--tgvkv-zero-bubble"
SOAK = ("--tgvkv-retention", "0.1", "--chunked-prefill-size", "64")
THIN, FULL = Load(users=64, ramp=20.0), Load(users=32, ramp=10.0)
ONE_TOKEN = Load(users=1, answer=(1, 1), ramp=0.0)
TEXT_ONLY = Load(users=32, images=0, text=1024, answer=(128, 384), ramp=4.0)


def gpu_programme() -> tuple[Part, ...]:
    """The programme for one GPU of 80 GB or more, the most important figures first."""
    tight = Part("qwen-tight", (
        *_loads("4k", 45, 1, THIN, (0.05,), stock=True),
        *_loads("4k", 20, 5, replace(THIN, ramp=10.0), (0.1, 0.2, 1.0), stock=False),
        *_loads("1k", 15, 7, replace(THIN, side=1024, ramp=6.0), (0.05,), stock=True),
        *_loads("16k", 25, 8, replace(THIN, images=4, ramp=10.0), (0.05,), stock=True),
    ), _pair(QWEN, 40_960), 115)  # fmt: skip
    texts = [Cell(f"text{again} on {side}", "load", 15, 3, side, replace(TEXT_ONLY, seed=len(again)))
             for again in ("", ", again") for side in ("tgvkv", "stock")]  # fmt: skip
    ample = Part("qwen-ample", (
        *_loads("4k", 35, 2, FULL, (0.05,), stock=True),
        *texts,
        *_first_tokens("first token, 4k", 10, 3, ONE_TOKEN),
        *_loads("4k", 15, 5, replace(FULL, ramp=6.0), (0.1, 0.2, 1.0), stock=False),
        *_loads("1k", 15, 7, replace(FULL, side=1024, ramp=6.0), (0.05,), stock=True),
        *_loads("16k", 20, 8, replace(FULL, users=8, images=4, ramp=8.0), (0.05,), stock=True),
        *_first_tokens("first token, 16k", 10, 8, replace(ONE_TOKEN, images=4)),
    ), _pair(QWEN, 200_000), 110)  # fmt: skip
    stress = Part("stress", (
        Cell("retention 1 equals stock", "equal", 25, 4, "demo"),
        Cell("soak", "soak", 75, 4, "soak"),
        Cell("zero bubble equals", "equal", 25, 4, "demo-zero-bubble"),
        Cell("soak, zero bubble", "soak", 75, 9, "soak-zero-bubble"),
    ), (
        ServerSpec("demo-stock", "demo", "flashinfer", 4000),
        ServerSpec("demo", "demo", "tgvkv", 4000, ("--tgvkv-retention", "0.1"), True),
        ServerSpec("demo-zero-bubble", "demo", "tgvkv", 4000, ("--tgvkv-retention", "0.1", ZERO_BUBBLE), True),
        ServerSpec("soak", "stand-in", "tgvkv", 1000, SOAK, True),
        ServerSpec("soak-zero-bubble", "stand-in", "tgvkv", 1000, (*SOAK, ZERO_BUBBLE), True),
    ), 90)  # fmt: skip
    second = Part("mistral", (
        *_loads("tight, 4k", 30, 6, replace(THIN, ramp=12.0), (0.05,), True, "-tight"),
        *_loads("ample, 4k", 25, 6, replace(FULL, users=16, ramp=8.0), (0.05,), True, "-ample"),
    ), (*_pair(MISTRAL, 40_960, "-tight"), *_pair(MISTRAL, 100_000, "-ample")), 125)  # fmt: skip
    return (
        Part("environment", (Cell("environment", "environment", 40, 0),)),
        Part("kernels", (Cell("kernels, the main ones", "kernels", 110, 0),)),
        tight,
        ample,
        stress,
        second,
        Part("more-kernels", (Cell("kernels, all", "all-kernels", 180, 9),)),
    )


def cpu_programme() -> tuple[Part, ...]:
    """The same kinds of cells with tiny sizes on CPU servers: it tries the machinery and measures nothing."""
    load = Load(users=2, side=128, text=8, answer=(4, 8), ramp=2.0)
    first = replace(load, users=1, answer=(1, 1), ramp=0.0)
    texts = [Cell(f"text on {name}", "load", 8, 3, name, replace(load, images=0)) for name in ("tgvkv", "stock")]
    ours, stock = _pair("small", 2000)
    stress = (
        ServerSpec("demo-stock", "demo", "torch_native", 4000),
        ServerSpec("demo", "demo", "tgvkv", 4000, ("--tgvkv-retention", "0.1"), True),
        ServerSpec("soak", "stand-in", "tgvkv", 1000, SOAK, True),
    )
    return (
        Part("environment", (Cell("environment", "environment", 60, 0),)),
        Part("kernels", (Cell("kernels, the main ones", "kernels", 30, 0),)),
        Part("small", (
            *_loads("load", 10, 1, load, (0.05, 1.0), stock=True),
            *texts,
            *_first_tokens("first token", 8, 3, first),
        ), (ours, replace(stock, backend="torch_native")), 240),
        Part("stress", (
            Cell("retention 1 equals stock", "equal", 120, 4, "demo"),
            Cell("soak", "soak", 120, 4, "soak"),
        ), stress, 240),
    )  # fmt: skip
