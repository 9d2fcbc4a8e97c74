"""``tgvkv demo``: one picture, one chat on this machine's CPU, in three ways: with all of the picture's KV, with a few
per cent of it chosen anew each turn, and with the first turn's choice kept."""

from __future__ import annotations

import argparse
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from ..config import parse_retention
from ..demo.bundle import DEMO_MODEL
from ..demo.questions import Question, questions
from ..demo.scenes import make_scene, render
from ..errors import ConfigError
from ..flags import BACKEND
from ..registry import policy_names
from .client import ChatError, Conversation
from .demo_view import Column, Turn, closing, opening, turn_table
from .kept import kv_unit_bytes, read_kept
from .server import CpuServer, ServerFailedError

# Questions whose answers need the picture's KV while they are decoded ("fit to measure" in the model card); the quality
# benchmark (bench/quality) asks the same and says how many are answered rightly in each column, over many pictures.
CLASSES = ("at", "numbers", "row", "colorlist", "describe")
MIN_ANSWER_TOKENS = 48
TRACE_WAIT_S = 5.0


def demo(args: argparse.Namespace) -> int:
    """Returns 0 when every turn was answered (rightly or not), 1 when a server failed."""
    _check(args)
    console = Console()
    directory = Path(args.out) / time.strftime("%Y%m%d-%H%M%S")
    directory.mkdir(parents=True, exist_ok=True)
    model, random_model = _model(args, directory, console)
    scene = make_scene(args.seed)
    picture = directory / "picture.png"
    render(scene).save(picture)
    turns = questions(scene, random.Random(args.seed), args.turns, CLASSES)
    console.print(opening(picture, args.retention, args.policy, random_model, args.control))
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with ExitStack() as stack:
            servers = _servers(args, model, directory, stack)
            _wait(servers, console)
            columns = _columns(args, servers, picture, directory)
            try:
                right = _hold_chat(turns, columns, kv_unit_bytes(model), console)
            except ChatError as error:
                tails = "\n".join(server.log_tail() for server in servers)
                raise ServerFailedError(f"{error}\n{tails}") from error
    except ServerFailedError as error:
        console.print(f"tgvkv: {error}", style="red", markup=False, highlight=False)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    console.print(closing(columns, right, len(turns), directory, random_model))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.turns < 1:
        raise ConfigError(f"--turns must be at least 1, got {args.turns}")
    if args.policy not in policy_names():
        raise ConfigError(f"--policy must be one of {', '.join(policy_names())}, got {args.policy!r}")
    if parse_retention(args.retention, "--retention") == 1.0:
        raise ConfigError("--retention 1.0 is the demo's other column; give a value below 1, say 0.05")


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _model(args: argparse.Namespace, directory: Path, console: Console) -> tuple[Path, bool]:
    """The bundled model, or a random one made on the spot."""
    if not args.random_model and (DEMO_MODEL / "model.safetensors").is_file():
        return DEMO_MODEL, False
    from ..demo.tiny_model import make_tiny_model

    with console.status("making a random model"):
        return make_tiny_model(directory / "random_model"), True


def _servers(args: argparse.Namespace, model: Path, directory: Path, stack: ExitStack) -> list[CpuServer]:
    reclaims = ["pressure", "eager"] if args.control else ["pressure"]
    servers = []
    for reclaim in reclaims:
        flags = [
            "--model-path", str(model), "--attention-backend", BACKEND, "--enable-cache-report",
            "--enable-precise-embedding-interpolation", "--max-total-tokens", "32768", "--max-running-requests", "8",
            "--watchdog-timeout", "600", "--tgvkv-retention", str(args.retention), "--tgvkv-policy", args.policy,
            "--tgvkv-reclaim", reclaim,
            "--tgvkv-trace-dir", str(directory / f"traces-{reclaim}"),
        ]  # fmt: skip
        server = stack.enter_context(CpuServer(flags, directory / f"server-{reclaim}.log"))
        servers.append(server.start())
    return servers


def _wait(servers: list[CpuServer], console: Console) -> None:
    logs = " and ".join(str(server.log) for server in servers)
    console.print(f"Starting SGLang; one to three minutes on two cores. Its log: {logs}", style="dim")
    console.print("(tracebacks about libtorchcodec in there are harmless: SGLang looks for FFmpeg)", style="dim")
    start = time.monotonic()
    with console.status("starting") as status:
        for server in servers:
            server.wait(lambda _: status.update(f"starting, {time.monotonic() - start:.0f} s"))
    console.print(f"Ready after {time.monotonic() - start:.0f} s.\n", style="dim")


def _columns(args: argparse.Namespace, servers: list[CpuServer], picture: Path, directory: Path) -> list[Column]:
    def conversation(server: CpuServer, retention: float) -> Conversation:
        custom = {"tgvkv_retention": retention, "tgvkv_trace": True}
        return Conversation(server.url, picture, custom, max_tokens=MIN_ANSWER_TOKENS)

    percent = f"{100 * args.retention:.3g} %"
    columns = [
        Column("100 % of the vision KV", conversation(servers[0], 1.0), None),
        Column(f"{percent}, chosen anew each turn", conversation(servers[0], args.retention),
               directory / "traces-pressure"),
    ]  # fmt: skip
    if len(servers) > 1:
        columns.append(
            Column(f"{percent}, the first turn's choice kept", conversation(servers[1], args.retention),
                   directory / "traces-eager")
        )  # fmt: skip
    return columns


def _hold_chat(turns: list[Question], columns: list[Column], unit_bytes: int, console: Console) -> list[int]:
    """Ask every question in every column; returns the number of right answers by column."""
    right = [0] * len(columns)
    for number, question in enumerate(turns, 1):
        row = []
        for i, column in enumerate(columns):
            column.conversation.max_tokens = max(MIN_ANSWER_TOKENS, 2 * len(question.answer_words))
            with console.status(f"turn {number}: {column.title}"):
                reply = column.conversation.ask(question.text)
                column.see(read_kept(column.traces, reply.rid, TRACE_WAIT_S if number == 1 else 0.5))
            correct = reply.text.split() == question.answer_words
            right[i] += correct
            row.append(Turn(reply, correct, column.kept))
        console.print(turn_table(number, question, columns, row, unit_bytes))
    return right
