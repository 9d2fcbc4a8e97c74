"""The rules of sharing (docs/design.md, "Rules"), one example each. Requests run on the stand-in engine."""

import numpy as np
import pytest
import torch

from tests.unit.radix_engine import Engine, Request
from tgvkv_sglang.errors import IntegrityError
from tgvkv_sglang.kv import integrity
from tgvkv_sglang.kv.nodes import VISION_PAD_BASE, vision_runs
from tgvkv_sglang.kv.radix import whole_prefix

IMAGE, OTHER = [VISION_PAD_BASE + 1] * 9, [VISION_PAD_BASE + 2] * 6
SYSTEM, WHAT, WHERE = [1, 2, 3, 4], [11, 12, 13], [11, 22, 23]
LAYERS = 3


@pytest.fixture
def engine() -> Engine:
    return Engine(capacity=100, layers=LAYERS)


def finished(engine: Engine, prompt: list[int], output: list[int] = ()) -> Request:
    req = engine.serve(prompt, output)
    engine.finish(req, engine.first_third)
    return req


def reclaim(engine: Engine) -> int:
    return engine.tree.trim(0)


def span_nodes(engine: Engine) -> list:
    return [node for node in engine.tree.nodes() if node.atom]


def match(engine: Engine, prompt: list[int]):
    return engine.match(engine.request(prompt))


# -- rule 5: what may be reused ------------------------------------------------------------------------------------


def test_sibling_question_shares_the_image_while_it_is_in_full_and_selects_for_itself(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    found = match(engine, SYSTEM + IMAGE + WHERE)
    # its first word is the other question's first word too, and is computed again: it grounds this selection
    assert found.length == len(SYSTEM + IMAGE)
    assert len(found.full) == 1 and found.views == [] and found.replay == []


def test_third_sibling_is_grounded_in_all_of_its_words_too(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    finished(engine, SYSTEM + IMAGE + WHERE)  # now the shared first word is a node of its own
    assert match(engine, SYSTEM + IMAGE + [11, 32]).length == len(SYSTEM + IMAGE)


def test_sibling_question_never_gets_somebody_elses_view(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert reclaim(engine) == 6
    found = match(engine, SYSTEM + IMAGE + WHERE)
    assert found.length == len(SYSTEM) and found.views == [] and found.full == []


def test_text_before_the_image_is_always_shared(engine):
    first = finished(engine, SYSTEM + IMAGE + WHAT)
    reclaim(engine)
    found = match(engine, SYSTEM + OTHER + WHAT)
    assert found.length == len(SYSTEM)
    engine.pool.check_slots(found.slots.tolist(), first.pids[: len(SYSTEM)], "the system prompt")


def test_same_conversation_continues_on_its_view(engine):
    finished(engine, SYSTEM + IMAGE + WHAT, [7, 8])
    view = span_nodes(engine)[0].span_views.copy().pop()
    reclaim(engine)
    follow_up = SYSTEM + IMAGE + WHAT + [7, 8] + WHERE
    found = match(engine, follow_up)
    assert found.length == len(SYSTEM + IMAGE + WHAT) + 2 and found.views == [view]
    assert found.slots[len(SYSTEM) : len(SYSTEM + IMAGE)].tolist() == [0] * len(IMAGE)
    req = engine.serve(follow_up)
    assert req.state.views == [view] and view.users == 1


def test_follow_up_selects_afresh_while_the_image_is_in_full(engine):
    finished(engine, SYSTEM + IMAGE + WHAT, [7, 8])
    first = span_nodes(engine)[0].span_views.copy()
    req = engine.serve(SYSTEM + IMAGE + WHAT + [7, 8] + WHERE)
    (view,) = req.state.views
    assert view not in first
    assert view.grounding == (len(SYSTEM + IMAGE + WHAT) + 2, len(SYSTEM + IMAGE + WHAT) + 2 + len(WHERE))


@pytest.mark.parametrize("reclaimed", [False, True])
def test_same_question_again_replays_the_view(engine, reclaimed):
    first = finished(engine, SYSTEM + IMAGE + WHAT)
    (view,) = span_nodes(engine)[0].span_views
    if reclaimed:
        reclaim(engine)
    found = match(engine, SYSTEM + IMAGE + WHAT)
    assert found.length == len(first.prompt) - 1
    assert (found.views, found.replay) == (([view], []) if reclaimed else ([], [view]))
    assert found.node is view.node
    assert engine.serve(SYSTEM + IMAGE + WHAT).state.views == [view]


def test_match_is_cut_before_the_first_uncovered_span(engine):
    finished(engine, SYSTEM + IMAGE + WHAT, [7])
    reclaim(engine)
    finished(engine, SYSTEM + IMAGE + WHAT + [7] + OTHER + WHERE)
    reclaim(engine)
    found = match(engine, SYSTEM + IMAGE + WHAT + [7] + OTHER + [31, 32])
    # IMAGE goes on with the view of WHAT; of OTHER only WHERE's view is left, so it is computed again
    assert found.length == len(SYSTEM + IMAGE + WHAT) + 1 and len(found.views) == 1


def test_heal(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    reclaim(engine)
    (node,) = span_nodes(engine)
    (old,) = node.span_views
    assert node.value is None
    sibling = finished(engine, SYSTEM + IMAGE + WHERE)
    assert node.value is not None and span_nodes(engine) == [node]
    engine.pool.check_slots(node.value.tolist(), sibling.pids[len(SYSTEM) : len(SYSTEM + IMAGE)], "healed span")
    assert old in node.span_views and old.packed and len(node.span_views) == 2
    assert match(engine, SYSTEM + IMAGE + [31]).length == len(SYSTEM + IMAGE)


def test_namespaces_share_nothing(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert engine.match(engine.request(SYSTEM + IMAGE + WHAT, "other")).length == 0


def test_another_length_of_run_is_another_image(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert match(engine, SYSTEM + IMAGE[:-1] + WHAT).length == len(SYSTEM)
    assert match(engine, SYSTEM + IMAGE + IMAGE + WHAT).length == len(SYSTEM)


def test_without_atoms_an_image_is_shared_in_part():
    engine = Engine(capacity=60, layers=1)
    req = engine.request(SYSTEM + IMAGE + WHAT, "plain", atomic=False)
    engine.admit(req)
    engine.forward(req, len(req.prompt))
    engine.finish(req, engine.first_third)
    assert engine.match(engine.request(SYSTEM + IMAGE[:4] + WHERE, "plain", atomic=False)).length == len(SYSTEM) + 4


def test_whole_prefix_never_cuts_an_image():
    ids = np.array(SYSTEM + IMAGE + WHAT)
    assert vision_runs(ids) == [(4, 13)]
    assert [whole_prefix(ids, n, True) for n in (3, 4, 5, 12, 13, 14)] == [3, 4, 4, 4, 13, 14]
    assert whole_prefix(ids, 5, False) == 5


# -- rule 4: reclaim -----------------------------------------------------------------------------------------------


def test_deepest_view_of_each_branch_is_packed_the_others_are_dropped(engine):
    finished(engine, SYSTEM + IMAGE + WHAT, [7])
    finished(engine, SYSTEM + IMAGE + WHAT + [7] + WHERE)
    finished(engine, SYSTEM + IMAGE + WHERE)
    (node,) = span_nodes(engine)
    assert len(node.span_views) == 3
    reclaim(engine)
    kept = {(view.grounding, view.packed) for view in node.span_views}
    assert kept == {((17, 20), True), ((13, 16), True)}
    assert match(engine, SYSTEM + IMAGE + WHERE + [5]).length == 16


def test_packing_that_frees_nothing_is_not_done(engine):
    def everything(tokens):
        return torch.ones(LAYERS, tokens, dtype=torch.bool)

    req = engine.serve(SYSTEM + IMAGE + WHAT, keep=everything)
    (view,) = req.state.views
    assert reclaim(engine) == 0 and engine.tree.evictable == 0
    assert not view.packed and view.span.value is not None


def test_least_recently_used_span_goes_first(engine):
    a, b = finished(engine, IMAGE + WHAT), finished(engine, OTHER + WHAT)
    engine.match(a)  # now b's image is the older one
    assert engine.tree.evict(1) == 4
    left = {node.end - node.start: node.value is not None for node in span_nodes(engine)}
    assert left == {len(IMAGE): True, len(OTHER): False}
    assert b.prompt[: len(OTHER)] == OTHER


def test_full_spans_go_before_nodes_and_nodes_oldest_first(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    finished(engine, [41, 42])
    finished(engine, [51, 52])
    assert engine.tree.evict(6) == 6
    for prompt, held in (([51, 52, 1], 2), (SYSTEM + IMAGE + WHAT + [1], 16), ([41, 42, 1], 2)):
        assert match(engine, prompt).length == held  # nothing but the full span is gone
    assert engine.tree.evict(1) == 2
    assert [match(engine, [word, word + 1, 1]).length for word in (41, 51)] == [2, 0]


def test_locked_span_is_reclaimable_when_every_user_decodes_through_a_view(engine):
    a = engine.serve(SYSTEM + IMAGE + WHAT)
    b = engine.request(SYSTEM + IMAGE + WHERE)
    engine.admit(b)
    assert engine.tree.evictable == 0 and engine.tree.evict(5) == 0  # b's prefill reads the image
    engine.forward(b, len(b.prompt) - b.kv)
    engine.process_prefill(b, engine.first_third)
    # two views of 3 units in each of 3 layers: 3 slots each
    assert engine.tree.evictable == len(IMAGE) - 6
    assert engine.tree.evict(1) == 3 and engine.tree.evictable == 0
    for req in (a, b):
        assert req.row[4:13].tolist() == [0] * 9 and 0 not in req.row[:4].tolist() + req.row[13:16].tolist()
        units, positions = req.state.decode_table.layer(2)
        assert positions.tolist() == [4, 5, 6]
        engine.pool.check_units(units, req.pids[4:7], torch.tensor([2, 2, 2]), "packed view")


def test_span_becomes_reclaimable_when_another_branch_is_dropped(engine):
    def everything(tokens):
        return torch.ones(LAYERS, tokens, dtype=torch.bool)

    sibling = engine.serve(SYSTEM + IMAGE + WHERE, keep=everything)
    engine.finish(sibling, everything)
    running = engine.serve(SYSTEM + IMAGE + WHAT)
    # 3 slots for the running view and 9 for the other do not fit in 9; without the other question (2 slots) 6 are left
    assert engine.tree.evictable == 2 + 6
    assert engine.tree.evict(8) == 8 and running.row[4:13].tolist() == [0] * 9


def test_request_without_a_view_pins_its_span(engine):
    req = engine.serve(SYSTEM + IMAGE)  # no text after the image: nothing is selected
    assert req.state.views == [] and engine.tree.evictable == 0 and engine.tree.evict(99) == 0


@pytest.mark.parametrize("units", [0, 1, 2, 3, 4, 7, 26, 27])
def test_eager_reclaim_gives_back_exactly_what_the_formula_says(units):
    def keep(tokens):
        return (torch.arange(LAYERS * tokens) < units).reshape(LAYERS, tokens)

    engine = Engine(capacity=100, layers=LAYERS, reclaimable_share=0.0)
    engine.serve(SYSTEM + IMAGE + WHAT, keep=keep)
    used = len(SYSTEM) + len(WHAT) + -(-units // LAYERS)
    assert len(engine.pool.free_slots) == 100 - used


def test_full_budget_is_kept_to():
    engine = Engine(capacity=100, layers=LAYERS, reclaimable_share=0.1)
    finished(engine, IMAGE + WHAT)
    assert all(node.value is not None for node in span_nodes(engine))
    finished(engine, OTHER + WHAT)
    assert {len(node) for node in span_nodes(engine) if node.value is not None} == {len(OTHER)}


def test_repeated_prompt_in_chunks_holds_the_view_it_replays(engine):
    """Asking for input log-probabilities limits the match, so that even a repeated prompt may run in chunks."""
    question = WHAT + [14, 15]
    finished(engine, SYSTEM + IMAGE + question)
    reclaim(engine)
    req = engine.request(SYSTEM + IMAGE + question)
    (view,) = engine.admit(req, limit=len(SYSTEM + IMAGE) + 1).views
    engine.forward(req, 2)
    engine.stash_chunk(req)
    assert engine.tree.evict(99) == 0 and view in view.span.span_views
    engine.forward(req, len(req.prompt) - req.kv)
    engine.process_prefill(req, engine.first_third)
    units, positions = req.state.decode_table.layer(1)
    engine.pool.check_units(units, [req.pids[p] for p in positions], torch.tensor([1, 1, 1]), "replayed view")


# -- leaving -------------------------------------------------------------------------------------------------------


def test_retracted_request_goes_on_with_its_view(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT, [7, 8])
    views = req.state.views
    engine.drop(req)
    reclaim(engine)
    engine.admit(req)
    assert list(req.state.plan.kept_views) == views and req.state.plan.select == ()
    engine.forward(req, len(req.ids) - req.kv)
    engine.process_prefill(req, engine.first_third)
    assert req.state.views == views


def test_prompt_of_a_retracted_request_is_grounding_though_its_answer_follows_in_the_same_chunk(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT, [7, 8])
    engine.drop(req)
    engine.tree.evict(99)
    engine.admit(req)
    engine.forward(req, len(req.prompt) + 1)
    engine.stash_chunk(req)
    engine.forward(req, 1)
    engine.process_prefill(req, engine.first_third)
    # a sibling's first word is in the cache, and is computed again to ground its selection
    assert match(engine, SYSTEM + IMAGE + WHERE).length == len(SYSTEM + IMAGE)
    assert match(engine, SYSTEM + IMAGE + WHAT + [7, 9]).length == len(req.prompt) + 1  # generated text grounds nothing


def test_abort_in_the_middle_of_an_image_frees_the_private_tail(engine):
    req = engine.request(SYSTEM + IMAGE + WHAT)
    engine.admit(req)
    engine.forward(req, 8)
    engine.stash_chunk(req)
    assert req.prot == len(SYSTEM)
    engine.drop(req)
    assert engine.tree.total == len(SYSTEM) == engine.tree.evictable
    assert len(engine.pool.free_slots) == 100 - len(SYSTEM)


def test_two_requests_computed_the_same_span_at_the_same_time(engine):
    a, b = (engine.request(SYSTEM + IMAGE + question) for question in (WHAT, WHERE))
    for req in (a, b):
        engine.admit(req)
        engine.forward(req, len(req.prompt))
    for req in (a, b):
        engine.process_prefill(req, engine.first_third)
    shared = len(SYSTEM + IMAGE) + 1
    assert a.row[:shared].tolist() == b.row[:shared].tolist()
    assert len(engine.pool.free_slots) == 100 - shared - 4


# -- misuse --------------------------------------------------------------------------------------------------------


def test_unlocking_too_often_is_an_error(engine):
    req = finished(engine, SYSTEM + WHAT)
    with pytest.raises(RuntimeError, match="unlocked more often"):
        engine.tree.unlock(engine.match(req).node)


def test_integrity_check_gives_the_numbers(engine):
    finished(engine, SYSTEM + WHAT)
    free = torch.tensor(engine.pool.free_slots)
    integrity.check(engine.tree, free, 100)
    with pytest.raises(IntegrityError, match=r"free 92 \+ tree and views 7 \+ requests 0 != total 100"):
        integrity.check(engine.tree, free[1:], 100)
    with pytest.raises(IntegrityError, match=r"two owners: \[1\]"):
        integrity.check(engine.tree, torch.cat([free[1:], torch.tensor([1])]), 100)
    with pytest.raises(IntegrityError, match="outside 1..100: from 0"):
        integrity.check(engine.tree, torch.cat([free[1:], torch.tensor([0])]), 100)


def test_integrity_check_sees_a_wrong_lock_count(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT)
    free = torch.tensor(engine.pool.free_slots)
    req.node.lock_ref = 0  # the question's node: 3 slots, the image's 9 and the system prompt's 4 stay locked
    with pytest.raises(IntegrityError, match="locked nodes own 13 slots, the tree accounts 16"):
        integrity.check(engine.tree, free, 100)


def test_healing_half_a_span_is_an_error(engine):
    finished(engine, IMAGE + WHAT)
    reclaim(engine)
    with pytest.raises(ValueError, match=r"\[0, 9\) can only be healed whole, owned from 3"):
        engine.tree.insert("", np.array(IMAGE), torch.arange(9), 3, True)
