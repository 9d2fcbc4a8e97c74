"""Scoring and view attention on the CPU, against dense attention in float64 and the oracle's brute force."""

import numpy as np
import pytest
import torch

from tests.oracle.selection import select
from tests.unit.kv.columns import columns_of
from tests.unit.selection.random_prompt import DIM, KINDS, KV_HEADS, LAYERS, Q_HEADS, SCALE, SPANS, N, Prompt, run
from tgvkv_sglang.attention.torch_cpu import KeyRows, attend, row_lse_e, visible
from tgvkv_sglang.errors import NeverScoredError
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.kv.views import ViewTable
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import LayerByLayer, LayerInputs, LayerScores, Model
from tgvkv_sglang.selection.tgv import Tgv
from tgvkv_sglang.types import Span


def attention_of(prompt: Prompt) -> np.ndarray:
    return np.stack([prompt.dense(layer, np.tri(N))[0].mean(0) for layer in range(LAYERS)])


def numbers(grounding: Grounding) -> list[torch.Tensor]:
    """Everything that a selection comes from and leads to."""
    chosen = grounding.chosen
    assert set(chosen.extras) == {"text_weights"}
    return [chosen.scores, chosen.mass, chosen.weights, chosen.extras["text_weights"], chosen.units.columns,
            chosen.units.layer_ptr, chosen.units.units]  # fmt: skip


def same_bits(a: Grounding, b: Grounding) -> bool:
    return all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


@pytest.mark.parametrize("cuts", [[], [5], [13], [19], [6, 14, 18, 20], list(range(1, N))], ids=str)
@pytest.mark.parametrize("start", [0, 18])
def test_scores_equal_the_oracle_however_the_prefill_is_cut(cuts, start):
    prompt = Prompt()
    oracle = select(attention_of(prompt), KINDS, 0.3, new_text_start=start)
    grounding = prompt.ground([cut for cut in cuts if cut > start], start)
    result = grounding.chosen
    assert grounding.asked.text.tolist() == oracle.grounding_positions.tolist()
    assert grounding.asked.vision.tolist() == oracle.vision_positions.tolist()
    # the LSE is taken in float32: about 1e-6 relative in exp(logit - lse)
    for got, want in (
        (result.extras["text_weights"], oracle.text_weights),
        (result.scores, oracle.scores),
        (result.mass, oracle.layer_mass),
        (result.weights, oracle.layer_mass),
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=5e-6)
    choice = grounding.choice()
    assert choice.mask().tolist() == oracle.kept.tolist() and choice.budget == oracle.budget.tolist()


@pytest.mark.parametrize("policy", ["tgv", "layer by layer"])
def test_scores_of_quantised_kv_are_those_of_what_it_stands_for(policy):
    """Each layer's K is divided by another factor; queries are in float64, as they would be in the model's dtype."""
    prompt = Prompt(4, factors=[(0.05, 1.0), (2.0, 3.0), (0.7, 0.1)])
    attention = attention_of(prompt)
    oracle = select(attention, KINDS, 0.3)
    options = {} if policy == "tgv" else {"policy": OfKeys()}
    chosen = prompt.ground([6, 14, 18, 20], model=Model(LAYERS, Q_HEADS, dtype=torch.float64), **options).chosen
    if policy == "tgv":
        np.testing.assert_allclose(chosen.scores.numpy(), oracle.scores, rtol=5e-6)
        np.testing.assert_allclose(chosen.mass.numpy(), oracle.layer_mass, rtol=5e-6)
    else:
        keys = prompt.true.k_flat.view(LAYERS, -1, KV_HEADS, DIM)[:, prompt.row[oracle.vision_positions].long()]
        np.testing.assert_allclose(chosen.scores.numpy(), keys.abs().sum((2, 3)).numpy(), rtol=5e-6)


def test_the_stash_is_reckoned_in_the_dtype_of_queries():
    """Not in that of KV, which is smaller when it is quantised: 4528 bytes a layer, not 944."""
    blocks = []

    class Counted(Tgv):
        def score(self, block):
            blocks.append(block.layers)
            return super().score(block)

    prompt = Prompt(4, factors=[(1.0, 1.0)] * LAYERS)
    prompt.ground([], stash_bytes=5000, policy=Counted(), model=Model(LAYERS, Q_HEADS, dtype=torch.float64))
    assert blocks == [1, 1, 1]


@pytest.mark.parametrize("cuts", [[13], [6, 14, 18, 20], list(range(1, N))], ids=str)
def test_chunks_change_no_bit(cuts):
    assert same_bits(Prompt().ground(cuts), Prompt().ground([]))


@pytest.mark.parametrize("stash_bytes", [1, 5000, 2**30])
@pytest.mark.parametrize("cuts", [[], [19]], ids=str)
def test_blocks_of_layers_change_no_bit(stash_bytes, cuts):
    assert same_bits(Prompt().ground(cuts, stash_bytes=stash_bytes), Prompt().ground([]))


@pytest.mark.parametrize("stash_bytes", [1, 2**30])
def test_neighbours_in_a_batch_change_no_bit(stash_bytes):
    """Three prompts in one forward; the second began in an earlier one, the third has another policy."""
    prompt = Prompt()
    members = [prompt, prompt.beside(1), prompt.beside(2)]
    alone = [one.ground([19], **how) for one, how in zip(members, HOWS, strict=True)]
    together = [(one, one.begin(**how)) for one, how in zip(members, HOWS, strict=True)]
    run(together, 0, 19, stash_bytes)
    assert [grounding.stashed for _, grounding in together] == [4, 4, 4]
    run(together, 19, N, stash_bytes)
    for (_, grounding), one in zip(together, alone, strict=True):
        assert same_bits(grounding, one) and grounding.earlier is None
        assert grounding.choice().mask().tolist() == one.choice().mask().tolist()


class Mean(LayerByLayer):
    """Each vision token is worth its place."""

    def query_positions(self, spans, start, end, cap):
        return Tgv().query_positions(spans, start, end, cap)

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        assert torch.equal(layer.store.units_of(layer.vision_units - layer.layer * layer.store.slots, layer.layer),
                           layer.vision_units)  # fmt: skip
        scores = layer.vision_positions.float() * (1 + layer.layer)
        return LayerScores(scores, scores.mean(), {"text_weights": layer.lse_e.float().sum(1)})


class OfKeys(Mean):
    """Each vision token is worth the size of its key."""

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        scores = layer.store.keys(layer.vision_units, layer.layer).abs().sum((1, 2))
        return LayerScores(scores, scores.mean(), {"text_weights": layer.lse_e.float().sum(1)})


HOWS = [{}, {"retention": "0.6"}, {"policy": Mean()}]


def test_a_policy_layer_by_layer_is_asked_for_each_layer_of_each_request():
    prompt = Prompt()
    grounding = prompt.ground([19], policy=Mean())
    vision = grounding.asked.vision
    assert torch.equal(grounding.chosen.scores, torch.stack([vision.float() * k for k in (1, 2, 3)]))
    assert grounding.choice().budget == [2, 4, 5], "masses are as 1 : 2 : 3, of eleven tokens in all"
    assert grounding.choice().mask()[2].nonzero()[0].tolist() == list(range(7, 12)), "the last ones are worth most"


@pytest.mark.parametrize("cap", [1, 3, 6])
def test_the_cap_leaves_the_last_text_to_ground(cap):
    prompt = Prompt(1)
    capped = select(attention_of(prompt), KINDS, 0.3, new_text_start=N - cap)
    result = prompt.ground([13], cap=cap).chosen
    np.testing.assert_allclose(result.scores.numpy(), capped.scores, rtol=5e-6)
    np.testing.assert_allclose(result.extras["text_weights"].numpy(), capped.text_weights, rtol=5e-6)


def test_tensor_parallel_halves_add_up():
    """Each rank has half of the heads; what they hand to the sum over ranks adds up to the whole model's numbers."""
    whole = Prompt(2)
    halves = []
    for rank in range(2):
        half = Prompt(2)
        k = whole.store.k_flat.view(LAYERS, -1, KV_HEADS, DIM)[:, :, rank : rank + 1].contiguous()
        v = whole.store.v_flat.view(LAYERS, -1, KV_HEADS, DIM + 1)[:, :, rank : rank + 1].contiguous()
        half.store, half.q = UnitStore(k, v), whole.q[:, :, 2 * rank : 2 * rank + 2]
        halves.append(half)
    want = whole.ground([]).chosen
    handed: list[list[torch.Tensor]] = [[], []]
    summed: list[torch.Tensor] = []

    def rank_model(rank: int) -> Model:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            handed[rank].append(tensor)
            return summed[len(handed[rank]) - 1] if len(handed[rank]) <= len(summed) else tensor

        return Model(LAYERS, Q_HEADS, reduce, ranks=2)

    for _ in range(2):  # the second sum is right once the first one is known
        handed[:] = [], []
        for rank, half in enumerate(halves):
            half.ground([], model=rank_model(rank))
        assert [len(calls) for calls in handed] == [2, 2], "two collectives, however many layers"
        summed[:] = [a + b for a, b in zip(*handed, strict=True)]
    weights, scores_and_mass = summed
    np.testing.assert_allclose(weights.numpy(), want.extras["text_weights"].numpy(), rtol=5e-6)
    np.testing.assert_allclose(scores_and_mass[:, :-1].numpy(), want.scores.numpy(), rtol=5e-6)
    np.testing.assert_allclose(scores_and_mass[:, -1].numpy(), want.mass.numpy(), rtol=5e-6)


def test_the_text_that_asks():
    grounding_positions = Tgv().query_positions
    assert grounding_positions(SPANS, 0, N, 99).tolist() == [10, 11, 17, 18, 19, 20, 21, 22]
    assert grounding_positions(SPANS, 11, N, 99).tolist() == [11, 17, 18, 19, 20, 21, 22]
    assert grounding_positions(SPANS, 0, N, 2).tolist() == [21, 22]
    assert grounding_positions(SPANS, 0, 17, 99).tolist() == [10, 11]
    assert grounding_positions([Span(3, 10)], 0, 10, 99).tolist() == []
    assert grounding_positions([], 0, N, 99).tolist() == []


@pytest.mark.parametrize("layers", [[], [0, 1], [0, 2], [1, 2]], ids=str)
def test_without_every_layer_nothing_is_chosen(layers):
    prompt = Prompt()
    grounding = prompt.begin()
    run([(prompt, grounding)], 0, N, layers=layers)
    with pytest.raises(NeverScoredError, match="not every layer was scored with the 8 tokens"):
        grounding.choice()


def test_without_every_chunk_nothing_is_chosen():
    prompt = Prompt()
    grounding = prompt.begin()
    run([(prompt, grounding)], 19, N)
    with pytest.raises(NeverScoredError, match="not every layer was scored with the 8 tokens"):
        grounding.choice()


@pytest.mark.parametrize("factors", [None, [(1.0, 1.0)] * LAYERS], ids=["float64", "e4m3"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_through_views_is_dense_attention_with_a_mask_per_layer(packed, factors):
    prompt = Prompt(3, factors)
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
        view = View(node, (17, N), *columns_of(kept[span]), slots, prompt.store)
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
