"""Views that own KV of their own from the start: LightKV's merge against loops, and the slots that it takes."""

import math

import pytest
import torch

from tests.unit.kv.radix_engine import Engine, Request
from tests.unit.kv.radix_examples import IMAGE, LAYERS, OTHER, SYSTEM, WHAT, WHERE, new_engine, reclaim, span_nodes
from tgvkv_sglang.kv import integrity
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.selection.policies.lightkv import WINDOW, LightKv
from tgvkv_sglang.selection.policy import Merging
from tgvkv_sglang.selection.tgv import Tgv

MARK = 10**9
PROMPT = SYSTEM + IMAGE + WHAT


class Marks(Tgv):
    """Merged K and V are recognised."""

    def merge(self, k, v, scores, kept):
        assert scores.tolist() == [float(i in kept) for i in range(len(k))]
        return k[kept] + MARK, v[kept] - MARK


def by_loops(k, v, scores, kept, window):
    """Every evicted token goes to the kept one of its window that points most its way."""
    flat = k.flatten(1).tolist()
    cosine = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)  # noqa: E731
    takes = {b: [b] for b in kept}
    for a in set(range(len(flat))) - set(kept):
        near = [b for b in kept if b // window == a // window]
        if near:
            takes[max(near, key=lambda b: cosine(flat[a], flat[b]))].append(a)
    mean = lambda x, own: sum(scores[i] * x[i] for i in own) / sum(scores[i] for i in own)  # noqa: E731
    return tuple(torch.stack([mean(x, takes[b]) for b in kept]) for x in (k, v))


@pytest.mark.parametrize("kept", [[0], [3, 70, 71], [130], list(range(0, 150, 7)), list(range(150))], ids=len)
def test_lightkv_merges_as_the_loops_do(kept):
    gen = torch.Generator().manual_seed(len(kept))
    k, v = (torch.randn(150, 2, 4, generator=gen, dtype=torch.float64) for _ in "kv")
    scores = torch.rand(150, generator=gen, dtype=torch.float64)
    got = LightKv().merge(k, v, scores, torch.tensor(kept))
    for ours, want in zip(got, by_loops(k, v, scores, kept, WINDOW), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2))
def test_lightkv_merges_8_bit_kv_as_the_loops_do_and_the_pool_takes_it(dtype):
    """What is merged is rounded once, and a factor of K or V changes nothing: a mean takes it along."""
    gen = torch.Generator().manual_seed(7)
    k, v = (torch.randn(2, 150, 2, 4, generator=gen).to(dtype) for _ in "kv")
    store, kept = UnitStore(k, v), list(range(0, 150, 7))
    scores = torch.rand(150, generator=gen, dtype=torch.float64)
    merged = LightKv().merge(k[1], v[1], scores, torch.tensor(kept))
    want = by_loops(k[1].double(), v[1].double(), scores, kept, WINDOW)
    units = torch.arange(len(kept)) + 3
    store.put(units, *merged)
    for flat, ours, exact in zip((store.k_flat, store.v_flat), merged, want, strict=True):
        assert ours.dtype == dtype and torch.equal(flat[units].float(), ours.float())
        step = torch.finfo(dtype).eps / 2  # half a step of the format, and of its smallest number
        torch.testing.assert_close(ours.double(), exact, rtol=step, atol=torch.finfo(dtype).smallest_normal * step)


def test_lightkv_without_weights_or_without_kept_tokens():
    k, v = torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    same = LightKv().merge(k, v, torch.zeros(5), torch.tensor([1, 4]))
    assert torch.equal(same[0], k[[1, 4]]) and torch.equal(same[1], v[[1, 4]])
    nothing = LightKv().merge(k, v, torch.ones(5), torch.tensor([], dtype=torch.int64))
    assert [part.shape for part in nothing] == [(0, 1, 4)] * 2
    assert isinstance(LightKv(), Merging) and not isinstance(Tgv(), Merging)


@pytest.fixture
def engine() -> Engine:
    return new_engine()


def merging(engine: Engine, prompt: list[int]) -> Request:
    """A request whose policy merges, its prefill computed."""
    req = engine.request(prompt)
    req.state.policy = Marks()
    engine.admit(req)
    engine.forward(req, len(prompt) - req.kv)
    return req


def check_merged(engine: Engine, view) -> None:
    """The view's units lie in its own slots and hold the marked KV of the tokens that it keeps, layer by layer."""
    layers = torch.repeat_interleave(torch.arange(LAYERS), torch.tensor(view.counts))
    assert view.units.tolist() == engine.tree.store.dense_units(view.block, len(view)).tolist()
    source = engine.tree.store.units_of(view.span.value[view.columns.long()], layers)
    assert torch.equal(engine.tree.store.k_flat[view.units], engine.tree.store.k_flat[source] + MARK)
    assert torch.equal(engine.tree.store.v_flat[view.units], engine.tree.store.v_flat[source] - MARK)


def test_a_merged_view_owns_its_slots_beside_the_full_span(engine):
    req = merging(engine, PROMPT)
    free = len(engine.pool.free_slots)
    assert req.state.table(decode=True) is None, "a step under way attends to the image in full"
    engine.process_prefill(req, engine.first_third)
    (view,) = req.state.views
    assert view.packed and len(view) == LAYERS * 3 and len(view.block) == 3 == free - len(engine.pool.free_slots)
    assert view.span.value is not None and engine.tree.total == len(PROMPT) + 3
    check_merged(engine, view)
    held = engine.tree.store.k_flat[view.units].clone()
    assert reclaim(engine) == len(IMAGE), "nothing needs packing any more"
    assert torch.equal(engine.tree.store.k_flat[view.units], held), "when memory ran short changes nothing"
    engine.drop(req)
    integrity.check(engine.evictor, torch.tensor(engine.pool.free_slots), engine.pool.capacity)


def test_spans_are_merged_each_with_its_own_scores(engine):
    req = merging(engine, SYSTEM + IMAGE + WHAT + OTHER + WHERE)
    engine.process_prefill(req, engine.first_third)
    assert [len(view.block) for view in req.state.views] == [3, 2]
    for view in req.state.views:
        check_merged(engine, view)


def test_ending_with_the_first_token_leaves_a_merged_view(engine):
    req = merging(engine, PROMPT)
    engine.finish(req, engine.first_third)
    (view,) = span_nodes(engine)[0].span_views
    check_merged(engine, view)
    assert view.readers == 0 and engine.evictor.evictable == engine.tree.total, "everything can go"
    assert engine.evictor.evict(engine.tree.total) == len(PROMPT) + 3 and engine.tree.total == 0


def test_without_room_the_image_stays_in_full(monkeypatch):
    engine = Engine(capacity=len(PROMPT) + 2, layers=LAYERS)
    told = []
    monkeypatch.setattr(engine.lifecycle._witness, "failed", lambda state, error: told.append(str(error)))
    req = merging(engine, PROMPT)
    engine.process_prefill(req, engine.first_third)
    assert told == ["no 9 units are free to merge into"]
    assert req.state.views == [] and req.state.table(decode=True) is None and not span_nodes(engine)[0].span_views
    engine.drop(req)
    integrity.check(engine.evictor, torch.tensor(engine.pool.free_slots), engine.pool.capacity)
