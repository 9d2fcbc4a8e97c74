"""The brute-force selection, checked by hand and by other routes to the same numbers."""

import dataclasses
import itertools
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from tests.oracle.selection import (
    TEXT,
    VIEWED,
    VISION,
    ambiguous,
    check_kept,
    largest_remainder,
    select,
    total_quotas,
    vision_quotas,
)
from tests.server.compare import assert_budget

KINDS = [TEXT, VISION, VISION, VISION, TEXT, TEXT]


def hand_attention() -> np.ndarray:
    """Two layers; only the rows of the two grounding tokens exist, so reading another row gives NaN."""
    attention = np.full((2, 6, 6), np.nan)
    attention[0, 4] = [0.1, 0.2, 0.3, 0.1, 0.3, 0.0]
    attention[0, 5] = [0.1, 0.1, 0.1, 0.3, 0.2, 0.2]
    attention[1, 4] = [0.5, 0.1, 0.1, 0.05, 0.25, 0.0]
    attention[1, 5] = [0.4, 0.05, 0.1, 0.1, 0.05, 0.3]
    return attention


def random_attention(rng: np.random.Generator, layers: int, kinds: list[int]) -> np.ndarray:
    """Causal rows that sum to 1, with layers that differ in how they favour the image."""
    n = len(kinds)
    logits = rng.normal(0, 1, (layers, n, n)) + 3 * rng.random((layers, 1, 1)) * (np.array(kinds) == VISION)
    weights = np.exp(logits) * np.tri(n)
    return weights / weights.sum(-1, keepdims=True)


def test_hand_computed_selection():
    selection = select(hand_attention(), KINDS, 0.5)
    assert selection.vision_positions.tolist() == [1, 2, 3]
    assert selection.grounding_positions.tolist() == [4, 5]
    # token 4 is seen by 4 and 5, token 5 by itself: (0.3 + 0.2) / 2, 0.2 / 1; (0.25 + 0.05) / 2, 0.3 / 1
    np.testing.assert_allclose(selection.text_weights, [[0.25, 0.2], [0.15, 0.3]], rtol=1e-15)
    np.testing.assert_allclose(selection.scores, [[0.07, 0.095, 0.085], [0.03, 0.045, 0.0375]], rtol=1e-14)
    np.testing.assert_allclose(selection.layer_mass, [1.1, 0.5], rtol=1e-15)
    # 2 layers * 0.5 * 3 tokens = 3 units, of which 3 * 1.1 / 1.6 = 2.0625 and 0.9375
    assert selection.budget.tolist() == [2, 1]
    assert selection.kept.tolist() == [[False, True, True], [False, True, False]]


def test_hand_computed_selection_of_the_papers_scope():
    # 2 layers * 6 tokens * 0.5 = 6, of which 4.125 and 1.875; 3 of them are text
    selection = select(hand_attention(), KINDS, 0.5, "total")
    assert selection.budget.tolist() == [1, 0]
    assert selection.kept.tolist() == [[False, True, False], [False, False, False]]
    # 2 * 6 * 1 = 12: 8.25 and 3.75, so layer 0 keeps all 3 and what is over is lost, layer 1 keeps 4 - 3
    assert select(hand_attention(), KINDS, 1.0, "total").budget.tolist() == [3, 1]


def test_only_new_text_grounds():
    selection = select(hand_attention(), KINDS, 0.5, new_text_start=5)
    assert selection.grounding_positions.tolist() == [5]
    np.testing.assert_allclose(selection.text_weights, [[0.2], [0.3]], rtol=1e-15)
    np.testing.assert_allclose(selection.layer_mass, [0.5, 0.25], rtol=1e-15)


def test_viewed_tokens_are_neither_scored_nor_text():
    kinds = [VIEWED, TEXT, VISION, VISION, TEXT, TEXT]
    selection = select(hand_attention(), kinds, 0.5, "total")
    assert selection.vision_positions.tolist() == [2, 3]
    assert selection.num_text == 3


def test_text_between_images_scores_only_what_precedes_it():
    kinds = [VISION, TEXT, VISION, TEXT]
    attention = np.array([[[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.2, 0.3, 0], [0.1, 0.2, 0.3, 0.4]]])
    selection = select(attention, kinds, 0.5)
    assert selection.grounding_positions.tolist() == [1, 3]
    # w = (0.4 + 0.2) / 2 and 0.4 / 1
    np.testing.assert_allclose(selection.scores, [[0.3 * 0.6 + 0.4 * 0.1, 0.4 * 0.3]], rtol=1e-14)
    assert selection.kept.tolist() == [[True, False]]


def test_equal_scores_go_to_the_lower_position():
    attention = np.zeros((1, 5, 5))
    attention[0, 4] = [0.2, 0.2, 0.2, 0.2, 0.2]
    selection = select(attention, [VISION] * 4 + [TEXT], 0.5)
    assert selection.kept.tolist() == [[True, True, False, False]]


def test_scores_equal_a_matrix_formulation():
    rng = np.random.default_rng(0)
    kinds = [TEXT] * 3 + [VISION] * 9 + [TEXT] * 2 + [VISION] * 4 + [TEXT] * 7
    attention = random_attention(rng, 3, kinds)
    selection = select(attention, kinds, 0.3)
    text, vision = np.flatnonzero(np.array(kinds[3:]) == TEXT) + 3, np.flatnonzero(np.array(kinds) == VISION)
    block = attention[:, text][:, :, text]
    weights = block.sum(1) / np.arange(len(text), 0, -1)  # causal: the sum over all queries is that over later ones
    to_vision = attention[:, text][:, :, vision]
    np.testing.assert_allclose(selection.text_weights, weights, rtol=1e-13)
    np.testing.assert_allclose(selection.scores, np.einsum("lt,ltv->lv", weights, to_vision), rtol=1e-13)
    np.testing.assert_allclose(selection.layer_mass, to_vision.sum((1, 2)), rtol=1e-13)


@pytest.mark.parametrize(
    ("num_vision", "layers", "retention", "total"),
    [
        (5, 1, 0.5, 2),  # 2.5: ties to even
        (7, 1, 0.5, 4),  # 3.5
        (50, 3, 0.07, 10),  # 10.5 exactly, though 0.07 * 150 is 10.500000000000002 in binary
        (3, 4, 0.01, 0),  # 0.12: no minimum
        (3, 4, 1.0, 12),
    ],
)
def test_total_budget(num_vision: int, layers: int, retention: float, total: int):
    quota = vision_quotas([1.0 + i for i in range(layers)], retention, num_vision)
    assert sum(quota) == total
    assert sum(largest_remainder(quota)) == total


def quota_by_enumeration(mass: list[int], total: int, num_vision: int) -> list[Fraction]:
    """The one lambda with sum(min(V, lambda * mass)) = total, found by trying every set of full layers."""
    layers = range(len(mass))
    for full in itertools.chain.from_iterable(itertools.combinations(layers, k) for k in range(len(mass) + 1)):
        rest = [i for i in layers if i not in full]
        if not rest:
            return [Fraction(num_vision)] * len(mass)
        scale = Fraction(total - num_vision * len(full), sum(mass[i] for i in rest))
        if all(scale * mass[i] <= num_vision for i in rest) and all(scale * mass[i] >= num_vision for i in full):
            return [Fraction(num_vision) if i in full else scale * mass[i] for i in layers]
    raise AssertionError("no water level found")


def test_water_filling_equals_enumeration():
    rng = np.random.default_rng(1)
    capped = 0
    for _ in range(300):
        layers, num_vision = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        mass = [int(m) for m in rng.integers(1, 60, layers)]
        retention = round(float(rng.uniform(0.01, 1)), 2)
        quota = vision_quotas(mass, retention, num_vision)
        total = round(Fraction(str(retention)) * layers * num_vision)
        assert quota == quota_by_enumeration(mass, total, num_vision)
        capped += any(q == num_vision for q in quota) and not all(q == num_vision for q in quota)
    assert capped > 30, "hardly any case reached the cap"


def test_surplus_with_no_mass_left_is_shared_equally():
    assert vision_quotas([1.0, 0.0, 0.0], 0.5, 4) == [4, 1, 1]
    assert vision_quotas([0.0, 0.0], 0.5, 4) == [2, 2]
    assert total_quotas([0.0, 0.0], 0.5, 4) == [2, 2]


def test_largest_remainder_equals_enumeration():
    """Of all integer vectors with the right sum it is the nearest, and of those the one that favours lower layers."""
    rng = np.random.default_rng(2)
    tied = 0
    for case in range(200):
        layers, num_vision = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        mass = [1] * layers if case % 4 == 0 else [int(m) for m in rng.integers(1, 9, layers)]
        quota = vision_quotas(mass, round(float(rng.uniform(0.05, 1)), 2), num_vision)
        vectors = [v for v in itertools.product(range(num_vision + 1), repeat=layers) if sum(v) == sum(quota)]

        def distance(vector, quota=quota):
            return sum((x - q) ** 2 for x, q in zip(vector, quota, strict=True))

        nearest = min(map(distance, vectors))
        best = [v for v in vectors if distance(v) == nearest]
        tied += len(best) > 1
        assert tuple(largest_remainder(quota)) == max(best)
    assert tied > 20, "hardly any case was a tie"


@pytest.mark.parametrize("scope", ["vision", "total"])
def test_errors_within_the_tolerance_never_turn_an_unmarked_decision(scope: str):
    """Every attention weight is off by up to eps; masses then are off by eps, shares and scores by up to 2 eps."""
    rng = np.random.default_rng(3)
    eps, turned, marked = 0.01, 0, 0.0
    kinds = [TEXT] * 2 + [VISION] * 12 + [TEXT] * 4
    for _ in range(150):
        attention = random_attention(rng, 3, kinds)
        retention = round(float(rng.uniform(0.1, 0.9)), 2)
        exact = select(attention, kinds, retention, scope)
        noisy = select(attention * (1 + rng.uniform(-eps, eps, attention.shape)), kinds, retention, scope)
        check_kept(noisy.kept, exact, 2.1 * eps, max_ambiguous=1)
        turned += bool((noisy.kept != exact.kept).any())
        marked += ambiguous(exact, 2.1 * eps).mean() / 150
    assert turned > 5, "the noise never mattered, so nothing was tested"
    assert marked < 0.35, "almost everything is marked"


def test_exact_ties_are_marked_and_clear_decisions_are_not():
    attention = np.zeros((1, 6, 6))
    attention[0, 5] = [0.4, 0.1, 0.1, 0.1, 0.05, 0.25]
    selection = select(attention, [VISION] * 5 + [TEXT], 0.4)
    assert selection.kept.tolist() == [[True, True, False, False, False]]
    assert ambiguous(selection, 1e-6).tolist() == [[False, True, True, True, False]]


def test_disputed_unit_marks_the_disputed_rank_of_both_layers():
    attention = np.zeros((2, 4, 4))
    attention[:, 3] = [0.1, 0.3, 0.2, 0.4]  # equal masses, 3 units: 1.5 each, layer 0 wins the tie
    selection = select(attention, [VISION] * 3 + [TEXT], 0.5)
    assert selection.budget.tolist() == [2, 1]
    assert ambiguous(selection, 1e-6).tolist() == [[False, False, True], [False, False, True]]
    moved = np.array([[False, True, False], [False, True, True]])
    check_kept(moved, selection, 1e-6, max_ambiguous=1)
    with pytest.raises(AssertionError, match="4 units kept in all"):
        check_kept(np.array([[False, True, True], [False, True, True]]), selection, 1e-6, max_ambiguous=1)


def test_check_kept_refuses_what_it_must():
    selection = select(hand_attention(), KINDS, 0.5)
    check_kept(selection.kept, selection, 1e-6)
    swapped = selection.kept.copy()
    swapped[0] = [True, True, False]
    with pytest.raises(AssertionError, match="2 decisions differ .* layer 0, vision token 0"):
        check_kept(swapped, selection, 1e-6)
    with pytest.raises(AssertionError, match="shape"):
        check_kept(selection.kept[:1], selection, 1e-6)
    with pytest.raises(AssertionError, match="near-ties"):
        check_kept(selection.kept, dataclasses.replace(selection, scores=np.ones((2, 3))), 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retention": 0}, "retention must lie in"),
        ({"retention": 1.5}, "retention must lie in"),
        ({"retention": 0.5, "scope": "all"}, "scope must be one of"),
        ({"retention": 0.5, "kinds": [TEXT] * 6}, "no vision token"),
        ({"retention": 0.5, "kinds": [TEXT] * 4 + [VISION] * 2}, "no new text"),
    ],
)
def test_bad_input_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        select(hand_attention(), **{"kinds": KINDS, **arguments})


def test_a_trace_with_other_budgets_than_its_masses_give_is_refused():
    """Kept and budget of a trace agree by construction under zero bubble: the oracle's arithmetic must be asked."""
    mass, kept = np.array([1.0, 3.0]), np.zeros((2, 8), bool)
    kept[0, :2] = kept[1, :6] = True
    arrays = {"layer_mass": mass, "kept": kept, "budget": kept.sum(1)}
    selection = SimpleNamespace(vision_positions=range(8), num_text=5)
    meta = {"retention": 0.5, "scope": "vision"}
    assert_budget(arrays, meta, selection)
    moved = np.roll(kept, 1, axis=0)
    with pytest.raises(AssertionError):
        assert_budget({"layer_mass": mass, "kept": moved, "budget": moved.sum(1)}, meta, selection)
    with pytest.raises(AssertionError):
        assert_budget(arrays, {**meta, "scope": "total"}, selection)
