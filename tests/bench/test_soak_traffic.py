"""What the soak calls comparable, equal and different, by hand-made cases."""

from __future__ import annotations

import random
import types

import numpy as np
import pytest

from bench.soak_check import TOLERANCES, Finished, comparable, first_difference, gaps_of, replay, verdict
from bench.soak_traffic import Chat, Request, refused, shared_image, text_tokens, vision_tokens
from tgvkv_sglang.testing.prompts import IMAGE, chat


def request(text="What?", images=(2,), retention=None, turn=0):
    return Request(chat("Look: " + IMAGE * len(images) + text), images, retention, turn, 8)


def test_positions_of_a_hand_made_prompt():
    # <|im_start|> user \n Look:␣ <|vision_start|>: 1 + 4 + 1 + 6 + 1, then image 2 with 6 x 8 tokens
    made = request()
    assert vision_tokens(2) == 48
    assert made.first_image_end == 13 + 48
    # <|vision_end|> What? <|im_end|> \n <|im_start|> assistant \n
    assert made.prompt_tokens == 61 + 1 + 5 + 1 + 1 + 1 + 9 + 1


@pytest.mark.parametrize(
    "made, cached, retractions, expected",
    [
        (request(), 0, 0, True),
        (request(), 61, 0, True),  # the image itself came from the cache, the question did not
        (request(), 62, 0, False),  # the same question was asked before: its view may be all that is left
        (request(), 61, 1, False),
        (request(turn=1), 0, 0, False),
        (request(images=(2, 3)), 61, 0, True),
        (request(images=(2, 3)), 100, 0, False),  # the text between the images no longer grounds
        (request(retention=0.2), 0, 0, True),
        (request(retention=1.0, turn=3), 100, 2, True),
        (request(images=(), turn=3), 20, 2, True),
    ],
)
def test_comparable(made, cached, retractions, expected):
    assert comparable(Finished(made, (1, 2), cached, retractions)) is expected


def test_verdicts():
    fresh, gaps = [5, 6, 7], [0.5, 1e-5, 0.5]
    assert verdict([5, 6, 7], fresh, gaps, 1e-3) == "equal"
    assert verdict([5, 9, 9], fresh, gaps, 1e-3) == "toss-up"
    assert verdict([9, 6, 7], fresh, gaps, 1e-3) == "different"
    assert verdict([5, 6, 9], fresh, gaps, 1e-3) == "different"
    assert verdict([5, 6], fresh, gaps, 1e-3) == "different"
    assert first_difference([5, 6], fresh) == 2 and first_difference(fresh, fresh) is None


def test_gaps():
    assert gaps_of([[[-0.5, 3, None], [-2.0, 4, None]], [[-1.0, 1, None], [-1.25, 2, None]]]) == [1.5, 0.25]


def conversation(seed):
    talk, made = Chat(random.Random(seed), 6), []
    for asked in talk.requests():
        made.append(asked)
        talk.answer("So.")
    return made


def test_a_chat_is_its_seed_and_grows_by_its_own_text():
    assert conversation(3) == conversation(3)
    several = [made for made in map(conversation, range(40)) if len(made) > 1]
    assert len(several) > 5
    for made in several:
        for before, after in zip(made, made[1:], strict=False):
            assert after.text.startswith(before.text + "So.<|im_end|>")
            assert after.images[: len(before.images)] == before.images
            assert after.text.count("<|image_pad|>") == len(after.images)


def test_images_zero_and_one_differ_in_one_pixel():
    a, b = shared_image(0), shared_image(1)
    assert a.size == b.size
    assert (np.array(a) != np.array(b)).any(-1).sum() == 1


def test_every_kind_of_junk_turns_up_and_must_be_refused():
    made = [refused(random.Random(seed), 1000) for seed in range(60)]
    assert len({kind for kind, _, _ in made}) == 4
    for kind, body, allowed in made:
        assert 200 not in allowed and min(allowed) >= 400
        if kind == "longer than the pool":
            assert text_tokens(body["text"]) > 1000
        if kind == "longer than the context":
            assert text_tokens(body["text"]) > 8192


class FreshServer:
    """Answers whatever it is asked with ``ids``, two best tokens far apart but for the second."""

    def __init__(self, ids):
        self.ids, self.flushes = ids, 0

    def flush(self):
        self.flushes += 1

    def post(self, path, body):
        assert self.flushes and body["return_logprob"] and body["top_logprobs_num"] == 2
        tops = [[[-0.1, 1, None], [-0.1 - gap, 2, None]] for gap in (2.0, 0.1, 2.0)]
        reply = {"output_ids": self.ids, "meta_info": {"output_top_logprobs": tops}}
        return types.SimpleNamespace(raise_for_status=lambda: None, json=lambda: reply)


@pytest.mark.parametrize(
    "dtype, said, failures",
    [
        ("float32", {"equal": 1, "different": 3}, 3),
        ("bfloat16", {"equal": 1, "toss-up": 1, "selected anew, toss-up": 1, "different": 1}, 1),
    ],
)
def test_replay_asks_each_comparable_request_again_on_a_flushed_server(dtype, said, failures):
    exact, selected = request(retention=1.0), request()
    finished = [
        Finished(exact, (5, 6, 7), 0, 0),
        Finished(exact, (5, 9, 9), 0, 0),
        Finished(exact, (9, 6, 7), 0, 0),
        Finished(selected, (5, 9, 9), 0, 0),
        Finished(request(turn=1), (1, 1, 1), 0, 0),  # not comparable
    ]
    server = FreshServer([5, 6, 7])
    found = replay(server, finished, TOLERANCES[dtype])
    assert found.verdicts == said and len(found.failures) == failures
    assert (found.candidates, server.flushes, found.different_answers) == (4, 4, 1)


def test_another_selection_is_a_failure_in_float32_alone():
    finished = [Finished(request(), (9, 6, 7), 0, 0)]
    assert len(replay(FreshServer([5, 6, 7]), finished, TOLERANCES["float32"]).failures) == 1
    found = replay(FreshServer([5, 6, 7]), finished, TOLERANCES["bfloat16"])
    assert not found.failures and found.verdicts == {"selected anew, different": 1}


def test_replay_keeps_to_its_limits():
    finished = [Finished(request(retention=1.0), (5, 6, 7), 0, 0)] * 5
    assert sum(replay(FreshServer([5, 6, 7]), finished, TOLERANCES["float32"], most=2).verdicts.values()) == 2
    assert not replay(FreshServer([5, 6, 7]), finished, TOLERANCES["float32"], seconds=-1).verdicts
