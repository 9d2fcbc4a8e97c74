"""Layer budgets: exact totals, caps and water-filling, against brute force and the oracle's own implementation."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.selection import largest_remainder, total_quotas, vision_quotas
from tgvkv_sglang.errors import SelectionError
from tgvkv_sglang.selection.budget import shares, total_budget, vision_budget, vision_total

MASSES = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-12, 1e6), st.integers(1, 5).map(float)), min_size=1, max_size=9
)
RETENTIONS = st.integers(1, 100).map(lambda percent: percent / 100)


def exact(retention: float) -> Fraction:
    return Fraction(str(retention))


@given(MASSES, st.integers(1, 300), RETENTIONS)
def test_vision_budget_meets_the_total_and_the_cap(masses, tokens, retention):
    budget = vision_budget(masses, tokens, exact(retention))
    assert sum(budget) == vision_total(len(masses), tokens, exact(retention))
    assert all(0 <= b <= tokens for b in budget)
    assert abs(sum(budget) - len(masses) * tokens * exact(retention)) <= Fraction(1, 2)
    order = sorted(range(len(masses)), key=lambda i: masses[i])
    assert all(budget[i] <= budget[j] + 1 for i, j in zip(order, order[1:], strict=False)), "more mass, less budget"


@given(MASSES, st.integers(1, 300), RETENTIONS)
def test_vision_budget_equals_the_oracle(masses, tokens, retention):
    assert vision_budget(masses, tokens, exact(retention)) == largest_remainder(
        vision_quotas(masses, retention, tokens)
    )


def filled_by_bisection(masses: list[float], total: int, cap: int) -> list[float]:
    """Water-filling by its definition: budgets ``min(cap, level * mass)`` at the level where they sum to total."""
    low, high = 0.0, 1e30
    for _ in range(400):
        level = (low + high) / 2
        low, high = (level, high) if math.fsum(min(cap, level * m) for m in masses) < total else (low, level)
    return [min(cap, high * m) for m in masses]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 200), RETENTIONS)
def test_water_filling_by_bisection(masses, tokens, retention):
    total = vision_total(len(masses), tokens, exact(retention))
    real = filled_by_bisection(masses, total, tokens)
    for got, want in zip(vision_budget(masses, tokens, exact(retention)), real, strict=True):
        assert math.floor(want - 1e-6) <= got <= math.ceil(want + 1e-6)


@given(MASSES, st.integers(1, 100), st.integers(0, 100), RETENTIONS)
def test_total_budget_equals_the_oracle(masses, vision, text, retention):
    want = [min(max(round(q) - text, 0), vision) for q in total_quotas(masses, retention, vision + text)]
    assert total_budget(masses, vision, vision + text, exact(retention)) == want


def test_by_hand():
    # 3 layers * 0.2 * 10 = 6, by 3:2:1
    assert vision_budget([3.0, 2.0, 1.0], 10, Fraction(1, 5)) == [3, 2, 1]
    # 2 * 0.75 * 10 = 15; 9:1 would be 13.5 and 1.5, the first is capped at 10 and the second gets the rest
    assert vision_budget([9.0, 1.0], 10, Fraction(3, 4)) == [10, 5]
    # 3 * 0.6 * 10 = 18; 8:1:1 would be 14.4, 1.8, 1.8; the surplus 4.4 is halved: 10, 4, 4
    assert vision_budget([8.0, 1.0, 1.0], 10, Fraction(3, 5)) == [10, 4, 4]
    # a full layer's surplus reaches layers that have no mass at all
    assert vision_budget([1.0, 0.0, 0.0], 10, Fraction(3, 5)) == [10, 4, 4]


def test_remainders_go_to_the_lower_layer_on_a_tie():
    assert vision_budget([1.0, 1.0, 1.0, 1.0], 10, Fraction(3, 20)) == [2, 2, 1, 1]
    assert vision_budget([0.0, 0.0, 0.0], 5, Fraction(1, 3)) == [2, 2, 1]


def test_total_scope_by_hand():
    # 2 layers * 20 tokens * 0.5 = 20, by 3:1 is 15 and 5; 8 are text: 7 and 0, and the missing 3 are not made up for
    assert total_budget([3.0, 1.0], 12, 20, Fraction(1, 2)) == [7, 0]
    # 2 * 20 * 0.9 = 36, by 3:1 is 27 and 9; 12 vision tokens at most
    assert total_budget([3.0, 1.0], 12, 20, Fraction(9, 10)) == [12, 1]
    # Python's round: halves go to the even integer, 2.5 -> 2 and 7.5 -> 8
    assert total_budget([1.0, 3.0], 10, 10, Fraction(1, 2)) == [2, 8]


def test_retention_is_the_decimal_that_was_written():
    # 0.1 as a binary float is above one tenth: 0.1 * 5 would round to 1, one tenth of 5 is a tie and goes to 0
    assert vision_total(1, 5, Fraction("0.1")) == 0 and vision_total(1, 5, Fraction(0.1)) == 1
    assert vision_total(1, 15, Fraction("0.1")) == 2


@pytest.mark.parametrize("retention", [Fraction(1), Fraction(1, 1)])
def test_retention_one_keeps_everything(retention):
    assert vision_budget([5.0, 0.0, 1e-9], 7, retention) == [7, 7, 7]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_mass_is_named(bad):
    with pytest.raises(SelectionError, match="layer 1 has attention mass"):
        vision_budget([1.0, bad], 4, Fraction(1, 2))


def test_shares_are_exact():
    assert shares([0.1, 0.2, 0.3]) == [Fraction(m) / sum(map(Fraction, (0.1, 0.2, 0.3))) for m in (0.1, 0.2, 0.3)]
    assert sum(shares([1e-300, 1e300, 7.0])) == 1
