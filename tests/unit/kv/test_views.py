"""Views and the merged table that a request attends through."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kv.columns import columns_of
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.kv.views import ViewTable

SLOTS = 64


def store_of(layers: int) -> UnitStore:
    return UnitStore(*(torch.zeros(layers, SLOTS, 1, 1) for _ in "kv"))


def span_node(start: int, tokens: int, first_slot: int) -> Node:
    return Node(np.full(tokens, 10**6), torch.arange(first_slot, first_slot + tokens), start=start, atom=True)


def test_view_lists_what_a_layer_keeps_by_position():
    node = span_node(10, 4, 40)
    kept = torch.tensor([[True, False, False, True], [False] * 4, [False, True, True, True]])
    view = View(node, (14, 20), *columns_of(kept), node.value, store_of(3))
    assert len(view) == 5 and view.counts == [2, 0, 3] and not view.packed
    assert view.positions.tolist() == [10, 13, 11, 12, 13] and view.positions.dtype == torch.int32
    assert view.units.tolist() == [40, 43, 128 + 41, 128 + 42, 128 + 43] and view.units.dtype == torch.int32


@given(st.data())
def test_table_merges_views_by_layer_and_position_and_follows_packing(data):
    layers = data.draw(st.integers(1, 4))
    store = store_of(layers)
    views, want, at = [], {layer: [] for layer in range(layers)}, 0
    for i in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(st.integers(1, 6))
        at += data.draw(st.integers(0, 3))
        kept = data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=layers,
                                  max_size=layers))  # fmt: skip
        node = span_node(at, tokens, 1 + 10 * i)
        views.append(View(node, (0, 1), *columns_of(torch.tensor(kept)), node.value, store))
        for layer in range(layers):
            want[layer] += [(at + j, layer * SLOTS + 1 + 10 * i + j) for j in range(tokens) if kept[layer][j]]
        at += tokens
    table = ViewTable(data.draw(st.permutations(views)))
    assert table.spans == [(view.span.start, view.span.end) for view in views]

    def read(layer):
        units, positions = table.layer(layer)
        return list(zip(positions.tolist(), units.tolist(), strict=True))

    assert [read(layer) for layer in range(layers)] == [want[layer] for layer in range(layers)]
    view = data.draw(st.sampled_from(views))
    moved = dict(zip(view.units.tolist(), range(len(view)), strict=True))
    block = torch.arange(50, 50 + store.slots_for(len(view)))
    view.moved_to(block, store.dense_units(block, len(view)))
    packed = store.dense_units(block, len(view)).tolist()
    for layer in range(layers):
        assert read(layer) == [(p, packed[moved[u]] if u in moved else u) for p, u in want[layer]]
