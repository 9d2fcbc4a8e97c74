"""Batches on a fake GPU: requests with a picture each, their pool, page table and planner, forwards without a model."""

from collections import Counter
from fractions import Fraction
from typing import Callable

import torch

from tests.fakes.launches import Launches, on_gpu
from tgvkv_sglang.attention.merge import merge_views
from tgvkv_sglang.attention.planner import Step, ViewPlanner
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.kv.views import ViewTable
from tgvkv_sglang.registry import load_budget_rule, load_policy, load_scope
from tgvkv_sglang.selection.choose import Quota
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.types import Span

LAYERS, SLOTS, Q_HEADS, KV_HEADS, DIM, SCALE = 4, 200, 4, 2, 16, 0.25
VISION, LENGTH = Span(2, 14), 20


class Request:
    """An attendee whose prompt is an image between two pieces of text, and whose decode goes through its choice."""

    prompt_len = LENGTH

    def __init__(self, number: int, scope: str = "vision", policy: str = "tgv", budget: str = "tvb"):
        quota = Quota(load_scope(scope), Fraction(1, 4), LENGTH)
        how = load_policy(policy), load_budget_rule(budget), quota
        text = how[0].query_positions([VISION], 0, LENGTH, 4096)
        self.grounding = Grounding(f"request {number}", [VISION], text, *how)
        self._table = None

    def begin_chunk(self, start: int) -> Grounding:
        return self.grounding

    def table(self, decode: bool) -> ViewTable | None:
        if decode and self._table is None:
            self._table = ViewTable([self.grounding.chosen.units])
        return self._table


class Gpu:
    """A pool, a page table and a planner on a GPU, and forwards of batches without a model."""

    def __init__(self, requests: int, stash_bytes: int = 2**30, **how):
        self.store = UnitStore(*(self.random(LAYERS, SLOTS, KV_HEADS, DIM) for _ in range(2)))
        rows = torch.randperm(SLOTS - 1)[: requests * LENGTH].view(requests, LENGTH) + 1
        self.requests = [Request(i, **how) for i in range(requests)]
        self.page_table = on_gpu(rows.int())
        self.planner = ViewPlanner(self.store, Model(LAYERS, Q_HEADS), self.page_table, stash_bytes)

    @staticmethod
    def random(*shape: int) -> torch.Tensor:
        return on_gpu(torch.randn(*shape))

    def attend(self, step: Step, rows: int) -> None:
        """Our part of a forward, layer by layer, after the dense attention."""
        for layer in range(LAYERS):
            q, out, lse_b2 = (self.random(rows, Q_HEADS, *last) for last in ((DIM,), (DIM,), ()))
            merge_views(q, out, lse_b2, step, layer, self.store, SCALE)
            if step.scoring is not None:
                step.scoring.add(layer, q, lse_b2, SCALE)

    def prefill(self, start: int = 0, end: int = LENGTH) -> None:
        count = len(self.requests)
        rows = self.planner.prefill_rows(self.requests, [start] * count, [end] * count)
        self.attend(self.planner.prefill(rows, list(range(count))), count * (end - start))

    def decode(self) -> None:
        self.attend(self.planner.decode(list(self.requests)), len(self.requests))


class Counted:
    """What one step adds to the counts."""

    def __init__(self, seen: Launches, step: Callable, *args):
        before, up, down = Counter(seen.launches), seen.to_device, seen.to_host
        step(*args)
        self.launches = seen.launches - before
        self.up, self.down = seen.to_device - up, seen.to_host - down

    @property
    def kernels(self) -> int:
        return self.launches.total()
