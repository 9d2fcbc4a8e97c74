"""A prompt of random queries and keys, and how it is scored: by the backend's calls, and densely in numpy."""

import numpy as np
import torch

from tests.oracle.selection import TEXT, VISION
from tgvkv_sglang.attention.torch_cpu import KeyRows, row_lse_e, visible
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.selection.tgv import Tgv
from tgvkv_sglang.types import Span

LAYERS, Q_HEADS, KV_HEADS, DIM, SCALE = 3, 4, 2, 8, 0.31
KINDS = [TEXT] * 3 + [VISION] * 7 + [TEXT] * 2 + [VISION] * 5 + [TEXT] * 6
SPANS = [Span(3, 10), Span(12, 17)]
N = len(KINDS)


class Prompt:
    """Random queries and a shuffled row of slots, everything in float64."""

    def __init__(self, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        slots = 2 * N
        self.store = UnitStore(random(LAYERS, slots, KV_HEADS, DIM), random(LAYERS, slots, KV_HEADS, DIM + 1))
        self.q = random(LAYERS, N, Q_HEADS, DIM)
        self.row = 1 + torch.randperm(slots - 1, generator=rng)[:N].to(torch.int32)

    def dense(self, layer: int, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Attention by numpy loops over heads: weights [Hq, n, n], outputs [n, Hq, Dv], natural LSE [n, Hq]."""
        units = layer * self.store.slots + self.row.numpy()
        k, v = self.store.k_flat.numpy()[units], self.store.v_flat.numpy()[units]
        weights, outputs, lses = [], [], []
        for head in range(Q_HEADS):
            kv = head // (Q_HEADS // KV_HEADS)
            logits = self.q[layer, :, head].numpy() @ k[:, kv].T * SCALE
            exp = np.exp(logits) * seen
            weights.append(exp / exp.sum(1, keepdims=True))
            outputs.append(weights[-1] @ v[:, kv])
            lses.append(np.log(exp.sum(1)))
        return np.array(weights), np.stack(outputs, 1), np.stack(lses, 1)

    def ground(
        self, cuts: list[int], start: int = 0, cap: int = 4096, heads: int = Q_HEADS, reduce=None, policy=None
    ) -> Grounding:
        """Run a prefill of ``[start, N)`` in chunks that end at ``cuts``, as the backend does."""
        policy = policy or Tgv()
        text = policy.query_positions(SPANS, start, N, cap)
        model = Model(LAYERS, heads) if reduce is None else Model(LAYERS, heads, reduce)
        grounding = Grounding(SPANS, text, (start, N), model, policy)
        begin = start
        for end in [*cuts, N]:
            keys = KeyRows(self.row[:end], None, self.store)
            rows = grounding.rows(begin, end)
            if end == N:
                grounding.locate(self.row)
            for layer in range(LAYERS):
                q = self.q[layer, begin:end][rows]
                if len(rows):
                    mask = visible(rows + begin, keys.layer(layer))
                    grounding.add(layer, q, row_lse_e(q, keys.layer(layer), self.store, mask, SCALE))
                if end == N:
                    grounding.finish_layer(layer, self.store, SCALE)
            begin = end
        return grounding
