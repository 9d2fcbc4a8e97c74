"""A live server on which some requests' scores are not finite: each of them answers as if nothing was ever evicted.

The fault is injected by ``tests/fakes/spoiled``. Eager reclaim would free the image right after a selection.
"""

from __future__ import annotations

import re
from typing import Iterator

import pytest

from tests.fakes import spoiled_env
from tests.server.compare import GAP, assert_selection, assert_tokens, ids_of
from tests.server.conftest import CHUNKED, OURS
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Server, launch

RETENTION, TOKENS = 0.1, 16
KINDS = ("nan", "inf", "mass")
FLAGS = (*OURS, "--tgvkv-retention", str(RETENTION), "--tgvkv-reclaim", "eager", *CHUNKED)
VARIANTS = {"no overlap": (("--disable-overlap-schedule",), spoiled_env()), "overlap": ((), spoiled_env(graphs=True))}


@pytest.fixture(scope="module", params=VARIANTS)
def server(request, model_dir, tmp_path_factory) -> Iterator[Server]:
    flags, env = VARIANTS[request.param]
    with launch(model_dir, tmp_path_factory.mktemp("spoiled"), *FLAGS, *flags, tokens=3000, env=env) as server:
        yield server


@pytest.fixture
def steps_before_the_result(server) -> int:
    """Decode steps that go through a choice before the scheduler sees the scores."""
    return 0 if "--disable-overlap-schedule" in server.process.args else 1


def reports(server: Server, rid: str) -> list[str]:
    return re.findall(rf"tgvkv: request '{rid}' decodes on its whole images.*", server.log_text())


def assert_in_full(answer, turn, steps_before_the_result: int) -> None:
    """The oracle's answer over the whole image; where a step goes through a meaningless choice, up to that step."""
    if steps_before_the_result:
        assert turn.gaps[0] >= GAP and answer.ids[0] == turn.token_ids[0]
    else:
        assert assert_tokens(answer, turn) >= 8


def test_a_spoiled_request_among_others(server, oracle, steps_before_the_result):
    """In one batch: each spoiled request is the full KV's, the others select and decode as if they were alone."""
    server.flush()
    jobs, turns = [], []
    for i, kind in enumerate((*KINDS, "fine", "fine", None)):
        images = [make_image(600 + i, 160, 128 + 32 * (i % 3))] * (kind is not None)
        text = chat(about_images(f"Number {i}: tell me what you see.", len(images)))
        rid = f"fine-{i}" if kind in ("fine", None) else f"spoiled-{kind}-{i}"
        jobs.append({"text": text, "images": images, "rid": rid, "trace": True, "logprobs": True})
        kept = RETENTION if kind == "fine" else None
        turns.append(oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), images), TOKENS, retention=kept))
    answers, compared = server.together(jobs), 0
    for job, answer, turn in zip(jobs, answers, turns, strict=True):
        rid = job["rid"]
        if rid.startswith("spoiled"):
            assert_in_full(answer, turn, steps_before_the_result)
            (report,) = reports(server, rid)
            assert "scores of layers [1] are not finite" in report
            assert not list(server.traces.glob(f"{rid}.*")), "nothing was selected"
        else:
            compared += assert_tokens(answer, turn)
            if job["images"]:
                assert_selection(server, rid, turn.selection)
    assert compared >= 24
    log = server.log_text()
    assert re.findall(r"Such requests so far: (\d+)", log)[-len(KINDS) :] == ["1", "2", "3"]
    memory = server.memory()
    assert memory["available"] + memory["evictable"] == server.tokens


def test_the_conversation_goes_on_with_a_selection_of_its_own(server, oracle):
    """The image is in the cache in full, and the next turn selects from it."""
    server.flush()
    image = make_image(640, 192, 160)
    first = chat(about_images("What is it?"))
    one = server.generate(first, [image], rid="spoiled-nan-first", max_new_tokens=TOKENS)
    assert len(reports(server, "spoiled-nan-first")) == 1
    vision = 6 * 5
    held = one.meta["prompt_tokens"] + TOKENS - ("--disable-overlap-schedule" in server.process.args)
    assert server.memory()["available"] == server.tokens - held, "all of its slots (the last one with overlap alone)"
    second = chat(about_images("What is it?"), "A circle.", "And its colour?")
    two = server.generate(second, [image], rid="second-turn", trace=True, logprobs=True)
    prompt = oracle.prepare_ids(ids_of(oracle, first), [image])
    turn_one = oracle.greedy(prompt, TOKENS)
    turn_two = oracle.continue_(turn_one.state, oracle.prepare_ids(ids_of(oracle, second), [image]), TOKENS,
                                view="full", retention=RETENTION, cached_len=two.cached)  # fmt: skip
    assert two.cached >= vision
    assert_selection(server, "second-turn", turn_two.selection)
    assert assert_tokens(two, turn_two) >= 8
    server.flush()
    server.generate(chat("Hello"), max_new_tokens=4)
    assert server.memory()["available"] > server.tokens - 40
