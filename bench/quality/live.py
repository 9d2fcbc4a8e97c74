"""Chats held with a live server: every question is asked after the true answers to the ones before it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Callable, Sequence

import httpx

from bench.client import RefusedError, connect
from bench.quality.boards import Chat
from bench.quality.cells import Cell
from training.demo_model.probes import Probe, chat_messages, image_part

EVIDENCE_POLICY = Path(__file__).resolve().parent / "evidence_policy"
SLACK = 4
"""Tokens that an answer may be longer than the true one; it is wrong by then."""

Answers = list[list[str]]
"""What was said, by chat and turn."""


def server_env() -> dict[str, str]:
    """Environment of a server that knows the policy ``evidence``."""
    root = EVIDENCE_POLICY.parents[2]
    paths = [EVIDENCE_POLICY, root, root / "triton_kernels", os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


def ask(url: str, cell: Cell, chats: Sequence[Chat], at_once: int, progress: Callable[[], None] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None) -> Answers:  # fmt: skip
    """Hold ``chats`` in one cell, ``at_once`` at a time.

    Raises:
        ExceptionGroup: of RefusedError, the server's answer to a question was an error, and httpx.HTTPError, it could
            not be reached.
    """

    async def run() -> Answers:
        places = asyncio.Semaphore(at_once)
        async with connect(url, transport=transport) as http, asyncio.TaskGroup() as group:
            tasks = [group.create_task(_hold(http, places, cell, chat, progress)) for chat in chats]
        return [task.result() for task in tasks]

    return asyncio.run(run())


async def _hold(
    http: httpx.AsyncClient, places: asyncio.Semaphore, cell: Cell, chat: Chat, progress: Callable[[], None]
) -> list[str]:
    async with places:
        picture = [await asyncio.to_thread(image_part, chat.scene)]
        said = []
        for turn in range(len(chat.turns)):
            said.append(await _question(http, cell, chat, turn, picture))
            progress()
        return said


async def _question(http: httpx.AsyncClient, cell: Cell, chat: Chat, turn: int, picture: list[dict]) -> str:
    probe = Probe(chat.board, (chat.scene,), chat.turns[: turn + 1])
    body = {
        "model": "default", "messages": chat_messages(probe, image_parts=picture), "temperature": 0,
        "max_tokens": len(probe.question.answer_words) + SLACK, "rid": chat.name(turn), "custom_params": cell.options(),
    }  # fmt: skip
    reply = await http.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        raise RefusedError(f"{cell}: HTTP {reply.status_code}: {reply.text[:300]}")
    return (reply.json()["choices"][0]["message"]["content"] or "").strip()
