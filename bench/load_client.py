"""Streaming chats over the OpenAI-compatible API, timed on the client's side."""

from __future__ import annotations

import asyncio
import json
import time
from typing import AsyncIterator, Callable

import httpx

from bench.load_traffic import PlannedChat, Traffic
from bench.stats import Turn
from tgvkv_sglang.testing.images import data_url, make_image

TIMEOUT_S = 600.0


def picture_part(image: int, side: int) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(make_image(image, side, side))}}


async def pieces(http: httpx.AsyncClient, body: dict, turn: Turn) -> AsyncIterator[tuple[dict, int]]:
    """Stream one chat completion: each piece with the answer's tokens so far by the server's count (0: not told).

    Prompt and cached tokens go to ``turn`` as the server tells them.

    Raises:
        RuntimeError: an HTTP error, or a piece that is one. httpx.HTTPError: the connection broke.
    """
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"HTTP {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                raise RuntimeError(str(piece["error"]))
            usage = piece.get("usage") or {}
            if usage:
                turn.prompt_tokens = usage["prompt_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                turn.cached_tokens = max(turn.cached_tokens, details.get("cached_tokens") or 0)
            yield piece, usage.get("completion_tokens") or 0


class LoadClient:
    """Holds planned chats with one server. Use :meth:`run` once."""

    def __init__(
        self,
        url: str,
        traffic: Traffic,
        progress: Callable[[], None] = lambda: None,
        model: str = "default",
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.traffic, self.progress, self.model = traffic, progress, model
        self.http = httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT_S, trust_env=False,
            # Shorter than the server's 5 s, which may close an idle connection just as the next request goes out.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
            transport=transport,
        )  # fmt: skip
        self.turns: list[Turn] = []
        self.messages: dict[int, list[dict]] = {}
        self.began = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self.began

    async def _answer(self, messages: list[dict], max_tokens: int, turn: Turn) -> str:
        """Stream one answer into ``turn``; returns its text."""
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        text = ""
        async for piece, count in pieces(self.http, body, turn):
            content = "".join((choice.get("delta") or {}).get("content") or "" for choice in piece.get("choices") or [])
            if content:
                turn.arrivals.append(self._now())
                turn.tokens.append(count or (turn.tokens[-1] if turn.tokens else 0) + 1)
                text += content
        if not turn.arrivals:
            raise RuntimeError("the answer was empty")
        return text

    async def _chat(self, chat: PlannedChat) -> None:
        messages: list[dict] = []
        before = 0
        picture = await asyncio.to_thread(picture_part, chat.image, self.traffic.side)
        for number, (question, pause) in enumerate(zip(chat.questions, chat.pauses, strict=True)):
            await asyncio.sleep(pause)
            content = ([picture] if number == 0 else []) + [{"type": "text", "text": question}]
            messages = [*messages, {"role": "user", "content": content}]
            turn = Turn(chat.number, number, self._now(), before=before)
            try:
                text = await self._answer(messages, self.traffic.max_tokens, turn)
            except (httpx.HTTPError, RuntimeError) as error:
                turn.error = f"{type(error).__name__}: {error}"
            self.turns.append(turn)
            self.progress()
            if turn.error is not None:
                return
            messages = [*messages, {"role": "assistant", "content": text}]
            before = turn.prompt_tokens
        self.messages[chat.number] = messages

    async def _user(self, waiting: list[PlannedChat]) -> None:
        while waiting:
            chat = waiting.pop(0)
            await asyncio.sleep(max(0.0, chat.start - self._now()))
            await self._chat(chat)

    async def count_resident(self) -> int:
        """Ask every finished chat once more, the youngest first; how many found their last prompt in the cache."""
        last = {turn.chat: turn.prompt_tokens for turn in self.turns if turn.error is None}
        resident = 0
        for number, messages in reversed(self.messages.items()):
            turn = Turn(number, -1, self._now())
            await self._answer([*messages, {"role": "user", "content": "So?"}], 1, turn)
            resident += turn.cached_tokens >= last[number]
        return resident

    async def run(self, chats: list[PlannedChat]) -> tuple[list[Turn], float, int]:
        """(turns, seconds, conversations resident at the end)."""
        async with self.http:
            self.began = time.perf_counter()
            waiting = list(chats)
            # Poisson arrivals wait for nobody (open loop): every chat has a user of its own.
            users = len(chats) if self.traffic.rate else self.traffic.users
            await asyncio.gather(*(self._user(waiting) for _ in range(users)))
            seconds = self._now()
            return self.turns, seconds, await self.count_resident()


def run_load(url: str, traffic: Traffic, chats: list[PlannedChat], progress: Callable[[], None]):
    """Blocking :meth:`LoadClient.run`."""

    async def run():
        return await LoadClient(url, traffic, progress).run(chats)

    return asyncio.run(run())
