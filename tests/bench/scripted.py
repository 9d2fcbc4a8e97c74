"""A chat server in place of SGLang's: it streams what the tests say."""

from __future__ import annotations

import json
from typing import Callable

import httpx


class ScriptedServer:
    """Streams the pieces that ``script`` makes of a request's body; number ``fail_at`` (or "always") is refused."""

    def __init__(self, script: Callable[[dict], list[dict]], fail_at: int | str | None = None):
        self.script, self.fail_at, self.bodies = script, fail_at, []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.fail_at in (len(self.bodies) - 1, "always"):
            return httpx.Response(503, text="no")
        pieces = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, *self.script(body)]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


def piece(text: str, prompt: int, count: int, cached: int = 0) -> dict:
    usage = {"prompt_tokens": prompt, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": cached}}
    return {"choices": [{"delta": {"content": text}}], "usage": usage}
