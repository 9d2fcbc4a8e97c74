"""TGV-KV as its authors' code chooses, quirks included, vectorised where ``selection.py`` has loops.

Shares nothing with the plugin or with ``selection.py``. Where the plugin differs on purpose stands in docs/design.md,
"Where the published code differs".
"""

from __future__ import annotations

import numpy as np

SINKS = 4


def keep(attention: np.ndarray, first_image: int, image_tokens: int, removed: float) -> np.ndarray:
    """Kept tokens of every kind, bool ``[L, n]``.

    Args:
        attention: ``[L, n, n]`` softmax attention, mean over heads, queries in rows.
        first_image: position of the first vision token. image_tokens: of all images.
        removed: share of all KV that goes (their setting counts what is removed).
    """
    layers, n, _ = attention.shape
    after = first_image + image_tokens  # "text" is what follows as many tokens as there are vision tokens
    text, vision = np.arange(after, n), np.arange(first_image, after)
    to_vision = attention[:, text][:, :, vision]
    mass = to_vision.sum((1, 2))
    counts = np.rint(layers * n * (1 - removed) * mass / mass.sum()).astype(int).clip(max=n)  # surplus is lost
    among_text = np.tril(attention[:, text][:, :, text])
    weights = among_text.sum(1) / np.arange(len(text), 0, -1)
    score = np.full((layers, n), -1.0)
    score[:, vision] = np.einsum("lt,ltv->lv", weights, to_vision)
    score[:, text] = 1e6  # text comes first
    score[:, :SINKS] = score[:, -1] = 1e9  # and these before any other
    rank = np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)
    return rank < counts[:, None]
