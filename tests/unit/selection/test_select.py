"""From scores to kept positions: both scopes against the brute-force oracle and by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.selection import TEXT, VISION, select
from tgvkv_sglang.errors import SelectionError, TgvkvError
from tgvkv_sglang.registry import load_budget_rule
from tgvkv_sglang.selection.choose import choose, keep_top, usable_masses
from tgvkv_sglang.selection.grounding import Scores


def brute_force(scores: list[list[float]], budget: list[int]) -> list[list[bool]]:
    """Take the best one again and again; the first of equals is met first."""
    out = []
    for row, k in zip(scores, budget, strict=True):
        left = list(enumerate(row))
        for _ in range(k):
            best = left[0]
            for item in left[1:]:
                if item[1] > best[1]:
                    best = item
            left.remove(best)
        out.append([i not in dict(left) for i in range(len(row))])
    return out


@given(st.data())
def test_keep_top_is_the_brute_force_choice_with_many_ties(data):
    layers, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    row = st.lists(st.integers(0, 3).map(float), min_size=tokens, max_size=tokens)
    scores = data.draw(st.lists(row, min_size=layers, max_size=layers))
    budget = data.draw(st.lists(st.integers(0, tokens), min_size=layers, max_size=layers))
    assert keep_top(torch.tensor(scores), budget).tolist() == brute_force(scores, budget)


def test_ties_go_to_the_lower_position():
    kept = keep_top(torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), [2, 3])
    assert kept.tolist() == [[True, True, False, False], [True, True, True, False]]


def test_ties_in_a_long_row_go_to_the_lower_position():
    kept = keep_top(torch.zeros(2, 5000), [1234, 4999])
    assert kept[0].nonzero()[:, 0].tolist() == list(range(1234)) and kept[1].sum() == 4999 and not kept[1, -1]


def test_zero_and_minus_zero_tie():
    assert keep_top(torch.tensor([[-0.0, 0.0]]), [1]).tolist() == [[True, False]]


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
def test_scores_that_are_not_finite_are_refused_by_layer(bad):
    scores, mass = torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert usable_masses(Scores(scores, mass, {})) == [1.0, 2.0, 3.0, 4.0]
    scores[1, 2] = scores[3, 0] = bad
    with pytest.raises(SelectionError, match=r"scores of layers \[1, 3\] .*\(of 4 layers\)") as caught:
        usable_masses(Scores(scores, mass, {}))
    assert isinstance(caught.value, TgvkvError)


@pytest.mark.parametrize("bad", [*BAD, -1e-30])
def test_masses_that_are_no_masses_are_refused_by_layer(bad):
    with pytest.raises(SelectionError, match=r"layers \[0\]"):
        usable_masses(Scores(torch.ones(2, 3), torch.tensor([bad, 1.0]), {}))
    assert usable_masses(Scores(torch.ones(2, 3), torch.zeros(2), {})) == [0.0, 0.0]


@pytest.mark.parametrize("scope", ["vision", "total"])
@pytest.mark.parametrize("retention", [0.05, 0.1, 0.2, 0.5, 1.0])
def test_selection_equals_the_oracle(scope, retention):
    rng = np.random.default_rng(7)
    kinds = [TEXT] * 3 + [VISION] * 20 + [TEXT] * 2 + [VISION] * 9 + [TEXT] * 6
    n, layers = len(kinds), 5
    logits = rng.normal(0, 1, (layers, n, n)) + 3 * rng.random((layers, 1, 1)) * (np.array(kinds) == VISION)
    attention = np.exp(logits) * np.tri(n)
    attention /= attention.sum(-1, keepdims=True)
    oracle = select(attention, kinds, retention, scope)
    scores = Scores(torch.from_numpy(oracle.scores), torch.from_numpy(oracle.layer_mass), {})
    choice = choose(scores, load_budget_rule(scope), Fraction(str(retention)), n)
    assert choice.budget == oracle.budget.tolist()
    assert choice.kept.tolist() == oracle.kept.tolist()
