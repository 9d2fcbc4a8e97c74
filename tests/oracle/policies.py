"""Policies and budget rules other than the paper's, by brute force: every published formula in plain loops, exact sums.

Nothing here is shared with the plugin. All take full attention matrices by head, ``attention`` float64 ``[H, n, n]`` of
one layer, queries in rows; ``text`` are the asking tokens' positions, ``spans`` the images' (start, end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

Spans = Sequence[tuple[int, int]]


def asking(policy: str, spans: Spans, start: int, n: int) -> list[int]:
    """Positions of the tokens whose queries a policy asks with, of a prompt of n tokens that is new from start on."""
    vision = {p for first, end in spans for p in range(first, end)}
    after = [p for p in range(start, n) if p > spans[0][0] and p not in vision]
    if policy == "h2o":
        return [p for p in range(start, n) if p >= spans[0][0]]
    if policy == "last-query":
        return after[-1:]
    if policy in ("snapkv", "pyramidkv"):
        return after[-64:]
    return after


def scores(policy: str, layers: Sequence[np.ndarray], text: list[int], spans: Spans) -> np.ndarray:
    """float64 ``[L, V]`` of every layer's attention ``[H, n, n]``."""
    vision = [p for first, end in spans for p in range(first, end)]
    if policy == "streamingllm":
        return np.array([[1e9 if v < 4 else v for v in vision]] * len(layers))
    if policy == "peak-last":
        own = [[_discounted_peak(a, text, v) for v in vision] for a in layers]
        return np.array([[max([row[i]] + [other[i] / 8 for other in own]) for i in range(len(vision))] for row in own])
    if policy in ("snapkv", "pyramidkv"):
        return np.array([_pooled(a, text, spans) for a in layers])
    return np.array([[_ONE[policy](a, text, v) for v in vision] for a in layers])


def masses(policy: str, layers: Sequence[np.ndarray], text: list[int], spans: Spans) -> list[float]:
    """What the rule ``tvb`` goes by: attention from the asking tokens to vision, mean over heads."""
    vision = [p for first, end in spans for p in range(first, end)]
    weight = {t: 1.0 for t in text}
    if policy == "peak-last":
        weight = {t: 1.0 if t == text[-1] else 1 / 32 for t in text}
    return [math.fsum(weight[t] * a[h, t, v] for h in range(len(a)) for t in text for v in vision) / len(a)
            for a in layers]  # fmt: skip


def _received(attention: np.ndarray, text: list[int], v: int) -> float:
    return math.fsum(attention[h, t, v] for h in range(len(attention)) for t in text) / len(attention)


def _peak(attention: np.ndarray, text: list[int], v: int) -> float:
    return max(attention[h, t, v] for h in range(len(attention)) for t in text)


def _fourth_powers(attention: np.ndarray, text: list[int], v: int) -> float:
    return math.fsum(attention[h, t, v] ** 4 for h in range(len(attention)) for t in text)


def _discounted_peak(attention: np.ndarray, text: list[int], v: int) -> float:
    return max(attention[h, t, v] / (1 if t == text[-1] else 32) for h in range(len(attention)) for t in text)


def _pooled(attention: np.ndarray, text: list[int], spans: Spans) -> list[float]:
    """Mean over a token, two before and two behind it; outside of its image they count as 0."""
    return [
        math.fsum(_received(attention, text, p) for p in range(v - 2, v + 3) if first <= p < end) / 5
        for first, end in spans
        for v in range(first, end)
    ]


_ONE: dict[str, Callable[[np.ndarray, list[int], int], float]] = {
    "peak": _peak,
    "peak4": _fourth_powers,
    "uniform-attention": _received,
    "vl-cache": _received,
    "h2o": _received,
    "last-query": _received,
}

def pyramid_weights(layers: int) -> list[float]:
    """PyramidKV's arithmetic: the last layer has 1/20 of the mean, the first the rest of twice it, a line between."""
    last = 1 / 20
    first = 2 - last
    return [first + (last - first) * i / (layers - 1) for i in range(layers)]


def vl_cache_weights(
    layers: Sequence[np.ndarray], text: list[int], vision: Sequence[int], retention: Fraction
) -> list[float]:
    """VL-Cache's budgets before they are made to sum up again."""
    keys = sorted({*vision, *text})
    density = []
    for attention in layers:
        sparsity = []
        for head in attention:
            pairs = zeros = 0
            for q in text:
                row = [head[q, j] for j in keys if j <= q]
                pairs += len(row)
                zeros += sum(a < 0.01 * max(row) for a in row)
            sparsity.append(zeros / pairs)
        density.append(1 - math.fsum(sparsity) / len(sparsity))
    total = math.fsum(density)
    return [min(max(d / total * float(retention) * len(layers), 0.01), 1.0) for d in density]
