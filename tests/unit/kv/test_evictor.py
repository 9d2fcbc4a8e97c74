"""The evictor against a count from scratch, with locks, views and users put where no orderly engine would put them."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv import reclaim_oracle
from tests.unit.kv.columns import columns_of
from tgvkv_sglang.kv.evictor import Evictor
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.radix import SpanTree
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.spans import VISION_PAD_BASE

LAYERS, SLOTS = 2, 9000
IMAGES = [[VISION_PAD_BASE + pad] * length for pad, length in ((0, 12), (1, 9))]


class User:
    """One lock, and the views its holder decodes through."""

    def __init__(self, node: Node):
        self.node, self.views = node, []

    def span_reclaimed(self, start: int, end: int) -> None: ...


class Disorder:
    """A tree, and random changes to it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.tree = SpanTree(UnitStore(*(torch.zeros(LAYERS, SLOTS, 1, 1) for _ in "kv")), lambda slots: None)
        self.evictor = Evictor(self.tree)
        self.users: list[User] = []
        self.given = 0

    def prompt(self) -> np.ndarray:
        """Often what is there already and a little more, so that branches get deep."""
        ids, node = [], self.random.choice([self.tree.root, *self.nodes()])
        while node.parent is not None:
            ids, node = node.key.tolist() + ids, node.parent
        for _ in range(self.random.randint(0 if ids else 1, 3)):
            ids += self.random.choice([*IMAGES, [1], [2], [1, 2], [2, 2, 1]])
        return np.array(ids)

    def nodes(self) -> list[Node]:
        return sorted(self.tree.nodes(), key=lambda node: node.serial)

    def insert(self) -> None:
        ids = self.prompt()
        match = self.tree.match("", ids, len(ids), True)
        new = len(ids) - match.length
        self.given += new
        row = torch.cat([match.slots, torch.arange(self.given - new + 1, self.given + 1)])
        self.tree.insert("", ids, row, match.length, True, self.random.choice([None, (match.length, len(ids))]))

    def match(self) -> None:
        ids = self.prompt()
        self.tree.match("", ids, self.random.randint(0, len(ids)), True)

    def attach(self) -> None:
        node = self.random.choice(self.nodes())
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        for span in path:
            if span.atom and span.value is not None and self.random.random() < 0.7:
                kept = torch.rand(LAYERS, len(span), generator=torch.Generator().manual_seed(len(path))) < 0.2
                grounding = (self.random.randint(0, 3), path[0].end)
                self.tree.attach(View(span, grounding, *columns_of(kept), span.value, self.tree.store), path[0])

    def lock(self) -> None:
        node = self.random.choice(self.nodes())
        self.tree.lock(node)
        self.users.append(User(node))

    def use(self) -> None:
        user = self.random.choice(self.users)
        node, spans = user.node, set()
        while node.parent is not None:
            views = [view for view in node.views if view.span not in spans | {v.span for v in user.views}]
            chosen = [view for view in views if self.random.random() < 0.7][:1]
            self.tree.use(chosen, user)
            user.views += chosen
            node = node.parent

    def unlock(self) -> None:
        user = self.users.pop(self.random.randrange(len(self.users)))
        self.tree.disuse(user.views, user)
        self.tree.unlock(user.node)

    def drop_view(self) -> None:
        unread = [view for node in self.nodes() for view in node.views if not view.readers]
        views = [view for view in unread if view.span.value is not None]
        if views:
            self.tree.drop_view(self.random.choice(views))

    def evict(self) -> None:
        want, promised = self.random.randint(1, 6), self.evictor.evictable
        freed = self.evictor.evict(want)
        assert freed >= min(want, promised) and self.evictor.evictable == promised - freed

    def trim(self) -> None:
        slots = self.random.randint(0, 9)
        self.evictor.trim(slots)
        assert sum(map(len, self.evictor.spans())) <= slots

    def reset(self) -> None:
        self.tree.reset()
        self.users = []

    def step(self) -> None:
        nodes, users = bool(self.tree.root.children), bool(self.users)
        weights = {
            self.insert: 5, self.match: 2, self.attach: 5 * nodes, self.lock: 6 * nodes, self.use: 3 * users,
            self.unlock: 6 * users, self.drop_view: 1, self.evict: 0.3, self.trim: 0.3, self.reset: 0.1,
        }  # fmt: skip
        self.random.choices(list(weights), list(weights.values()))[0]()


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_figures_and_order_equal_a_count_from_scratch_after_every_change(seed):
    disorder = Disorder(seed)
    for _ in range(100):
        disorder.step()
        reclaim_oracle.compare(disorder.evictor)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_figures_and_order_equal_a_count_from_scratch_after_many_changes(seed):
    disorder = Disorder(seed)
    for step in range(120):
        disorder.step()
        if step % 7 == 0:
            reclaim_oracle.compare(disorder.evictor)
