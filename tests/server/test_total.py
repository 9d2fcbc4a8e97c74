"""Scope ``total`` (the paper's budgets), on a server that retracts requests all the time."""

from __future__ import annotations

import pytest

from tests.images import make_image
from tests.server.compare import assert_selection, assert_tokens, ids_of
from tests.server.prompts import about_images, chat


@pytest.mark.parametrize("retention", (0.05, 0.1, 0.2, 0.5, 0.7))
def test_selection_of_the_total_scope(total, oracle, retention):
    image = make_image(31, 320, 256)
    text = chat(about_images("Red?"))
    rid = f"total-{retention}"
    answer = total.generate(text, [image], rid=rid, trace=True, retention=retention, max_new_tokens=12)
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
    assert "retract" in total.log.read_text(errors="replace").lower()
