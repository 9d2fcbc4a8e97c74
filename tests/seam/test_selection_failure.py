"""Scores that cannot be used cost one request its view: through our radix cache, without a server."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.common import release_kv_cache

from tests.seam.one_process import OneProcess, configured, picture
from tgvkv_sglang.errors import NeverScoredError
from tgvkv_sglang.request.state import Phase
from tgvkv_sglang.sglang_seam import selections
from tgvkv_sglang.sglang_seam.requests import state_of

TOKENS = 40
PROMPT = [1, 2, 3, *picture(0, TOKENS), 4, 5, 6, 7, 9]
SECOND = [*PROMPT, *picture(1, 12), 11, 12]
EVERYTHING = EvictParams(num_tokens=10**6)
STRICT = envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY


def nan_in_layer_one(q: torch.Tensor, layer: int) -> None:
    if layer == 1:
        q[0, 0, 0] = math.nan


def overflow(q: torch.Tensor, layer: int) -> None:
    q *= 1e30


@pytest.fixture(scope="module", autouse=True)
def configuration(model_dir):
    with configured(model_dir):
        yield


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    monkeypatch.setattr(selections, "is_first_rank", lambda: True)


@pytest.fixture
def engine() -> OneProcess:
    return OneProcess()


def reports(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == selections.__name__]


def failed(engine: OneProcess) -> int:
    return engine.cache.selections.failed_requests


def in_full(engine: OneProcess, req) -> bool:
    return engine.attended(req) == [list(range(req.kv_committed_len))] * 3


@pytest.mark.parametrize("strict", (0, 2))
@pytest.mark.parametrize("spoil", (nan_in_layer_one, overflow))
def test_bad_scores_leave_the_image_in_full_and_in_place(engine, caplog, spoil, strict):
    """Not even strict checks make numbers that a picture can cause a reason to stop."""
    with STRICT.override(strict):
        req = engine.prefill("overflown\n", PROMPT, spoil)
    (message,) = reports(caplog)
    layers = "[1]" if spoil is nan_in_layer_one else "[0, 1, 2]"
    assert "'overflown\\n' decodes on its whole images at tokens [3, 43)" in message and layers in message
    assert "so far: 1" in message and "--dtype" in message and failed(engine) == 1
    state = state_of(req)
    assert state.phase is Phase.DECODING and not state.views and state.selection_failed
    assert in_full(engine, req)
    free = engine.free()
    assert engine.cache.evictable_size() == 0 and engine.cache.evict(EVERYTHING).num_tokens_evicted == 0, "it is pinned"
    engine.decode(req)
    assert in_full(engine, req) and engine.free() == free - 1
    engine.finish(req)
    engine.check_idle()


@pytest.mark.parametrize("reclaim", ("pressure", "eager"))
def test_others_on_the_same_image_keep_their_views(reclaim):
    """A neighbour that selects on the shared span decodes through its view; the span stays until the first is done."""
    engine = OneProcess(reclaim=reclaim)
    bad = engine.prefill("bad", PROMPT, nan_in_layer_one)
    good = engine.prefill("good", [*PROMPT[:-5], 21, 22, 23])
    assert len(good.prefix_indices) and state_of(good).views
    for _ in range(3):
        engine.decode(bad)
        engine.decode(good)
        assert in_full(engine, bad)
        assert all(len(positions) < good.kv_committed_len for positions in engine.attended(good))
    engine.cache.evict(EVERYTHING)
    assert in_full(engine, bad), "another's view is no reason to take the span from it"
    engine.finish(bad)
    engine.cache.evict(EVERYTHING)
    assert state_of(good).views[0].packed, "now it can be reclaimed"
    engine.finish(good)
    engine.check_idle()


def test_a_follow_up_selects_afresh_from_the_whole_image(engine):
    bad = engine.prefill("bad", PROMPT, nan_in_layer_one)
    engine.decode(bad)
    engine.finish(bad)
    again = engine.prefill("again", [*PROMPT, 7, 13, 14])
    assert len(state_of(again).plan.select) == 1 and len(state_of(again).views) == 1
    assert again.extend_range.start == len(PROMPT) + 1, "it is in the cache, up to the answer"
    assert not in_full(engine, again)
    engine.finish(again)
    engine.check_idle()


def test_a_view_of_an_earlier_image_is_kept_when_a_later_selection_fails():
    """Only the spans that were to be selected from stay in full."""
    engine = OneProcess(reclaim="eager")
    engine.finish(engine.prefill("first", PROMPT))
    second = engine.prefill("second", [*PROMPT, *SECOND[len(PROMPT) :]], nan_in_layer_one)
    assert [(view.span.start, view.span.end) for view in state_of(second).views] == [(3, 43)]
    for positions in engine.attended(second):
        old = [p for p in positions if p < 43]
        assert 3 <= len(old) < 43 and [p for p in positions if p >= 43] == list(range(43, len(SECOND)))
    engine.finish(second)
    engine.check_idle()


def test_a_request_that_ends_with_its_first_token(engine, caplog):
    engine.prefill("short", PROMPT, overflow, last=True)
    assert failed(engine) == len(reports(caplog)) == 1
    engine.check_idle()


@pytest.mark.parametrize("spoil", (nan_in_layer_one, None))
def test_a_retracted_request_is_reported_once_and_can_do_better(engine, caplog, spoil):
    """Its first prefill after that selects again, since nothing was chosen; a later one goes on as it was."""
    req = engine.prefill("again", PROMPT, nan_in_layer_one)
    engine.decode(req)
    for _ in range(2):
        engine.retract(req)
        engine.check_idle()
        engine.schedule(req)
        engine.run(req, spoil)
        engine.take_result(req)
        assert in_full(engine, req) is (spoil is not None)
    assert failed(engine) == len(reports(caplog)) == 1
    engine.finish(req)
    engine.check_idle()


def never_begins(engine: OneProcess, req) -> None:
    """A forward in which no line of ours runs, as in a prefill replayed from a graph."""


def misses_a_layer(engine: OneProcess, req) -> None:
    engine.run(req, layers=[0, 2])


@pytest.mark.parametrize("forward, words", [(never_begins, "no layer was scored, 5 tokens"),
                                            (misses_a_layer, "not every layer was scored with the 5")])  # fmt: skip
@pytest.mark.parametrize("last", (False, True))
def test_a_layer_that_was_never_scored_is_a_bug(engine, caplog, forward, words, last):
    """It raises where SGLang's strict checks are on, and costs the request its view where they are off."""
    for strict in (2, 0):
        req = engine.request(f"strict-{strict}", PROMPT)
        engine.schedule(req)
        forward(engine, req)
        with STRICT.override(strict):
            if strict:
                with pytest.raises(NeverScoredError, match=words):
                    engine.take_result(req, last=last)
                engine = OneProcess()
            else:
                engine.take_result(req, last=last)
    assert failed(engine) == 1 and "strict-0" in reports(caplog)[0]
    if not last:
        assert in_full(engine, req)
        engine.finish(req)
    engine.check_idle()


@pytest.mark.parametrize("insert", (False, True))
def test_gone_before_its_last_chunk_is_no_failure(engine, caplog, insert):
    """An aborted request has no scores and needs none."""
    req = engine.request("gone", PROMPT)
    engine.schedule(req, until=len(PROMPT) - 2)
    engine.run(req)
    assert state_of(req).grounding is not None and state_of(req).grounding.chosen is None
    with STRICT.override(2):
        release_kv_cache(req, engine.cache, is_insert=insert)
    assert not reports(caplog) and failed(engine) == 0
    engine.check_idle()


@pytest.mark.parametrize("ids", (PROMPT[:-5], [1, 2, 3, 4, 5]))
def test_nothing_to_select_is_no_failure(engine, caplog, ids):
    """No text after the image, or no image."""
    caplog.set_level(logging.DEBUG)
    with STRICT.override(2):
        req = engine.prefill("plain", ids)
    assert not reports(caplog) and failed(engine) == 0
    engine.finish(req)
    engine.check_idle()
