"""A small client of the OpenAI-compatible chat API: one conversation about one picture."""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from ..errors import TgvkvError


class ChatError(TgvkvError, RuntimeError):
    """The server could not be reached or refused the request; the message gives its reason."""


@dataclass(frozen=True)
class Reply:
    """One answer. ``cached_tokens`` are prompt tokens served from the radix cache (needs --enable-cache-report)."""

    rid: str
    text: str
    prompt_tokens: int
    cached_tokens: int


def image_part(path: str | Path) -> dict:
    """An ``image_url`` content part with the file's bytes as a data URL."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ChatError(f"{path} cannot be read ({error.strerror}); give an image file") from error
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


@dataclass
class Conversation:
    """Turns so far; each :meth:`ask` adds the question and the server's own answer.

    Attributes:
        url: server, without ``/v1``. image: file shown with the first question.
        custom_params: per-request tgvkv options, sent with every turn.
    """

    url: str
    image: str | Path
    custom_params: dict[str, Any] = field(default_factory=dict)
    model: str = "default"
    max_tokens: int = 64
    timeout_s: float = 600
    messages: list[dict] = field(default_factory=list)

    def ask(self, question: str) -> Reply:
        """Raises ChatError; the conversation is then as it was before."""
        content: list[dict] = [] if self.messages else [image_part(self.image)]
        content.append({"type": "text", "text": question})
        messages = [*self.messages, {"role": "user", "content": content}]
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens,
        }  # fmt: skip
        if self.custom_params:
            body["custom_params"] = self.custom_params
        reply = _post(self.url + "/v1/chat/completions", body, self.timeout_s)
        text = reply["choices"][0]["message"]["content"] or ""
        self.messages = [*messages, {"role": "assistant", "content": text}]
        usage = reply["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Reply(reply["id"], text.strip(), usage["prompt_tokens"], cached)


def _post(url: str, body: dict, timeout_s: float) -> dict:
    try:
        answer = requests.post(url, json=body, timeout=timeout_s)
    except requests.RequestException as error:
        raise ChatError(f"no server answers at {url} ({type(error).__name__}); start one with 'tgvkv serve'") from error
    if not answer.ok:
        raise ChatError(f"the server refused the request (HTTP {answer.status_code}): {answer.text[:500]}")
    return answer.json()
