"""Pictures whose pad ids collide are never taken for one another: the tree knows a picture by its whole hash.

On this server every picture has the same pad id, so that SGLang's own key tells none from another.
"""

from __future__ import annotations

import pytest

from tests.server.compare import assert_selection, assert_tokens, ids_of
from tgvkv_sglang.spans import VISION_PAD_BASE
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.log_text import retractions
from tgvkv_sglang.testing.prompts import about_images, chat, interleaved

RETENTIONS = (0.1, 0.5, 1.0)  # the server's own, a request's own, and a plain radix tree


def asked(oracle, text, images, retention, tokens=12):
    prompt = oracle.prepare_ids(ids_of(oracle, text), images)
    return oracle.greedy(prompt, tokens, retention=retention)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_the_second_picture_is_not_answered_from_the_first(colliding, oracle, retention):
    text = chat(about_images("What is in the corner?"))
    before_image = len(ids_of(oracle, text.split("<|image_pad|>")[0]))
    images = [make_image(300 + i, 192, 192) for i in range(3)]
    colliding.flush()
    for again in (False, True):
        for i, image in enumerate(images):
            rid = f"collide-{retention}-{i}-{again}"
            options = {"retention": retention, "max_new_tokens": 12, "logprobs": True, "rid": rid, "trace": True}
            answer = colliding.generate(text, [image], **options)
            turn = asked(oracle, text, [image], retention)
            assert assert_tokens(answer, turn) >= 8
            if again:
                assert answer.cached == answer.meta["prompt_tokens"] - 1
                continue
            assert answer.cached <= before_image
            if retention < 1:
                trace = assert_selection(colliding, rid, turn.selection)
                pads = trace["token_ids"][trace["vision_positions"]]
                assert set(pads.tolist()) == {VISION_PAD_BASE}, "these pictures do not collide"


@pytest.mark.parametrize("retention", RETENTIONS)
def test_several_colliding_pictures_in_one_prompt(colliding, oracle, retention):
    text = chat(interleaved(["First ", " then ", " which is redder?"]))
    one, two = make_image(310, 160, 160), make_image(311, 160, 160)
    colliding.flush()
    turns = []
    for images in ([one, two], [two, one], [one, one], [two, two]):
        options = {"retention": retention, "max_new_tokens": 12, "logprobs": True}
        answer = colliding.generate(text, images, **options)
        turns.append(asked(oracle, text, images, retention))
        assert assert_tokens(answer, turns[-1]) >= 8
    assert len({tuple(turn.token_ids) for turn in turns}) >= 3


@pytest.mark.parametrize("retention", RETENTIONS)
def test_colliding_pictures_side_by_side_under_retraction(colliding, oracle, retention):
    """Eight at once do not fit: they are evicted, retracted and recomputed beside each other.

    Tokens alone are compared: of a request that is retracted in its prefill SGLang loses a log probability.
    """
    text = chat(about_images("Describe it, please."))
    images = [make_image(320 + i, 256, 256) for i in range(8)]
    colliding.flush()
    jobs = [{"text": text, "images": [image], "retention": retention, "max_new_tokens": 24} for image in images]
    for _ in range(2):
        answers = colliding.together(jobs)
        turns = [asked(oracle, text, [image], retention, 24) for image in images]
        assert sum(assert_tokens(a, t) for a, t in zip(answers, turns, strict=True)) >= 120
    assert retractions(colliding.log_text())
