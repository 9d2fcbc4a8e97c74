"""The span tree against a dictionary model, driven by Hypothesis through a small stand-in for SGLang."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tests.unit.kv import reclaim_oracle
from tests.unit.kv.radix_engine import HOME, PLAIN, POISON, Engine, Request
from tests.unit.kv.radix_model import Model, ViewRecord, compare_match, snapshot
from tgvkv_sglang.kv import integrity
from tgvkv_sglang.kv.evictor import Evictor
from tgvkv_sglang.namespace import Namespace
from tgvkv_sglang.spans import VISION_PAD_BASE

LAYERS = 3
MAX_RUNNING = 4
IMAGES = [[VISION_PAD_BASE + pad] * length for pad, length in ((0, 5), (1, 7), (1, 4), (2, 8), (3, 2))]
WORDS = st.lists(st.integers(1, 3), min_size=1, max_size=4)
STEPS = {"count": 0}


class SpanTreeMachine(RuleBasedStateMachine):
    @initialize(capacity=st.sampled_from([40, 64, 90]), share=st.sampled_from([1.0, 1.0, 0.25, 0.0]),
                cap=st.sampled_from([2, 4096]))  # fmt: skip
    def start(self, capacity, share, cap):
        self.engine = Engine(capacity, LAYERS, reclaimable_share=share, cap=cap)
        self.model = Model(self.engine.prefixes)
        self.waiting: list[Request] = []
        self.history: list[tuple[Namespace, list[int]]] = [(HOME, [])] * 3 + [(PLAIN, [])]

    # -- helpers -------------------------------------------------------------------------------------------------

    def _running(self, *phases):
        return [req for req in self.engine.requests if req.phase in phases]

    def _keep(self, data):
        def keep(tokens):
            seed = data.draw(st.integers(0, 2**16), label="selection")
            share = data.draw(st.sampled_from([0.0, 0.2, 0.4, 0.8, 1.0]), label="share")
            return torch.from_numpy(np.random.default_rng(seed).random((LAYERS, tokens)) < share)

        return keep

    def _spy_insert(self):
        """Follow the engine's insertions on the model, and check what each returned and freed."""
        tree, model = self.engine.tree, self.model

        def insert(namespace, ids, slots, owned_from, atomic, grounding=None):
            pids = self.engine.prefixes.walk(namespace, ids.tolist())
            stand_in = Request("", namespace, [], pids, None)
            freed = len(self.engine.pool.freed)
            duplicates = model.insert(stand_in, slots.tolist(), owned_from, len(ids), grounding)
            inserted = type(tree).insert(tree, namespace, ids, slots, owned_from, atomic, grounding)
            assert set(self.engine.pool.freed[freed:]) == duplicates
            assert inserted.slots.tolist() == [model.tokens[pid] for pid in pids]
            assert inserted.node.end == len(ids) and [n.end for n in inserted.path] == sorted(
                n.end for n in inserted.path
            )
            return inserted

        def attach(view, node):
            equal = [
                r.view
                for r in model.views
                if r.view.node is node and r.view.span is view.span and r.grounding == view.grounding
            ]
            out = type(tree).attach(tree, view, node)
            if equal:
                assert out is equal[0]
                return out
            assert out is view
            span = self._pid_of(view.span)
            kept = torch.zeros(LAYERS, len(view.span), dtype=torch.bool)
            counts = torch.tensor(view.counts)
            kept[torch.arange(LAYERS).repeat_interleave(counts), view.positions.long() - view.span.start] = True
            model.views.append(ViewRecord(view, span, self._pid_of(node), view.grounding, kept))
            return out

        tree.insert, tree.attach, self.engine.evictor.trim = insert, attach, self._checked_trim

    def _pid_of(self, node):
        return next(pid for pid, other in snapshot(self.engine)[1].items() if other is node)

    def _checked_trim(self, slots):
        return self._observe(lambda: Evictor.trim(self.engine.evictor, slots), trim_to=slots)

    def _evict(self, n):
        before = self.engine.evictor.evictable
        freed = self._observe(lambda: self.engine.evictor.evict(n), wanted=n)
        assert freed >= min(n, before), f"evict({n}) freed {freed}, promised {before}"
        assert self.engine.evictor.evictable == before - freed
        return freed

    def _observe(self, free, wanted=None, trim_to=None):
        """Run an eviction or a trim and check that it only did what it may."""
        engine, model = self.engine, self.model
        self._recount_users()
        locked, gains = model.locked(engine.requests), model.reclaimable(engine.requests)
        before, views, log = dict(model.tokens), list(model.views), len(engine.pool.freed)
        total = model.total()
        freed = free()
        after, _ = snapshot(engine)
        gone = before.keys() - after.keys()
        reclaimed = {pid for pid in after if before[pid] and not after[pid]}
        assert not gone & locked.keys(), "a locked token was dropped"
        assert after.keys() <= before.keys()
        assert {pid: before[pid] for pid in after if pid not in reclaimed} == {
            pid: slot for pid, slot in after.items() if pid not in reclaimed
        }
        spans = [span for span in engine.prefixes.span.values() if span[-1] in reclaimed]
        assert sum(map(len, spans)) == len(reclaimed)
        assert all(model.unpinned(span, locked) for span in spans), "a span that somebody attends to was reclaimed"
        model.views = [r for r in views if any(v is r.view for v in r.view.span.span_views)]
        for record in set(views) - set(model.views):
            assert not record.users, "a view in use was dropped"
            assert record.end in gone or self._was_superseded(record, views, locked)
        model.tokens = after
        assert all(r.view.packed for r in model.views if not after[r.span])
        assert freed == len(engine.pool.freed) - log == total - model.total()
        if trim_to is not None:
            assert not gone
            held = sum(map(len, model.reclaimable(engine.requests)))
            assert held <= trim_to
        if gone and wanted is not None:
            assert sum(gains.values()) < wanted, "a node was dropped though reclaiming full spans would have done"
        return freed

    def _was_superseded(self, record, views, locked):
        """As :meth:`Model.superseded`, with the order that views had before some were dropped."""
        kept, self.model.views = self.model.views, views
        try:
            return self.model.superseded(record, views, locked)
        finally:
            self.model.views = kept

    def _recount_users(self):
        for record in self.model.views:
            record.users = sum(
                record.view is view for req in self.engine.requests if req.state for view in req.state.views
            )

    def _room(self, n):
        missing = n - len(self.engine.pool.free_slots)
        if missing > self.engine.evictor.evictable:
            return False
        if missing > 0:
            self._evict(missing)
        return len(self.engine.pool.free_slots) >= n

    def _checked_match(self, req, limit):
        expected = self.model.match(req, limit)
        compare_match(self.engine.match(req, limit), expected, req)

    # -- steps ---------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def step(self, data):
        """One rule that weighs what can be done now: Hypothesis's own choice among rules leaves most steps idle."""
        running, waiting = self._running, bool(self.waiting)
        weights = {
            self.arrive: 3 * (len(self.waiting) < 4),
            self.ask_again: 3 * (len(self.history) > 4 and len(self.waiting) < 4),
            self.admit: 6 * (waiting and len(self.engine.requests) < MAX_RUNNING),
            self.forward: 8 * bool(running("prefill")),
            self.process: 8 * bool(running("computed")),
            self.decode: 3 * bool(running("decode")),
            self.finish: 3 * bool(running("decode", "computed")),
            self.abort_or_retract: bool(self.engine.requests),
            self.evict: 2,
            self.evict_all: int(len(self.history) % 4 == 0),
            self.trim: 2,
            self.peek: 1,
            self.flush: int(not self.engine.requests and len(self.history) > 12),
        }
        at = data.draw(st.integers(0, 2**16), label="step") % sum(weights.values())
        for action, weight in weights.items():
            if at < weight:
                action(data)
                return
            at -= weight

    def arrive(self, data):
        namespace, before = data.draw(st.sampled_from(self.history), label="after")
        prompt = list(before)
        for _ in range(data.draw(st.sampled_from([1, 1, 2, 0]), label="images")):
            prompt += data.draw(st.one_of(st.just([]), WORDS)) + data.draw(st.sampled_from(IMAGES))
        prompt += data.draw(WORDS) if not prompt or data.draw(st.integers(0, 9)) != 5 else []
        if len(prompt) < 32 and len(self.waiting) < 4:
            self.waiting.append(self.engine.request(prompt, namespace))
            self.history.append((namespace, prompt))

    def ask_again(self, data):
        namespace, prompt = data.draw(st.sampled_from(self.history[4:]))
        if len(self.waiting) < 4 and len(prompt) < 32:
            self.waiting.append(self.engine.request(prompt, namespace))

    def admit(self, data):
        """A limit below the last token is what asking for input log-probabilities does."""
        self._spy_insert()
        req = data.draw(st.sampled_from(self.waiting))
        limit = len(req.ids) - data.draw(st.sampled_from([1, 1, 1, 3, 6]))
        limit = max(limit, 0)
        self._checked_match(req, limit)
        expected = self.model.match(req, limit)
        compare_match(self.engine.admit(req, limit), expected, req)
        if self._room(len(req.ids) - req.kv + 1):
            self.waiting.remove(req)
        else:
            self.engine.dismiss(req)

    def forward(self, data):
        share = data.draw(st.sampled_from([1.0, 1.0, 0.6, 0.3]), label="share of the rest")
        self._spy_insert()
        req = data.draw(st.sampled_from(self._running("prefill")))
        if req.kv != req.stashed:
            self.engine.stash_chunk(req)
            req.stashed = req.kv
        n = max(1, int(share * (len(req.ids) - req.kv)))
        if self._room(n):
            self._check_prefix(req)
            self.engine.forward(req, n)

    def process(self, data):
        self._spy_insert()
        self.engine.process_prefill(data.draw(st.sampled_from(self._running("computed"))), self._keep(data))

    def decode(self, data):
        token = data.draw(st.integers(1, 3))
        req = data.draw(st.sampled_from(self._running("decode")))
        if len(req.ids) < 40 and self._room(1):
            self.engine.decode(req, token)

    def finish(self, data):
        self._spy_insert()
        req = data.draw(st.sampled_from(self._running("decode", "computed")))
        self.engine.finish(req, self._keep(data))
        self.history.append((req.namespace, req.ids))

    def abort_or_retract(self, data):
        again = data.draw(st.booleans())
        self._spy_insert()
        req = data.draw(st.sampled_from(self.engine.requests))
        self.engine.drop(req)
        if again:
            self.waiting.append(req)

    def evict(self, data):
        self._evict(data.draw(st.integers(1, 30)))

    def evict_all(self, data):
        self._evict(self.engine.evictor.evictable)
        assert self.engine.evictor.evictable == 0

    def trim(self, data):
        self._checked_trim(data.draw(st.integers(0, 20)))

    def peek(self, data):
        """Scheduling policies match without admitting."""
        namespace, prompt = data.draw(st.sampled_from(self.history))
        if prompt:
            req = self.engine.request(prompt, namespace)
            self._checked_match(req, data.draw(st.integers(0, len(prompt))))

    def flush(self, data):
        self.engine.flush()
        self.model.clear()

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_prefix(self, req):
        """What a prefill attends to: every prefix position through the row or through a view, with its own content."""
        table = req.state.table(decode=False) if req.state is not None else None
        self._check_row(req, table, req.kv)

    def _check_row(self, req, table, length):
        viewed = {p for start, end in (table.spans if table else ()) for p in range(start, end)}
        dense = [p for p in range(length) if p not in viewed]
        slots = [int(req.page_row[p]) for p in dense]
        assert 0 not in slots, f"{req.name}: no slot and no view at {dense[slots.index(0)] if 0 in slots else None}"
        self.engine.pool.check_slots(slots, [req.pids[p] for p in dense], f"row of {req.name}")
        for p in viewed & set(range(length)):
            if req.page_row[p]:
                self.engine.pool.check_slots([int(req.page_row[p])], [req.pids[p]], f"row of {req.name} under a view")
        for layer in range(LAYERS) if table else ():
            units, positions = table.layer(layer)
            assert positions.tolist() == sorted(set(positions.tolist()) & viewed)
            pids = [req.pids[p] for p in positions]
            self.engine.pool.check_units(units, pids, torch.full((len(pids),), layer), f"views of {req.name}")

    @invariant()
    def ownership(self):
        engine = self.engine
        STEPS["count"] += 1
        free = torch.tensor(engine.pool.free_slots, dtype=torch.int64)
        integrity.check(engine.evictor, free, engine.pool.capacity, sum(req.private for req in engine.requests))
        assert bool((engine.pool.k[:, free] == POISON).all())

    @invariant()
    def same_as_model(self):
        engine, model = self.engine, self.model
        self._recount_users()
        tokens, nodes = snapshot(engine)
        assert tokens == model.tokens
        locked = model.locked(engine.requests)
        for pid, node in nodes.items():
            assert node.lock_ref == len(locked.get(pid, [])), f"locks of [{node.start}, {node.end})"
            assert node.atom or not node.through
        assert engine.tree.total == model.total()
        assert engine.evictor.evictable == model.evictable(engine.requests)
        assert all(node.value is not None or node.views for node in engine.tree.leaves), "nothing is left of this span"
        in_tree = [view for node in nodes.values() for view in node.views]
        assert len(in_tree) == len(model.views) and set(in_tree) == {r.view for r in model.views}

    @invariant()
    def evictor_equals_a_count_from_scratch(self):
        reclaim_oracle.compare(self.engine.evictor)

    @invariant()
    def views_hold_their_units(self):
        for record in self.model.views:
            span = self.engine.prefixes.span[record.span]
            layers, offsets = record.kept.nonzero(as_tuple=True)
            assert record.view.readers == record.users
            assert record.view.packed or self.model.tokens[record.span]
            self.engine.pool.check_units(record.view.units, [span[i] for i in offsets], layers, "a view")

    @invariant()
    def requests_see_their_own_tokens(self):
        for req in self.engine.requests:
            if req.phase == "decode":
                self._check_row(req, req.state.table(decode=True) if req.state else None, req.kv)
            elif req.state is not None or req.phase == "computed":
                self._check_prefix(req)

    def teardown(self):
        """Everybody leaves and everything is evicted: all slots come back."""
        if not hasattr(self, "engine"):
            return
        for req in list(self.engine.requests):
            self.engine.drop(req)
        self._evict(self.engine.evictor.evictable)
        assert sorted(self.engine.pool.free_slots) == list(range(1, self.engine.pool.capacity + 1))
        assert self.engine.tree.total == 0  # what is left owns nothing: reclaimed spans with views that kept nothing


def test_tree_equals_the_model():
    run(SpanTreeMachine, settings=settings(max_examples=12, stateful_step_count=50))


@pytest.mark.long
def test_tree_equals_the_model_for_long():
    STEPS["count"] = 0
    run(SpanTreeMachine, settings=settings(max_examples=250, stateful_step_count=100))
    assert STEPS["count"] >= 20_000
