"""Batches of requests in poisoned pages, and attention over them written out query by query, head by head."""

from __future__ import annotations

import numpy as np
import torch

HEADS, KV_HEADS, DIM = 6, 2, 8
POISON = float("nan")


class Batch:
    """Requests of ``lengths`` cached tokens in pages scattered over a cache; everything they do not own is NaN."""

    def __init__(self, lengths, page_size, seed=0, layout="NHD"):
        rng = np.random.default_rng(seed)
        self.lengths, self.page_size = lengths, page_size
        counts = [-(-length // page_size) for length in lengths]
        total = 2 * sum(counts) + 3
        order = rng.permutation(total)[: sum(counts)]
        self.k = np.full((total, page_size, KV_HEADS, DIM), POISON, np.float32)
        self.v = self.k.copy()
        self.keys, self.values = [], []
        at = 0
        for length, count in zip(lengths, counts, strict=True):
            k, v = rng.normal(size=(2, length, KV_HEADS, DIM)).astype(np.float32)
            for i in range(length):
                page = order[at + i // page_size]
                self.k[page, i % page_size], self.v[page, i % page_size] = k[i], v[i]
            self.keys.append(k)
            self.values.append(v)
            at += count
        self.indptr = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        self.indices = torch.tensor(order, dtype=torch.int32)
        last = [(length - 1) % page_size + 1 if length else 1 for length in lengths]
        self.last = torch.tensor(last, dtype=torch.int32)
        self.rng = rng
        axes = (0, 1, 2, 3) if layout == "NHD" else (0, 2, 1, 3)
        self.cache = tuple(torch.tensor(x.transpose(axes)) for x in (self.k, self.v))

    def queries(self, counts):
        q = self.rng.normal(size=(sum(counts), HEADS, DIM)).astype(np.float32)
        indptr = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        return torch.tensor(q), indptr

    @property
    def pages(self):
        return self.indptr, self.indices, self.last


def brute(q, keys, values, scale, causal=False, cap=0.0, window=-1, mask=None):
    """One request, query by query, head by head, float64; an unseen row is (0, -5e4)."""
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -5e4)
    offset = len(keys) - len(q)
    for i in range(len(q)):
        for h in range(HEADS):
            seen = [
                j
                for j in range(len(keys))
                if (not causal or j <= i + offset)
                and (window < 0 or j >= i + offset - window)
                and (mask is None or mask[i][j])
            ]
            if not seen:
                continue
            kv = h // (HEADS // KV_HEADS)
            x = np.array([float(np.dot(q[i, h].astype(np.float64), keys[j][kv])) * scale for j in seen])
            if cap:
                x = cap * np.tanh(x / cap)
            weights = np.exp2((x - x.max()) / np.log(2))
            out[i, h] = sum(w * values[j][kv].astype(np.float64) for w, j in zip(weights, seen, strict=True))
            out[i, h] /= weights.sum()
            lse[i, h] = np.log2(weights.sum()) + x.max() / np.log(2)
    return out, lse
