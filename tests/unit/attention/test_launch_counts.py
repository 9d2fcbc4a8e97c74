"""What a GPU has to do for our part of a forward and of a decode step: launches, copies, and no wait of the host."""

from collections import Counter
from fractions import Fraction
from typing import Callable

import pytest
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

    def __init__(self, number: int, scope: str = "vision", policy: str = "tgv"):
        quota = Quota(load_scope(scope), Fraction(1, 4), LENGTH)
        how = load_policy(policy), load_budget_rule("tvb"), quota
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
        self.planner = ViewPlanner(self.store, Model(LAYERS, Q_HEADS), on_gpu(rows.int()), stash_bytes)

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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


SCORES = {"stash_rows_kernel": LAYERS, "take": 1, "column_sums_kernel": 2, "column_reduce_kernel": 2,
          "select_batch_kernel": 1}  # fmt: skip
"""Launches of a prefill that scores; three uploads: rows and places, the plan, the requests' quotas."""
CHOICE = 3
"""Tensors of a batch's choice that go to the host behind the forward."""


@pytest.mark.parametrize("requests", (1, 5))
def test_a_prefill_that_scores(requests):
    """Nobody waits for the choice until the prefill's result is there, and then once for all requests."""
    with Launches() as seen:
        gpu = Gpu(requests)
        step = Counted(seen, gpu.prefill)
        assert step.launches == SCORES and (step.up, step.down) == (3, CHOICE)
        assert seen.event_waits == []
        for request in gpu.requests:
            assert len(request.grounding.choice().host_columns) == LAYERS * len(VISION) // 4
    assert len(seen.event_waits) == 1 and seen.waits == []


@pytest.mark.parametrize("requests", (1, 5))
def test_chunks_and_blocks_of_layers(requests):
    """An earlier chunk's queries are put before the last one's: two launches. A block of layers is scored by itself;
    then scores, masses and each request's extras are joined."""
    with Launches() as seen:
        gpu = Gpu(requests)
        first = Counted(seen, gpu.prefill, 0, 17)
        assert first.launches == {"stash_rows_kernel": LAYERS} and (first.up, first.down) == (1, 0)
        last = Counted(seen, gpu.prefill, 17, LENGTH)
        assert last.launches == {**SCORES, "cat": 2}
        blocks = Counted(seen, Gpu(requests, stash_bytes=1).prefill)
        assert blocks.launches == {**SCORES, "column_sums_kernel": 2 * LAYERS, "column_reduce_kernel": 2 * LAYERS,
                                   "cat": 3 + requests}  # fmt: skip
    assert seen.waits == []


@pytest.mark.parametrize("requests", (1, 5))
def test_a_total_that_depends_on_the_weights_is_waited_for_once(requests):
    with Launches() as seen:
        step = Counted(seen, Gpu(requests, scope="total").prefill)
    (wait,) = seen.waits
    assert "selection/choose.py" in wait and step.launches == SCORES and (step.up, step.down) == (4, CHOICE + 1)


@pytest.mark.parametrize("requests", (1, 5))
def test_decode_steps(requests):
    """Tables are made when a batch or a view changes, from two uploads and a number of launches that does not depend
    on how many requests there are. Any other step launches the view kernel alone, and in a graph nothing outside it."""
    with Launches() as seen:
        gpu = Gpu(requests)
        gpu.prefill()
        new, same = Counted(seen, gpu.decode), Counted(seen, gpu.decode)
        assert same.launches == {"view_decode_kernel": LAYERS} and (same.up, same.down) == (0, 0)
        assert same.kernels < new.kernels <= LAYERS + 25 and (new.up, new.down) == (2, 0)
        gpu.planner.make_graph_tables(8)
        tables = gpu.planner.decode_tables(list(gpu.requests))
        new, same = (Counted(seen, gpu.planner.graph_step, tables, 8) for _ in range(2))
        assert new.kernels <= 27 and (new.up, new.down) == (2, 0)
        assert (same.kernels, same.up, same.down) == (0, 0, 0)
        step = gpu.planner.graph_step([None] * 8, 8)
        with seen.capture():
            gpu.attend(step, 8)
    assert seen.waits == []


def test_a_move_of_units():
    with Launches() as seen:
        store, units = Gpu(1).store, [on_gpu(torch.arange(start, start + 40)) for start in (0, 20)]
        assert Counted(seen, store.move, *units).launches == {"move_rows_kernel": 2}
    assert seen.waits == []
