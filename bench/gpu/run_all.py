"""The whole GPU programme: kernels, serving against stock SGLang, text-only and scoring overhead, stress.

    python -m bench.gpu.run_all --plan                         # what would run, and how long it may take; runs nothing
    python -m bench.gpu.run_all --out DIR --commit HASH        # all of it, the most important figures first
    python -m bench.gpu.run_all --out DIR --part stress        # one part
    python -m bench.gpu.run_all --dry-run-cpu --out DIR        # the machinery, on CPU servers with tiny sizes

Needs only files it carries (bench/gpu/README.md says how they get onto a machine without a network). Results are
written after every cell to DIR/gpu-results.json (kernels: gpu-kernels.json); what is in there is not measured again, so
an interrupted run goes on where it stopped. What does not fit --minutes is dropped, and named in the results.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable, Sequence

from bench.common import ROOT, header
from bench.gpu.figures import headlines
from bench.gpu.models import WHAT
from bench.gpu.programme import Cell, Choice, Part, choose, cpu_programme, gpu_programme
from bench.gpu.results import Results, copy_results
from bench.gpu.servers import kill_left_over

LOG = "gpu-log.txt"
RUNNING, FINISHED = "running.pid", "finished"
SLACK_S = 45.0
"""What a part may take beyond its plan, where the budget has it."""
STOP_S = 25.0
GOALS = {
    "8B, 4k, 5 %, tight memory: throughput over stock": ">= 2.5",
    "8B, 4k, 5 %, ample memory: throughput over stock": ">= 0.98",
    "text only: throughput over stock": ">= 0.99",
    "text only: inter-token latency over stock": "<= 1.01",
    "selection, share of time to first token, 4k": "< 0.02",
    "selection, share of time to first token, 16k": "< 0.02",
}

Runner = Callable[[Part, Sequence[Cell], float], None]


def plan_text(choice: Choice, parts: Sequence[Part], budget: float, args: argparse.Namespace) -> str:
    """The plan for people."""
    lines = [
        f"{args.minutes:g} min in all, {args.setup_s:g} s of them for the machine's start, transfers and unpacking"
    ]
    by_name = {part.name: part for part in parts}
    for name, cells in choice.cells.items():
        start = f" (servers: {by_name[name].start_seconds:.0f} s)" if by_name[name].servers else ""
        lines.append(f"{choice.seconds[name]:6.0f} s  {name}{start}")
        lines += [f"  {cell.seconds:6.0f} s  {cell.name}" for cell in cells]
    lines.append(f"{choice.total:6.0f} s  of {budget:.0f} s")
    lines += [f"dropped: {name}" for name in choice.dropped]
    return "\n".join(lines)


def run_programme(parts: Sequence[Part], budget: float, results: Path, run: Runner,
                  clock: Callable[[], float] = time.monotonic) -> Results:  # fmt: skip
    """Run part after part, planning anew with the time that is left before each.

    Args:
        budget: seconds for all calls together; what earlier calls spent is in the results.
        run: measures some cells of a part within some seconds, writing rows to ``results`` as it goes.
    """
    store = Results(results)
    before, began = store.content["spent_s"], clock()
    tried: set[str] = set()
    while True:
        left = budget - before - (clock() - began)
        choice = choose(parts, left, store.done | tried)
        if not choice.cells:
            break
        name, cells = next(iter(choice.cells.items()))
        part = next(part for part in parts if part.name == name)
        tried |= {part.key(cell) for cell in cells}
        run(part, cells, choice.seconds[name] + min(SLACK_S, left - choice.total))
        store = Results(results)
        store.note("spent_s", round(before + clock() - began, 1))
    for name in choice.dropped:
        store.drop(name, f"did not fit: {left:.0f} s were left")
    store.note("headlines", headlines(store.rows))
    store.note("models", WHAT)
    return store


def part_runner(args: argparse.Namespace, results: Path, work: Path, publish: Callable[[], None]) -> Runner:
    """Runs cells in a process of their own, stopped when their time is over, with everything it started."""

    def run(part: Part, cells: Sequence[Cell], seconds: float) -> None:
        command = [sys.executable, "-m", "bench.gpu.part", part.name, "--seconds", f"{seconds:.0f}"]
        command += ["--results", str(results), "--work", str(work), "--commit", args.commit]
        command += ["--cells", *(cell.name for cell in cells), *(["--cpu"] if args.dry_run_cpu else [])]
        command += [f"--server-flag={flag}" for flag in args.server_flag]
        command += [f"--server-env={pair}" for pair in args.server_env]
        print(f"{part.name}: {len(cells)} cell(s), at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        with (results / LOG).open("ab") as log:
            log.write(f"\n== {part.name} ==\n".encode())
            log.flush()
            env = {**os.environ, "TQDM_DISABLE": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env)
            try:
                while process.poll() is None and (left := began + seconds + STOP_S - time.monotonic()) > 0:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(min(5, left))
                    publish()
            finally:
                stop(process)
                kill_left_over(work)
                keep_logs(log, work)
        publish()
        took = time.monotonic() - began
        print(f"{part.name}: {took:.0f} s" + (f", exit status {process.returncode}" if process.returncode else ""),
              flush=True)  # fmt: skip

    return run


def stop(process: subprocess.Popen) -> None:
    """Ask it to stop its servers and itself; insist after :data:`STOP_S`."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def keep_logs(log, work: Path) -> None:
    """The end of each server's log goes into the programme's own: the machine keeps nothing."""
    for path in sorted((work / "servers").glob("*/server.log")):
        log.write(f"\n-- {path.parent.name} --\n".encode() + path.read_bytes()[-20_000:])
        path.unlink()


def summary(store: Results) -> str:
    """A short table, printed last: the reply of a remote call carries the end of its output."""
    content = store.content
    lines = [f"{len(store.done)} cell(s) measured, {content['spent_s']:.0f} s spent"]
    for row in store.rows:
        if "error" in row:
            lines.append(f"FAILED {row['part']}/{row['cell']}: {row['error'].splitlines()[0][:160]}")
        elif row["figures"].get("failures") or row["figures"].get("wrong"):
            lines.append(
                f"WRONG {row['part']}/{row['cell']}: {row['figures'].get('failures') or row['figures']['wrong']}"
            )
    for part, runs in content["parts"].items():
        for name, log in (pair for run in runs for pair in run["failed"].items()):
            lines.append(f"NOT STARTED {part}/{name}: {log.strip().splitlines()[-1][:160] if log.strip() else ''}")
    lines += [f"dropped {name}: {why}" for name, why in content["dropped"].items()]
    for name, value in content.get("headlines", {}).items():
        goal = f"   (goal {GOALS[name]})" if name in GOALS else ""
        lines.append(f"{'-' if value is None else value!s:>8}  {name}{goal}")
    return "\n".join(lines)


def detach(arguments: Sequence[str], keep: Path) -> None:
    """Start the same run in a session of its own, which outlives the call that started it."""
    if (pid := running(keep)) is not None:
        raise SystemExit(f"a run is under way already (process {pid}); use --follow")
    keep.mkdir(parents=True, exist_ok=True)
    (keep / FINISHED).unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu.run_all", *(word for word in arguments if word != "--detach")]
    env = {name: value for name, value in os.environ.items() if name != "OUT"}  # this call's folder ends with it
    with (keep / "run.txt").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env, start_new_session=True)
    (keep / RUNNING).write_text(str(process.pid))
    print(f"started as process {process.pid}")


def running(keep: Path) -> int | None:
    """Process id of a detached run that has not ended, or None."""
    if not (keep / RUNNING).is_file() or (keep / FINISHED).is_file():
        return None
    pid = int((keep / RUNNING).read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state == "Z" else pid  # nobody may be there to reap it


def follow(keep: Path, out: Path, seconds: float) -> bool:
    """Copy what a detached run has so far to ``out`` until it ends or ``seconds`` are over; True when it has ended."""
    deadline = time.monotonic() + seconds
    shown = 0
    while True:
        alive = running(keep) is not None
        copy_results(keep, out)
        text = (keep / "run.txt").read_text(errors="replace") if (keep / "run.txt").is_file() else ""
        print(text[shown:], end="", flush=True)
        shown = len(text)
        if not alive or time.monotonic() > deadline:
            return not alive
        time.sleep(1)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = os.environ.get("OUT")
    parser.add_argument("--out", type=Path, default=Path(out) if out else None, help="for the results (default: $OUT)")
    parser.add_argument(
        "--keep", type=Path, help="a folder that outlives this call; results are kept and looked for there"
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tgvkv-gpu", help="models and logs")
    parser.add_argument("--minutes", type=float, default=25.0, help="GPU time in all, every call counted")
    parser.add_argument("--setup-s", type=float, default=180.0, help="of that: machine start, transfers, unpacking")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part (may be repeated)")
    parser.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny sizes on CPU servers")
    parser.add_argument("--commit", default="not given", help="recorded with the results")
    parser.add_argument("--server-flag", action="append", default=[], metavar="FLAG", help="for every server")
    parser.add_argument("--server-env", action="append", default=[], metavar="NAME=VALUE", help="for every server")
    parser.add_argument("--detach", action="store_true", help="with --keep: run on after this call, in the background")
    parser.add_argument(
        "--follow", type=float, metavar="SECONDS", help="with --keep: watch a detached run, fetch results"
    )
    return parser


def checked(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[Part, ...]:
    """The parts asked for; bad arguments end the program with the remedy."""
    parts = cpu_programme() if args.dry_run_cpu else gpu_programme()
    unknown = set(args.part or ()) - {part.name for part in parts}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    if not args.minutes * 60 > args.setup_s >= 0:
        parser.error(f"--minutes {args.minutes:g} leaves nothing after --setup-s {args.setup_s:g}")
    if (args.detach or args.follow is not None) and args.keep is None:
        parser.error("--detach and --follow need --keep DIR, a folder that outlives the call")
    if args.out is None and not args.plan and (args.keep is None or args.follow is not None):
        parser.error("--out DIR is needed (there is no $OUT here)")
    for pair in args.server_env:
        if "=" not in pair:
            parser.error(f"--server-env {pair}: NAME=VALUE is needed")
    return tuple(part for part in parts if not args.part or part.name in args.part)


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    parser = arguments()
    args = parser.parse_args(words)
    parts = checked(args, parser)
    budget = args.minutes * 60 - args.setup_s
    results = args.keep or args.out
    if args.plan:
        store = Results(results) if results else None
        left = budget - (store.content["spent_s"] if store else 0)
        print(plan_text(choose(parts, left, store.done if store else ()), parts, left, args))
        return 0
    if args.detach:
        detach(words, args.keep)
    elif args.follow is not None:
        ended = follow(args.keep, args.out, args.follow)
        print("the run has ended" if ended else "still running: follow again within 30 s of this call's end")
    else:
        run_here(args, parts, budget, results)
    return 0


def run_here(args: argparse.Namespace, parts: Sequence[Part], budget: float, results: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)

    def publish() -> None:
        if args.keep and args.out:
            copy_results(args.keep, args.out)

    Results(results).note("measured", {**header(), "commit": args.commit, "minutes": args.minutes})
    try:
        store = run_programme(parts, budget, results, part_runner(args, results, args.work, publish))
        print(summary(store), flush=True)
    finally:
        publish()
        if args.keep:
            (args.keep / FINISHED).write_text("")


if __name__ == "__main__":
    sys.exit(main())
