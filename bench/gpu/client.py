"""A closed loop of streaming chat requests for a fixed time, each about images that nobody has asked about before."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
import zlib

import httpx
import numpy as np
from PIL import Image

from bench.gpu.programme import Load
from bench.load_client import pieces
from bench.stats import Turn

TIMEOUT_S = 600.0
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def jpeg_url(seed: tuple[int, int], side: int) -> str:
    """A new picture: coloured squares of 32 pixels, as a JPEG data URL (a PNG of this size takes a second to make)."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-side // 32), -(-side // 32), 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


class TimedClient:
    """``load.users`` users ask until the time is over; what is under way then is cut off. Use :meth:`run` once."""

    def __init__(self, url: str, load: Load, name: str, transport: httpx.AsyncBaseTransport | None = None):
        self.load = load
        self.stream = zlib.crc32(f"{name}/{load.seed}".encode())  # cells on one server show different pictures
        self.rng = random.Random(self.stream)
        self.http = httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT_S, trust_env=False, transport=transport,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )  # fmt: skip
        self.turns: list[Turn] = []
        self.began = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self.began

    def _body(self, number: int) -> dict:
        load = self.load
        urls = [jpeg_url((self.stream, number * 64 + i), load.side) for i in range(load.images)]
        rng = random.Random(f"{self.stream}-{number}")
        text = "".join(rng.choices(LETTERS, k=load.text))
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
        body = {
            "model": "default", "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": rng.randint(*load.answer), "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        if load.retention is not None:
            body["custom_params"] = {"tgvkv_retention": load.retention}
        return body

    async def _ask(self, number: int) -> None:
        body = await asyncio.to_thread(self._body, number)
        turn = Turn(number, 0, self._now())
        self.turns.append(turn)
        try:
            # By the server's own count: not every token of a model without weights is a piece of text.
            async for _, count in pieces(self.http, body, turn):
                if count > (turn.tokens[-1] if turn.tokens else 0):
                    turn.arrivals.append(self._now())
                    turn.tokens.append(count)
            if turn.tokens[-1:] != [body["max_tokens"]]:
                raise RuntimeError(f"the answer ended after {turn.tokens[-1:]} of {body['max_tokens']} tokens")
        except (httpx.HTTPError, RuntimeError) as error:
            turn.error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.2)  # a server that refuses everything is not to be hammered

    async def _user(self, number: int) -> None:
        while True:
            await self._ask(number)
            number += self.load.users

    async def run(self, seconds: float) -> list[Turn]:
        """All turns, those cut off included (without an error)."""
        async with self.http:
            self.began = time.perf_counter()
            users = [asyncio.create_task(self._user(number)) for number in range(self.load.users)]
            done, _ = await asyncio.wait(users, timeout=seconds)  # they never return, so one that did has failed
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
            for user in done:
                user.result()
        return self.turns


def ask_once(url: str, load: Load, name: str, limit: float) -> Turn:
    """One request, alone. Raises TimeoutError after ``limit`` seconds and RuntimeError when it was not answered."""

    async def ask() -> Turn:
        client = TimedClient(url, load, name)
        async with client.http:
            client.began = time.perf_counter()
            await asyncio.wait_for(client._ask(0), limit)
        return client.turns[0]

    turn = asyncio.run(ask())
    if turn.error is not None:
        raise RuntimeError(turn.error)
    return turn


def run_load(url: str, load: Load, name: str, seconds: float) -> list[Turn]:
    """Blocking :meth:`TimedClient.run`."""
    return asyncio.run(TimedClient(url, load, name).run(seconds))
