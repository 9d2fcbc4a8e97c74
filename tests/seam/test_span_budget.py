"""How one budget is shared among the spans of a prompt, new and viewed: through our radix cache, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from tests.seam.one_process import LAYERS, OneProcess, configured, picture
from tgvkv_sglang.sglang_seam.requests import state_of

FIRST, SECOND, THIRD = picture(0, 24), picture(1, 16), picture(2, 12)
TWO = [1, 2, *FIRST, 3, 4, *SECOND, 5, 6, 7]


@pytest.fixture(scope="module", autouse=True)
def configuration(model_dir):
    with configured(model_dir):
        yield


@pytest.fixture
def engine() -> OneProcess:
    return OneProcess()


def kept(engine: OneProcess, req, start: int, length: int) -> int:
    """Units of the span ``[start, start + length)`` that the next decode step reads."""
    return sum(int(((np.array(row) >= start) & (np.array(row) < start + length)).sum()) for row in engine.attended(req))


def test_two_new_pictures_share_one_budget(engine):
    req = engine.prefill("two", TWO)
    parts = [kept(engine, req, 2, 24), kept(engine, req, 28, 16)]
    assert sum(parts) == round(0.25 * LAYERS * 40) and parts != [round(0.25 * LAYERS * n) for n in (24, 16)]


def test_a_picture_in_a_later_turn_shares_with_one_that_is_still_whole(engine):
    engine.finish(engine.prefill("first", TWO))
    req = engine.prefill("second", [*TWO, 7, *THIRD, 8, 9])
    assert [(span.start, len(span)) for span in state_of(req).plan.select] == [(2, 24), (28, 16), (48, 12)]
    parts = [kept(engine, req, 2, 24), kept(engine, req, 28, 16), kept(engine, req, 48, 12)]
    assert sum(parts) == round(0.25 * LAYERS * 52)


def test_what_is_on_a_view_keeps_it_and_counts_in_no_total(engine):
    first = engine.prefill("first", TWO)
    engine.cache.evict(EvictParams(num_tokens=20))  # packs both pictures' views, the prompt stays
    before = [kept(engine, first, 2, 24), kept(engine, first, 28, 16)]
    engine.finish(first)
    req = engine.prefill("second", [*TWO, 7, *THIRD, 8, 9])
    viewed = {view.span.start for view in state_of(req).plan.kept_views}
    new = [(span.start, len(span)) for span in state_of(req).plan.select]
    assert viewed and sorted([*viewed, *(start for start, _ in new)]) == [2, 28, 48]
    for start, units in zip((2, 28), before, strict=True):
        if start in viewed:
            assert kept(engine, req, start, {2: 24, 28: 16}[start]) == units
    total = sum(length for _, length in new)
    assert sum(kept(engine, req, start, length) for start, length in new) == round(0.25 * LAYERS * total)


def test_text_between_pictures_asks_about_the_first_alone(engine):
    """Nothing follows the second picture: it scores nothing, and the first gets all there is."""
    req = engine.prefill("between", [1, *FIRST, 3, 4, 5, *SECOND])
    assert [kept(engine, req, 1, 24), kept(engine, req, 28, 16)] == [round(0.25 * LAYERS * 40), 0]


def test_a_picture_that_ends_its_prompt_is_read_in_full(engine):
    req = engine.prefill("last", [1, 2, 3, *FIRST])
    assert not state_of(req).plan.kept_views and kept(engine, req, 3, 24) == LAYERS * 24
