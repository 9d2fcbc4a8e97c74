"""Scope ``total`` (the paper's budgets), on a server that retracts requests all the time and prefills in chunks."""

from __future__ import annotations

import pytest

from tests.server.compare import assert_selection, assert_tokens, ids_of
from tests.server.conftest import CHUNK
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.log_text import prefills_beside_one, retractions, rounds
from tgvkv_sglang.testing.prompts import about_images, chat


@pytest.mark.parametrize("retention", (0.05, 0.1, 0.2, 0.5, 0.7))
def test_selection_of_the_total_scope(total, oracle, retention):
    image = make_image(31, 320, 256)
    text = chat(about_images("Red?"))
    rid = f"total-{retention}"
    answer = total.generate(text, [image], rid=rid, trace=True, retention=retention, max_new_tokens=12, logprobs=True)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 12, retention=retention, scope="total")
    assert_selection(total, rid, turn.selection)
    assert_tokens(answer, turn)


def test_retracted_requests_answer_as_if_nothing_had_happened(total, oracle):
    """SGLANG_TEST_RETRACT retracts running requests every third step; they resume on their own views."""
    jobs, turns = [], []
    for i in range(6):
        image = make_image(70 + i, 160, 128 + 32 * (i % 3))
        text = chat(about_images(f"Number {i}: tell me what you see."))
        jobs.append({"text": text, "images": [image], "max_new_tokens": 16, "retention": 0.8})
        prompt = oracle.prepare_ids(ids_of(oracle, text), [image])
        turns.append(oracle.greedy(prompt, 16, retention=0.8, scope="total"))
    answers = total.together(jobs)
    compared = [assert_tokens(answer, turn) for answer, turn in zip(answers, turns, strict=True)]
    assert sum(compared) >= 60
    assert retractions(total.log_text())


def test_a_chunk_of_generated_tokens_alone_is_not_scored(total, oracle):
    """Asking for the prompt's log-probabilities makes every retraction compute, and select from, the whole prompt anew.

    That prefill runs on past the prompt: its third chunk crosses the prompt's end, and once enough tokens are generated
    the fourth holds nothing else. Each selection is that of the prompt alone.
    """
    jobs, turns = [], []
    for i in range(2):
        image, text = make_image(90 + i, 256, 224), chat(about_images(f"Number {i}: go on and on."))
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 1, retention=0.8, scope="total"))
        job = {"text": text, "images": [image], "rid": f"on-and-on-{i}", "trace": True, "retention": 0.8}
        jobs.append({**job, "logprob_start_len": 0, "max_new_tokens": 64})
    seen = len(total.log_text())
    for job, turn, answer in zip(jobs, turns, total.together(jobs), strict=True):
        assert len(answer.ids) == 64 and 2 * CHUNK < answer.meta["prompt_tokens"] <= 3 * CHUNK
        selections = len(list(total.traces.glob(f"{job['rid']}.*")))
        for number in {0, selections - 1}:
            assert_selection(total, job["rid"], turn.selection, number)
    # How far did a prefill beside the other request go, from one retraction to the next?
    again = [prefills_beside_one(lines) for lines in rounds(total.log_text()[seen:])]
    assert max(map(sum, again)) > 3 * CHUNK
