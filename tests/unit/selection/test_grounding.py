"""Scoring and view attention on the CPU, against dense attention in float64 and the oracle's brute force."""

import numpy as np
import pytest
import torch

from tests.oracle.selection import select
from tests.unit.selection.random_prompt import DIM, KINDS, KV_HEADS, LAYERS, Q_HEADS, SCALE, SPANS, N, Prompt
from tgvkv_sglang.attention.torch_cpu import KeyRows, attend, row_lse_e, visible
from tgvkv_sglang.errors import NeverScoredError
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.kv.views import ViewTable
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.selection.tgv import Tgv
from tgvkv_sglang.types import Span


@pytest.mark.parametrize("cuts", [[], [5], [13], [19], [6, 14, 18, 20], list(range(1, N))], ids=str)
@pytest.mark.parametrize("start", [0, 18])
def test_scores_equal_the_oracle_however_the_prefill_is_cut(cuts, start):
    prompt = Prompt()
    attention = np.stack([prompt.dense(layer, np.tri(N))[0].mean(0) for layer in range(LAYERS)])
    oracle = select(attention, KINDS, 0.3, new_text_start=start)
    grounding = prompt.ground([cut for cut in cuts if cut > start], start)
    result = grounding.result()
    assert grounding.complete
    assert grounding.text_positions.tolist() == oracle.grounding_positions.tolist()
    assert grounding.vision_positions.tolist() == oracle.vision_positions.tolist()
    # the LSE is taken in float32: about 1e-6 relative in exp(logit - lse)
    for got, want in (
        (result.extras["text_weights"], oracle.text_weights),
        (result.scores, oracle.scores),
        (result.layer_mass, oracle.layer_mass),
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=5e-6)


@pytest.mark.parametrize("cap", [1, 3, 6])
def test_the_cap_leaves_the_last_text_to_ground(cap):
    prompt = Prompt(1)
    attention = np.stack([prompt.dense(layer, np.tri(N))[0].mean(0) for layer in range(LAYERS)])
    capped = select(attention, KINDS, 0.3, new_text_start=N - cap)
    result = prompt.ground([13], cap=cap).result()
    np.testing.assert_allclose(result.scores.numpy(), capped.scores, rtol=5e-6)
    np.testing.assert_allclose(result.extras["text_weights"].numpy(), capped.text_weights, rtol=5e-6)


def test_tensor_parallel_halves_add_up():
    """Each rank has half of the heads; its partial sums, added, are the whole model's weights and scores."""
    whole = Prompt(2)
    halves = []
    for rank in range(2):
        half = Prompt(2)
        k = whole.store.k_flat.view(LAYERS, -1, KV_HEADS, DIM)[:, :, rank : rank + 1].contiguous()
        v = whole.store.v_flat.view(LAYERS, -1, KV_HEADS, DIM + 1)[:, :, rank : rank + 1].contiguous()
        half.store, half.q = UnitStore(k, v), whole.q[:, :, 2 * rank : 2 * rank + 2]
        halves.append(half)
    want = whole.ground([]).result()
    weights = []
    for half in halves:
        seen: list[torch.Tensor] = []
        half.ground([], reduce=lambda t, seen=seen: seen.append(t) or t)
        weights.append(seen[0::2])
    summed = [a + b for a, b in zip(*weights, strict=True)]
    np.testing.assert_allclose(torch.stack(summed).numpy(), want.extras["text_weights"].numpy(), rtol=5e-6)
    totals = []
    for half in halves:
        calls, seen = iter(range(99)), []

        def reduce(tensor, calls=calls, seen=seen):
            call = next(calls)
            seen.append(tensor)
            return summed[call // 2] if call % 2 == 0 else tensor

        half.ground([], reduce=reduce)
        totals.append(seen[1::2])
    packed = torch.stack([a + b for a, b in zip(*totals, strict=True)]).numpy()
    np.testing.assert_allclose(packed[:, :-1], want.scores.numpy(), rtol=5e-6)
    np.testing.assert_allclose(packed[:, -1], want.layer_mass.numpy(), rtol=5e-6)


def test_the_text_that_asks():
    grounding_positions = Tgv().query_positions
    assert grounding_positions(SPANS, 0, N, 99).tolist() == [10, 11, 17, 18, 19, 20, 21, 22]
    assert grounding_positions(SPANS, 11, N, 99).tolist() == [11, 17, 18, 19, 20, 21, 22]
    assert grounding_positions(SPANS, 0, N, 2).tolist() == [21, 22]
    assert grounding_positions(SPANS, 0, 17, 99).tolist() == [10, 11]
    assert grounding_positions([Span(3, 10)], 0, 10, 99).tolist() == []
    assert grounding_positions([], 0, N, 99).tolist() == []


def test_an_unfinished_grounding_says_which_layers_are_missing():
    grounding = Grounding(SPANS, Tgv().query_positions(SPANS, 0, N, 99), (0, N), Model(LAYERS, Q_HEADS), Tgv())
    assert not grounding.complete
    with pytest.raises(NeverScoredError, match=r"\[0, 1, 2\] were never scored"):
        grounding.result()


def test_scoring_before_the_tokens_are_located_is_named():
    prompt = Prompt()
    grounding = Grounding(SPANS, Tgv().query_positions(SPANS, 0, N, 99), (0, N), Model(LAYERS, Q_HEADS), Tgv())
    grounding.add(0, prompt.q[0][:1], torch.zeros(1, Q_HEADS))
    with pytest.raises(NeverScoredError, match="locate"):
        grounding.finish_layer(0, prompt.store, SCALE)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_through_views_is_dense_attention_with_a_mask_per_layer(packed):
    prompt = Prompt(3)
    rng = np.random.default_rng(3)
    kept = {span: torch.from_numpy(rng.random((LAYERS, len(span))) < 0.4) for span in SPANS}
    want = []
    for layer in range(LAYERS):
        seen = np.ones(N, dtype=bool)
        for span in SPANS:
            seen[span.start : span.end] = kept[span][layer]
        want.append(prompt.dense(layer, np.tri(N) * seen)[1:])
    views = []
    for span in SPANS:
        slots = prompt.row[span.start : span.end].long()
        node = Node(np.full(len(span), 10**6), slots, start=span.start, atom=True)
        view = View(node, (17, N), kept[span], slots, prompt.store)
        if packed:
            block = slots[: prompt.store.slots_for(len(view))].clone()
            units = prompt.store.dense_units(block, len(view))
            prompt.store.move(view.units, units)
            view.moved_to(block, units)
            prompt.row[span.start : span.end] = 0
        views.append(view)
    keys = KeyRows(prompt.row, ViewTable(views), prompt.store)
    for layer in range(LAYERS):
        positions = torch.arange(17, N)  # the question's tokens, and each token as a decode step
        seen = keys.layer(layer)
        q = prompt.q[layer, 17:]
        mask = visible(positions, seen)
        np.testing.assert_allclose(attend(q, seen, prompt.store, mask, SCALE), want[layer][0][17:], rtol=1e-10)
        np.testing.assert_allclose(row_lse_e(q, seen, prompt.store, mask, SCALE), want[layer][1][17:], rtol=1e-5)
        last = attend(q[-1:], seen, prompt.store, None, SCALE)
        np.testing.assert_allclose(last, want[layer][0][-1:], rtol=1e-10)
