"""What a GPU has to do for our part of a forward and of a decode step: launches, copies, and no wait of the host."""

import pytest
import torch

from tests.fakes.launches import Launches, on_gpu
from tests.unit.attention.gpu_batches import LAYERS, LENGTH, VISION, Counted, Gpu
from tgvkv_sglang.registry import BUDGET_RULES, POLICIES


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


def assert_cost(more: int, each: int, **how) -> None:
    """One more request takes at most ``each`` more launches, none waits; alone it takes ``LAYERS + 6 + more``."""
    with Launches() as seen:
        one, five = (Counted(seen, Gpu(count, **how).prefill) for count in (1, 5))
    assert seen.waits == [] and one.down == five.down == CHOICE
    assert one.kernels <= LAYERS + 6 + more and five.kernels - one.kernels <= 4 * each


LAYER_BY_LAYER = 28 * LAYERS
"""Launches of plain torch, for each request."""


@pytest.mark.parametrize("policy", POLICIES)
def test_what_each_policy_costs(policy):
    each = {"snapkv": 1, "pyramidkv": 1, "h2o": LAYER_BY_LAYER}.get(policy, 0)
    assert_cost(LAYER_BY_LAYER if policy == "h2o" else 2, each, policy=policy)


@pytest.mark.parametrize("budget", BUDGET_RULES)
def test_what_each_budget_rule_costs(budget):
    more, each = (LAYER_BY_LAYER + 25, LAYER_BY_LAYER) if budget == "vl-cache" else (8, 0)
    assert_cost(more, each, budget=budget)


def test_a_rule_by_density_for_queries_that_are_vision_tokens():
    assert_cost(40 * LAYERS, 40 * LAYERS, policy="h2o", budget="uniform")
    assert_cost(80 * LAYERS, 80 * LAYERS, policy="h2o", budget="vl-cache")


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
