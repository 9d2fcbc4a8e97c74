"""Send malformed and hostile requests to our server and to stock SGLang: no worse answer, and nobody else is harmed.

    python -m bench.malformed                   # the whole corpus, ours and then stock SGLang
    python -m bench.malformed --per-kind 5      # a few of each kind

Fails (exit status 1) when our server dies, hangs, or drops a connection, when it answers 5xx where stock does not,
when afterwards a slot is missing or a good request is answered otherwise, or when a file appears outside the traces.
Of what our server refuses because it would end the scheduler, only one request for each reason in ``--killers`` is
sent to stock: each that ends it costs another server.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.common import RESULTS, STOCK, Arm, header, ours, serve, stand_in_model, write_json
from bench.malformed_corpus import ESCAPE, EXCLUDED, Malformed, corpus
from tgvkv_sglang.cli.server import ServerFailedError
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Server

ANSWER_LIMIT_S = 60.0
DROPPED, HUNG, CUT = "dropped", "hung", "cut short"
KILLERS = ("input_ids", "logit_bias", "prompt", "regex", "logprob_start_len")
GUARD = "would end the server"
"""In the message of every refusal by :mod:`tgvkv_sglang.sglang_seam.request_checks`."""


@dataclass(frozen=True)
class Reply:
    """What came back: an HTTP status and the first characters of the body, or no whole answer.

    ``dropped``: the connection ended and the server with it; ``cut short``: the server goes on (what would have been
    a 500, had a stream not begun); ``hung``: nothing came in time.
    """

    status: int | str
    text: str = ""

    @property
    def badness(self) -> int:
        """0 answered or refused, 1 an error of the server's own, 2 no answer."""
        if self.status in (DROPPED, HUNG):
            return 2
        return int(self.status == CUT or self.status >= 500)

    @property
    def guarded(self) -> bool:
        return GUARD in self.text


def send(server: Server, request: Malformed, limit_s: float = ANSWER_LIMIT_S) -> Reply:
    try:
        reply = requests.post(
            server.url + request.endpoint,
            data=request.body,
            headers={"Content-Type": "application/json", "Connection": "close"},
            timeout=limit_s,
        )
        return Reply(reply.status_code, reply.text[:300])
    except requests.Timeout:
        return Reply(HUNG)
    except requests.RequestException as error:
        return Reply(CUT if lives(server) else DROPPED, type(error).__name__)


def lives(server: Server) -> bool:
    """Whether a small request is still answered."""
    try:
        return server.post("/generate", Server.body(chat("Hello"), (), 1), timeout=ANSWER_LIMIT_S).ok
    except requests.RequestException:
        return False


# -- the rest of the world -------------------------------------------------------------------------------------------


def written(server: Server, model: Path) -> set[Path]:
    """Files that the server may not add to: those beside its model, its log and its traces, and any escaped name."""
    mine = [path for root in (model.parent, server.log.parent) for path in root.rglob("*")]
    allowed = {server.log, server.traces, *server.traces.rglob("*")}
    shared = {Path.cwd(), Path("/"), Path(tempfile.gettempdir()), server.log.parent.parent}
    escaped = [path for root in shared for path in root.glob(f"*{ESCAPE}*")]
    return ({*mine} - allowed) | {*escaped}


def good_answer(server: Server) -> dict[str, Any]:
    """A flushed server's answer to a good request with a picture, and where its slots are then."""
    server.flush()
    answer = server.generate(chat(about_images("What is this?")), [make_image(1, 128, 96)], max_new_tokens=8)
    memory = {name: server.memory()[name] for name in ("available", "evictable", "protected", "uncached")}
    if sum(memory.values()) != server.tokens:
        raise RuntimeError(f"slots are missing: {memory} of {server.tokens}")
    return {"tokens": answer.ids, "memory": memory}


def unharmed(server: Server, model: Path, before: tuple[dict[str, Any], set[Path]]) -> list[str]:
    """What the requests left behind: nothing, if all is well. ``before`` is what :func:`world` said before them."""
    try:
        answer, files = world(server, model)
    except (requests.RequestException, RuntimeError) as error:
        return [f"the server does not answer a good request any more: {error}"]
    failures = [f"a file appeared: {path}" for path in sorted(files - before[1])]
    if answer != before[0]:
        failures.append(f"a good request gives {answer}, before the malformed ones {before[0]}")
    return failures


def world(server: Server, model: Path) -> tuple[dict[str, Any], set[Path]]:
    return good_answer(server), written(server, model)


# -- campaigns ---------------------------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """One arm's replies to a corpus, over as many servers as it takes: one that dies or hangs is replaced.

    Attributes:
        replies: by the request's name.
        failures: what the requests left behind on a server that lived through them.
        servers: how many it took.
    """

    arm: Arm
    model: Path
    tokens: int
    replies: dict[str, Reply] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    servers: int = 0

    def run(self, batch: Sequence[Malformed]) -> None:
        left = list(batch)
        with tqdm(total=len(batch), desc=self.arm.name, unit="request") as bar:
            while left:
                self.servers += 1
                answered = len(self.replies)
                with suppress(ServerFailedError), serve(self.arm, self.model, self.tokens, checked=True) as server:
                    self._one_server(server, left, bar)
                if len(self.replies) == answered:
                    raise RuntimeError(f"{self.arm.name} does not even start")
                left = left[len(self.replies) - answered :]

    def _one_server(self, server: Server, left: Sequence[Malformed], bar: tqdm) -> None:
        before = world(server, self.model)
        for request in left:
            reply = self.replies[request.name] = send(server, request)
            bar.update()
            if reply.badness == 2:
                return
        self.failures += unharmed(server, self.model, before)


# -- the comparison --------------------------------------------------------------------------------------------------


def worse(request: Malformed, our: Reply, stock: Reply | None) -> str | None:
    """Why ``our`` reply is not good enough, or None. ``stock`` None: the request was not sent to stock SGLang.

    SGLang answers 500 to much of what it cannot read; what it never saw, it cannot excuse.
    """
    if our.badness < 2 and our.badness <= (stock.badness if stock else 0):
        return None
    return f"{request.name}: {our.status} {our.text!r}, stock SGLang: {stock.status if stock else 'not asked'}"


def guard_of(reply: Reply) -> str:
    """What a guarded refusal is about, without the value."""
    found = re.search(r"(\w+)(?:\[[^]]*\])? (?:cannot be|must be|has no option|has no)", reply.text)
    return found[1] if found else "a value that cannot be sent"


def one_of_each(batch: Sequence[Malformed], replies: dict[str, Reply], guards: Sequence[str]) -> list[Malformed]:
    """The first guarded request for each of ``guards``."""
    first: dict[str, Malformed] = {}
    for request in batch:
        first.setdefault(guard_of(replies[request.name]), request)
    return [first[guard] for guard in guards if guard in first]


@dataclass
class Comparison:
    """A corpus on both arms. ``killers`` were guarded by ours and sent to stock all the same."""

    requests: list[Malformed]
    ours: Campaign
    stock: Campaign
    killers: list[Malformed] = field(default_factory=list)

    def run(self, killers: Sequence[str] = ()) -> None:
        self.ours.run(self.requests)
        guarded = [request for request in self.requests if self.ours.replies[request.name].guarded]
        names = {request.name for request in guarded}
        self.stock.run([request for request in self.requests if request.name not in names])
        self.killers = one_of_each(guarded, self.ours.replies, killers)
        self.stock.run(self.killers)

    def failures(self) -> list[str]:
        pairs = ((one, self.ours.replies[one.name], self.stock.replies.get(one.name)) for one in self.requests)
        return [found for pair in pairs if (found := worse(*pair))] + self.ours.failures

    def as_dict(self) -> dict[str, Any]:
        ours, stock = self.ours.replies, self.stock.replies
        by_kind: dict[str, list[Reply]] = {}
        for one in sorted(self.requests, key=lambda one: one.kind):
            by_kind.setdefault(one.kind, []).append(ours[one.name])
        ended = [name for name, reply in stock.items() if reply.badness == 2]
        return {
            "failures": self.failures(),
            "requests": len(self.requests),
            "kinds": {kind: _statuses(replies) for kind, replies in by_kind.items()},
            "servers": {self.ours.arm.name: self.ours.servers, self.stock.arm.name: self.stock.servers},
            "ours": _statuses(ours.values()),
            "stock": _statuses(stock.values()),
            "guarded": dict(sorted(Counter(guard_of(reply) for reply in ours.values() if reply.guarded).items())),
            "sent to stock although guarded": {one.name: stock[one.name].status for one in self.killers},
            "ended stock": {name: ours[name].text for name in ended},
            "left behind on stock": self.stock.failures,
            "never sent": EXCLUDED,
        }


def _statuses(replies: Iterable[Reply]) -> dict[str, int]:
    return dict(sorted(Counter(str(reply.status) for reply in replies).items()))


def show(comparison: Comparison, console: Console) -> None:
    table = Table(title=f"{len(comparison.requests)} malformed requests")
    for column in ("status", comparison.ours.arm.name, comparison.stock.arm.name):
        table.add_column(column)
    ours, stock = (_statuses(campaign.replies.values()) for campaign in (comparison.ours, comparison.stock))
    for status in sorted({*ours, *stock}):
        table.add_row(status, str(ours.get(status, 0)), str(stock.get(status, 0)))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-field", type=int, default=4, help="wrong values for each field of a valid body")
    parser.add_argument("--per-kind", type=int, help="send only this many of each kind")
    parser.add_argument("--killers", nargs="*", default=KILLERS, help="reasons to show on stock, one request each")
    parser.add_argument("--pool", type=int, default=3000, help="slots of the pool")
    parser.add_argument("--retention", type=float, default=0.1)
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: a tiny random model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "malformed-cpu.json")
    args = parser.parse_args()
    start = time.monotonic()
    with stand_in_model(args.model) as model:
        arms = (Campaign(arm, model, args.pool) for arm in (ours(args.retention), STOCK))
        comparison = Comparison(corpus(args.seed, per_field=args.per_field, per_kind=args.per_kind), *arms)
        comparison.run(args.killers)
    show(comparison, Console())
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "out")}
    seconds = round(time.monotonic() - start)
    write_json(args.out, {**header(), "settings": settings, "seconds": seconds, **comparison.as_dict()})
    failures = comparison.failures()
    for failure in failures[:20]:
        print("FAILED:", failure, file=sys.stderr)
    print(f"{len(failures)} failures" if failures else "all is well")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
