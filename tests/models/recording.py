"""What attention was given and gave in a live server, and what it should have given, in float64 and plain numpy.

Nothing of the plugin is used here. Shapes: L layers, n tokens, H query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.oracle.selection import TEXT, VISION, Selection, select

ATTENTION_ATOL = 2e-5
"""float32 against float64, values of about 1 (the largest difference seen is about 2e-6)."""


@dataclass
class Forward:
    """One forward of one request: positions ``[start, start + t)``; q and out [L, t, H, D], k and v [L, t, G, D]."""

    start: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    scaling: float

    @property
    def end(self) -> int:
        return self.start + self.q.shape[1]


def read(directory: Path, rid: str, end: int) -> list[Forward]:
    """The forwards of a request up to position ``end``, first to last.

    SGLang may run one more decode step than was asked for, and it may still be running.

    Raises:
        AssertionError: nothing was recorded.
    """
    parts: dict[int, dict[int, dict[str, np.ndarray]]] = {}
    for path in directory.glob(f"{rid}.*.*.npz"):
        start, layer = map(int, path.name.removesuffix(".npz").split(".")[-2:])
        if start >= end:
            continue
        with np.load(path) as file:
            parts.setdefault(start, {})[layer] = dict(file)
    assert parts, f"no forward of {rid!r} was recorded"
    forwards = []
    for start, layers in sorted(parts.items()):
        assert sorted(layers) == list(range(len(layers)))
        fields = {name: np.stack([layers[i][name] for i in range(len(layers))]) for name in ("q", "k", "v", "out")}
        arrays = {name: value.astype(np.float64) for name, value in fields.items()}
        forwards.append(Forward(start, scaling=float(layers[0]["scaling"]), **arrays))
    return forwards


class Conversation:
    """Keys and values of every token of one conversation, and which were computed by which forward.

    Args:
        vision: bool [n], which tokens of the prompt are vision.
        forwards: of this turn. before: the conversation up to the tokens that this turn took from the cache.
    """

    def __init__(self, vision: np.ndarray, forwards: list[Forward], before: "Conversation | None" = None):
        self.vision, self.forwards = vision, forwards
        self.start = forwards[0].start
        assert before is not None or self.start == 0
        known = [(before.k[:, : self.start], before.v[:, : self.start])] if before is not None else []
        known += [(forward.k, forward.v) for forward in forwards]
        self.k, self.v = (np.concatenate([pair[i] for pair in known], axis=1) for i in (0, 1))
        assert self.k.shape[1] == forwards[-1].end and len(vision) <= self.k.shape[1]

    @property
    def layers(self) -> int:
        return self.k.shape[0]

    def weights(self, layer: int, q: np.ndarray, positions: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Softmax attention [H, t, n] of queries [t, H, D] at ``positions`` to earlier tokens that are ``seen`` [n]."""
        n = int(positions[-1]) + 1
        groups = q.shape[1] // self.k.shape[2]
        keys = np.repeat(self.k[layer, :n], groups, axis=1)
        logits = np.einsum("thd,nhd->htn", q, keys) * self.forwards[0].scaling
        visible = (np.arange(n) <= positions[:, None]) & seen[:n]
        logits = np.where(visible, logits, -np.inf)
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    def select(self, retention: float, viewed: np.ndarray | None = None) -> Selection:
        """What this turn's prefill must keep; the attention is full (no span is reduced to a view)."""
        n = len(self.vision)
        seen = np.ones(self.k.shape[1], bool)
        attention = np.full((self.layers, n, n), np.nan)
        for forward in self.forwards:
            positions = np.arange(forward.start, min(forward.end, n))
            if not len(positions):
                break
            for layer in range(self.layers):
                rows = self.weights(layer, forward.q[layer, : len(positions)], positions, seen).mean(0)
                attention[layer, positions] = 0
                attention[layer, positions, : rows.shape[1]] = rows
        kinds = [VISION if vision else TEXT for vision in self.vision]
        return select(attention, kinds, retention, "vision", self.start)

    def assert_attention(self, prefill_kept: np.ndarray | None, decode_kept: np.ndarray | None) -> int:
        """Every output of every forward is attention over text and what was kept of the vision tokens.

        Args:
            prefill_kept, decode_kept: bool [L, V], or None where all vision tokens are seen.

        Returns:
            How many decode steps were compared.
        """
        where, steps = np.flatnonzero(self.vision), 0
        for forward in self.forwards:
            decode = forward.start >= len(self.vision)
            steps += decode
            kept = decode_kept if decode else prefill_kept
            positions = np.arange(forward.start, forward.end)
            for layer in range(self.layers):
                seen = np.ones(self.k.shape[1], bool)
                if kept is not None:
                    seen[where[: kept.shape[1]]] = kept[layer]
                weights = self.weights(layer, forward.q[layer], positions, seen)
                groups = weights.shape[0] // self.v.shape[2]
                values = np.repeat(self.v[layer, : weights.shape[2]], groups, axis=1)
                expected = np.einsum("htn,nhd->thd", weights, values)
                np.testing.assert_allclose(
                    forward.out[layer], expected, rtol=0, atol=ATTENTION_ATOL * max(1.0, np.abs(expected).max()),
                    err_msg=f"layer {layer}, positions from {forward.start}",
                )  # fmt: skip
        return steps
