"""`select`: references against exact arithmetic and Python sorting, kernels equal to the references."""

import math
from fractions import Fraction

import pytest
import torch
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.select import select_batch, view_units

from tests.kernels.kernel_support import NAN, assert_same_bits, generator
from tgvkv_sglang.selection.budget import vision_budget

MASSES = {
    "equal": [1.0] * 7,
    "one layer has all": [0.0, 0.0, 5.0, 0.0],
    "none has any": [0.0] * 5,
    "tiny beside large": [1e-30, 1.0, 1e-7, 3.0],
    "thirds": [1.0, 1.0, 1.0, 2.0, 1.0],
    "halves": [1.0, 3.0, 1.0, 3.0],
    "one layer": [0.25],
}


def random_masses(seed, layers=None):
    gen = generator(seed)
    layers = int(torch.randint(1, 40, (), generator=gen)) if layers is None else layers
    return (torch.rand(layers, generator=gen) ** 4 + 1e-4).tolist()


def totals(layers, cap):
    return sorted({0, 1, layers * cap // 20, layers * cap // 3, layers * cap // 2 + 1, layers * cap - 1, layers * cap})


def python_top(row, count):
    """Higher first, ties to the lower position; -0 equals 0 and NaN is lowest, as the contract says."""
    clean = [float("-inf") if value != value else value for value in row]  # noqa: PLR0124
    return sorted(sorted(range(len(row)), key=lambda i: (-clean[i], i))[:count])


def hard_scores(seed, layers, vision):
    """Many ties, both zeros, infinities and a NaN."""
    gen = generator(seed)
    scores = (torch.randn(layers, vision, generator=gen) * 2).round() / 2
    scores[0, torch.randperm(vision, generator=gen)[: vision // 3]] = -0.0
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45])
    scores[-1, : min(5, vision)] = special[:vision]
    return scores


def select(scores, masses=None, total=None, *, budget=None, **how):
    """`select_batch` for one request: ``(positions, layer_ptr)``."""
    budgets = None if budget is None else torch.tensor(budget, dtype=torch.int32)[:, None]
    totals = [total if budget is None else sum(budget)]
    vision = scores.shape[1]
    masses = None if masses is None else masses[:, None]
    positions, layer_ptr, _ = select_batch(
        scores, masses, [vision], totals, torch.arange(vision), vision, budgets=budgets, **how
    )
    return positions, layer_ptr[0]


def layer_budgets(masses, total, cap, **how):
    """Budgets that the masses alone make."""
    return select(torch.zeros(len(masses), cap), masses, total, **how)[1].diff()


def check_kernels(seed, layers, vision):
    masses = torch.tensor(random_masses(seed, layers))
    scores = hard_scores(seed, layers, vision)
    slots = torch.randperm(5000, generator=generator(seed))[:vision]
    for total in sorted({0, layers * vision // 3, layers * vision}):
        positions, layer_ptr = select(scores, masses, total)
        got = select(scores, masses, total, backend="triton")
        assert_same_bits("positions", got[0], positions)
        assert_same_bits("layer_ptr", got[1], layer_ptr)
        for span_slots in (slots, slots.int()):
            units = view_units(positions, layer_ptr, span_slots, 5000)
            assert_same_bits("units", view_units(*got, span_slots, 5000, backend="triton"), units)
    lumpy = torch.randint(0, vision + 1, (layers,), generator=generator(seed + 1)).tolist()
    for given, expected in zip(
        select(scores, budget=lumpy, backend="triton"), select(scores, budget=lumpy), strict=True
    ):
        assert_same_bits("by budget", given, expected)


def check_budgets(masses, caps):
    mass = torch.tensor(masses)
    for cap in caps:
        for total in totals(len(masses), cap):
            budget = layer_budgets(mass, total, cap)
            assert_same_bits("budget", layer_budgets(mass, total, cap, backend="triton"), budget)


def check_large_ids():
    """Units beyond 2^31 come out as int64."""
    layer_ptr = torch.tensor([0, 1, 3], dtype=torch.int32)
    positions = torch.tensor([1, 0, 1], dtype=torch.int32)
    slots = torch.tensor([7, 2**30 - 1])
    for per_layer, dtype in ((2**30, torch.int32), (2**30 + 1, torch.int64)):
        units = view_units(positions, layer_ptr, slots, per_layer)
        assert units.dtype == dtype and units.tolist() == [2**30 - 1, per_layer + 7, per_layer + 2**30 - 1]
        assert_same_bits("units", view_units(positions, layer_ptr, slots, per_layer, backend="triton"), units)


def check_strided_scores():
    scores = hard_scores(3, 4, 50).T.contiguous().T
    assert scores.stride(1) != 1
    for got, expected in zip(
        select(scores, budget=[3, 0, 50, 7], backend="triton"), select(scores, budget=[3, 0, 50, 7]), strict=True
    ):
        assert_same_bits("strided", got, expected)
    empty = select(scores, budget=[0] * 4, backend="triton")
    assert empty[0].shape == (0,) and empty[1].tolist() == [0] * 5


@pytest.mark.parametrize("masses", [*MASSES.values(), *(random_masses(seed) for seed in range(20))])
def test_budgets_equal_the_exact_ones(masses):
    """The host's exact-rational budgets (`tgvkv_sglang.selection.budget`) and the device's float64 ones agree."""
    layers = len(masses)
    stored = torch.tensor(masses)
    for cap in (1, 5, 576):
        for total in totals(layers, cap):
            exact = vision_budget(stored.tolist(), cap, Fraction(total, layers * cap))
            assert layer_budgets(stored, total, cap).tolist() == exact
            assert sum(exact) == total


@pytest.mark.parametrize("vision", [1, 2, 40])
def test_top_positions_equal_python_sorting(vision):
    scores = hard_scores(vision, 3, vision)
    for count in {0, 1, vision // 2, vision}:
        positions, layer_ptr = select(scores, budget=[count, vision - count, 1])
        expected = [
            python_top(row, budget) for row, budget in zip(scores.tolist(), (count, vision - count, 1), strict=True)
        ]
        assert positions.tolist() == sum(expected, [])
        assert layer_ptr.tolist() == [0, count, vision, vision + 1]


def test_view_units_by_hand():
    units = view_units(
        torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([0, 2, 2, 3]), torch.tensor([9, 4, 6]), 100
    )
    assert units.tolist() == [9, 6, 204] and units.dtype == torch.int32


# 1024 positions are one block of the kernel: 2100 need three.
@pytest.mark.parametrize(("layers", "vision"), [(1, 1), (5, 127), (4, 128), (3, 129), (5, 700), (1, 2100)])
def test_kernels_equal_references(interpreted, layers, vision):
    interpreted(check_kernels, vision, layers, vision)


@pytest.mark.parametrize("masses", [*MASSES.values(), random_masses(30, 36)])
def test_budget_kernel_equals_reference(interpreted, masses):
    interpreted(check_budgets, masses, (1, 6, 576) if len(masses) < 10 else (577,))


def test_large_ids_strides_and_empty(interpreted):
    interpreted(check_large_ids)
    interpreted(check_strided_scores)


def batch_of(seed, visions, layers):
    gen = generator(seed)
    scores = torch.cat([hard_scores(seed + i, layers, vision) for i, vision in enumerate(visions)], dim=1)
    masses = torch.stack([torch.tensor(random_masses(seed + i, layers)) for i in range(len(visions))], dim=1)
    slots = torch.randperm(5000, generator=gen)[: sum(visions)]
    return scores, masses, slots


def one_by_one(scores, masses, visions, totals, slots, backend):
    """What `select` and `view_units` choose for each request alone."""
    start, chosen = 0, []
    for request, (vision, total) in enumerate(zip(visions, totals, strict=True)):
        own = slice(start, start + vision)
        positions, layer_ptr = select(scores[:, own].contiguous(), masses[:, request], total, backend=backend)
        units = view_units(positions, layer_ptr, slots[own], 5000, backend=backend)
        chosen.append((positions, layer_ptr, units))
        start += vision
    positions, layer_ptr, units = zip(*chosen, strict=True)
    return torch.cat(positions), torch.stack(layer_ptr), torch.cat(units)


def check_batch(backend):
    visions, layers = [1, 130, 40, 1100], 5
    scores, masses, slots = batch_of(70, visions, layers)
    totals = [5, 33, 0, 1200]
    for span_slots in (slots, slots.int()):
        got = select_batch(scores, masses, visions, totals, span_slots, 5000, backend=backend)
        expected = one_by_one(scores, masses, visions, totals, slots, "reference")
        for name, g, want in zip(("positions", "layer_ptr", "units"), got, expected, strict=True):
            assert_same_bits(name, g, want)
    every = select_batch(scores, masses, visions, [layers * v for v in visions], slots, 5000, backend=backend)
    assert every[2].dtype == torch.int32 and len(every[0]) == layers * sum(visions)
    spoiled = masses.clone()
    spoiled[1, 0], spoiled[3, 0], spoiled[0, 1], spoiled[4, 3] = NAN, -1.0, math.inf, -math.inf
    zeroed = torch.where(spoiled.isfinite(), spoiled, 0.0)
    got = select_batch(scores, spoiled, visions, totals, slots, 5000, backend=backend)
    for name, g, want in zip(("positions", "layer_ptr", "units"), got,
                             one_by_one(scores, zeroed, visions, totals, slots, "reference"), strict=True):  # fmt: skip
        assert_same_bits(f"{name} with masses that are not finite", g, want)
    wide = select_batch(scores, masses, visions, totals, slots, 2**30, backend=backend)
    assert wide[2].dtype == torch.int64 and int(wide[2].max()) > 2**31


def check_given_budgets(backend):
    """Scores with many ties; budgets from none to all, against Python's sort."""
    visions, layers = [1, 130, 40, 1100], 5
    scores, _, slots = batch_of(71, visions, layers)
    gen = generator(72)
    budgets = torch.stack([torch.randint(0, v + 1, (layers,), generator=gen, dtype=torch.int32) for v in visions], 1)
    budgets[:, 2] = torch.tensor([0, 40, 0, 7, 1])
    totals = budgets.sum(0).tolist()
    positions, layer_ptr, units = [], [], []
    for request, own in enumerate(torch.split(scores, visions, dim=1)):
        kept = [python_top(row, count) for row, count in zip(own.tolist(), budgets[:, request].tolist(), strict=True)]
        positions += sum(kept, [])
        layer_ptr.append([sum(map(len, kept[:layer])) for layer in range(layers + 1)])
        first = sum(visions[:request])
        units += [layer * 5000 + int(slots[first + p]) for layer, own_kept in enumerate(kept) for p in own_kept]
    for span_slots in (slots, slots.int()):
        for masses in (None, torch.full((layers, len(visions)), NAN)):
            got = select_batch(scores, masses, visions, totals, span_slots, 5000, budgets=budgets, backend=backend)
            assert [part.tolist() for part in got] == [positions, layer_ptr, units]


def test_a_batch_is_its_requests_one_by_one():
    check_batch("reference")


def test_batch_kernel_equals_the_reference(interpreted):
    interpreted(check_batch, "triton")


def test_given_budgets_are_kept():
    check_given_budgets("reference")


def test_batch_kernel_keeps_given_budgets(interpreted):
    interpreted(check_given_budgets, "triton")


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, -2.0])
def test_a_mass_that_is_no_number_counts_as_zero(bad):
    assert layer_budgets(torch.tensor([1.0, bad, 3.0]), 8, 10).tolist() == [2, 0, 6]
    assert layer_budgets(torch.tensor([bad, bad]), 4, 10).tolist() == [2, 2]


def test_batch_errors_name_the_value():
    scores, masses, slots = batch_of(1, [3, 4], 2)
    with pytest.raises(KernelInputError, match=r"total=9 is outside 0\.\.2\*4"):
        select_batch(scores, masses, [3, 4], [1, 9], slots, 100)
    with pytest.raises(KernelInputError, match="2 layers, 2 vision lengths, 1 totals"):
        select_batch(scores, masses, [3, 4], [1], slots, 100)
    with pytest.raises(KernelInputError, match=r"scores has shape \[2, 7\], expected \[\*, 8\]"):
        select_batch(scores, masses, [4, 4], [1, 1], slots, 100)
    with pytest.raises(KernelInputError, match="give layer_mass or budgets"):
        select_batch(scores, None, [3, 4], [1, 1], slots, 100)
    for budgets in ([[1, 4], [1, 0]], [[1, 5], [0, -1]], [[4, 1], [-3, 3]]):
        given = torch.tensor(budgets, dtype=torch.int32)
        with pytest.raises(KernelInputError, match=r"budgets of request \d are \[.*must lie in 0\.\.\d"):
            select_batch(scores, None, [3, 4], [1, 4], slots, 100, budgets=given)
    with pytest.raises(KernelInputError, match="budgets has dtype torch.int64"):
        select_batch(scores, None, [3, 4], [1, 4], slots, 100, budgets=torch.ones(2, 2, dtype=torch.int64))


def test_errors_name_the_value():
    scores = torch.zeros(2, 5)
    with pytest.raises(KernelInputError, match="total=11"):
        select(scores, torch.ones(2), 11)
    with pytest.raises(KernelInputError, match=r"\[6, 0\]"):
        select(scores, budget=[6, 0])
    with pytest.raises(KernelInputError, match="layer_mass or budgets"):
        select(scores, total=1)
