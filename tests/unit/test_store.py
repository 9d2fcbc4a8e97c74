"""The unit store: addressing, dense packing and overlapping moves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_moves_run_on_the_forward_stream_in_order(monkeypatch):
    """What a GPU needs: wait for the scheduler's stream, move on the other, keep the lists alive until then."""
    k, v, _ = make(v_dim=4)
    store = UnitStore(k, v)
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append(("waits for", other))

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            events.append(("on", self.stream))

        def __exit__(self, *error):
            events.append(("off", self.stream))

    forward = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "scheduler")
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: events.append((tensor.tolist(), stream)))
    monkeypatch.setattr(store, "_move", lambda source, target: events.append("moved"))
    store.move_on(forward)
    store.move(torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert events == [("waits for", "scheduler"), ("on", forward), "moved", ("off", forward), ([1, 2], forward),
                      ([3, 4], forward)]  # fmt: skip
