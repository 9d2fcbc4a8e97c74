"""Soak a live CPU server: a pool far too small, many chats over shared images, aborts, closed connections, junk.

    python -m bench.soak --seconds 240 [--retract]
    python -m bench.soak --repeat            # same traffic, in the same order, on two fresh servers

Fails (exit status 1) when a request that nobody aborted got no whole answer, when a request that must be refused was
not, when the server dies (its memory is checked after every batch), when slots are missing after a flush, or when an
answer is not the one a flushed server gives (:mod:`bench.soak_check` says which answers can be compared, and why).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.client import RefusedError, connect, stream
from bench.common import RESULTS, header, ours, serve, stand_in_model, write_json
from bench.malformed_corpus import corpus
from bench.soak_check import TOLERANCES, Finished, Replay, Tolerance, replay
from bench.soak_traffic import Chat, Request, refused
from tgvkv_sglang.testing.prompts import chat
from tgvkv_sglang.testing.server import Server

FLAGS = ("--chunked-prefill-size", "64")
RETRACT = {"SGLANG_TEST_RETRACT": "1"}
REQUEST_LIMIT_S = 240.0
IDLE_LIMIT_S = 120.0
TROUBLE = (httpx.HTTPError, requests.RequestException, RuntimeError)
OWNERS = ("available", "evictable", "protected", "uncached")
FATES = ("finish",) * 8 + ("abort", "close")


@dataclass(frozen=True)
class Plan:
    """What a soak does, for ``seconds``, or for as many chat requests as ``requests`` says.

    ``flush_every`` seconds (or requests) the traffic pauses, and the idle server is flushed and counted. Afterwards
    ``replays`` answers are compared with fresh ones, for ``replay_seconds`` at most (None: all of them).
    """

    seconds: float = 240.0
    requests: int | None = None
    clients: int = 12
    images: int = 6
    seed: int = 0
    flush_every: float = 30.0
    replays: int | None = 150
    replay_seconds: float | None = None
    tolerance: Tolerance = TOLERANCES["float32"]

    @property
    def goal(self) -> float:
        return self.seconds if self.requests is None else self.requests


@dataclass
class Outcome:
    """What a soak found. ``failures`` is empty when all is well; ``counts`` says what was done."""

    failures: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    finished: list[Finished] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    verdicts: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, found: Replay) -> None:
        self.verdicts = found.verdicts
        self.failures += found.failures
        self.counts["answers that can be compared exactly"] = found.candidates
        self.counts["different answers among those compared"] = found.different_answers

    def as_dict(self) -> dict[str, Any]:
        return {
            "failures": self.failures,
            "counts": dict(sorted(self.counts.items())),
            "memory_after_each_flush": self.memory,
            "answers_compared": dict(self.verdicts),
            "seconds": round(self.seconds, 1),
        }


class Soak:
    """Clients that hammer ``server``; all of them share one clock, one gate and one :class:`Outcome`."""

    def __init__(self, server: Server, plan: Plan):
        self.server, self.plan, self.outcome = server, plan, Outcome()
        self.http = connect(server.url, REQUEST_LIMIT_S)
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = 0
        self.rids = 0
        self.malformed = corpus(plan.seed, per_field=1)
        self.start = time.monotonic()

    def passed(self) -> float:
        """How much of ``plan.goal`` is done."""
        return time.monotonic() - self.start if self.plan.requests is None else self.rids

    def fail(self, message: str) -> None:
        self.outcome.failures.append(message)

    # -- one request -------------------------------------------------------------------------------------------------

    async def ask(self, request: Request, rng: random.Random) -> str | None:
        """Send one turn; returns the answer, or None when this client aborted it or hung up."""
        fate = rng.choice(FATES)
        self.rids += 1
        rid = f"soak-{self.rids:06d}"  # of equal length: SGLang aborts every request whose id begins with the one given
        stop_after = rng.randrange(request.max_new_tokens)
        last, seen = None, 0
        try:
            async with aclosing(stream(self.http, "/generate", request.body(rid, stream=True))) as pieces:
                async for piece in pieces:
                    last, seen = piece, seen + 1
                    if fate in ("abort", "close") and seen > stop_after:
                        if fate == "close":
                            self.outcome.counts["connections closed mid-stream"] += 1
                            return None
                        await self.http.post("/abort_request", json={"rid": rid})
                        fate = "aborted"
        except httpx.HTTPError as error:
            self.fail(f"{rid}: {type(error).__name__} {error}")
            return None
        except RefusedError as error:
            if fate != "aborted":
                self.fail(f"{rid}: {error}")
                return None
        return self._judge(rid, request, last, aborted=fate == "aborted")

    def _judge(self, rid: str, request: Request, last: dict | None, aborted: bool) -> str | None:
        if aborted:
            self.outcome.counts["aborted mid-stream"] += 1
            return None
        meta = (last or {}).get("meta_info")
        if not meta or (meta.get("finish_reason") or {}).get("type") != "length":
            self.fail(f"{rid}: no whole answer: {str(last)[:300]}")
            return None
        if len(last["output_ids"]) != request.max_new_tokens or meta["prompt_tokens"] != request.prompt_tokens:
            self.fail(f"{rid}: {len(last['output_ids'])} tokens for {request.max_new_tokens} asked, prompt of "
                      f"{meta['prompt_tokens']} counted as {request.prompt_tokens} by the client")  # fmt: skip
            return None
        retractions = meta.get("num_retractions") or 0
        done = Finished(request, tuple(last["output_ids"]), meta["cached_tokens"], retractions)
        self.outcome.finished.append(done)
        counts = self.outcome.counts
        counts["answered"] += 1
        counts["answered, retracted on the way"] += retractions > 0
        counts["answered, follow-up turns"] += request.turn > 0
        counts["prompt tokens"] += request.prompt_tokens
        counts["prompt tokens from the cache"] += done.cached
        return last["text"]

    async def send_malformed(self, rng: random.Random) -> None:
        """Any answer will do (:mod:`bench.malformed` compares them with stock SGLang's), but one must come."""
        one = rng.choice(self.malformed)
        try:
            reply = await self.http.post(one.endpoint, content=one.body, headers={"Content-Type": "application/json"})
        except httpx.HTTPError as error:
            self.fail(f"{one.name}: {type(error).__name__} {error}")
            return
        self.outcome.counts[f"malformed: HTTP {reply.status_code}"] += 1

    async def junk(self, rng: random.Random) -> None:
        kind, body, allowed = refused(rng, self.server.tokens)
        try:
            reply = await self.http.post("/generate", json=body)
        except httpx.HTTPError as error:
            self.fail(f"{kind}: {type(error).__name__} {error}")
            return
        self.outcome.counts[f"refused: {kind}"] += 1
        if reply.status_code not in allowed:
            self.fail(f"{kind}: HTTP {reply.status_code}, expected a refusal: {reply.text[:200]}")

    # -- clients -----------------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        rng = random.Random(f"{self.plan.seed}-{number}")
        while self.passed() < self.plan.goal and self.server.alive():
            await self.gate.wait()
            self.busy += 1
            try:
                await self._something(rng)
            finally:
                self.busy -= 1

    async def _something(self, rng: random.Random) -> None:
        dice = rng.random()
        if dice < 0.06:
            await self.junk(rng)
        elif dice < 0.16:
            await self.send_malformed(rng)
        elif dice < 0.2:
            status = (await self.http.post("/flush_cache")).status_code
            self.outcome.counts[f"flush attempted under load: HTTP {status}"] += 1
        else:
            talk = Chat(rng, self.plan.images)
            for request in talk.requests():
                text = await self.ask(request, rng)
                if text is None:
                    return
                talk.answer(text)
                await asyncio.sleep(rng.random() * 0.2)

    # -- memory ------------------------------------------------------------------------------------------------------

    def count_slots(self) -> None:
        """On a flushed server the same small request must always leave the same numbers of slots."""
        self.server.flush(IDLE_LIMIT_S)
        self.server.generate(chat("Count."), max_new_tokens=4)
        deadline = time.monotonic() + 20
        while True:
            memory = {name: count for name, count in self.server.memory().items() if name in OWNERS}
            expected = self.outcome.memory[0] if self.outcome.memory else memory
            if memory == expected or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # the log may lag behind the answer
        self.outcome.memory.append(memory)
        if memory != expected or sum(memory.values()) != self.server.tokens:
            self.fail(f"slots after a flush: {memory}, on the fresh server {expected}, pool {self.server.tokens}")

    async def director(self) -> None:
        while self.passed() < self.plan.goal and self.server.alive():
            pause = min(self.passed() + self.plan.flush_every, self.plan.goal)
            while self.passed() < pause and self.server.alive():
                await asyncio.sleep(0.1)
            self.gate.clear()
            while self.busy:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(self.count_slots)
            self.gate.set()

    # -- all of it ---------------------------------------------------------------------------------------------------

    async def _soak(self) -> None:
        await asyncio.to_thread(self.count_slots)
        unit = "s" if self.plan.requests is None else "request"
        with tqdm(total=round(self.plan.goal), desc="soaking", unit=unit) as bar:
            async with asyncio.TaskGroup() as tasks:  # one that fails ends them all
                ticker = tasks.create_task(self._tick(bar))
                clients = [tasks.create_task(self.client(n)) for n in range(self.plan.clients)]
                await self.director()
                await asyncio.wait(clients)
                ticker.cancel()

    async def _tick(self, bar: tqdm) -> None:
        while True:
            await asyncio.sleep(1)
            bar.update(min(round(self.passed()), bar.total) - bar.n)

    async def run(self) -> Outcome:
        self.start = time.monotonic()
        async with self.http:
            try:
                await self._soak()
                await asyncio.to_thread(self.count_slots)
            except* TROUBLE as group:
                first = group.exceptions[0]
                self.fail(f"the server does not answer, or a request hangs: {type(first).__name__} {first}")
        return self.outcome


def soak(server: Server, plan: Plan) -> Outcome:
    """Soak a live, memory-checked server of ours (see the module docstring); blocks until done."""
    began = time.monotonic()
    outcome = asyncio.run(Soak(server, plan).run())
    if server.alive():
        try:
            outcome.add(replay(server, outcome.finished, plan.tolerance, plan.seed, plan.replays, plan.replay_seconds))
        except TROUBLE as error:
            outcome.failures.append(f"the server does not answer: {type(error).__name__} {error}")
    if not server.alive():
        outcome.failures.append("the server died.\n" + server.log_tail())
    outcome.seconds = time.monotonic() - began
    return outcome


def sequential(server: Server, seed: int, chats: int, images: int) -> list[tuple[tuple[int, ...], int]]:
    """(token ids, cached tokens) of every turn of ``chats`` chats, interleaved one request at a time."""
    rng = random.Random(seed)
    talks = [Chat(rng, images) for _ in range(chats)]
    waiting = [(talk, talk.requests()) for talk in talks]
    answers = []
    while waiting:
        talk, requests = waiting.pop(rng.randrange(len(waiting)))
        request = next(requests, None)
        if request is None:
            continue
        reply = server.post("/generate", request.body())
        reply.raise_for_status()
        reply = reply.json()
        talk.answer(reply["text"])
        answers.append((tuple(reply["output_ids"]), reply["meta_info"]["cached_tokens"]))
        waiting.append((talk, requests))
    return answers


def repeat(model: Path, args: argparse.Namespace) -> list[str]:
    """Same inputs, same order, two fresh servers; returns what differed."""
    runs = []
    for _ in range(2):
        with serve(ours(args.retention, *FLAGS), model, args.pool, checked=True) as server:
            runs.append(sequential(server, args.seed, args.chats, args.images))
    cached = sum(count for _, count in runs[0])
    print(f"{len(runs[0])} requests one at a time on each of two fresh servers, {cached} tokens from the cache")
    if len(runs[0]) != len(runs[1]):
        return [f"{len(runs[0])} requests in the first run, {len(runs[1])} in the second"]
    return [f"request {i}: {a} then {b}" for i, (a, b) in enumerate(zip(*runs, strict=True)) if a != b]


def show(outcome: Outcome, console: Console) -> None:
    table = Table(title=f"soak, {outcome.seconds:.0f} s")
    table.add_column("what")
    table.add_column("count", justify="right")
    verdicts = {f"compared with a fresh answer: {name}": count for name, count in sorted(outcome.verdicts.items())}
    flushes = {"flushes of the idle server, slots all there": len(outcome.memory)}
    for name, count in {**dict(sorted(outcome.counts.items())), **verdicts, **flushes}.items():
        table.add_row(name, str(count))
    console.print(table)


def main() -> int:
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=plan.seconds)
    parser.add_argument("--clients", type=int, default=plan.clients)
    parser.add_argument("--images", type=int, default=plan.images, help="images shared by all chats")
    parser.add_argument("--pool", type=int, default=1000, help="slots of the pool")
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=plan.seed)
    parser.add_argument("--replays", type=int, default=plan.replays, help="answers to compare with fresh ones")
    parser.add_argument("--retract", action="store_true", help="let SGLang force retractions (SGLANG_TEST_RETRACT)")
    parser.add_argument("--repeat", action="store_true", help="only check that two runs give the same answers")
    parser.add_argument("--chats", type=int, default=24, help="chats of --repeat")
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: a tiny random model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak-cpu.json")
    args = parser.parse_args()
    with stand_in_model(args.model) as model:
        if args.repeat:
            failures = repeat(model, args)
        else:
            env = RETRACT if args.retract else None
            named = ("seconds", "clients", "images", "seed", "replays")
            chosen = replace(plan, **{name: getattr(args, name) for name in named})
            with serve(ours(args.retention, *FLAGS), model, args.pool, checked=True, env=env) as server:
                outcome = soak(server, chosen)
                if outcome.failures:
                    kept = shutil.copy(server.log, Path(tempfile.gettempdir()) / f"tgvkv-soak-{os.getpid()}.log")
                    print(f"the server's log is {kept}", file=sys.stderr)
            show(outcome, Console())
            settings = {name: value for name, value in vars(args).items() if name not in ("model", "out")}
            write_json(args.out, {**header(), "settings": settings, **outcome.as_dict()})
            failures = outcome.failures
    for failure in failures[:20]:
        print("FAILED:", failure, file=sys.stderr)
    print(f"{len(failures)} failures" if failures else "all is well")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
