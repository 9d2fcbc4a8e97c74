"""What the scheduler's side costs a GPU: a conversation through SGLang's pools and our cache, on fake GPU memory."""

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from tests.fakes.launches import Launches, on_gpu
from tests.seam.one_process import DIM, KV_HEADS, LAYERS, Q_HEADS, SCALE, SLOTS, OneProcess, configured, picture
from tests.unit.attention.gpu_batches import Counted
from tgvkv_sglang.attention.planner import ViewPlanner
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.sglang_seam.pool import TgvKVPool
from tgvkv_sglang.sglang_seam.radix_cache import TgvRadixCache
from tgvkv_sglang.sglang_seam.requests import state_of


class OnGpu(OneProcess):
    """With SGLang's allocator for GPUs."""

    def __init__(self, seen: Launches, **config):
        self.config = TgvConfig(**{"retention": 0.25, **config})
        self.rows = ReqToTokenPool(8, 256, "cuda", False)
        pool = TgvKVPool(SLOTS, 1, torch.float32, KV_HEADS, DIM, LAYERS, "cuda", False)
        self.store = pool.store
        self.planner = ViewPlanner(self.store, Model(LAYERS, Q_HEADS), self.rows.req_to_token, self.config.stash_bytes)
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.float32, "cuda", pool, False)
        self.cache = TgvRadixCache(CacheInitParams(False, self.rows, self.allocator, 1), self.config)
        seen.waits.clear()  # a pool's construction waits, once

    def run(self, req: Req, spoil: None = None) -> None:
        prefix, end = req.extend_range
        (row,) = self.planner.prefill_rows([state_of(req)], [prefix], [end])
        step = self.planner.prefill([row], [req.req_pool_idx])
        if step is None or step.scoring is None:
            return
        for layer in range(LAYERS):
            q, lse_b2 = on_gpu(torch.randn(end - prefix, Q_HEADS, DIM)), on_gpu(torch.rand(end - prefix, Q_HEADS))
            step.scoring.add(layer, q, lse_b2, SCALE)


def served(engine: OnGpu, rid: str, ids: list[int], steps: int = 2) -> Req:
    """A prefill and decode steps, each planned as the backend plans it."""
    req = engine.prefill(rid, ids)
    for _ in range(steps):
        engine.decode(req)
        engine.planner.decode([state_of(req)])
    return req


def test_nothing_of_a_conversation_waits_for_the_gpu(model_dir):
    """Two questions about one picture, a reclaim under a request that runs, a turn after it, a retraction. The host
    waits for one event a selection: its own copy, behind which SGLang's is when it processes the prefill's result."""
    torch.manual_seed(0)
    image, other = picture(0, 60), picture(1, 60)
    with configured(model_dir), Launches() as seen:
        engine = OnGpu(seen)
        first = served(engine, "first", [1, *image, 2, 3])
        second = served(engine, "second", [1, *image, 4, 5, 6])
        third = served(engine, "third", [7, *other, 8, 9])
        assert len(seen.event_waits) == 3
        for req in (first, second):
            engine.finish(req)
        reclaim = Counted(seen, engine.cache.evict, EvictParams(num_tokens=SLOTS - 80))
        assert reclaim.launches["move_rows_kernel"] >= 2 and (reclaim.up, reclaim.down) == (0, 0)
        (view,) = state_of(third).views
        assert view.packed
        engine.planner.decode([state_of(third)])
        more = served(engine, "more", [7, *other, 8, 9, 7, 8, 10, 11])
        assert state_of(more).views and len(seen.event_waits) == 3, "it goes on through what was kept"
        engine.retract(third)
        engine.schedule(third)
        engine.run(third)
        engine.take_result(third)
        for req in (more, third):
            engine.finish(req)
        again = served(engine, "again", [12, *other, 13, 14])
    assert state_of(again).selections == 1 and len(seen.event_waits) == 4 and seen.waits == []


def test_what_a_selection_costs_the_scheduler(model_dir):
    """Beside the forward: a handful of launches and at most one upload, whatever was kept."""
    with configured(model_dir), Launches() as seen:
        engine, costs = OnGpu(seen), []
        for number, tokens in enumerate((20, 120)):
            req = engine.request(f"r{number}", [1, *picture(number, tokens), 2, 3])
            engine.schedule(req)
            engine.run(req)
            costs.append(Counted(seen, engine.take_result, req))
            engine.finish(req)
    assert all(cost.kernels <= 9 and cost.up <= 1 and cost.down == 0 for cost in costs)
    assert seen.waits == []
