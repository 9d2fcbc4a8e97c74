"""Beside other features of SGLang: parallel samples, prompt log-probabilities, streams that stop, grammars, priorities,
data parallelism."""

from __future__ import annotations

import json
from typing import Iterator

import numpy as np
import pytest
import requests

from tests.server.compare import EPS, assert_selection, assert_tokens, ids_of
from tgvkv_sglang.testing.images import data_url, make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Answer

RETENTION = 0.2
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


# -- what any server can be asked for --------------------------------------------------------------------------------


def test_parallel_samples_share_the_picture_and_its_view(eager, oracle):
    """SGLang computes the prompt once for all. Each sample then asks it again: its last token is computed through the
    view that was chosen (packed by then, since reclaim is eager). Whether later steps read that token's new KV or the
    first one's, which the tree has, depends on when the scheduler inserts the sample: sure tokens are the same."""
    image, text = make_image(700, 192, 160), chat(about_images("What stands left?"))
    eager.flush()
    reply = eager.post("/generate", {**eager.body(text, [image], n=3, retention=RETENTION), "return_logprob": True})
    reply.raise_for_status()
    answers = [Answer.of(answer) for answer in reply.json()]
    prompt = oracle.prepare_ids(ids_of(oracle, text), [image])
    once = oracle.greedy(prompt, 16, retention=RETENTION)
    cached = len(prompt.token_ids) - 1
    again = oracle.continue_(once.state, prompt, 16, view="kept", retention=RETENTION, cached_len=cached)
    assert len(answers) == 3 and abs(once.logprobs[0] - again.logprobs[0]) > 0.1, "a prefill answers alike"
    sure = next(i for i, gap in enumerate(again.gaps) if gap < 0.3)
    assert sure >= 3
    for answer in answers:
        assert answer.cached == cached and answer.ids[:sure] == again.token_ids[:sure]
        np.testing.assert_allclose(answer.logprobs[0], again.logprobs[0], atol=EPS, rtol=0)


def test_parallel_samples_differ_and_are_choices_of_a_chat(eager):
    image = make_image(701, 160, 160)
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    content = [picture, {"type": "text", "text": "Where is it?"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 2.0,
            "n": 4, "custom_params": {"tgvkv_retention": RETENTION}}  # fmt: skip
    reply = eager.post("/v1/chat/completions", body)
    reply.raise_for_status()
    texts = [choice["message"]["content"] for choice in reply.json()["choices"]]
    assert len(texts) == 4 and len(set(texts)) > 1


def test_log_probabilities_of_a_prompt_with_a_picture(eager):
    """They come from the prefill, which sees the whole picture at any retention; the answer is the one without them."""
    image, text = make_image(702, 192, 160), chat(about_images("And what is behind it?"))
    eager.flush()
    plain, kept, full = (
        eager.generate(text, [image], logprobs=True, logprob_start_len=start, retention=retention)
        for start, retention in ((None, RETENTION), (0, RETENTION), (0, 1.0))
    )
    of_prompt = [[entry[0] for entry in answer.meta["input_token_logprobs"]] for answer in (kept, full)]
    assert [len(values) for values in of_prompt] == [kept.meta["prompt_tokens"]] * 2 and kept.cached == 0
    np.testing.assert_allclose(of_prompt[0][1:], of_prompt[1][1:], atol=EPS)
    assert kept.ids == plain.ids
    np.testing.assert_allclose(kept.logprobs, plain.logprobs, atol=EPS)
    assert np.abs(np.subtract(kept.logprobs[1:2], full.logprobs[1:2])).max() > EPS, "decode reads another KV"


def test_a_stream_ends_before_its_stop_string(eager):
    image, text = make_image(703, 160, 160), chat(about_images("Tell me more."))
    eager.flush()
    whole = eager.generate(text, [image], retention=RETENTION, max_new_tokens=24).text
    starts = range(len(whole) // 2, len(whole) - 2)
    stop = next(whole[i : i + 3] for i in starts if whole[i : i + 3].isascii())
    body = eager.body(text, [image], 24, retention=RETENTION, stop=[stop])
    eager.flush()  # asked again, the first token would come through the view
    reply = eager.post("/generate", {**body, "stream": True})
    events = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 2
    last = json.loads(events[-2])
    assert last["text"] == whole[: whole.index(stop)]
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_input_embeds_are_http_400(eager):
    """SGLang takes them without a radix cache alone, and there is no server of ours without one."""
    reply = eager.post("/generate", {"input_embeds": [[0.0] * 64] * 4, "sampling_params": {"max_new_tokens": 1}})
    assert reply.status_code == 400 and "disable_radix_cache" in reply.text
    assert eager.generate(chat("Hello"), max_new_tokens=2).ids


# -- a server with two data-parallel ranks, a grammar and priorities ---------------------------------------------------


def test_an_answer_in_json_about_a_picture(features, oracle):
    image, text = make_image(710, 192, 160), chat(about_images("Which colour, and how many?"))
    answer = features.generate(text, [image], max_new_tokens=64, rid="json", trace=True, ignore_eos=False,
                               json_schema=json.dumps(SCHEMA))  # fmt: skip
    given = json.loads(answer.text)
    assert given["colour"] in ("red", "blue") and 0 <= given["count"] <= 9 and len(given) == 2
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 1, retention=0.1)
    assert_selection(features, "json", turn.selection)


@pytest.mark.parametrize("rank", (0, 1))
def test_each_data_parallel_rank_selects_and_keeps_its_own(features, oracle, rank):
    """The first question finds nothing in this rank's cache, though the other was asked it before; the second does."""
    image, first = make_image(711, 192, 160), chat(about_images("What is it?"))
    second = chat(about_images("What is it?"), "A square.", "And where?")
    here = {"logprobs": True, "fields": {"routed_dp_rank": rank}}
    one = features.generate(first, [image], rid=f"rank-{rank}", trace=True, **here)
    two = features.generate(second, [image], **here)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, first), [image]), 16, retention=0.1)
    assert_selection(features, f"rank-{rank}", turn.selection)
    assert assert_tokens(one, turn) >= 8
    vision = len(turn.selection.vision_positions)
    assert one.cached < vision <= two.cached and one.meta["dp_rank"] == two.meta["dp_rank"] == rank


def begun(server, body) -> Iterator[dict]:
    """What a streamed request says from its second event on; returns once it said the first, and so runs."""
    reply = requests.post(f"{server.url}/generate", json={**body, "stream": True}, stream=True, timeout=300)
    lines = (line[6:] for line in reply.iter_lines() if line.startswith(b"data: {"))
    next(lines)
    return map(json.loads, lines)


def test_a_preempted_request_answers_as_if_nothing_had_happened(features):
    """Two long answers fill a rank; a request of higher priority takes the place of one, which goes on afterwards."""

    def job(question, seed, tokens, priority) -> dict:
        body = features.body(chat(about_images(question)), [make_image(seed, 192, 160)], tokens)
        return {**body, "routed_dp_rank": 0, "priority": priority}

    slow, urgent = [job(f"Story {i}?", 720 + i, 400, 0) for i in range(2)], job("Now?", 722, 8, 50)
    alone = [features.post("/generate", one).json()["output_ids"] for one in (*slow, urgent)]
    features.flush()  # asked again, their first tokens would come through their views
    running = [begun(features, one) for one in slow]
    quick = features.post("/generate", urgent).json()
    answers = [list(events)[-1] for events in running]
    assert sum(one["meta_info"]["num_retractions"] for one in answers) == 1
    assert [one["output_ids"] for one in (*answers, quick)] == alone
