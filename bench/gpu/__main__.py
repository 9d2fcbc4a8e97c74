"""Everything that needs a GPU: kernels, serving beside stock SGLang, the cost of selection and of text alone, stress.

    python -m bench.gpu                        # what fits 20 minutes, the most important figures first
    python -m bench.gpu --minutes 60           # all of it
    python -m bench.gpu --plan                 # what would run, and how long it takes; runs nothing
    python -m bench.gpu --only smoke           # one part: whether it is worth timing anything
    python -m bench.gpu --dry-run              # the machinery, on CPU servers with tiny sizes; needs no GPU

Results are written after every cell to OUT/gpu-results.json (kernels: gpu-kernels.json). What is in there is not
measured again, so a run that was stopped goes on where it was. What does not fit --minutes is named in it. The run ends
when the smoke part fails, or ours for the second time, and says where the logs are.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Collection, Sequence

from bench.common import RESULTS, Store, git, header
from bench.gpu.headlines import headlines, verdict
from bench.gpu.parts import RunEndedError, measure_part
from bench.gpu.programme import Cell, Choice, Part, choose, cpu_programme, gpu_programme, part_seconds
from bench.gpu.servers import Setup
from tgvkv_sglang.cli.serve import cuda_usable

FILE = "gpu-results.json"
MINUTES = 20.0
Measure = Callable[[Part, Sequence[Cell], Setup, Store, list[str]], None]
SERVER_FIGURES = ("answer_tokens_per_s", "running_requests", "cuda_graph_share", "units_per_step", "retracted_requests")


def missing(parts: Sequence[Part], choice: Choice, done: Collection[str]) -> list[str]:
    """Names of the cells that are neither done nor chosen."""
    return [f"{part.name}/{cell.name}" for part in parts for cell in part.cells
            if cell not in choice.get(part.name, ()) and part.key(cell) not in done]  # fmt: skip


def plan_text(parts: Sequence[Part], choice: Choice, done: set[str]) -> str:
    """The plan for people."""
    lines, total = [], 0.0
    for part in parts:
        if cells := choice.get(part.name, ()):
            seconds = part_seconds(part, cells)
            start = f" (starting servers: {part.start_seconds:.0f} s)" if part.servers else ""
            lines += [f"{seconds:6.0f} s  {part.name}{start}", *(f"  {c.seconds:6.0f} s  {c.name}" for c in cells)]
            total += seconds
    lines.append(f"{total:6.0f} s  in all, about")
    return "\n".join([*lines, *(f"no time for {name}" for name in missing(parts, choice, done))])


def run_programme(parts: Sequence[Part], seconds: float, setup: Setup, store: Store, measure: Measure = measure_part,
                  clock: Callable[[], float] = time.monotonic) -> str | None:  # fmt: skip
    """Part after part, choosing anew before each from the time that is left; a cell that fails is not tried again.

    Returns:
        Why the run ended before its time, or None.
    """
    began, failures, ended = clock(), [], None
    for i, part in enumerate(parts):
        cells = choose(parts[i:], seconds - (clock() - began), store.done).get(part.name)
        if cells:
            print(f"{part.name}: {len(cells)} cell(s), about {part_seconds(part, cells):.0f} s", flush=True)
            try:
                measure(part, cells, setup, store, failures)
            except RunEndedError as error:
                ended = str(error)
                break
    dropped = missing(parts, {}, set(store.runs))
    found = headlines(list(store.runs.values()))
    store.note(headlines=found, dropped=dropped, seconds=round(clock() - began, 1), ended=ended)
    return ended


def summary(store: Store) -> str:
    """What was measured, what went wrong, each load's row, and the headlines beside their goals."""
    lines = [f"{len(store.done)} cell(s) measured"]
    for row in store.runs.values():
        name, figures = f"{row['part']}/{row['cell']}", row.get("figures", {})
        if "error" in row:
            lines.append(f"FAILED {name}: {row['error'].splitlines()[0][:160]}")
        elif wrong := figures.get("failures") or figures.get("wrong"):
            lines.append(f"WRONG {name}: {wrong}")
        elif "running_requests" in figures:
            said = (f"{key.replace('_', ' ')} {figures.get(key)}" for key in SERVER_FIGURES)
            lines.append(f"{name}: {', '.join(said)}")
    for part, facts in store.content.get("parts", {}).items():
        for server, log in facts["failed"].items():
            lines.append(f"NOT STARTED {part}/{server}: {(log.strip().splitlines() or [''])[-1][:160]}")
    lines += [f"not measured: {name}" for name in store.content.get("dropped", ())]
    for name, value in store.content.get("headlines", {}).items():
        lines.append(f"{'-' if value is None else value!s:>8}  {name}   {verdict(name, value)}".rstrip())
    return "\n".join([*lines, *filter(None, [store.content.get("ended")])])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results; --dry-run: --work)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tgvkv-gpu", help="models and logs")
    parser.add_argument("--minutes", type=float, help=f"time for all of it (default: {MINUTES:g}; --dry-run: no limit)")
    parser.add_argument("--only", action="append", metavar="PART", help="only this part (may be repeated)")
    parser.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU servers")
    parser.add_argument("--commit", help="recorded with the results where the tree has no git")
    parser.add_argument("--server-flag", action="append", default=[], metavar="FLAG", help="for every server")
    return parser


def checked(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[Part, ...]:
    """The parts asked for; bad arguments end the program with the remedy."""
    parts = cpu_programme() if args.dry_run else gpu_programme()
    unknown = set(args.only or ()) - {part.name for part in parts}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    if args.minutes is None:
        args.minutes = float("inf") if args.dry_run else MINUTES
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}")
    if not (args.plan or args.dry_run or cuda_usable()):
        parser.error("no CUDA device is found here; --plan shows what would run, --dry-run tries it on the CPU")
    return tuple(part for part in parts if not args.only or part.name in args.only)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(words)
    parts = checked(args, parser)
    store = Store((args.out or (args.work if args.dry_run else RESULTS)) / FILE, fresh=args.dry_run)
    if args.plan:
        print(plan_text(parts, choose(parts, 60 * args.minutes, store.done), store.done))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped on the way out
    commit = args.commit or git("rev-parse", "HEAD")
    setup = Setup(args.dry_run, args.work, tuple(args.server_flag), commit)
    store.note(measured={**header(), "commit": commit})
    ended = run_programme(parts, 60 * args.minutes, setup, store)
    print(summary(store), flush=True)
    return 1 if ended else 0


if __name__ == "__main__":
    sys.exit(main())
