"""Device tables of a batch against a plain loop over requests, layers and views."""

import doctest

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv.columns import columns_of
from tgvkv_sglang.attention import batch_tables
from tgvkv_sglang.attention.batch_tables import BatchUnits, FixedUnits, Holes, row_requests, stamp_of, units_in
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.kv.views import KeptUnits, ViewTable

STRIDE = 1000
CPU = torch.device("cpu")


def store_of(layers: int) -> UnitStore:
    return UnitStore(*(torch.zeros(layers, STRIDE, 1, 1) for _ in "kv"))


@st.composite
def batches(draw):
    """(layers, tables): requests with and without views, views of one and of several spans, empty layers."""
    layers = draw(st.integers(1, 4))
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        parts, at = [], draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3))):
            tokens = draw(st.integers(1, 5))
            cells = draw(st.lists(st.booleans(), min_size=layers * tokens, max_size=layers * tokens))
            kept = torch.tensor(cells).view(layers, tokens)
            slots = torch.tensor(draw(st.permutations(range(1, 60)))[:tokens])
            span = Node(np.full(tokens, 10**6), slots, start=at, atom=True)
            parts.append(View(span, (0, 1), *columns_of(kept), slots, store_of(layers)))
            at += tokens + draw(st.integers(0, 2))
        tables.append(ViewTable(parts) if parts else None)
    return layers, tables


def loop(tables, layer: int) -> list[list[int]]:
    """Each request's units of one layer, read from the views' boolean meaning."""
    rows = []
    for table in tables:
        units = [u for part in (table.parts if table else []) for u in part.units.tolist() if u // STRIDE == layer]
        rows.append(units)
    return rows


def read(units: BatchUnits, layer: int, batch: int) -> list[list[int]]:
    bounds = units.indptr[layer].tolist()
    return [units.units[bounds[b] : bounds[b + 1]].tolist() for b in range(batch)]


@settings(max_examples=200)
@given(batches())
def test_units_of_a_batch_are_each_requests_units_layer_by_layer(batch):
    layers, tables = batch
    units = BatchUnits.of(tables, layers, CPU)
    assert units.units.dtype == units.indptr.dtype == torch.int32
    assert units.indptr.shape == (layers, len(tables) + 1)
    assert [read(units, layer, len(tables)) for layer in range(layers)] == [loop(tables, i) for i in range(layers)]


@settings(max_examples=100)
@given(batches(), st.integers(0, 3))
def test_a_fixed_table_holds_what_was_loaded_and_rows_past_the_batch_own_nothing(batch, padding):
    layers, tables = batch
    fixed = FixedUnits(layers, len(tables) + padding, 300, CPU)
    addresses = fixed.units.data_ptr(), fixed.indptr.data_ptr()
    fixed.units.fill_(-1)
    fixed.indptr.fill_(77)  # what an earlier, larger batch left behind
    assert units_in(tables) == len(BatchUnits.of(tables, layers, CPU).units) <= fixed.capacity
    fixed.load(BatchUnits.of(tables, layers, CPU))
    assert (fixed.units.data_ptr(), fixed.indptr.data_ptr()) == addresses
    for layer in range(layers):
        assert read(fixed, layer, len(tables) + padding) == loop(tables, layer) + [[]] * padding


@given(batches())
def test_holes_are_the_viewed_spans(batch):
    _, tables = batch
    holes = Holes.of(tables, CPU)
    bounds = holes.indptr.tolist()
    for b, table in enumerate(tables):
        own = slice(bounds[b], bounds[b + 1])
        spans = list(zip(holes.start[own].tolist(), holes.end[own].tolist(), strict=True))
        assert spans == (table.spans if table else [])
        assert holes.hidden[b] == len({p for start, end in spans for p in range(start, end)})
    assert bounds[-1] == len(holes.start) == len(holes.end)


def test_a_part_of_several_spans_makes_a_hole_for_each():
    part = KeptUnits([(2, 4), (9, 12)], torch.tensor([1, 2]), torch.tensor([5, 6]), torch.tensor([0, 1, 2]))
    holes = Holes.of([None, ViewTable([part])], CPU)
    assert part.positions.tolist() == [3, 9]
    assert holes.start.tolist() == [2, 9] and holes.end.tolist() == [4, 12]
    assert holes.indptr.tolist() == [0, 0, 2] and holes.hidden == [0, 5]


def test_the_worked_example_in_the_docstring_is_right():
    result = doctest.testmod(batch_tables)
    assert result.failed == 0 and result.attempted > 10


def test_rows_of_a_prefill_name_their_request():
    assert row_requests([2, 1, 3], CPU).tolist() == [0, 0, 1, 2, 2, 2]


def test_a_stamp_changes_with_the_batch_and_with_packing():
    span = Node(np.full(2, 10**6), torch.arange(2), start=0, atom=True)
    view = View(span, (0, 1), torch.tensor([0, 1]), [2], span.value, store_of(1))
    table, other = ViewTable([view]), ViewTable([view])
    before = stamp_of([table, None])
    assert before == stamp_of([table, None])
    assert len({before, stamp_of([None, table]), stamp_of([table]), stamp_of([other, None])}) == 4
    view.moved_to(torch.tensor([1]), torch.tensor([1, 2]))
    assert before != stamp_of([table, None])
