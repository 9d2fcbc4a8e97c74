"""SGLang's frontend language: several turns about an image, then a fork that asks several questions at once.

    tgvkv serve                                   # in another terminal
    python examples/sglang_frontend.py --base-url http://127.0.0.1:30000

Every branch of the fork shares the picture's KV through the radix cache and chooses its own part of it.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import sglang as sgl
from sglang.lang.chat_template import ChatTemplate, get_chat_template, register_chat_template

from tgvkv_sglang.demo.scenes import make_scene, render

TURNS = ("what color is number 1?", "where is number 1?")
BRANCHES = ("read the numbers in the first row.", "how many red objects?", "list the purple objects.")
DEMO_TEMPLATE = ChatTemplate(
    name="tgvkv-demo",
    default_system_prompt=None,
    role_prefix_and_suffix={
        "system": ("", ""),
        "user": ("<|im_start|>user ", "<|im_end|>"),
        "assistant": ("<|im_start|>assistant", "<|im_end|>"),
    },
    stop_str=("<|im_end|>",),
    image_token="image one<|vision_start|><|image_pad|><|vision_end|> ",
)


@sgl.function
def visual_chat(s, image: bytes, turns: list[str], branches: list[str], max_tokens: int):
    for number, question in enumerate(turns):
        s += sgl.user(sgl.image(image) + question if number == 0 else question)
        s += sgl.assistant(sgl.gen(f"turn{number}", max_tokens=max_tokens, temperature=0))
    forks = s.fork(len(branches))
    for fork, question in zip(forks, branches, strict=True):
        fork += sgl.user(question)
        fork += sgl.assistant(sgl.gen("answer", max_tokens=max_tokens, temperature=0))
    forks.join()
    s["branches"] = [fork["answer"] for fork in forks]


def picture(path: str | None) -> bytes:
    """The file's bytes, or a drawn scene's."""
    if path is not None:
        return Path(path).read_bytes()
    buffer = io.BytesIO()
    render(make_scene(seed=40)).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--image", help="image file (default: a drawn scene)")
    parser.add_argument("--chat-template", help="SGLang's name of it (default: the demo model's, else qwen2-vl)")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    register_chat_template(DEMO_TEMPLATE)
    backend = sgl.RuntimeEndpoint(args.base_url)
    bundled = "demo_model" in backend.model_info["model_path"]
    name = args.chat_template or (DEMO_TEMPLATE.name if bundled else "qwen2-vl")
    backend.chat_template = get_chat_template(name)

    state = visual_chat.run(picture(args.image), list(TURNS), list(BRANCHES), args.max_tokens, backend=backend)
    if state.error() is not None:
        print(f"the program failed: {state.error()}", file=sys.stderr)
        return 1
    answers = [state[f"turn{number}"] for number in range(len(TURNS))] + state["branches"]
    for question, answer in zip((*TURNS, *BRANCHES), answers, strict=True):
        print(f"> {question}\n{answer.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
