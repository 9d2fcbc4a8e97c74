"""KV of 8 bits (``--kv-cache-dtype fp8_e4m3``): what is selected, packed and decoded is what an oracle does whose own K
and V are rounded likewise.

The server rounds K of float32, the oracle of float64: where the two lie on either side of a rounding edge, one number
of one key differs by a sixteenth, so that tolerances are wider than elsewhere. What rounding itself does is larger
still (the last test).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fakes import replayed_variants, steps_without_graph
from tests.server.compare import assert_selection, assert_tokens, ids_of
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat

RETENTION = 0.1
EPS, GAP = 2e-3, 2e-2


@pytest.fixture
def rounded(oracle):
    with oracle.quantised(torch.float8_e4m3fn):
        yield oracle


@pytest.mark.parametrize("retention", (0.1, 0.5))
def test_chunked_selection(quantised, rounded, retention):
    image = make_image(1, 256, 224)
    text = chat(about_images("What is in the lower left corner, and what is above it? " * 2))
    rid = f"rounded-{retention}"
    asked = {"rid": rid, "trace": True, "retention": retention, "logprobs": True}
    answer = quantised.generate(text, [image], max_new_tokens=24, **asked)
    turn = rounded.greedy(rounded.prepare_ids(ids_of(rounded, text), [image]), 24, retention=retention)
    assert_selection(quantised, rid, turn.selection, eps=EPS)
    assert assert_tokens(answer, turn, GAP, EPS) >= 8


def test_conversations_continue_on_packed_views(quantised, rounded):
    """Twelve images of 144 tokens do not fit 1 500 slots in full."""
    quantised.flush()
    chats, packed, compared = [], 0, 0
    for i in range(12):
        image = make_image(200 + i, 384, 384)
        text = chat(about_images(f"Question {i}?"))
        chats.append((text, image, quantised.generate(text, [image], max_new_tokens=4)))
    for i, (text, image, first) in enumerate(chats):
        more = text + "Well.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
        second = quantised.generate(more, [image], rid=f"more-{i}", trace=True, max_new_tokens=8, logprobs=True)
        assert second.cached >= first.meta["prompt_tokens"], f"conversation {i} was lost"
        view = "full" if (quantised.traces / f"more-{i}.0.npz").exists() else "kept"
        turn = rounded.greedy(rounded.prepare_ids(ids_of(rounded, text), [image]), 4, retention=RETENTION)
        prompt = rounded.prepare_ids(ids_of(rounded, more), [image])
        turn = rounded.continue_(turn.state, prompt, 8, view=view, retention=RETENTION, cached_len=second.cached)
        compared += assert_tokens(second, turn, GAP, EPS)
        packed += view == "kept"
    assert packed >= 4 and compared >= 40


def test_the_oracle_without_rounding_is_told_apart(quantised, oracle):
    """Else the tests above could not fail; and every step of theirs was replayed from a graph."""
    image, text = make_image(3, 224, 224), chat(about_images("Name the biggest thing."))
    answer = quantised.generate(text, [image], max_new_tokens=8, logprobs=True)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 8, retention=RETENTION)
    assert np.abs(np.subtract(answer.logprobs[:1], turn.logprobs[:1])).max() > EPS
    assert "tgvkv" in replayed_variants(quantised.log_text()) and steps_without_graph(quantised.log_text()) == []
