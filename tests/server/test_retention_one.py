"""Retention 1.0 is stock SGLang, token for token and cached token for cached token."""

from __future__ import annotations

import random

from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat, interleaved

WORDS = ["red", "blue", "what", "where", "which", "picture", "corner", "left", "circle", "count", "name", "the"]
GROUPS = 10  # of five prompts each


def group(number: int) -> list[dict]:
    """Five prompts sent at once: text, one image, three interleaved images, a follow-up turn, a long text."""
    rng = random.Random(number)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    images = [make_image(1000 * number + i, 32 * rng.randint(3, 7), 32 * rng.randint(3, 7)) for i in range(5)]
    one = about_images(words(6))
    return [
        {"text": chat(words(8))},
        {"text": chat(one), "images": images[:1]},
        {"text": chat(interleaved([words(2), words(3), words(2), words(4)])), "images": images[1:4]},
        {"text": chat(words(5), words(4), words(6))},
        {"text": chat(words(60)), "images": []},
    ]


def follow_up(number: int) -> dict:
    """A second turn about the image of ``group(number)``."""
    first = group(number)[1]
    text = first["text"] + "It is red.<|im_end|>\n<|im_start|>user\nAnd why?<|im_end|>\n<|im_start|>assistant\n"
    return {"text": text, "images": first["images"]}


def answers(server, together: bool) -> list[tuple[list[int], int, int]]:
    """(token ids, cached tokens, prompt tokens) of all prompts, from an empty cache."""
    server.flush()
    out = []
    for number in range(GROUPS):
        jobs = [{**job, "max_new_tokens": 32} for job in group(number)]
        out += server.together(jobs) if together else [server.generate(**job) for job in jobs]
        out.append(server.generate(**follow_up(number), max_new_tokens=32))
    return [(answer.ids, answer.cached, answer.meta["prompt_tokens"]) for answer in out]


def test_fifty_mixed_prompts_equal_stock(stock, eager):
    """One after the other, so that what is in the cache at each prompt is the same on both servers."""
    ours, theirs = answers(eager, together=False), answers(stock, together=False)
    assert len(ours) == 6 * GROUPS
    assert ours == theirs
    assert sum(cached for _, cached, _ in ours) > 0


def test_batches_equal_stock(stock, eager):
    """Five prompts at once. Which of them finds a prefix that another has just computed is a matter of milliseconds."""
    ours, theirs = answers(eager, together=True), answers(stock, together=True)
    assert [ids for ids, _, _ in ours] == [ids for ids, _, _ in theirs]


def test_memory_equals_stock(stock, eager):
    """The same traffic leaves the same number of free slots: nothing of ours costs a slot at retention 1.0."""
    for server in (stock, eager):
        server.flush()
        for job in [*group(0), follow_up(0)]:
            server.generate(**job, max_new_tokens=8)
    assert eager.memory()["available"] == stock.memory()["available"]
