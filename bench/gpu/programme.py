"""What the GPU programme measures, in which order, and how long each piece may take. Data and arithmetic only.

A part is a set of servers that are started together and the cells measured on them. Servers are dear (a minute or two
each) and GPU memory is not, so the two sides of a comparison live side by side and are measured in turn. Each cell has
a priority (1 first); when time is short, :func:`choose` drops the cells of the lowest priority.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Iterable, Sequence

SIDE = 2048
"""Side in pixels of an image of 64 x 64 = 4096 vision tokens (one a square of 32 pixels)."""


@dataclass(frozen=True)
class ServerSpec:
    """One server of a part.

    Attributes:
        model: a name of ``models.MODELS``.
        backend: the ``--attention-backend``. flags: what else it is started with. pool: slots of its KV pool.
        checked: SGLang checks its memory in every batch (strict, slow): for the stress run alone.
    """

    name: str
    model: str
    backend: str
    pool: int
    flags: tuple[str, ...] = ()
    checked: bool = False


@dataclass(frozen=True)
class Load:
    """Traffic of one cell: ``users`` requests at any time, each about fresh images, answers forced to full length.

    Attributes:
        retention: of each request; None: the server's (stock SGLang has none).
        images: of ``side`` x ``side`` pixels each. text: tokens of the question (one a letter).
        answer: shortest and longest answer in tokens; drawn uniformly, so that users do not march in step.
        ramp: seconds before the figures begin, for the server to fill up.
    """

    users: int
    retention: float | None = None
    images: int = 1
    side: int = SIDE
    text: int = 64
    answer: tuple[int, int] = (512, 1536)
    ramp: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.answer
        if self.users < 1 or self.images < 0 or self.text < 1 or not 1 <= low <= high:
            raise ValueError(f"users, text and answer must be positive and images >= 0, got {self!r}")

    @property
    def vision_tokens(self) -> int:
        return self.images * (self.side // 32) ** 2


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: how it is measured: a key of ``part.MEASURES``.
        server: name of the server of its part; empty for a cell that needs none.
        seconds: what it takes; it is stopped soon after.
        group: cells of one group are measured all or none: one side of a comparison is worth nothing.
    """

    name: str
    kind: str
    seconds: float
    priority: int
    server: str = ""
    load: Load | None = None
    group: str = ""


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

    def key(self, cell: Cell) -> str:
        """The same measurement has the same key in every process; other settings have another."""
        server = asdict(self.server(cell.server)) if cell.server else {}
        content = {"part": self.name, "spec": server, **asdict(replace(cell, seconds=0.0, priority=0, group=""))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Choice:
    """What of a programme fits a budget: cells by part in running order, seconds a part, and what was dropped."""

    cells: dict[str, tuple[Cell, ...]]
    seconds: dict[str, float]
    dropped: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def choose(parts: Sequence[Part], budget: float, done: Iterable[str] = ()) -> Choice:
    """Take cells by priority (then in the programme's order) while they fit ``budget`` seconds.

    Cells of one part, priority and group are taken or dropped together. The first cell taken of a part pays for the
    start of its servers. What does not fit is dropped, and something cheaper of a lower priority may still be taken.
    Cells whose key is in ``done`` cost nothing and are left out.
    """
    finished = set(done)
    groups: dict[tuple[int, int, str], list[int]] = {}
    for i, part in enumerate(parts):
        for j, cell in enumerate(part.cells):
            if part.key(cell) not in finished:
                groups.setdefault((cell.priority, i, cell.group or cell.name), []).append(j)
    taken: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    dropped: list[tuple[int, int]] = []
    for (_, i, _), members in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], item[1][0])):
        cost = sum(parts[i].cells[j].seconds for j in members) + (0.0 if i in taken else parts[i].start_seconds)
        if sum(seconds.values()) + cost > budget:
            dropped += [(i, j) for j in members]
            continue
        taken.setdefault(i, []).extend(members)
        seconds[i] = seconds.get(i, 0.0) + cost
    return Choice(
        {parts[i].name: tuple(parts[i].cells[j] for j in sorted(taken[i])) for i in sorted(taken)},
        {parts[i].name: seconds[i] for i in sorted(seconds)},
        tuple(f"{parts[i].name}/{parts[i].cells[j].name}" for i, j in sorted(dropped)),
    )


def _side(name: str, backend: str, model: str, pool: int, *flags: str) -> ServerSpec:
    return ServerSpec(name, model, backend, pool, flags)


def _pair(model: str, pool: int, suffix: str = "") -> tuple[ServerSpec, ServerSpec]:
    """Ours (retention by request; 5 % where a request has none) and stock SGLang with everything on."""
    ours = _side(f"tgvkv{suffix}", "tgvkv", model, pool, "--tgvkv-retention", "0.05")
    return ours, _side(f"stock{suffix}", "flashinfer", model, pool)


def _at(retention: float, name: str, kind: str, seconds: float, priority: int, server: str, load: Load) -> Cell:
    return Cell(f"{name} at {retention:g}", kind, seconds, priority, server, replace(load, retention=retention), name)


def _loads(name: str, seconds: float, priority: int, load: Load, retentions: Sequence[float], stock: bool,
           suffix: str = "") -> list[Cell]:  # fmt: skip
    """The same load at each retention on our server, and on the stock one."""
    cells = [_at(retention, name, "load", seconds, priority, f"tgvkv{suffix}", load) for retention in retentions]
    on_stock = Cell(f"{name} on stock", "load", seconds, priority, f"stock{suffix}", load, name)
    return [*cells, on_stock] if stock else cells


def _first_tokens(name: str, seconds: float, priority: int, load: Load) -> list[Cell]:
    """Time to first token, one request at a time: with selection, without it, and on the stock server."""
    ours = [_at(retention, name, "ttft", seconds, priority, "tgvkv", load) for retention in (0.05, 1.0)]
    return [*ours, Cell(f"{name} on stock", "ttft", seconds, priority, "stock", load, name)]


QWEN, MISTRAL = "qwen3-vl-8b", "mistral-7b"
ZERO_BUBBLE = "--tgvkv-zero-bubble"
SOAK = ("--tgvkv-retention", "0.1", "--chunked-prefill-size", "64")
THIN, FULL = Load(users=64, ramp=20.0), Load(users=32, ramp=10.0)
ONE_TOKEN = Load(users=1, answer=(1, 1), ramp=0.0)
TEXT_ONLY = Load(users=32, images=0, text=1024, answer=(128, 384), ramp=4.0)


def gpu_programme() -> tuple[Part, ...]:
    """The programme for one H200, the most important figures first."""
    tight = Part("qwen-tight", (
        *_loads("4k", 45, 1, THIN, (0.05,), stock=True),
        *_loads("4k", 20, 5, replace(THIN, ramp=10.0), (0.1, 0.2, 1.0), stock=False),
        *_loads("1k", 15, 7, replace(THIN, side=1024, ramp=6.0), (0.05,), stock=True),
        *_loads("16k", 25, 8, replace(THIN, images=4, ramp=10.0), (0.05,), stock=True),
    ), _pair(QWEN, 40_960), 115)  # fmt: skip
    texts = [cell for again in ("", ", again") for cell in (
        Cell(f"text{again} on tgvkv", "load", 15, 3, "tgvkv", replace(TEXT_ONLY, seed=len(again)), "text"),
        Cell(f"text{again} on stock", "load", 15, 3, "stock", replace(TEXT_ONLY, seed=len(again)), "text"),
    )]  # fmt: skip
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
    pair = (ours, replace(stock, backend="torch_native"))
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
        ), pair, 240),
        Part("stress", (
            Cell("retention 1 equals stock", "equal", 120, 4, "demo"),
            Cell("soak", "soak", 120, 4, "soak"),
        ), stress, 240),
    )  # fmt: skip
