"""The unit store: addressing, dense packing and overlapping moves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.streams import Streams
from tgvkv_sglang.kv.store import UnitStore


def make(layers=3, slots=7, heads=2, dim=4, v_dim=6):
    k = torch.arange(layers * slots * heads * dim, dtype=torch.float32).view(layers, slots, heads, dim)
    v = -torch.arange(layers * slots * heads * v_dim, dtype=torch.float32).view(layers, slots, heads, v_dim)
    return k, v, UnitStore(k, v)


def test_units_address_layers_of_slots_without_a_copy():
    k, v, store = make()
    slots = torch.tensor([5, 2], dtype=torch.int32)
    for layer in range(3):
        units = store.units_of(slots, layer)
        assert torch.equal(store.k_flat[units], k[layer, [5, 2]]) and torch.equal(store.v_flat[units], v[layer, [5, 2]])
    k[1, 5] = 99
    assert bool((store.k_flat[store.units_of(torch.tensor([5]), 1)] == 99).all())


def test_dense_units_fill_slot_by_slot():
    _, _, store = make()
    assert store.dense_units(torch.tensor([4, 1]), 5).tolist() == [4, 11, 18, 1, 8]
    assert store.dense_units(torch.empty(0, dtype=torch.int64), 0).tolist() == []
    assert [store.slots_for(n) for n in (0, 1, 3, 4, 6, 7)] == [0, 1, 1, 2, 2, 3]


@given(st.permutations(range(21)), st.permutations(range(21)), st.integers(0, 21))
def test_moves_may_overlap(source, target, count):
    k, v, store = make()
    want_k, want_v = store.k_flat.clone(), store.v_flat.clone()
    for s, t in list(zip(source, target, strict=True))[:count]:
        want_k[t], want_v[t] = make()[2].k_flat[s], make()[2].v_flat[s]
    store.move(torch.tensor(source[:count], dtype=torch.int64), torch.tensor(target[:count], dtype=torch.int64))
    assert torch.equal(store.k_flat, want_k) and torch.equal(store.v_flat, want_v)


def test_two_blocks_or_different_sizes_are_refused():
    k, v, _ = make()
    with pytest.raises(ValueError, match=r"K \(3, 7, 4, 2\).*must be contiguous"):
        UnitStore(k.transpose(2, 3), v)
    with pytest.raises(ValueError, match=r"V \(3, 6, 2, 6\)"):
        UnitStore(k, v[:, :6].contiguous())


def test_unit_ids_beyond_int32_are_refused():
    huge = torch.empty(2**16, 2**15, 1, 0)  # takes no memory
    with pytest.raises(ValueError, match="65536 layers x 32768 slots exceed"):
        UnitStore(huge, huge)


def test_moves_are_in_order_with_forwards_on_their_stream(monkeypatch):
    """After the scheduler's work so far and the step in flight, before the next step; the lists live until then."""
    device = Streams()
    device.install(monkeypatch)
    store = UnitStore(*make(v_dim=4)[:2])
    scheduler, forward = device.Stream(name="scheduler"), device.Stream(name="forward")
    monkeypatch.setattr(store, "_move", lambda source, target: device.run("move", source.tolist(), target.tolist()))
    store.move_on(forward)
    with device.stream(scheduler):
        device.run("the scheduler's work", writes=[4])
        with device.stream(forward):
            device.run("step in flight", reads=[1, 2, 3])
        source, target = torch.tensor([1, 2]), torch.tensor([3, 4])
        store.move(source, target)
        assert device.current_stream() is scheduler
        with device.stream(forward):
            device.run("next step", reads=[3, 4], writes=[1, 2])
    assert device.races == [] and device.operations[-2].stream is forward
    assert [(tensor.tolist(), stream) for tensor, stream in device.recorded] == [([1, 2], forward), ([3, 4], forward)]
