"""Reclaim under pressure, with prefills cut into chunks of 40 tokens (inside images and questions).

The pool has 1 500 slots: a handful of images in full, many conversations as views.
"""

from __future__ import annotations

import re

import pytest

from tests.fakes import replayed_variants, steps_without_graph
from tests.server.compare import assert_selection, assert_tokens, ids_of
from tgvkv_sglang.testing.images import make_image, make_pair
from tgvkv_sglang.testing.prompts import about_images, chat

RETENTION = 0.1
LAYERS = 4


@pytest.fixture
def graphs(request, pressure) -> bool:
    """Whether the server decodes through graphs."""
    return request.node.callspec.params["pressure"] == "graphs"


@pytest.mark.parametrize("retention", (0.05, 0.1, 0.2, 0.5))
def test_chunked_selection(pressure, oracle, retention):
    image = make_image(1, 256, 224)
    text = chat(about_images("What is in the lower left corner, and what is above it? " * 2))
    rid = f"chunked-{retention}"
    asked = {"rid": rid, "trace": True, "retention": retention, "logprobs": True}
    answer = pressure.generate(text, [image], max_new_tokens=24, **asked)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 24, retention=retention)
    assert_selection(pressure, rid, turn.selection)
    assert assert_tokens(answer, turn) >= 8


def test_follow_up_is_grounded_in_its_own_question(pressure, oracle):
    """While the image is there in full, turn 2 prefills against all of it and selects afresh."""
    image = make_image(2, 224, 224)
    first = chat(about_images("Name the biggest thing."))
    second = chat(about_images("Name the biggest thing."), "A circle.", "And the smallest one, where?")
    pressure.flush()
    pressure.generate(first, [image])
    two = pressure.generate(second, [image], rid="regrounded", trace=True, logprobs=True)
    prompt = oracle.prepare_ids(ids_of(oracle, first), [image])
    turn_one = oracle.greedy(prompt, 16, retention=RETENTION)
    turn_two = oracle.continue_(
        turn_one.state,
        oracle.prepare_ids(ids_of(oracle, second), [image]),
        16,
        view="full",
        retention=RETENTION,
        cached_len=two.cached,
    )
    assert two.cached >= len(prompt.token_ids)
    assert_selection(pressure, "regrounded", turn_two.selection)
    assert assert_tokens(two, turn_two) >= 8


def test_sibling_question_selects_like_a_fresh_server(pressure, oracle):
    """Another question about a cached image: image and text before it come from the cache, the question is whole."""
    image = make_image(4, 224, 192)
    texts = [chat("Look:\n" + about_images(q)) for q in ("What colour is the square?", "What colour is the sky?")]
    pressure.flush()
    for i, text in enumerate(texts):
        answer = pressure.generate(text, [image], rid=f"cousin-{i}", trace=True, logprobs=True)
        turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 16, retention=RETENTION)
        trace = assert_selection(pressure, f"cousin-{i}", turn.selection)
        assert assert_tokens(answer, turn) >= 8
    assert answer.cached == trace["vision_positions"][-1] + 1


def test_same_question_again_is_answered_from_the_cache(pressure):
    image, text = make_image(6, 192, 192), chat(about_images("Is it blue?"))
    pressure.flush()
    one, two = (pressure.generate(text, [image]) for _ in range(2))
    assert two.cached == one.meta["prompt_tokens"] - 1
    assert two.ids == one.ids


def test_nothing_is_freed_while_there_is_room(pressure):
    """One image of 64 vision tokens: all of its slots are still there after the answer."""
    image, text = make_image(7, 256, 256), chat(about_images("Hm?"))
    pressure.flush()
    answer = pressure.generate(text, [image], max_new_tokens=8)
    assert pressure.memory()["available"] == pressure.tokens - (answer.meta["prompt_tokens"] + 8)


def test_many_conversations_stay_resident(pressure, oracle):
    """Twelve images of 144 tokens do not fit 1 500 slots in full; all twelve conversations continue from the cache.

    Most continue on a packed view; whose picture is still there in full selects again, and leaves a trace.
    """
    pressure.flush()
    chats, packed = [], 0
    for i in range(12):
        image = make_image(200 + i, 384, 384)
        text = chat(about_images(f"Question {i}?"))
        chats.append((text, image, pressure.generate(text, [image], max_new_tokens=4)))
    for i, (text, image, first) in enumerate(chats):
        more = text + "Well.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
        second = pressure.generate(more, [image], rid=f"more-{i}", trace=True, max_new_tokens=8, logprobs=True)
        assert second.cached >= first.meta["prompt_tokens"], f"conversation {i} was lost"
        view = "full" if (pressure.traces / f"more-{i}.0.npz").exists() else "kept"
        turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 4, retention=RETENTION)
        prompt = oracle.prepare_ids(ids_of(oracle, more), [image])
        turn = oracle.continue_(turn.state, prompt, 8, view=view, retention=RETENTION, cached_len=second.cached)
        assert_tokens(second, turn)
        packed += view == "kept"
    assert packed >= 4


def test_pictures_that_differ_in_one_pixel_are_never_confused(pressure, oracle):
    """Equal token counts, equal questions, nearly equal images, side by side: every answer is its own image's."""
    pressure.flush()
    jobs, turns = [], []
    text = chat(about_images("Describe it."))
    for seed in range(4):
        for image in make_pair(seed, 192, 192):
            jobs.append({"text": text, "images": [image], "max_new_tokens": 12, "logprobs": True})
            turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 12, retention=RETENTION))
    before_image = len(ids_of(oracle, text.split("<|image_pad|>")[0]))
    for round_number in range(2):
        answers = pressure.together(jobs)
        assert sum(assert_tokens(a, t) for a, t in zip(answers, turns, strict=True)) >= 60
        if round_number == 0:  # nobody found anybody else's picture in the cache
            assert max(answer.cached for answer in answers) <= before_image
    assert len({tuple(turn.token_ids) for turn in turns}) >= 4


def test_a_batch_of_requests_with_and_without_views(pressure, oracle):
    """Text alone, an image in full (retention 1.0), images as views, two images: each answers as if it were alone."""
    pressure.flush()
    kinds = [(0, None), (1, 0.2), (1, 1.0), (0, None), (2, 0.1), (1, 0.05)]  # images, retention
    jobs, turns = [], []
    for i, (count, retention) in enumerate(kinds):
        images = [make_image(400 + 10 * i + j, 128 + 32 * j, 160) for j in range(count)]
        text = chat(about_images(f"Number {i}: what do you see?", count))
        jobs.append({"text": text, "images": images, "retention": retention, "max_new_tokens": 20, "logprobs": True})
        kept = retention if retention != 1.0 else None
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), images), 20, retention=kept))
    compared = [assert_tokens(answer, turn) for answer, turn in zip(pressure.together(jobs), turns, strict=True)]
    assert sum(compared) >= 60


def test_too_long_a_prompt_is_refused_and_nothing_is_lost(pressure):
    pressure.flush()
    body = pressure.body(chat("word " * 4000), ())
    reply = pressure.post("/generate", body)
    assert reply.status_code == 400
    assert pressure.generate(chat("Hello")).ids


def test_decode_graphs_are_replayed_with_and_without_views(pressure, graphs):
    """Only where there are graphs: text-only traffic goes through SGLang's own, the others through ours. Every decode
    step of all tests above was replayed."""
    pressure.generate(chat("Hello"), max_new_tokens=4)
    assert replayed_variants(pressure.log_text()) == ({"None", "tgvkv"} if graphs else set())
    assert steps_without_graph(pressure.log_text()) == []


def test_views_that_outgrow_the_graphs_tables_are_decoded_without_one(pressure, oracle, graphs):
    """Sixteen questions about one picture that is still there in full keep more units than the pool has: the answers
    are right, and each such step is counted."""
    pressure.flush()
    image, jobs, turns = make_image(500, 384, 384), [], []
    for i in range(16):
        text = chat(about_images(f"Question {i}: what is there?"))
        jobs.append({"text": text, "images": [image], "retention": 0.9, "max_new_tokens": 12, "logprobs": True})
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 12, retention=0.9))
    pressure.generate(**jobs[0])
    answers = pressure.together(jobs)
    assert sum(assert_tokens(a, t) for a, t in zip(answers, turns, strict=True)) >= 100
    missed = steps_without_graph(pressure.log_text())
    counts = re.findall(r"(\d+) units, the graphs' tables hold (\d+). Such steps so far: (\d+)", pressure.log_text())
    if graphs:
        assert min(missed) > 11 and [int(count) for *_, count in counts] == [
            2**i for i in range(len(missed).bit_length())
        ]
        assert all(int(needed) > int(held) >= LAYERS * pressure.tokens for needed, held, _ in counts)
    else:
        assert not missed and not counts
