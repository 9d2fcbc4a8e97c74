"""Layer budgets in exact arithmetic, so that totals never depend on rounding.

TGV-KV (arXiv 2606.03075) has three parts: text-vision budgeting (TVB: how many vision tokens each layer keeps; here),
text-weighted ranking (TWR: which ones; ``tgv.py``) and text-prioritised retention (TPR: text is never evicted).
Formulas: docs/design.md "Selection". ``L`` layers, ``V`` vision tokens in full, ``n`` tokens; a mass is dimensionless
(attention summed over text queries and vision keys), a budget counts tokens.

Two things decide a layer's budget. The **scope** (``--tgvkv-scope``, here) says how many tokens are kept in all, and
makes integers of the layers' weights. The **budget rule** (``--tgvkv-budget``, ``budget_rules.py``) says what a layer
weighs; TVB weighs it by its mass.

Budgets exist twice: here on the host, exact, for totals that depend on the masses; and in the ``select`` kernel in
float64, for totals that are known beforehand, so that nothing waits for the host.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Protocol, Sequence

from ..errors import SelectionError


class Scope(Protocol):
    """How many vision tokens are kept, in all and (from the layers' weights) in each layer."""

    def total(self, layers: int, vision_tokens: int, retention: Fraction) -> int | None:
        """Units kept in all, if that is known before any score is; else None."""

    def per_layer(self, masses: Sequence[float], vision_tokens: int, tokens: int, retention: Fraction) -> list[int]:
        """Vision tokens to keep in each layer, 0..vision_tokens.

        Args:
            masses: L finite numbers >= 0, what each layer weighs (a budget rule's).
            vision_tokens: vision tokens to choose from. tokens: those and the prompt's text.
            retention: in (0, 1], exact.
        """


def vision_total(layers: int, vision_tokens: int, retention: Fraction) -> int:
    """Units kept in all under ``scope=vision``: the integer nearest to ``layers * retention * vision_tokens``.

    Ties go to the even integer. Known on the host before any score is. ``retention`` is exact, in (0, 1].
    """
    return round(retention * layers * vision_tokens)


def shares(masses: Sequence[float]) -> list[Fraction]:
    """TVB's ``b_l = m_l / sum m``: exact shares that sum to 1 (uniform when no layer has any mass).

    Args:
        masses: ``m_l``, text-to-vision attention mass of each layer, length L, finite and >= 0.

    Returns:
        L fractions.

    Raises:
        SelectionError: a mass is negative or not finite.
    """
    for layer, mass in enumerate(masses):
        if not math.isfinite(mass) or mass < 0:
            raise SelectionError(
                f"layer {layer} has attention mass {mass!r}; masses must be finite and >= 0: send the request with "
                "tgvkv_retention 1.0, and report the model and its dtype"
            )
    total = sum(Fraction(m) for m in masses)
    if total == 0:
        return [Fraction(1, len(masses))] * len(masses)
    return [Fraction(m) / total for m in masses]


def _water_fill(share: Sequence[Fraction], total: int, cap: int) -> list[Fraction]:
    """Real-valued budgets proportional to ``share``, none above ``cap``, summing to ``total``."""
    budget = [Fraction(0)] * len(share)
    open_layers = list(range(len(share)))
    left = Fraction(total)
    while open_layers:
        mass = sum(share[i] for i in open_layers)
        part = {i: left * share[i] / mass if mass else left / len(open_layers) for i in open_layers}
        full = [i for i in open_layers if part[i] > cap]
        if not full:
            for i in open_layers:
                budget[i] = part[i]
            return budget
        for i in full:
            budget[i] = Fraction(cap)
        left -= cap * len(full)
        open_layers = [i for i in open_layers if part[i] <= cap]
    return budget


def _largest_remainder(budget: Sequence[Fraction], total: int) -> list[int]:
    """Integers nearest below plus one for the largest fractional parts; ties go to the lower layer."""
    whole = [math.floor(b) for b in budget]
    order = sorted(range(len(budget)), key=lambda i: (whole[i] - budget[i], i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


def vision_budget(masses: Sequence[float], vision_tokens: int, retention: Fraction) -> list[int]:
    """Kept vision tokens per layer, ``scope=vision``: exact total, each layer at most ``vision_tokens``.

    Args:
        masses: text-to-vision attention mass per layer, length L.
        vision_tokens: |V|.
        retention: exact retention in (0, 1].

    Returns:
        L integers that sum to :func:`vision_total`.

    Raises:
        ScoreError: a mass is negative or not finite.
    """
    total = vision_total(len(masses), vision_tokens, retention)
    return _largest_remainder(_water_fill(shares(masses), total, vision_tokens), total)


def total_budget(masses: Sequence[float], vision_tokens: int, tokens: int, retention: Fraction) -> list[int]:
    """Kept vision tokens per layer, ``scope=total`` (the paper): text first, surplus of a full layer is lost.

    ``keep_l = round(L * tokens * retention * share_l)``; text takes ``tokens - vision_tokens`` of it.

    Args:
        masses: text-to-vision attention mass per layer, length L.
        vision_tokens: |V|. tokens: n, text and vision in full together.
        retention: exact retention in (0, 1].

    Returns:
        L integers, each in 0..vision_tokens; their sum depends on the masses.

    Raises:
        ScoreError: a mass is negative or not finite.
    """
    text = tokens - vision_tokens
    layers = len(masses)
    keep = [round(layers * tokens * retention * share) for share in shares(masses)]
    return [min(max(k - text, 0), vision_tokens) for k in keep]


class VisionScope:
    """``--tgvkv-scope vision``: a share of the vision tokens, in all exactly :func:`vision_total`."""

    def total(self, layers: int, vision_tokens: int, retention: Fraction) -> int:
        return vision_total(layers, vision_tokens, retention)

    def per_layer(self, masses: Sequence[float], vision_tokens: int, tokens: int, retention: Fraction) -> list[int]:
        return vision_budget(masses, vision_tokens, retention)


class TotalScope:
    """``--tgvkv-scope total``, the paper's: a share of all tokens, text first."""

    def total(self, layers: int, vision_tokens: int, retention: Fraction) -> None:
        return None

    def per_layer(self, masses: Sequence[float], vision_tokens: int, tokens: int, retention: Fraction) -> list[int]:
        return total_budget(masses, vision_tokens, tokens, retention)
