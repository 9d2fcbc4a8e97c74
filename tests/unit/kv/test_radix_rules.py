"""The rules of sharing (docs/design.md, "Rules"), one example each; those of reclaim are in ``test_radix_reclaim``."""

import numpy as np
import pytest
import torch

from tests.unit.kv.radix_engine import HOME, PLAIN, Engine
from tests.unit.kv.radix_examples import (
    IMAGE,
    OTHER,
    SYSTEM,
    WHAT,
    WHERE,
    finished,
    match,
    new_engine,
    reclaim,
    span_nodes,
)
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import IntegrityError
from tgvkv_sglang.kv import integrity
from tgvkv_sglang.kv.matching import whole_prefix
from tgvkv_sglang.namespace import Namespace
from tgvkv_sglang.spans import vision_runs


@pytest.fixture
def engine() -> Engine:
    return new_engine()


# -- rule 5: what may be reused ------------------------------------------------------------------------------------


def test_sibling_question_shares_the_image_while_it_is_in_full_and_selects_for_itself(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    found = match(engine, SYSTEM + IMAGE + WHERE)
    # its first word is the other question's first word too, and is computed again: it grounds this selection
    assert found.length == len(SYSTEM + IMAGE)
    assert [node.value is not None for node in found.path if node.atom] == [True]
    assert found.views == [] and found.replay == []


def test_third_sibling_is_grounded_in_all_of_its_words_too(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    finished(engine, SYSTEM + IMAGE + WHERE)  # now the shared first word is a node of its own
    assert match(engine, SYSTEM + IMAGE + [11, 32]).length == len(SYSTEM + IMAGE)


def test_sibling_question_never_gets_somebody_elses_view(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert reclaim(engine) == 6
    found = match(engine, SYSTEM + IMAGE + WHERE)
    assert found.length == len(SYSTEM) and found.views == [] and not any(node.atom for node in found.path)


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


def test_repeated_prompt_whose_later_image_is_gone_is_grounded_anew_in_all_its_images(engine):
    """What hangs at its end is the earlier image's view alone: together they are the same question, one is not."""
    prompt = IMAGE + [5] + OTHER + WHAT
    finished(engine, prompt, [7])
    assert engine.evictor.evict(1) == 6  # IMAGE alone: it is packed at the prompt's end
    finished(engine, prompt + [7] + WHERE)  # of OTHER this is the deeper view
    reclaim(engine)
    (deep,) = [node for node in engine.tree.nodes() if node.end == len(prompt) and node.views]
    assert [view.span.start for view in deep.views] == [0]
    assert match(engine, prompt).length == 0


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


OTHER_CLIENT = Namespace.of(TgvConfig(retention=0.5), "other")


def test_namespaces_share_nothing(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert engine.match(engine.request(SYSTEM + IMAGE + WHAT, OTHER_CLIENT)).length == 0


def test_another_length_of_run_is_another_image(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert match(engine, SYSTEM + IMAGE[:-1] + WHAT).length == len(SYSTEM)
    assert match(engine, SYSTEM + IMAGE + IMAGE + WHAT).length == len(SYSTEM)


def test_without_atoms_an_image_is_shared_in_part():
    engine = Engine(capacity=60, layers=1)
    req = engine.request(SYSTEM + IMAGE + WHAT, PLAIN)
    engine.admit(req)
    engine.forward(req, len(req.prompt))
    engine.finish(req, engine.first_third)
    assert engine.match(engine.request(SYSTEM + IMAGE[:4] + WHERE, PLAIN)).length == len(SYSTEM) + 4


def test_whole_prefix_never_cuts_an_image():
    ids = np.array(SYSTEM + IMAGE + WHAT)
    assert vision_runs(ids) == [(4, 13)]
    assert [whole_prefix(ids, n, True) for n in (3, 4, 5, 12, 13, 14)] == [3, 4, 4, 4, 13, 14]
    assert whole_prefix(ids, 5, False) == 5


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


def test_retracted_request_goes_on_with_somebody_elses_view_of_an_image_it_had_in_full(engine):
    """Its prompt ends with that image: nothing grounded it, so that the request has no view of its own."""
    first = SYSTEM + IMAGE + [5]
    finished(engine, first)
    reclaim(engine)
    reader = engine.serve(first)  # replays, and holds the view
    retracted = engine.serve(first + OTHER, [7])
    assert retracted.state.views == reader.state.views
    other = engine.request(first + OTHER)
    engine.admit(other, limit=len(SYSTEM))  # its own question grounds both images
    engine.forward(other, len(other.prompt) - other.kv)
    engine.process_prefill(other, engine.first_third)
    engine.drop(retracted)
    reclaim(engine)
    assert [node.value for node in span_nodes(engine)] == [None, None]
    engine.admit(retracted)
    table = retracted.state.table(decode=False)
    assert table.spans == [(4, 13), (14, 20)]
    assert set(table.parts) == {*reader.state.views, *(v for v in other.state.views if v.span.start == 14)}
    engine.forward(retracted, 1)
    engine.process_prefill(retracted, engine.first_third)
    assert set(retracted.state.views) == set(table.parts)


def test_prompt_of_a_retracted_request_is_grounding_though_its_answer_follows_in_the_same_chunk(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT, [7, 8])
    engine.drop(req)
    engine.evictor.evict(99)
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
    assert req.protected_len == len(SYSTEM)
    engine.drop(req)
    assert engine.tree.total == len(SYSTEM) == engine.evictor.evictable
    assert len(engine.pool.free_slots) == 100 - len(SYSTEM)


def test_two_requests_computed_the_same_span_at_the_same_time(engine):
    a, b = (engine.request(SYSTEM + IMAGE + question) for question in (WHAT, WHERE))
    for req in (a, b):
        engine.admit(req)
        engine.forward(req, len(req.prompt))
    for req in (a, b):
        engine.process_prefill(req, engine.first_third)
    shared = len(SYSTEM + IMAGE) + 1
    assert a.page_row[:shared].tolist() == b.page_row[:shared].tolist()
    assert len(engine.pool.free_slots) == 100 - shared - 4


# -- misuse --------------------------------------------------------------------------------------------------------


def test_unlocking_too_often_is_an_error(engine):
    req = finished(engine, SYSTEM + WHAT)
    with pytest.raises(RuntimeError, match="unlocked more often"):
        engine.tree.unlock(engine.match(req).node)


def test_integrity_check_gives_the_numbers(engine):
    finished(engine, SYSTEM + WHAT)
    free = torch.tensor(engine.pool.free_slots)
    integrity.check(engine.evictor, free, 100)
    with pytest.raises(IntegrityError, match=r"free 92 \+ tree and views 7 \+ requests 0 != total 100"):
        integrity.check(engine.evictor, free[1:], 100)
    with pytest.raises(IntegrityError, match=r"two owners: \[1\]"):
        integrity.check(engine.evictor, torch.cat([free[1:], torch.tensor([1])]), 100)
    with pytest.raises(IntegrityError, match="outside 1..100: from 0"):
        integrity.check(engine.evictor, torch.cat([free[1:], torch.tensor([0])]), 100)


def test_integrity_check_sees_a_wrong_lock_count(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT)
    free = torch.tensor(engine.pool.free_slots)
    req.node.lock_ref = 0  # the question's node: 3 slots, the image's 9 and the system prompt's 4 stay locked
    with pytest.raises(IntegrityError, match="locked nodes own 13 slots, the tree accounts 16"):
        integrity.check(engine.evictor, free, 100)


def test_integrity_check_sees_users_that_hold_no_lock(engine):
    engine.serve(SYSTEM + IMAGE + WHAT)
    (span,) = span_nodes(engine)
    span.users.add("gone")
    with pytest.raises(IntegrityError, match=r"span \[4, 13\): 2 users hold 1 locks"):
        integrity.check(engine.evictor, torch.tensor(engine.pool.free_slots), 100)


def test_sums_give_the_numbers(engine):
    finished(engine, SYSTEM + WHAT)
    integrity.check_sums(engine.tree, 93, 100)
    for free in (92, 94):
        with pytest.raises(IntegrityError, match=rf"free {free} \+ tree and views 7 != total 100"):
            integrity.check_sums(engine.tree, free, 100)


def test_healing_half_a_span_is_an_error(engine):
    finished(engine, IMAGE + WHAT)
    reclaim(engine)
    with pytest.raises(ValueError, match=r"\[0, 9\) can only be healed whole, owned from 3"):
        engine.tree.insert(HOME, np.array(IMAGE), torch.arange(9), 3, True)
