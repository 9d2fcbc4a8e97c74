"""A request's phases, and what each of its steps may make. Rules and ownership are in ``tests/unit/kv``."""

import pytest

from tests.unit.kv.radix_engine import Engine
from tests.unit.kv.radix_examples import IMAGE, SYSTEM, WHAT, WHERE, finished, new_engine
from tgvkv_sglang.errors import SelectionError
from tgvkv_sglang.request import state as state_module
from tgvkv_sglang.request.state import Phase

PROMPT = SYSTEM + IMAGE + WHAT


@pytest.fixture
def engine() -> Engine:
    return new_engine()


@pytest.fixture
def plans(monkeypatch) -> list:
    """Plans made, in order."""
    made = []
    real = state_module.plan_prefill
    monkeypatch.setattr(state_module, "plan_prefill", lambda *args: made.append(real(*args)) or made[-1])
    return made


def test_the_phases_of_a_life_with_a_retraction(engine):
    req = engine.request(PROMPT)
    assert req.state.phase is Phase.GONE
    seen = []
    for _ in range(2):
        engine.admit(req)
        seen.append(req.state.phase)
        if len(req.ids) - req.kv > 1:
            engine.forward(req, len(req.ids) - req.kv - 1)
            engine.stash_chunk(req)
        engine.forward(req, 1)
        seen.append(req.state.phase)
        engine.process_prefill(req, engine.first_third)
        seen.append(req.state.phase)
        engine.decode(req, 7)
        engine.drop(req)
        seen.append(req.state.phase)
    assert seen == [Phase.PLANNED, Phase.SCORING, Phase.DECODING, Phase.GONE] * 2
    assert req.state.views == []


def test_a_match_plans_nothing_and_the_first_chunk_plans_once(engine, plans):
    """SGLang matches a waiting request on every scheduling pass; the last match counts."""
    req = engine.request(PROMPT)
    for _ in range(3):
        engine.match(req)
    assert plans == []
    finished(engine, SYSTEM + IMAGE + WHERE)
    made = len(plans)
    engine.admit(req)
    engine.forward(req, 1)
    engine.forward(req, len(PROMPT) - req.kv)
    engine.process_prefill(req, engine.first_third)
    assert len(plans) == made + 1 and plans[-1].start == len(SYSTEM + IMAGE)


def test_finishing_with_the_first_token_leaves_views_that_nobody_uses(engine):
    req = engine.request(PROMPT)
    engine.admit(req)
    engine.forward(req, len(PROMPT))
    engine.finish(req, engine.first_third)
    (view,) = [view for node in engine.tree.nodes() for view in node.views]
    assert req.state.phase is Phase.GONE and req.state.views == [] and view.readers == 0
    assert req.state.table(decode=True).parts == [view], "a decode step under way still reads it"
    assert engine.evictor.evictable == engine.tree.total


def test_a_selection_that_fails_costs_the_request_its_views(engine, monkeypatch):
    told = []
    monkeypatch.setattr(engine.lifecycle._witness, "failed", lambda state, error: told.append((state, str(error))))
    req = engine.request(PROMPT)
    engine.admit(req)
    engine.forward(req, len(PROMPT))

    def spoiled(tokens):
        raise SelectionError("not finite")

    engine.process_prefill(req, spoiled)
    assert told == [(req.state, "not finite")]
    assert req.state.phase is Phase.DECODING and req.state.table(decode=True) is None and req.state.selections == 0
    assert engine.evictor.evictable == 0, "it attends to the image in full, which is pinned"
    engine.drop(req)
    assert engine.evictor.evictable == engine.tree.total


def test_a_reclaimed_span_is_cleared_in_the_rows_of_those_who_run_and_of_nobody_else(engine):
    running, gone = engine.serve(PROMPT), engine.serve(PROMPT)
    engine.drop(gone)
    before = gone.page_row.clone()
    assert engine.evictor.trim(0) > 0
    span = slice(len(SYSTEM), len(SYSTEM + IMAGE))
    assert running.page_row[span].tolist() == [0] * len(IMAGE)
    assert gone.page_row.tolist() == before.tolist(), "another request may have the row by now"
