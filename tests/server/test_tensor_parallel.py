"""Two tensor-parallel ranks over gloo, with chunked prefills, forced retraction and a pool far too small.

The oracle knows nothing of ranks; both ranks' schedulers log their slots at every step and must agree on each.
"""

from __future__ import annotations

import pytest

from tests.server.compare import assert_selection, assert_tokens, ids_of
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.log_text import memory_checks, retractions
from tgvkv_sglang.testing.prompts import about_images, chat


@pytest.mark.parametrize("retention", (0.05, 0.2))
def test_ranks_select_what_one_rank_selects(tensor_parallel, oracle, retention):
    image = make_image(1, 256, 224)
    text = chat(about_images("What is in the lower left corner, and what is above it?"))
    rid = f"ranks-{retention}"
    answer = tensor_parallel.generate(text, [image], rid=rid, trace=True, retention=retention, logprobs=True)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 16, retention=retention)
    assert_selection(tensor_parallel, rid, turn.selection)
    assert assert_tokens(answer, turn) >= 8
    assert [path.name for path in tensor_parallel.traces.glob(f"{rid}.*")] == [f"{rid}.0.npz"]


def test_ranks_never_diverge_under_load(tensor_parallel, oracle):
    jobs, turns = [], []
    for i in range(12):
        image = make_image(300 + i, 288, 256)
        text = chat(about_images(f"Number {i}: what is it?"))
        jobs.append({"text": text, "images": [image], "max_new_tokens": 16})
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 16, retention=0.1))
    answers = tensor_parallel.together(jobs)
    assert sum(assert_tokens(a, t) for a, t in zip(answers, turns, strict=True)) >= 100
    log = tensor_parallel.log_text()
    steps = {rank: memory_checks(log, rank) for rank in (0, 1)}
    shared = min(len(lines) for lines in steps.values())
    assert shared > 50 and steps[0][:shared] == steps[1][:shared]
    assert retractions(log)
