"""A multi-turn chat about an image with the OpenAI client: nothing changes for the client but ``extra_body``.

    tgvkv serve                                   # in another terminal
    python examples/openai_multi_turn.py --base-url http://127.0.0.1:30000

``--image FILE`` takes any picture (with a real model); without it the bundled demo model's kind of picture is drawn.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

import openai

from tgvkv_sglang.demo.scenes import make_scene, render

# What the default policy answers at a few per cent. "describe the image." is not among it: at 5 % that takes
# --policy peak-last (docs/policies.md has the figures).
QUESTIONS = ("what color is number 1?", "read the numbers in the first row.", "list the green objects.")


def picture(path: str | None) -> str:
    """A data URL of the file, or of a drawn scene."""
    if path is not None:
        data = Path(path).read_bytes()
    else:
        buffer = io.BytesIO()
        render(make_scene(seed=34)).save(buffer, format="PNG")
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--image", help="image file (default: a drawn scene)")
    parser.add_argument("--question", action="append", help="ask this (may be given several times)")
    parser.add_argument("--retention", type=float, default=None, help="for this chat only (default: the server's)")
    parser.add_argument("--policy", default=None, help="for this chat only (default: the server's)")
    args = parser.parse_args()

    client = openai.OpenAI(base_url=f"{args.base_url}/v1", api_key="none")
    options = {"tgvkv_retention": args.retention, "tgvkv_policy": args.policy}
    extra = {"custom_params": {name: value for name, value in options.items() if value is not None}}
    messages: list[dict] = []
    for question in args.question or QUESTIONS:
        content: list[dict] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture(args.image)}})
        messages.append({"role": "user", "content": content})
        reply = client.chat.completions.create(
            model="default", messages=messages, temperature=0, max_tokens=64, extra_body=extra
        )
        answer = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer.strip()}   [{reply.usage.prompt_tokens} prompt tokens]")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except openai.OpenAIError as error:
        sys.exit(f"the request failed: {error}")
