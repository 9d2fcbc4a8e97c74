"""Every policy and budget rule against its published formula in plain loops (tests/oracle/policies.py)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.oracle import policies as oracle
from tests.oracle.selection import largest_remainder, vision_quotas
from tests.unit.selection.random_prompt import KV_HEADS, LAYERS, Q_HEADS, SPANS, N, Prompt, run
from tgvkv_sglang import registry
from tgvkv_sglang.errors import SelectionError
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.types import Span

COMPARED = [name for name in registry.POLICIES if name not in ("tgv", "lightkv", "random")]  # lightkv scores as tgv
RANGES = [(span.start, span.end) for span in SPANS]
VISION = [p for first, end in RANGES for p in range(first, end)]


def heads_of(prompt: Prompt) -> list[np.ndarray]:
    return [prompt.dense(layer, np.tri(N))[0] for layer in range(LAYERS)]


def ground(prompt: Prompt, policy: str, cuts=(), budget: str = "own", **how) -> Grounding:
    rule = registry.load_budget_rule(registry.rule_name(budget, policy))
    return prompt.ground(list(cuts), policy=registry.load_policy(policy), rule=rule, **how)


@pytest.mark.parametrize("start, cuts", [(0, []), (0, [6, 14, 18, 20]), (18, [])], ids=str)
@pytest.mark.parametrize("policy", COMPARED)
def test_scores_masses_and_the_choice_are_the_formulas(policy, start, cuts):
    prompt = Prompt(4)
    layers = heads_of(prompt)
    text = oracle.asking(policy, RANGES, start, N)
    result = ground(prompt, policy, cuts, "tvb", start=start)
    assert result.asked.text.tolist() == text
    # the LSE is taken in float32: about 1e-6 relative in exp(logit - lse), four times that in a fourth power
    scores, masses = oracle.scores(policy, layers, text, RANGES), oracle.masses(policy, layers, text, RANGES)
    if policy == "streamingllm":
        best = [sorted(range(len(VISION)), key=lambda i: -row[i]) for row in scores]
        assert [row.argsort(descending=True).tolist() for row in result.chosen.scores] == best
    else:
        np.testing.assert_allclose(result.chosen.scores, scores, rtol=2e-5)
    np.testing.assert_allclose(result.chosen.mass, masses, rtol=1e-5)
    choice = result.choice()
    assert choice.budget == largest_remainder(vision_quotas(masses, "0.3", len(VISION)))
    for kept, row, count in zip(choice.mask(), scores, choice.budget, strict=True):
        assert kept.nonzero()[0].tolist() == sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])


@pytest.mark.parametrize("retention", ["0.05", "0.3", "0.9"])
@pytest.mark.parametrize("policy", ["tgv", "h2o"])
@pytest.mark.parametrize("budget", ["uniform", "pyramid", "vl-cache"])
def test_budget_rules_are_the_formulas(budget, policy, retention):
    """Whatever policy scores, and however few layers are scored at once."""
    prompt = Prompt(5)
    text = oracle.asking(policy, RANGES, 0, N)
    weights = {
        "uniform": [1.0] * LAYERS,
        "pyramid": oracle.pyramid_weights(LAYERS),
        "vl-cache": oracle.vl_cache_weights(heads_of(prompt), text, VISION, Fraction(retention)),
    }[budget]
    for stash_bytes in (1, 2**30):
        result = ground(prompt, policy, [], budget, retention=retention, stash_bytes=stash_bytes)
        np.testing.assert_allclose(result.chosen.weights, weights, rtol=1e-6)
        assert result.choice().budget == largest_remainder(vision_quotas(weights, retention, len(VISION)))


def test_vl_caches_budgets_are_clipped():
    weights = torch.tensor([[0.999, 0.5], [0.0005, 0.3], [0.0005, 0.2]])
    settled = registry.load_budget_rule("vl-cache").settle(weights, [Fraction(1, 2), Fraction(1, 10)])
    np.testing.assert_allclose(settled, [[1.0, 0.15], [0.01, 0.09], [0.01, 0.06]], rtol=1e-6)


def test_a_policys_own_budgets_are_those_it_was_published_with():
    own = {name: registry.rule_name("own", name) for name in registry.POLICIES}
    assert own == {
        "tgv": "tvb", "lightkv": "tvb", "peak": "tvb", "peak4": "tvb", "peak-last": "tvb",
        "uniform-attention": "tvb",
        "vl-cache": "vl-cache", "pyramidkv": "pyramid", "snapkv": "uniform", "h2o": "uniform",
        "last-query": "uniform", "streamingllm": "uniform", "random": "uniform",
    }  # fmt: skip
    assert registry.rule_name("pyramid", "tgv") == "pyramid"


def same_bits(a: Grounding, b: Grounding) -> bool:
    pairs = ((a.chosen.scores, b.chosen.scores), (a.chosen.weights, b.chosen.weights),
             (a.chosen.units.columns, b.chosen.units.columns))  # fmt: skip
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("policy", [*COMPARED, "random"])
def test_chunks_blocks_and_neighbours_change_no_bit(policy):
    prompt = Prompt(6)
    alone = ground(prompt, policy)
    assert same_bits(alone, ground(prompt, policy, [6, 14, 18, 20]))
    assert same_bits(alone, ground(prompt, policy, stash_bytes=1))
    how = {"policy": registry.load_policy(policy), "rule": registry.load_budget_rule(registry.rule_name("own", policy))}
    members = [(one, one.begin(**how)) for one in (prompt.beside(7), prompt, prompt.beside(8))]
    run(members, 0, N)
    assert same_bits(alone, members[1][1])


def test_chance_depends_on_the_request_and_the_layer_alone():
    prompt = Prompt(9)
    scores = ground(prompt, "random").chosen.scores
    assert torch.equal(scores, ground(Prompt(10), "random").chosen.scores), "not on what the prompt says"
    assert len({tuple(row.tolist()) for row in scores}) == LAYERS and scores.min() >= 0 and scores.max() < 1
    other = prompt.begin(policy=registry.load_policy("random"), name="another \udcff request")
    run([(prompt, other)], 0, N)
    assert not (other.chosen.scores == scores).any()


class Ranks:
    """Two tensor-parallel ranks, one after the other: what a collective gives is played in from a record."""

    def __init__(self, whole: Prompt, policy: str, budget: str):
        self.halves = [self._half(whole, rank) for rank in range(2)]
        self.policy, self.budget = policy, budget

    @staticmethod
    def _half(whole: Prompt, rank: int) -> Prompt:
        half = Prompt(0)
        k, v = (flat.view(LAYERS, -1, KV_HEADS, flat.shape[-1])[:, :, rank : rank + 1].contiguous()
                for flat in (whole.store.k_flat, whole.store.v_flat))  # fmt: skip
        half.store, half.row, half.q = UnitStore(k, v), whole.row, whole.q[:, :, 2 * rank : 2 * rank + 2]
        half.forward_rows = lambda layer, begin, end: tuple(
            part[:, 2 * rank : 2 * rank + 2] for part in whole.forward_rows(layer, begin, end)
        )
        return half

    def run(self) -> list[Grounding]:
        """Until the record holds, each round one collective longer: what both ranks bring to it, and its kind."""
        record: list[tuple] = []
        while True:
            seen = [self._one(rank, record) for rank in range(2)]
            if len(seen[0][1]) == len(record):
                return [grounding for grounding, _ in seen]
            (kind, mine), (other_kind, yours) = (calls[len(record)] for _, calls in seen)
            assert kind == other_kind and mine.shape == yours.shape, "ranks must meet in the same collective"
            record.append((kind, mine + yours if kind == "sum" else torch.maximum(mine, yours)))

    def _one(self, rank: int, record: list[tuple]) -> tuple[Grounding, list]:
        calls: list = []

        def collective(kind):
            def reduce(tensor):
                calls.append((kind, tensor))
                return record[len(calls) - 1][1] if len(calls) <= len(record) else tensor

            return reduce

        model = Model(LAYERS, Q_HEADS, collective("sum"), collective("max"), ranks=2)
        return ground(self.halves[rank], self.policy, budget=self.budget, model=model), calls


@pytest.mark.parametrize("policy", [*COMPARED, "random"])
def test_two_ranks_choose_what_one_chooses(policy):
    whole = Prompt(11)
    want = ground(whole, policy)
    for got in Ranks(whole, policy, "own").run():
        np.testing.assert_allclose(got.chosen.scores, want.chosen.scores, rtol=1e-5)
        np.testing.assert_allclose(got.chosen.weights, want.chosen.weights, rtol=1e-5)
        assert got.choice().mask().tolist() == want.choice().mask().tolist()


@pytest.mark.parametrize("policy", COMPARED)
def test_scores_that_are_not_finite_are_never_chosen_by(policy):
    prompt = Prompt(12)
    asked = oracle.asking(policy, RANGES, 0, N)
    prompt.q[1, asked[-1]] = torch.nan
    with pytest.raises(SelectionError, match="layers"):
        ground(prompt, policy).choice()


def test_sinks_come_first_and_then_the_latest():
    prompt = Prompt(13)
    spans = [Span(2, 9)]
    grounding = prompt.ground([], policy=registry.load_policy("streamingllm"), spans=spans)
    order = grounding.chosen.scores[0].argsort(descending=True, stable=True) + 2
    assert order.tolist() == [2, 3, 8, 7, 6, 5, 4]
