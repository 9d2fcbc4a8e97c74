"""Which policy keeps the answers? Held-out questions about the bundled model's pictures, in many ways to evict.

    python -m bench.quality                                    # the default plan, on live servers on this CPU
    python -m bench.quality --engine transformers              # the same in plain transformers, and how far both agree
    python -m bench.quality --engine transformers --drop-each-step --policies tgv peak-last   # evicting while decoding
    python -m bench.quality --policies tgv peak-last --retentions 0.05 0.02 --chats 200 --out mine.json
    python -m bench.quality --show                             # tables and plot of what is there

Chats have three turns; each question is asked after the *true* answers to those before it, so that all cells are asked
the same. Every run (a cell and a kind of board) is written at once under a key of its settings and is not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Iterator

from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

from bench.common import RESULTS, ROOT, Arm, Store, header, key_of, serve
from bench.quality import cells as C
from bench.quality.boards import BOARDS, REPORTED, TURNS, chat
from bench.quality.live import ask, server_env
from bench.quality.report import Runs, plot, tables
from bench.quality.score import exact_of, mark, share_of
from tgvkv_sglang.config import RECLAIMS
from tgvkv_sglang.demo.bundle import DEMO_MODEL

POOL = 32_768
ENGINES = ("server", "transformers")


def settings(engine: str, board: str, cell: C.Cell, first: int, chats: int) -> dict:
    """What a run is, and its key is made of."""
    return {"engine": engine, "board": board, "first_seed": first, "chats": chats, **cell.settings()}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=("default", "full"), default="default", help="which cells")
    parser.add_argument("--policies", nargs="+", help="instead of a plan: these with each combination of the next")
    parser.add_argument("--retentions", nargs="+", default=[C.AT], help="as shares, say 0.05")
    parser.add_argument("--budgets", nargs="+", default=["own"])
    parser.add_argument("--reclaim", nargs="+", choices=RECLAIMS, default=["pressure"])
    parser.add_argument("--boards", nargs="+", choices=BOARDS, default=list(BOARDS))
    parser.add_argument("--chats", type=int, default=60, help="of each kind of board, three questions each")
    parser.add_argument("--first-seed", type=int, default=REPORTED,
                        help=f"seeds below {REPORTED} are for developing, others for reporting")  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="server")
    parser.add_argument("--drop-each-step", action="store_true",
                        help="in transformers: each decode step drops one more vision token of each layer")  # fmt: skip
    parser.add_argument("--at-once", type=int, default=12, help="chats at once on the server")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-cpu.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "quality.png")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are there already")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    return parser


def cells_of(args: argparse.Namespace) -> list[C.Cell]:
    """The cells that were asked for, each once."""
    if not args.policies:
        return C.unique(C.default_plan() if args.plan == "default" else C.full_plan())
    ways = [(r, b, reclaim) for reclaim in args.reclaim for b in args.budgets for r in args.retentions]
    return C.unique(C.cell(policy, *way) for policy in args.policies for way in ways)


class Bench:
    """Cells still to be measured, and where results go."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.store = args, Store(args.out, args.fresh)
        seeds = range(args.first_seed, args.first_seed + args.chats)
        self.chats = {board: [chat(board, seed) for seed in seeds] for board in args.boards}
        wanted = [(board, cell) for cell in cells_of(args) for board in args.boards]
        self.left = [pair for pair in wanted if self.key(*pair) not in self.store.done]

    def settings(self, board: str, cell: C.Cell, engine: str | None = None) -> dict:
        own = settings(engine or self.args.engine, board, cell, self.args.first_seed, self.args.chats)
        return {**own, "drops": True} if self.args.drop_each_step else own

    def key(self, board: str, cell: C.Cell) -> str:
        return key_of(self.settings(board, cell))

    def add(self, board: str, cell: C.Cell, answers: list[list[str]]) -> None:
        row = {**self.settings(board, cell), **mark(self.chats[board], answers), "measured": header()}
        self.store.add(self.key(board, cell), row)

    def runs(self, engine: str) -> Runs:
        """Finished runs of this board selection, these seeds and an engine."""
        found = {}
        for row in self.store.runs.values():
            cell = C.Cell(row["policy"], row["retention"], row["budget"], row["reclaim"])
            same = row.get("drops", False) == self.args.drop_each_step
            if same and {**row, **self.settings(row["board"], cell, engine)} == row:
                found[row["board"], cell] = row
        return found


def measure_live(bench: Bench) -> None:
    """One server for each way to reclaim; everything else is a request's own option."""
    for reclaim in RECLAIMS:
        left = [(board, cell) for board, cell in bench.left if cell.reclaim == reclaim]
        if not left:
            continue
        print(f"starting a server that reclaims by {reclaim} (a minute or more)")
        arm = Arm(f"tgvkv-{reclaim}", ("--attention-backend", "tgvkv", "--tgvkv-reclaim", reclaim))
        with serve(arm, DEMO_MODEL, POOL, env=server_env()) as server, _bar(len(left) * bench.args.chats) as bar:
            for board, cell in left:
                bar.set_description(f"{cell.title} {cell.retention} {reclaim}, {board}")
                server.flush()
                bench.add(board, cell, ask(server.url, cell, bench.chats[board], bench.args.at_once, bar.update))


def measure_in_transformers(bench: Bench) -> None:
    """All cells of a board at once."""
    from bench.quality.replay import can_replay, replay

    for board in bench.args.boards:
        left = [cell for at, cell in bench.left if at == board and can_replay(cell)]
        with _bar(bench.args.chats if left else 0) as bar:
            held = replay(left, bench.chats[board], lambda: bar.update(TURNS), bench.args.drop_each_step)
        for cell, answers in zip(left, held, strict=True):
            bench.add(board, cell, answers)


def _bar(chats: int) -> tqdm:
    return tqdm(total=TURNS * chats, unit="question", smoothing=0.02)


def agreement(live: Runs, replayed: Runs) -> Iterator[str]:
    """How often the two engines are right or wrong together, by cell."""
    for pair in sorted(live.keys() & replayed.keys()):
        same = (exact_of(live[pair]) == exact_of(replayed[pair])).mean()
        shares = [100 * share_of(run)[0] for run in (live[pair], replayed[pair])]
        board, cell = pair
        name = f"{board} {cell.title} {cell.retention} {cell.reclaim}"
        yield f"{name}: {100 * same:.1f} % alike, exact {shares[0]:.1f} and {shares[1]:.1f}"


def main() -> None:
    args = arguments().parse_args()
    if args.drop_each_step and args.engine != "transformers":
        raise SystemExit("--drop-each-step is for --engine transformers: the server evicts nothing while it decodes")
    bench = Bench(args)
    if bench.left and not args.show:
        (measure_live if args.engine == "server" else measure_in_transformers)(bench)
    runs = bench.runs(args.engine)
    text = tables(runs)
    Console().print(Markdown(text))
    for line in agreement(bench.runs("server"), bench.runs("transformers")):
        print(line)
    if args.engine == "server" and runs:
        args.out.with_suffix(".md").write_text(text)
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
