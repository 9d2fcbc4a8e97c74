"""A multi-turn chat about an image with ``requests`` alone, and what each turn took from the radix cache.

    tgvkv serve --enable-cache-report             # in another terminal
    python examples/requests_multi_turn.py --base-url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

import requests

from tgvkv_sglang.demo.scenes import make_scene, render

QUESTIONS = ("what shape is number 1?", "list the objects in the first row.", "where is number 1?")


def picture(path: str | None) -> str:
    """A data URL of the file, or of a drawn scene."""
    if path is not None:
        data = Path(path).read_bytes()
    else:
        buffer = io.BytesIO()
        render(make_scene(seed=37)).save(buffer, format="PNG")
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--image", help="image file (default: a drawn scene)")
    parser.add_argument("--question", action="append", help="ask this (may be given several times)")
    args = parser.parse_args()

    messages: list[dict] = []
    for question in args.question or QUESTIONS:
        content: list[dict] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture(args.image)}})
        messages.append({"role": "user", "content": content})
        body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 64}
        reply = requests.post(f"{args.base_url}/v1/chat/completions", json=body, timeout=600)
        if not reply.ok:
            print(f"HTTP {reply.status_code}: {reply.text}", file=sys.stderr)
            return 1
        answer, usage = reply.json()["choices"][0]["message"]["content"] or "", reply.json()["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", "?")
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer.strip()}   [{usage['prompt_tokens']} prompt tokens, {cached} cached]")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except requests.RequestException as error:
        sys.exit(f"the server cannot be reached: {error}")
