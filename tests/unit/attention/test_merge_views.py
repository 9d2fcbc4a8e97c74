"""The views' part of a forward next to FlashInfer's: one softmax over both, and no work where a batch has no units."""

import pytest
import torch

from tgvkv_sglang.attention import merge
from tgvkv_sglang.attention.batch_tables import BatchUnits, Holes
from tgvkv_sglang.attention.merge import merge_views
from tgvkv_sglang.attention.planner import Step
from tgvkv_sglang.kv.store import UnitStore

CPU = torch.device("cpu")
LAYERS, SLOTS, SCALE = 2, 12, 0.25


@pytest.fixture(params=[torch.float32, torch.float8_e4m3fn], ids=str)
def store(request):
    torch.manual_seed(0)
    made = UnitStore(*(torch.randn(LAYERS, SLOTS, 2, 16).to(request.param) for _ in range(2)))
    if request.param == torch.float8_e4m3fn:
        made.scale([(9.0, 9.0), (0.5, 3.0)])
    return made


def attend(q, store, units):
    """Output and base-2 LSE of ``q [Hq, D]`` over units, in float64."""
    (factors,) = {store.factors[unit // SLOTS] for unit in units}
    keys, values = (flat[units].double().repeat_interleave(2, dim=1) * factor
                    for flat, factor in zip((store.k_flat, store.v_flat), factors, strict=True))  # fmt: skip
    logits = torch.einsum("hd,nhd->hn", q.double(), keys) * SCALE
    return torch.einsum("hn,nhd->hd", logits.softmax(-1), values), torch.log2(logits.exp().sum(-1))


def test_dense_and_view_units_are_one_softmax(store):
    dense, views = [[3, 4], [5]], [[7, 0, 9], []]
    units = BatchUnits(torch.tensor([1, 2, 7, 0, 9]), torch.tensor([[0, 2, 2], [2, 5, 5]]))
    step = Step(Holes(*(torch.zeros(0, dtype=torch.int32),) * 2, torch.zeros(3, dtype=torch.int32), [3, 0]), units)
    q = torch.randn(2, 4, 16)
    parts = [attend(row, store, [SLOTS + slot for slot in slots]) for row, slots in zip(q, dense, strict=True)]
    out, lse_b2 = (torch.stack(part).float() for part in zip(*parts, strict=True))
    units.units[2:] += SLOTS
    merge_views(q, out, lse_b2, step, 1, store, SCALE)
    for row in range(2):
        every = [SLOTS + slot for slot in dense[row] + views[row]]
        expected, lse = attend(q[row], store, every)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse_b2[row].double(), lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("units", [None, BatchUnits.empty(LAYERS, 2, CPU)])
def test_without_units_no_kernel_is_called(store, monkeypatch, units):
    """Views may all be empty (a budget of 0): on CUDA a call would cost every layer of such a batch."""
    monkeypatch.setattr(merge, "view_attention", lambda *args: pytest.fail("a launch for nothing"))
    q, out, lse_b2 = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.randn(2, 4)
    before = out.clone(), lse_b2.clone()
    merge_views(q, out, lse_b2, Step(units=units), 0, store, SCALE)
    assert torch.equal(out, before[0]) and torch.equal(lse_b2, before[1])
