"""What goes when memory is short, and in which order (docs/design.md, rule 4), one example each."""

from itertools import permutations

import pytest
import torch

from tests.unit.kv.radix_engine import Engine
from tests.unit.kv.radix_examples import (
    IMAGE,
    LAYERS,
    OTHER,
    SYSTEM,
    WHAT,
    WHERE,
    evict,
    finished,
    keep_everything,
    match,
    new_engine,
    reclaim,
    span_nodes,
)
from tgvkv_sglang.kv import integrity
from tgvkv_sglang.spans import VISION_PAD_BASE


@pytest.fixture
def engine() -> Engine:
    return new_engine()


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


def healed(engine: Engine) -> tuple:
    """A conversation on a packed view; then a sibling's question that heals the image, and keeps running."""
    finished(engine, SYSTEM + IMAGE + WHAT, [7])
    reclaim(engine)
    (old,) = span_nodes(engine)[0].span_views
    sibling = engine.serve(SYSTEM + IMAGE + [31, 32])
    assert old.packed and span_nodes(engine)[0].value is not None
    return old, sibling


@pytest.mark.parametrize("running", [False, True])
def test_superseded_packed_view_goes_when_its_healed_span_is_reclaimed_again(engine, running):
    old, sibling = healed(engine)
    follow_up = engine.serve(SYSTEM + IMAGE + WHAT + [7] + WHERE)
    (new,) = follow_up.state.views
    if not running:
        engine.finish(follow_up, engine.first_third)
    before = len(engine.pool.free_slots)
    # 9 slots of the image, less 3 for each of the two deepest views; the 3 of the packed view come back
    assert evict(engine, 1) == 9 - 6 + 3 == len(engine.pool.free_slots) - before
    assert span_nodes(engine)[0].span_views == {new, *sibling.state.views} and old.node.views == []
    free = torch.tensor(engine.pool.free_slots)
    integrity.check(engine.evictor, free, 100, sum(req.private for req in engine.requests))
    assert match(engine, SYSTEM + IMAGE + WHAT + [7] + WHERE + [1]).views == [new]


def test_packed_view_in_use_outlives_its_successor(engine):
    old, _ = healed(engine)
    again = engine.serve(SYSTEM + IMAGE + WHAT)  # replays
    assert again.state.views == [old]
    finished(engine, SYSTEM + IMAGE + WHAT + [7] + WHERE)
    assert evict(engine, 1) == 9 - 6
    units, positions = again.state.table(decode=True).layer(0)
    engine.pool.check_units(units, [again.pids[p] for p in positions], torch.tensor([0, 0, 0]), "packed view in use")


def test_packing_that_frees_nothing_is_not_done(engine):
    req = engine.serve(SYSTEM + IMAGE + WHAT, keep=keep_everything)
    (view,) = req.state.views
    assert reclaim(engine) == 0 and engine.evictor.evictable == 0
    assert not view.packed and view.span.value is not None


def test_least_recently_used_span_goes_first(engine):
    a, b = finished(engine, IMAGE + WHAT), finished(engine, OTHER + WHAT)
    engine.match(a)  # now b's image is the older one
    assert engine.evictor.evict(1) == 4
    left = {node.end - node.start: node.value is not None for node in span_nodes(engine)}
    assert left == {len(IMAGE): True, len(OTHER): False}
    assert b.prompt[: len(OTHER)] == OTHER


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_full_spans_go_in_the_order_of_their_last_use(engine, order):
    prompts = [[VISION_PAD_BASE + i] * 9 + WHAT for i in range(3)]
    for prompt in prompts:
        finished(engine, prompt)
    for i in order:
        match(engine, prompts[i])
    held = set(range(3))
    for i in order:
        assert evict(engine, 1) == 6
        held.remove(i)
        assert {int(node.key[0]) - VISION_PAD_BASE for node in span_nodes(engine) if node.value is not None} == held


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_nodes_go_in_the_order_of_their_last_use(engine, order):
    prompts = [[10 * i + 1, 10 * i + 2] for i in range(3)]
    for prompt in prompts:
        finished(engine, prompt)
    for i in order:
        match(engine, prompts[i] + [9])
    held = set(range(3))
    for i in order:
        assert evict(engine, 1) == 2
        held.remove(i)
        assert {int(node.key[0]) // 10 for node in engine.tree.nodes()} == held


def test_reclaimed_span_goes_with_the_last_branch_below_it(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    assert evict(engine, 7) == 6 + len(WHAT) + 3  # the full span; then the question and its packed view
    assert span_nodes(engine) == [] and engine.evictor.evictable == len(SYSTEM)


def test_reclaimed_span_goes_with_the_last_branch_below_it_however_lately_it_was_used(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    reclaim(engine)
    finished(engine, [41, 42])
    half = engine.request(SYSTEM + IMAGE + WHERE)
    engine.admit(half)
    engine.forward(half, len(IMAGE))
    engine.stash_chunk(half)  # heals the image
    engine.drop(half)
    assert evict(engine, 1) == len(IMAGE)
    assert evict(engine, 1) == len(WHAT) + 3
    assert span_nodes(engine) == [] and match(engine, [41, 42, 1]).length == 2


def test_full_spans_go_before_nodes_and_nodes_oldest_first(engine):
    finished(engine, SYSTEM + IMAGE + WHAT)
    finished(engine, [41, 42])
    finished(engine, [51, 52])
    assert engine.evictor.evict(6) == 6
    for prompt, held in (([51, 52, 1], 2), (SYSTEM + IMAGE + WHAT + [1], 16), ([41, 42, 1], 2)):
        assert match(engine, prompt).length == held  # nothing but the full span is gone
    assert engine.evictor.evict(1) == 2
    assert [match(engine, [word, word + 1, 1]).length for word in (41, 51)] == [2, 0]


def test_locked_span_is_reclaimable_when_every_user_decodes_through_a_view(engine):
    a = engine.serve(SYSTEM + IMAGE + WHAT)
    b = engine.request(SYSTEM + IMAGE + WHERE)
    engine.admit(b)
    assert engine.evictor.evictable == 0 and engine.evictor.evict(5) == 0  # b's prefill reads the image
    engine.forward(b, len(b.prompt) - b.kv)
    engine.process_prefill(b, engine.first_third)
    # two views of 3 units in each of 3 layers: 3 slots each
    assert engine.evictor.evictable == len(IMAGE) - 6
    assert engine.evictor.evict(1) == 3 and engine.evictor.evictable == 0
    for req in (a, b):
        row = req.page_row.tolist()
        assert row[4:13] == [0] * 9 and 0 not in row[:4] + row[13:16]
        units, positions = req.state.table(decode=True).layer(2)
        assert positions.tolist() == [4, 5, 6]
        engine.pool.check_units(units, req.pids[4:7], torch.tensor([2, 2, 2]), "packed view")


def test_span_becomes_reclaimable_when_another_branch_is_dropped(engine):
    sibling = engine.serve(SYSTEM + IMAGE + WHERE, keep=keep_everything)
    engine.finish(sibling, keep_everything)
    running = engine.serve(SYSTEM + IMAGE + WHAT)
    # 3 slots for the running view and 9 for the other do not fit in 9; without the other question (2 slots) 6 are left
    assert engine.evictor.evictable == 2 + 6
    assert engine.evictor.evict(8) == 8 and running.page_row[4:13].tolist() == [0] * 9


def passing_by(engine: Engine) -> tuple:
    """A request on an old view of the image, whose path runs through the node of a newer one that nobody uses."""
    question = SYSTEM + IMAGE + WHAT + [7] + WHERE
    finished(engine, SYSTEM + IMAGE + WHAT, [7])
    reclaim(engine)
    running, other = engine.request(question), engine.request(question)
    (old,) = engine.admit(running).views
    engine.admit(other, limit=len(SYSTEM))  # asks for input log-probabilities: heals the image, and selects
    for req in (other, running):
        engine.forward(req, len(req.prompt) - req.kv)
        engine.process_prefill(req, engine.first_third)
    (newer,) = other.state.views
    engine.finish(other, engine.first_third)
    assert running.state.views == [old] and newer.node is running.node and not newer.packed
    return running, old, newer


def test_view_on_a_locked_path_does_not_yield_to_an_unlocked_branch(engine):
    """That branch may be dropped at any time; what can be evicted beside the running request must not depend on it."""
    running, old, newer = passing_by(engine)
    finished(engine, running.prompt + [8, 9])
    (deepest,) = span_nodes(engine)[0].span_views - {old, newer}
    assert evict(engine, 1) == 9 - 3 - 3
    assert old.packed and newer.packed and deepest.packed
    assert evict(engine, 1) == 2 + 3 and engine.evictor.evictable == 0  # the branch and its view


def test_view_on_a_locked_path_yields_to_a_deeper_one_on_it(engine):
    running, old, newer = passing_by(engine)
    deeper = engine.serve(running.prompt + [8, 9])
    assert evict(engine, 1) == 9 - 3
    assert span_nodes(engine)[0].span_views == {old, *deeper.state.views}
    assert engine.evictor.evictable == 0


def test_request_without_a_view_pins_its_span(engine):
    req = engine.serve(SYSTEM + IMAGE)  # no text after the image: nothing is selected
    assert req.state.views == [] and engine.evictor.evictable == 0 and engine.evictor.evict(99) == 0


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
    assert engine.evictor.evict(99) == 0 and view in view.span.span_views
    engine.forward(req, len(req.prompt) - req.kv)
    engine.process_prefill(req, engine.first_third)
    units, positions = req.state.table(decode=True).layer(1)
    engine.pool.check_units(units, [req.pids[p] for p in positions], torch.tensor([1, 1, 1]), "replayed view")
