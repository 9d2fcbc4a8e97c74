"""From scores to kept positions: both scopes against the brute-force oracle and by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.selection import TEXT, VISION, select
from tgvkv_sglang.errors import SelectionError, TgvkvError
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.registry import load_scope
from tgvkv_sglang.selection.choose import Chosen, Quota, Scored, choose
from tgvkv_sglang.types import Span

Scores = tuple[torch.Tensor, torch.Tensor]


def choose_for(scored: list[Scores], retentions: list[Fraction], scope="vision", tokens: int = 0) -> list[Chosen]:
    """Choose for requests with the given scores ``[L, V]`` and masses ``[L]``, each with one image at position 5."""
    scores, mass = (torch.cat(parts, 1) for parts in zip(*((s, m[:, None]) for s, m in scored), strict=True))
    lens = [one.shape[1] for one, _ in scored]
    slots = torch.arange(sum(lens), dtype=torch.int32).flip(0)
    pool = torch.zeros(len(scores), sum(lens), 1, 1)
    quotas = [Quota(load_scope(scope), retention, tokens) for retention in retentions]
    numbers = Scored(scores.float(), mass.float(), mass.float(), [{}] * len(lens), slots)
    return choose(numbers, [[Span(5, 5 + n)] for n in lens], quotas, UnitStore(pool, pool.clone()))


def kept_of(scores: torch.Tensor, mass: torch.Tensor, retention: Fraction, **how) -> list[list[bool]]:
    return choose_for([(scores, mass)], [retention], **how)[0].confirm().mask().tolist()


def best(scores: list[float], count: int) -> list[bool]:
    """Take the best one again and again; the first of equals is met first."""
    left = list(enumerate(scores))
    for _ in range(count):
        left.remove(max(left, key=lambda item: item[1]))
    return [i not in dict(left) for i in range(len(scores))]


small = st.integers(0, 5).map(float)


@st.composite
def requests(draw):
    layers = draw(st.integers(1, 5))
    out = []
    for tokens in draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)):
        rows = st.lists(st.lists(small, min_size=tokens, max_size=tokens), min_size=layers, max_size=layers)
        mass = torch.tensor(draw(st.lists(st.integers(0, 9).map(float), min_size=layers, max_size=layers)))
        out.append((torch.tensor(draw(rows)), mass, Fraction(draw(st.integers(1, 99)), 100)))
    return out


@pytest.mark.parametrize("scope", ["vision", "total"])
@given(requests())
def test_a_batch_chooses_what_each_request_would_by_exact_budgets(scope, batch):
    """Many ties, several requests at once, each with its own retention."""
    tokens = 30
    chosen = choose_for([(s, m) for s, m, _ in batch], [r for *_, r in batch], scope, tokens)
    for one, (scores, mass, retention) in zip(chosen, batch, strict=True):
        budget = load_scope(scope).per_layer(mass.tolist(), scores.shape[1], tokens, retention)
        choice = one.confirm()
        assert choice.budget == budget
        assert choice.mask().tolist() == [best(row, k) for row, k in zip(scores.tolist(), budget, strict=True)]
        assert torch.equal(one.units.positions, one.units.columns + 5)
        assert one.units.counts == budget and one.units.columns.tolist() == choice.host_columns.tolist()


def test_ties_in_a_long_row_go_to_the_lower_position():
    (kept,) = kept_of(torch.zeros(1, 5000), torch.ones(1), Fraction(1234, 5000))
    assert kept == [True] * 1234 + [False] * 3766


def test_zero_and_minus_zero_tie():
    assert kept_of(torch.tensor([[-0.0, 0.0]]), torch.ones(1), Fraction(1, 2)) == [[True, False]]


def test_spans_get_what_was_kept_of_them():
    """Two spans of one request compete; each is told its own columns, counted from its start."""
    scores = torch.tensor([[1.0, 9.0, 3.0, 8.0, 0.0], [5.0, 6.0, 1.0, 0.0, 7.0]])
    (chosen,) = choose_for([(scores, torch.ones(2))], [Fraction(1, 2)])
    choice = chosen.confirm()
    assert choice.budget == [3, 2]
    (left, left_counts), (right, right_counts) = choice.part(0, 2), choice.part(2, 3)
    assert (left.tolist(), left_counts) == ([1, 1], [1, 1])
    assert (right.tolist(), right_counts) == ([0, 1, 2], [2, 1])
    whole, counts = choice.part(0, 5)
    assert whole is choice.columns and counts == [3, 2]


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("scope", ["vision", "total"])
@pytest.mark.parametrize("bad", [*BAD, -1e-30])
def test_weights_that_are_no_weights_are_refused_by_layer_and_leave_the_others_alone(bad, scope):
    scores = torch.rand(4, 6)
    mass = torch.tensor([1.0, bad, 3.0, bad])
    retentions = [Fraction(1, 2)] * 3
    good = scores, torch.arange(1.0, 5.0)
    chosen = choose_for([good, (scores, mass), good], retentions, scope, 20)
    with pytest.raises(SelectionError, match=r"scores of layers \[1, 3\] .*\(of 4 layers\)") as caught:
        chosen[1].confirm()
    assert isinstance(caught.value, TgvkvError)
    for index in (0, 2):
        assert chosen[index].confirm().mask().tolist() == kept_of(*good, retentions[0], scope=scope, tokens=20)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["score", "layer", "everything"])
def test_a_choice_on_bad_numbers_has_the_right_size_and_stays_inside(bad, where):
    """The device cannot refuse: one decode step goes through this choice before the host sees the numbers."""
    layers, tokens, retention = 5, 17, Fraction(2, 5)
    scores, mass = torch.rand(layers, tokens), torch.rand(layers)
    part = {"score": (2, 3), "layer": (2, slice(None)), "everything": (slice(None), slice(None))}[where]
    scores[part] = bad
    mass[part[0]] = float("nan")  # what a policy says of such a layer
    units = choose_for([(scores, mass)], [retention])[0].units
    counts = units.layer_ptr.diff()
    assert units.layer_ptr[0] == 0 and counts.sum() == len(units.columns) == retention * layers * tokens
    assert counts.min() >= 0 and counts.max() <= tokens
    assert units.columns.min() >= 0 and units.columns.max() < tokens
    for layer, own in enumerate(units.columns.split(counts.tolist())):
        assert (own.diff() > 0).all() and units.units.split(counts.tolist())[layer].tolist() == [
            layer * tokens + tokens - 1 - column for column in own.tolist()
        ], "no column twice, each in its slot of its layer"


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
    scores, mass = torch.from_numpy(oracle.scores), torch.from_numpy(oracle.layer_mass)
    (chosen,) = choose_for([(scores, mass)], [Fraction(str(retention))], scope, n)
    assert chosen.confirm().budget == oracle.budget.tolist()
    assert chosen.confirm().mask().tolist() == oracle.kept.tolist()
