"""Chats held over the OpenAI-compatible API, streaming, timed on the client's side."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import AsyncIterator, Callable, Iterable, Iterator

import httpx

from bench.figures import Turn
from bench.traffic import PlannedChat

TIMEOUT_S = 600.0
AFTER_ERROR_S = 0.2
"""Pause of a user who was refused: a server that refuses everything is not to be hammered."""


class RefusedError(RuntimeError):
    """The server's answer was an error; the message has its status and text."""


def connect(url: str, timeout: float = TIMEOUT_S, transport: httpx.AsyncBaseTransport | None = None):
    """An :class:`httpx.AsyncClient` without a limit on connections.

    No connection is used twice: the server may close an idle one just as the next request goes out.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False, limits=limits, transport=transport)


async def stream(http: httpx.AsyncClient, path: str, body: dict) -> AsyncIterator[dict]:
    """The pieces of a streamed answer. Use with :func:`contextlib.aclosing`, which hangs up when the block is left.

    Raises:
        RefusedError: an HTTP error, or a piece that is one. httpx.HTTPError: the connection broke.
    """
    async with http.stream("POST", path, json=body) as reply:
        if reply.status_code != 200:
            raise RefusedError(f"HTTP {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise RefusedError(str(piece["error"]))
                yield piece


@dataclass
class Held:
    """What came of some chats: ``finished`` of them, in ``seconds``; ``resident`` were cached afterwards, or None."""

    turns: list[Turn]
    finished: int
    seconds: float
    resident: int | None


class ChatClient:
    """Holds planned chats with one server; use :func:`hold_chats`."""

    def __init__(self, http: httpx.AsyncClient, progress: Callable[[], None]):
        self.http, self.progress = http, progress
        self.turns: list[Turn] = []
        self.finished: dict[int, list[dict]] = {}
        self.began = time.perf_counter()

    def _now(self) -> float:
        return time.perf_counter() - self.began

    async def _answer(self, messages: list[dict], max_tokens: int, options: dict, turn: Turn) -> str:
        """Stream one answer into ``turn``; returns its text.

        Tokens are those of the server's own count: not every token is a piece of text. Where it does not count, each
        piece of text is one.
        """
        body = {
            "model": "default", "messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}, **options,
        }  # fmt: skip
        text, count = "", 0
        async with aclosing(stream(self.http, "/v1/chat/completions", body)) as pieces:
            async for piece in pieces:
                new = "".join((choice.get("delta") or {}).get("content") or "" for choice in piece.get("choices") or [])
                if usage := piece.get("usage") or {}:
                    turn.prompt_tokens = usage["prompt_tokens"]
                    details = usage.get("prompt_tokens_details") or {}
                    turn.cached_tokens = max(turn.cached_tokens, details.get("cached_tokens") or 0)
                now = usage.get("completion_tokens") or count + bool(new)
                if now > count:
                    turn.arrivals.append(self._now())
                    turn.tokens.append(now)
                text, count = text + new, max(count, now)
        if not count or (body.get("ignore_eos") and count != max_tokens):
            raise RefusedError(f"the answer ended after {count} of {max_tokens} tokens")
        return text

    async def _hold(self, chat: PlannedChat) -> bool:
        """One chat, with the server's own answers in it; False when a turn was not answered, which ends it."""
        messages: list[dict] = []
        before = 0
        pictures = await asyncio.to_thread(chat.picture_parts)
        for number, (question, pause) in enumerate(zip(chat.questions, chat.pauses, strict=True)):
            await asyncio.sleep(pause)
            content = (pictures if number == 0 else []) + [{"type": "text", "text": question}]
            messages = [*messages, {"role": "user", "content": content}]
            turn = Turn(chat.number, number, self._now(), before=before)
            self.turns.append(turn)
            try:
                text = await self._answer(messages, chat.max_tokens, chat.options, turn)
            except (httpx.HTTPError, RefusedError) as error:
                turn.error = f"{type(error).__name__}: {error}"
            self.progress()
            if turn.error is not None:
                return False
            messages = [*messages, {"role": "assistant", "content": text}]
            before = turn.prompt_tokens
        self.finished[chat.number] = messages
        return True

    async def _user(self, waiting: Iterator[PlannedChat]) -> None:
        for chat in waiting:
            await asyncio.sleep(max(0.0, chat.start - self._now()))
            if not await self._hold(chat):
                await asyncio.sleep(AFTER_ERROR_S)

    async def hold(self, chats: Iterable[PlannedChat], users: int, seconds: float | None) -> float:
        """``users`` take chat after chat until there are none, or the time is over; returns the seconds it took.

        What is under way when the time is over is cut off: such a turn has no error.
        """
        self.began = time.perf_counter()
        waiting = iter(chats)
        tasks = [asyncio.create_task(self._user(waiting)) for _ in range(users)]
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        took = self._now()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        return took

    async def count_resident(self) -> int:
        """Ask every finished chat once more, the youngest first; how many found their last prompt in the cache."""
        last = {turn.chat: turn.prompt_tokens for turn in self.turns if turn.error is None}
        resident = 0
        for number, messages in reversed(self.finished.items()):
            turn = Turn(number, -1, self._now())
            await self._answer([*messages, {"role": "user", "content": "So?"}], 1, {}, turn)
            resident += turn.cached_tokens >= last[number]
        return resident


def hold_chats(url: str, chats: Iterable[PlannedChat], users: int, *, seconds: float | None = None,
               resident: bool = False, progress: Callable[[], None] = lambda: None,
               transport: httpx.AsyncBaseTransport | None = None) -> Held:  # fmt: skip
    """Hold chats with the server at ``url``; blocks until done.

    Args:
        chats: may be endless when ``seconds`` is given.
        users: chats at once; as many as there are chats for arrivals that wait for nobody (open loop).
        resident: count afterwards whose last prompt is still in the cache.
    """

    async def run() -> Held:
        async with connect(url, transport=transport) as http:
            client = ChatClient(http, progress)
            took = await client.hold(chats, users, seconds)
            count = await client.count_resident() if resident else None
        return Held(client.turns, len(client.finished), took, count)

    return asyncio.run(run())
