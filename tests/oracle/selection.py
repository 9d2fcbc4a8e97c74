"""Text-grounded selection by brute force: docs/design.md "Selection" (arXiv 2606.03075: TVB, TWR, TPR) in plain loops.

Nothing here is shared with the plugin and nothing is clever: attention matrices are given in full, sums are exact
(``math.fsum``), budgets are rational numbers. Shapes: L layers, n tokens, V vision tokens in full, T grounding tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

TEXT = 0
VISION = 1
VIEWED = 2
"""Kinds of token: text, vision in full, vision of which only an earlier view is left (keeps that view, not scored)."""

SCOPES = ("vision", "total")


@dataclass(frozen=True)
class Selection:
    """What one prefill keeps, with everything that led to it.

    Attributes:
        vision_positions: int64 [V], positions of the scored vision tokens, ascending.
        grounding_positions: int64 [T], positions of the text tokens that scored them, ascending.
        text_weights: float64 [L, T], TWR weight of each grounding token.
        scores: float64 [L, V], higher = keep.
        layer_mass: float64 [L], attention mass from grounding text to vision.
        quota: exact real-valued number of tokens each layer is due, before rounding. In scope ``total`` it counts
            tokens of all kinds, in scope ``vision`` vision tokens after the cap and the water-filling.
        budget: int64 [L], vision tokens kept per layer.
        kept: bool [L, V].
        num_text: text tokens, which scope ``total`` serves first.
        scope: ``vision`` or ``total``.
    """

    vision_positions: np.ndarray
    grounding_positions: np.ndarray
    text_weights: np.ndarray
    scores: np.ndarray
    layer_mass: np.ndarray
    quota: tuple[Fraction, ...]
    budget: np.ndarray
    kept: np.ndarray
    num_text: int
    scope: str


def select(
    attention: np.ndarray, kinds: Sequence[int], retention: float | str, scope: str = "vision", new_text_start: int = 0
) -> Selection:
    """Select vision tokens from full attention matrices.

    Args:
        attention: float64 [L, n, n], softmax attention averaged over query heads, queries in rows. Rows of other
            tokens than the grounding text are not read and may be NaN.
        kinds: [n] of TEXT, VISION, VIEWED.
        retention: kept share, read as the decimal number it prints as (0.1 is one tenth exactly).
        scope: ``vision`` or ``total``.
        new_text_start: position of the first token that this prefill computed; text before it does not ground.

    Raises:
        ValueError: unknown scope, retention out of (0, 1], no vision token in full, or no grounding text.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if not 0 < as_fraction(retention) <= 1:
        raise ValueError(f"retention must lie in (0, 1], got {retention!r}")
    vision = [p for p, kind in enumerate(kinds) if kind == VISION]
    if not vision:
        raise ValueError("there is no vision token in full to select from")
    text = [p for p, kind in enumerate(kinds) if kind == TEXT and p >= new_text_start and p > vision[0]]
    if not text:
        raise ValueError("there is no new text after the first vision token, so nothing grounds a selection")

    weights = np.array([[_text_weight(layer, text, t) for t in text] for layer in attention])
    scores = np.array([_vision_scores(layer, text, vision, w) for layer, w in zip(attention, weights, strict=True)])
    mass = np.array([math.fsum(layer[t, v] for t in text for v in vision) for layer in attention])
    num_text = sum(kind == TEXT for kind in kinds)
    quota, budget = budgets(mass, retention, len(vision), num_text, scope)
    kept = np.array([_top_k(row, k) for row, k in zip(scores, budget, strict=True)])
    return Selection(
        vision_positions=np.array(vision),
        grounding_positions=np.array(text),
        text_weights=weights,
        scores=scores,
        layer_mass=mass,
        quota=tuple(quota),
        budget=np.array(budget),
        kept=kept,
        num_text=num_text,
        scope=scope,
    )


def as_fraction(retention: float | str) -> Fraction:
    """0.1 means one tenth, not the binary number next to it."""
    return Fraction(str(retention))


def _text_weight(attention: np.ndarray, text: list[int], t: int) -> float:
    """TWR: mean attention that token t gets from the grounding queries that can see it, itself included."""
    queries = [q for q in text if q >= t]
    return math.fsum(attention[q, t] for q in queries) / len(queries)


def _vision_scores(attention: np.ndarray, text: list[int], vision: list[int], weights: np.ndarray) -> list[float]:
    return [math.fsum(w * attention[t, v] for t, w in zip(text, weights, strict=True)) for v in vision]


def _top_k(scores: np.ndarray, k: int) -> list[bool]:
    best = set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    return [i in best for i in range(len(scores))]


def budgets(
    mass: Sequence[float], retention: float | str, num_vision: int, num_text: int, scope: str
) -> tuple[list[Fraction], list[int]]:
    """(real-valued quota, vision tokens kept) of each layer; ``mass [L]`` as in :class:`Selection`."""
    if scope == "vision":
        quota = vision_quotas(mass, retention, num_vision)
        return quota, largest_remainder(quota)
    quota = total_quotas(mass, retention, num_text + num_vision)
    return quota, [min(max(0, round(q) - num_text), num_vision) for q in quota]


def vision_quotas(mass: Sequence[float], retention: float | str, num_vision: int) -> list[Fraction]:
    """Scope ``vision``: L * retention * V units in all, by mass, at most V a layer, the surplus water-filled.

    The total is the nearest integer, ties to even. Surplus goes to the layers that are not full in proportion to their
    mass (equally if they have none), again and again until no layer is above V.
    """
    layers = range(len(mass))
    exact = [Fraction(float(m)) for m in mass]
    left = Fraction(round(len(mass) * as_fraction(retention) * num_vision))
    quota = [Fraction(0)] * len(mass)
    open_layers = list(layers)
    while left and open_layers:
        share = [exact[i] for i in open_layers]
        if not sum(share):
            share = [Fraction(1)] * len(open_layers)
        for i, s in zip(open_layers, share, strict=True):
            quota[i] += left * s / sum(share)
        left = sum((max(Fraction(0), q - num_vision) for q in quota), Fraction(0))
        quota = [min(q, Fraction(num_vision)) for q in quota]
        open_layers = [i for i in open_layers if quota[i] < num_vision]
    return quota


def total_quotas(mass: Sequence[float], retention: float | str, num_tokens: int) -> list[Fraction]:
    """Scope ``total`` (the paper's): L * n * retention tokens of all kinds, by mass; no cap, no water-filling."""
    exact = [Fraction(float(m)) for m in mass]
    total = len(mass) * num_tokens * as_fraction(retention)
    if not sum(exact):
        return [total / len(mass)] * len(mass)
    return [total * m / sum(exact) for m in exact]


def largest_remainder(quota: Sequence[Fraction]) -> list[int]:
    """Integers with the sum of ``quota`` (an integer): round down, then one more by remainder, ties to the lower."""
    floors = [math.floor(q) for q in quota]
    seats = sum(quota) - sum(floors)
    by_remainder = sorted(range(len(quota)), key=lambda i: (floors[i] - quota[i], i))
    return [f + (i in by_remainder[: int(seats)]) for i, f in enumerate(floors)]


def ambiguous(selection: Selection, eps: float) -> np.ndarray:
    """Decisions that a relative error of ``eps`` in masses and scores could turn, bool [L, V].

    An engine that computes in float32 gets every mass and score with some relative error, so what is decided by less
    than that is not wrong either way. Two things can tip: which layer gets a unit (then the tokens at the disputed
    ranks of both layers), and which side of a layer's threshold a token is on. Everything else must match exactly.
    """
    marks = np.zeros_like(selection.kept)
    for layer, (low, high) in enumerate(_possible_budgets(selection, eps)):
        scores = selection.scores[layer]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        marks[layer, order[low:high]] = True
        for budget in range(low, high + 1):
            if 0 < budget < len(order):
                last_in, first_out = scores[order[budget - 1]], scores[order[budget]]
                marks[layer, [i for i in order[:budget] if scores[i] - first_out <= eps * last_in]] = True
                marks[layer, [i for i in order[budget:] if last_in - scores[i] <= eps * last_in]] = True
    return marks


def _possible_budgets(selection: Selection, eps: float) -> list[tuple[int, int]]:
    """Lowest and highest budget of each layer that quotas within a relative ``eps`` could round to."""
    num_vision = selection.kept.shape[1]
    if selection.scope == "total":
        bounds = []
        for q in selection.quota:
            ends = (round(q * (1 - Fraction(eps))), round(q * (1 + Fraction(eps))))
            bounds.append(tuple(min(max(0, k - selection.num_text), num_vision) for k in ends))
        return bounds
    budget = [int(k) for k in selection.budget]
    remainder = [q - math.floor(q) for q in selection.quota]
    seated = [k > math.floor(q) for k, q in zip(budget, selection.quota, strict=True)]
    bounds = [[k, k] for k in budget]
    for i in range(len(budget)):
        for j in range(len(budget)):
            error = Fraction(eps) * (selection.quota[i] + selection.quota[j])
            if seated[i] and not seated[j] and remainder[i] - remainder[j] <= error:
                bounds[i][0] = budget[i] - 1
                bounds[j][1] = min(budget[j] + 1, num_vision)
    return [(low, high) for low, high in bounds]


def check_kept(kept: np.ndarray, selection: Selection, eps: float, max_ambiguous: float = 0.05) -> None:
    """Compare an engine's ``kept`` bool [L, V] with the oracle's, allowing for ``ambiguous`` decisions only.

    Raises:
        AssertionError: shapes differ; a decision outside the tolerance differs; a layer's budget is impossible; in
            scope ``vision`` the total is not met exactly; or more than ``max_ambiguous`` of all decisions are within
            the tolerance, so that the comparison would say little.
    """
    if kept.shape != selection.kept.shape:
        raise AssertionError(f"kept has shape {kept.shape}, the oracle's {selection.kept.shape}")
    excused = ambiguous(selection, eps)
    wrong = np.argwhere((kept != selection.kept) & ~excused)
    if len(wrong):
        layer, token = (int(x) for x in wrong[0])
        raise AssertionError(
            f"{len(wrong)} decisions differ beyond a relative tolerance of {eps}; first: layer {layer}, vision token "
            f"{token}, kept {bool(kept[layer, token])}, oracle {bool(selection.kept[layer, token])}, budgets "
            f"{kept.sum(1).tolist()} against {selection.budget.tolist()}"
        )
    counts = kept.sum(1).tolist()
    if any(not low <= k <= high for k, (low, high) in zip(counts, _possible_budgets(selection, eps), strict=True)):
        raise AssertionError(f"budgets {counts}, oracle {selection.budget.tolist()}, beyond a tolerance of {eps}")
    if selection.scope == "vision" and sum(counts) != selection.budget.sum():
        raise AssertionError(f"{sum(counts)} units kept in all, the budget is {selection.budget.sum()}")
    if excused.mean() > max_ambiguous:
        raise AssertionError(f"{excused.mean():.1%} of decisions are near-ties: the comparison says too little")
