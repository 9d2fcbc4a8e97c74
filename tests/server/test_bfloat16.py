"""A model in bfloat16 with four query heads to a KV head: what is served on a GPU, where decode runs on tensor cores.

FlashInfer is the stand-in, decode goes through graphs. Values are rounded to 8 bits between operations (relative 2^-9
each time), which some dozen roundings make 1 to 3 % of a score and some hundredths of a log probability. So a
selection is compared exactly with the trace's own scores, those loosely with the oracle's for the same rounded weights,
and answers with the oracle's through the tokens that the server kept.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Iterator
from unittest import mock

import numpy as np
import pytest

from tests.fakes import gpu_like_env, replayed_variants, steps_without_graph
from tests.oracle.oracle import Oracle, Turn, load
from tests.server.compare import assert_budget, ids_of
from tests.server.conftest import PRESSURE
from tgvkv_sglang.demo import tiny_model
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Answer, Server, launch

SCORE, MASS, LOGPROB = 0.08, 0.01, 0.15
GAP = 0.3


@pytest.fixture(scope="module")
def grouped_model(tmp_path_factory):
    grouped = replace(tiny_model.SIZES["tiny"], num_heads=8)
    with mock.patch.dict(tiny_model.SIZES, grouped=grouped):
        return tiny_model.make_tiny_model(tmp_path_factory.mktemp("grouped") / "model", seed=1, size="grouped")


@pytest.fixture(scope="module")
def rounded(grouped_model) -> Oracle:
    """The oracle on the weights that a bfloat16 server has."""
    oracle = load(grouped_model, image_backend="pil")
    for parameter in oracle.model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return oracle


@pytest.fixture(scope="module")
def server(grouped_model, tmp_path_factory) -> Iterator[Server]:
    flags, env = (*PRESSURE, "--dtype", "bfloat16"), gpu_like_env(graphs=True)
    with launch(grouped_model, tmp_path_factory.mktemp("bfloat16"), *flags, tokens=1500, env=env) as server:
        yield server


def answered(oracle: Oracle, text: str, image, kept: np.ndarray | None, tokens: int) -> Turn:
    """The oracle's answer through the tokens that the server kept; None: through the whole image."""
    prefill = oracle.prefill(oracle.prepare_ids(ids_of(oracle, text), [image]))
    return oracle.decode(prefill, tokens, kept if kept is None else replace(oracle.select(prefill, 0.1), kept=kept))


def assert_near(answer: Answer, turn: Turn) -> int:
    """Tokens up to the oracle's first toss-up, and their log probabilities. Returns how many were compared."""
    sure = next((i for i, gap in enumerate(turn.gaps) if gap < GAP), len(turn.gaps))
    assert answer.ids[:sure] == turn.token_ids[:sure]
    np.testing.assert_allclose(answer.logprobs[:sure], turn.logprobs[:sure], atol=LOGPROB, rtol=0)
    return sure


def assert_best(arrays: dict) -> None:
    """In each layer no token was kept that scored below one that was not."""
    for scores, kept in zip(arrays["scores"], arrays["kept"].astype(bool), strict=True):
        assert not kept.any() or kept.all() or scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("retention", (0.05, 0.1, 0.2))
def test_selection_and_answer(server, rounded, retention):
    """Kept are the best of the server's own scores, which are near the oracle's; decode attends to just those."""
    image = make_image(700 + int(100 * retention), 320, 320)
    text, rid = chat(about_images("What is in the lower left corner?" * 2)), f"bfloat16-{retention}"
    asked = {"rid": rid, "trace": True, "retention": retention, "max_new_tokens": 16, "logprobs": True}
    answer = server.generate(text, [image], **asked)
    arrays, meta = server.trace(rid)
    prefill = rounded.prefill(rounded.prepare_ids(ids_of(rounded, text), [image]))
    selection = rounded.select(prefill, retention)
    np.testing.assert_allclose(arrays["scores"], selection.scores, rtol=SCORE)
    np.testing.assert_allclose(arrays["layer_mass"], selection.layer_mass, rtol=MASS)
    assert_budget(arrays, meta, selection)
    assert_best(arrays)
    assert (arrays["kept"] != selection.kept).mean() <= 0.02
    turn = rounded.decode(prefill, 16, replace(selection, kept=arrays["kept"]))
    sure = assert_near(answer, turn)
    whole = rounded.decode(prefill, 16, None)
    assert sure >= 2 and answer.ids[:sure] != whole.token_ids[:sure], "the whole image would answer alike"


def test_packed_views(server, rounded):
    """Twelve images of 144 tokens do not fit 1 500 slots: conversations go on through units moved bit for bit."""
    server.flush()
    chats, packed, compared, told_apart = [], 0, 0, 0
    for i in range(12):
        image, text = make_image(720 + i, 384, 384), chat(about_images(f"Question {i}?"))
        server.generate(text, [image], rid=f"first-{i}", trace=True, max_new_tokens=4)
        chats.append((text, image, server.trace(f"first-{i}")[0]["kept"]))
    for i, (text, image, kept) in enumerate(chats):
        question = "And which colour has the big one on the right?"  # a sure answer, and another over the whole image
        more = f"{text}Well.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        answer = server.generate(more, [image], rid=f"more-{i}", trace=True, max_new_tokens=6, logprobs=True)
        assert answer.cached >= len(ids_of(rounded, text))
        if not (server.traces / f"more-{i}.0.npz").exists():
            prompt = rounded.prepare_ids(ids_of(rounded, more), [image])
            turn, whole = (
                rounded.continue_(answered(rounded, text, image, own, 4).state, prompt, 6, view="kept",
                                  cached_len=answer.cached) for own in (kept, None)
            )  # fmt: skip
            told_apart += abs(turn.logprobs[0] - whole.logprobs[0]) > LOGPROB
            compared += assert_near(answer, turn)
            packed += 1
    assert packed >= 4 and compared >= 3 * packed
    assert told_apart >= packed / 2, "the whole image would answer alike"


def test_a_batch_of_requests_with_and_without_views(server, rounded):
    server.flush()
    jobs, turns = [], []
    for i, retention in enumerate((0.2, 1.0, 0.1, 0.05)):
        image, text = make_image(740 + i, 160 + 32 * i, 192), chat(about_images(f"Number {i}: what do you see?"))
        asked = {"rid": f"batch-{i}", "trace": retention < 1, "retention": retention, "max_new_tokens": 12}
        jobs.append({"text": text, "images": [image], "logprobs": True, **asked})
    answers = server.together([*jobs, {"text": chat("And without an image?"), "max_new_tokens": 12}])
    for job in jobs:
        kept = server.trace(job["rid"])[0]["kept"] if job["trace"] else None
        turns.append(answered(rounded, job["text"], job["images"][0], kept, 12))
    assert sum(assert_near(answer, turn) for answer, turn in zip(answers, turns, strict=False)) >= 12


def test_decode_ran_on_tensor_cores_in_graphs(server):
    server.generate(chat("Hello"), max_new_tokens=4)
    told = server.log_text()
    assert re.findall("gpu_like: decode (.*)", told)[0] == "with tensor cores, KV in torch.bfloat16"
    assert replayed_variants(told) == {"None", "tgvkv"} and steps_without_graph(told) == []
