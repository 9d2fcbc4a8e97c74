"""Eager reclaim: selection, decode, memory and sharing against the oracle. Chat turns continue on their views."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import requests
from PIL import Image

from tests.server.compare import assert_selection, assert_tokens, ids_of
from tgvkv_sglang.testing.images import data_url, make_image
from tgvkv_sglang.testing.prompts import about_images, chat, interleaved

LAYERS = 4
RETENTIONS = (0.05, 0.1, 0.2, 0.5)


def slots_of(retention: float, vision: int) -> int:
    """Whole slots that a packed view of one image takes (docs/design.md "Four decisions", and rule 4)."""
    return math.ceil(round(Fraction(str(retention)) * LAYERS * vision) / LAYERS)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_one_image(eager, oracle, retention):
    image = make_image(1, 256, 224)
    text = chat(about_images("What is in the lower left corner, and what is above it?"))
    rid = f"one-{retention}"
    asked = {"rid": rid, "trace": True, "retention": retention, "logprobs": True}
    answer = eager.generate(text, [image], max_new_tokens=24, **asked)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 24, retention=retention)
    trace = assert_selection(eager, rid, turn.selection)
    assert assert_tokens(answer, turn) >= 8
    assert trace["meta"]["grids"] == [[1, 14, 16]]
    assert trace["spans"][:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("retention", (0.1, 0.5))
def test_three_images_interleaved(eager, oracle, retention):
    images = [make_image(10 + i, 96 + 32 * i, 128) for i in range(3)]
    text = chat(interleaved(["First ", " then ", " last ", " which one is the odd one?"]))
    rid = f"three-{retention}"
    answer = eager.generate(text, images, rid=rid, trace=True, retention=retention, logprobs=True)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), images), 16, retention=retention)
    trace = assert_selection(eager, rid, turn.selection)
    assert assert_tokens(answer, turn) >= 8
    assert trace["spans"][:, 0].tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_batch_of_different_requests(eager, oracle):
    """Several prefills at once, some text only, at different retentions: each answers as if it were alone."""
    jobs, turns = [], []
    for i in range(6):
        images = [make_image(50 + i, 128 + 32 * (i % 3), 160)] if i % 3 else []
        text = chat(about_images(f"Number {i}: what do you see?", len(images)))
        retention = (0.05, 0.2)[i % 2]
        jobs.append({"text": text, "images": images, "retention": retention, "max_new_tokens": 20, "logprobs": True})
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), images), 20, retention=retention))
    compared = [assert_tokens(answer, turn) for answer, turn in zip(eager.together(jobs), turns, strict=True)]
    assert sum(compared) >= 60


def test_conversation_continues_on_its_view(eager, oracle):
    """Turn 2 finds turn 1's view on its path: it is cached, the image is not computed again, the view is kept."""
    image, retention = make_image(3, 224, 192), 0.2
    first = chat(about_images("Name the biggest thing."))
    second = chat(about_images("Name the biggest thing."), "A circle.", "And the smallest one?")
    eager.flush()
    one = eager.generate(first, [image], retention=retention)
    two = eager.generate(second, [image], retention=retention, logprobs=True)
    prompt = oracle.prepare_ids(ids_of(oracle, first), [image])
    turn_one = oracle.greedy(prompt, 16, retention=retention)
    prompt_two = oracle.prepare_ids(ids_of(oracle, second), [image])
    turn_two = oracle.continue_(
        turn_one.state, prompt_two, 16, view="kept", retention=retention, cached_len=two.cached
    )
    assert two.cached >= len(prompt.token_ids)
    assert assert_tokens(one, turn_one) + assert_tokens(two, turn_two) >= 16
    assert turn_two.selection is None


def test_second_image_in_a_later_turn(eager, oracle):
    """Only the new image is selected from; the old one keeps its view."""
    images, retention = [make_image(20, 160, 160), make_image(21, 192, 128)], 0.2
    first = chat(about_images("What is this?"))
    second = chat(about_images("What is this?"), "A square.", about_images("And this one?"))
    eager.flush()
    eager.generate(first, images[:1], retention=retention)
    two = eager.generate(second, images, retention=retention, rid="later-image", trace=True)
    turn_one = oracle.greedy(oracle.prepare_ids(ids_of(oracle, first), images[:1]), 16, retention=retention)
    prompt_two = oracle.prepare_ids(ids_of(oracle, second), images)
    turn_two = oracle.continue_(
        turn_one.state, prompt_two, 16, view="kept", retention=retention, cached_len=two.cached
    )
    assert_selection(eager, "later-image", turn_two.selection)
    assert assert_tokens(two, turn_two) >= 8


def test_sibling_question_never_gets_a_foreign_view(eager, oracle):
    """After a reclaim another question about the same image computes it again, and shares the text before it."""
    image, retention = make_image(5, 192, 192), 0.1
    texts = [chat("Look at this:\n" + about_images(q)) for q in ("Is it red?", "How many squares are there?")]
    eager.flush()
    for i, text in enumerate(texts):
        answer = eager.generate(text, [image], retention=retention, rid=f"sibling-{i}", trace=True)
        turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 16, retention=retention)
        assert_selection(eager, f"sibling-{i}", turn.selection)
        assert assert_tokens(answer, turn) >= 8
    shared = ids_of(oracle, texts[0].split("<|image_pad|>")[0])
    assert answer.cached == len(shared)


def test_same_question_again_reuses_its_view(eager):
    image, text = make_image(6, 192, 192), chat(about_images("Is it blue?"))
    eager.flush()
    one, two = (eager.generate(text, [image], retention=0.2) for _ in range(2))
    assert two.cached == one.meta["prompt_tokens"] - 1
    again = eager.generate(text, [image], retention=0.2)
    assert again.ids == two.ids


def test_retentions_do_not_share(eager):
    """Each retention has its own radix namespace; the server's own retention is another one."""
    image, text = make_image(7, 160, 160), chat(about_images("Where is it?"))
    eager.flush()
    assert eager.generate(text, [image], retention=0.2).cached == 0
    assert eager.generate(text, [image], retention=0.5).cached == 0
    assert eager.generate(text, [image]).cached == 0
    assert eager.generate(text, [image], retention=0.5).cached > 0


def ask_chat(server, image, **fields) -> int:
    """A question about ``image`` through the chat API; returns how many prompt tokens came from the cache."""
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    content = [picture, {"type": "text", "text": "Where is it?"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    reply = server.post("/v1/chat/completions", {**body, **fields})
    reply.raise_for_status()
    return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("custom", ({}, {"custom_params": {"tgvkv_retention": 0.3}}))
def test_salts_and_keys_share_nothing(eager, custom):
    """One picture and question; every salt, key and pair of them is a namespace of its own."""
    image = make_image(17, 160, 160)
    eager.flush()
    tenants = [{}, {"cache_salt": "ab"}, {"extra_key": "xy"}, {"cache_salt": "ab", "extra_key": "c"},
               {"cache_salt": "a", "extra_key": "bc"}, {"cache_salt": "c", "extra_key": "ab"}]  # fmt: skip
    assert [ask_chat(eager, image, **tenant, **custom) for tenant in tenants] == [0] * len(tenants)
    assert min(ask_chat(eager, image, **tenant, **custom) for tenant in tenants) > 25


@pytest.mark.parametrize("value", ("nan", "1.0", "0.05", "x"))
def test_a_key_cannot_pose_as_another_namespace(eager, value):
    image = make_image(18, 160, 160)
    key = f"\x1ftgvkv-retention={value}"
    with pytest.raises(requests.HTTPError, match="400"):
        ask_chat(eager, image, extra_key=key)
    body = {**eager.body(chat(about_images("Hm?")), [image], retention=0.2), "extra_key": key}
    reply = eager.post("/generate", body)
    assert reply.status_code == 400 and "extra_key" in reply.text
    assert ask_chat(eager, image, cache_salt=key) == 0
    assert eager.generate(chat("Hello")).ids


def test_equal_patches_in_another_shape_are_another_picture(eager, oracle):
    """Two plain pictures, 256x64 and 128x128: the same patches, so SGLang's hash of the features is the same."""
    images = [Image.new("RGB", size, (200, 30, 60)) for size in ((256, 64), (128, 128))]
    text = chat(about_images("How wide is it?"))
    before_image = len(ids_of(oracle, text.split("<|image_pad|>")[0]))
    prompts = [oracle.prepare_ids(ids_of(oracle, text), [image]) for image in images]
    assert prompts[0].token_ids == prompts[1].token_ids
    for retention in (0.5, 1.0):
        eager.flush()
        for image, prompt in zip(images, prompts, strict=True):
            answer = eager.generate(text, [image], retention=retention, logprobs=True)
            assert answer.cached <= before_image
            assert assert_tokens(answer, oracle.greedy(prompt, 16, retention=retention)) >= 8


@pytest.mark.parametrize("field", ("mm_hashes", "hash"))
def test_a_client_cannot_say_which_picture_it_sends(eager, field):
    body = eager.body(chat(about_images("Hm?")), [make_image(19, 128, 128)])
    if field == "mm_hashes":
        body["mm_hashes"] = ["ff"]
    else:
        body["image_data"] = [{"format": "precomputed_embedding", "feature": [[0.0]], "hash": 255}]
    reply = eager.post("/generate", body)
    assert reply.status_code == 400 and field in reply.text
    assert eager.generate(chat("Hello")).ids


@pytest.mark.parametrize("retention", (0.1, 0.2))
def test_slots_come_back_to_the_slot(eager, retention):
    """One image of 1024 vision tokens: the free slots are those of the formula."""
    image, text = make_image(8, 1024, 1024), chat(about_images("What is this?"))
    eager.flush()
    answer = eager.generate(text, [image], retention=retention, max_new_tokens=8)
    memory = eager.memory()
    text_tokens = answer.meta["prompt_tokens"] - 1024
    used = text_tokens + 8 + slots_of(retention, 1024)  # under overlap scheduling the last token has KV too
    assert memory["available"] == eager.tokens - used
    assert memory["evictable"] == used and memory["protected"] == 0


def test_finish_with_the_first_token(eager):
    """A request that ends in its prefill still leaves its view, and the conversation goes on with it."""
    image, retention = make_image(9, 192, 192), 0.1
    text = chat(about_images("One word."))
    eager.flush()
    one = eager.generate(text, [image], retention=retention, max_new_tokens=1)
    assert len(one.ids) == 1
    assert eager.memory()["available"] == eager.tokens - (one.meta["prompt_tokens"] + 1 - 36 + slots_of(retention, 36))
    two = eager.generate(text + "So.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n", [image], retention=retention)
    assert two.cached >= one.meta["prompt_tokens"]


def test_one_word_answers_keep_the_conversation_on_its_view(eager, oracle):
    """A later turn that ends in its prefill leaves the KV of its one token, computed through the view."""
    image, retention = make_image(12, 224, 192), 0.2
    texts = [chat(about_images("What?")), chat(about_images("What?"), "A circle.", "Red?")]
    eager.flush()
    eager.generate(texts[0], [image], retention=retention)
    word = eager.generate(texts[1], [image], retention=retention, max_new_tokens=1)
    third = texts[1] + word.text + "<|im_end|>\n<|im_start|>user\nAnd what is left of it?<|im_end|>\n"
    answer = eager.generate(third, [image], retention=retention)
    first = oracle.prepare_ids(ids_of(oracle, texts[0]), [image])
    turn = oracle.greedy(first, 16, retention=retention)
    for text, tokens in ((texts[1], 1), (third, 16)):
        prompt = oracle.prepare_ids(ids_of(oracle, text), [image])
        turn = oracle.continue_(turn.state, prompt, tokens, view="kept", cached_len=len(first.token_ids))
    assert word.ids == [int(t) for t in ids_of(oracle, word.text)]
    assert answer.cached == word.meta["prompt_tokens"] + 1
    assert assert_tokens(answer, turn) >= 8


@pytest.mark.parametrize("value", (0, 1.5, -1, "x", True, [0.1]))
def test_bad_retention_is_http_400(eager, value):
    body = eager.body(chat("Hello"), (), retention=0.5)
    body["sampling_params"]["custom_params"]["tgvkv_retention"] = value
    reply = eager.post("/generate", body)
    assert reply.status_code == 400
    assert "tgvkv_retention" in reply.text and repr(value) in reply.text
    assert eager.generate(chat("Hello")).ids


def test_bad_option_is_http_400_through_the_chat_api(eager):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    for custom, word in (({"tgvkv_retention": 2}, "tgvkv_retention"), ({"tgvkv_retnetion": 0.1}, "tgvkv_retnetion")):
        reply = eager.post("/v1/chat/completions", {**body, "custom_params": custom})
        assert reply.status_code == 400 and word in reply.text
    assert eager.post("/v1/chat/completions", {**body, "custom_params": {"tgvkv_retention": 0.3}}).ok


def test_a_request_id_never_becomes_a_path(eager):
    image = make_image(11, 128, 128)
    rid = "../../escaped/\u2603"
    eager.generate(chat(about_images("Hm?")), [image], rid=rid, trace=True, retention=0.5)
    written = [path for path in eager.traces.rglob("*.npz") if "escaped" in path.name]
    assert len(written) == 1 and written[0].parent == eager.traces
    assert not list(eager.traces.parent.parent.rglob("escaped*/*"))
