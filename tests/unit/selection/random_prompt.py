"""A prompt of random queries and keys, and how it is scored: by the backend's calls, and densely in numpy."""

import math
from fractions import Fraction

import numpy as np
import torch

from tests.oracle.selection import TEXT, VISION
from tgvkv_sglang.attention.torch_cpu import KeyRows, row_lse_e, visible
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.registry import load_budget_rule, load_scope
from tgvkv_sglang.selection.choose import Quota
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.selection.scoring import Ask, PrefillScoring
from tgvkv_sglang.selection.tgv import Tgv
from tgvkv_sglang.types import Span

LAYERS, Q_HEADS, KV_HEADS, DIM, SCALE = 3, 4, 2, 8, 0.31
KINDS = [TEXT] * 3 + [VISION] * 7 + [TEXT] * 2 + [VISION] * 5 + [TEXT] * 6
SPANS = [Span(3, 10), Span(12, 17)]
N = len(KINDS)
MODEL = Model(LAYERS, Q_HEADS)


class Prompt:
    """Random queries and a shuffled row of slots, everything in float64; or KV of 8 bits, divided by ``factors``."""

    def __init__(self, seed: int = 0, factors: list[tuple[float, float]] | None = None):
        rng = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
        slots = 2 * N
        self.store = UnitStore(random(LAYERS, slots, KV_HEADS, DIM), random(LAYERS, slots, KV_HEADS, DIM + 1))
        self._true: UnitStore | None = None
        if factors is not None:
            self._quantise(slots, factors)
        self.q = random(LAYERS, N, Q_HEADS, DIM)
        self.row = 1 + torch.randperm(slots - 1, generator=rng)[:N].to(torch.int32)

    def _quantise(self, slots: int, factors: list[tuple[float, float]]) -> None:
        """``store`` is what a server keeps, ``true`` what it stands for, in float64."""
        stored, true = [], []
        for flat, kind in ((self.store.k_flat, 0), (self.store.v_flat, 1)):
            divisors = torch.tensor([pair[kind] for pair in factors], dtype=torch.float64)[:, None, None, None]
            stored.append((flat.view(LAYERS, slots, *flat.shape[1:]) / divisors).to(torch.float8_e4m3fn))
            true.append(stored[-1].double() * divisors)
        self.store, self._true = UnitStore(*stored), UnitStore(*true)
        self.store.scale(factors)

    @property
    def true(self) -> UnitStore:
        """K and V as the model made them."""
        return self._true or self.store

    def beside(self, seed: int) -> "Prompt":
        """Another prompt in the same pool: other queries, the same slots in another order."""
        other = Prompt(seed)
        other.store, other.row = self.store, self.row[torch.randperm(N, generator=torch.Generator().manual_seed(seed))]
        return other

    def forward_rows(self, layer: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries ``[t, Hq, D]`` of a chunk and the natural LSE of their rows ``[t, Hq]``.

        A row's LSE has the same bits in every chunking, so that what scoring makes of it can be compared to the bit.
        """
        keys = KeyRows(self.row, None, self.true).layer(layer)
        lse_e = row_lse_e(self.q[layer], keys, self.true, visible(torch.arange(N), keys), SCALE)
        return self.q[layer, begin:end], lse_e[begin:end]

    def dense(self, layer: int, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Attention by numpy loops over heads: weights [Hq, n, n], outputs [n, Hq, Dv], natural LSE [n, Hq]."""
        units = layer * self.store.slots + self.row.numpy()
        k, v = self.true.k_flat.numpy()[units], self.true.v_flat.numpy()[units]
        weights, outputs, lses = [], [], []
        for head in range(Q_HEADS):
            kv = head // (Q_HEADS // KV_HEADS)
            logits = self.q[layer, :, head].numpy() @ k[:, kv].T * SCALE
            exp = np.exp(logits) * seen
            weights.append(exp / exp.sum(1, keepdims=True))
            outputs.append(weights[-1] @ v[:, kv])
            lses.append(np.log(exp.sum(1)))
        return np.array(weights), np.stack(outputs, 1), np.stack(lses, 1)

    def begin(self, start: int = 0, cap: int = 4096, policy=None, retention: str = "0.3", scope: str = "vision",
              spans=SPANS, rule=None, name: str = "random prompt") -> Grounding:  # fmt: skip
        policy, rule = policy or Tgv(), rule or load_budget_rule("tvb")
        quota = Quota(load_scope(scope), Fraction(retention), N)
        text = policy.query_positions(spans, start, N, cap)
        return Grounding(name, spans, text, policy, rule, quota)

    def ground(self, cuts: list[int], start=0, stash_bytes: int = 2**30, model: Model = MODEL, **how) -> Grounding:
        """Run a prefill of ``[start, N)`` in chunks that end at ``cuts``, as the backend does."""
        grounding = self.begin(start, **how)
        for begin, end in zip([start, *cuts], [*cuts, N], strict=True):
            run([(self, grounding)], begin, end, stash_bytes, model)
        return grounding


def run(members: list[tuple[Prompt, Grounding]], begin: int, end: int, stash_bytes: int = 2**30, model: Model = MODEL,
        layers=range(LAYERS)) -> None:  # fmt: skip
    """One forward over ``[begin, end)`` of prompts that share a pool, each with a grounding."""
    store, count = members[0][0].store, end - begin
    table = torch.stack([prompt.row for prompt, _ in members])
    asks = [Ask(grounding, grounding.rows(begin, end) + i * count, i, end == N)
            for i, (_, grounding) in enumerate(members)]  # fmt: skip
    scoring = PrefillScoring(asks, table, store, model, stash_bytes)
    for layer in layers:
        rows = [prompt.forward_rows(layer, begin, end) for prompt, _ in members]
        q, lse_e = (torch.cat(parts) for parts in zip(*rows, strict=True))
        scoring.add(layer, q, lse_e / math.log(2), SCALE)
