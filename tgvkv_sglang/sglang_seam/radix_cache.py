"""SGLang's prefix-cache interface on top of the span tree: requests in, slots out."""

from __future__ import annotations

import time
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)

from ..config import TgvConfig
from ..errors import UnsupportedServerError
from ..kv.evictor import Evictor
from ..kv.integrity import check, check_sums
from ..kv.nodes import Node
from ..kv.radix import SpanTree
from ..namespace import Namespace
from ..request.lifecycle import Lifecycle
from . import active
from .held_request import HeldRequest
from .pool import TgvKVPool
from .requests import Facts, facts_of
from .selections import Selections
from .server_args import config_of


def create_radix_cache(ctx: Any) -> "TgvRadixCache":
    """Factory registered as radix cache backend ``tgvkv``."""
    active.require("the radix cache")
    config = config_of(ctx.server_args)
    if config is None or ctx.disable_radix_cache or ctx.params.disable:
        raise UnsupportedServerError("tgvkv: --radix-cache-backend tgvkv works with --attention-backend tgvkv only.")
    return TgvRadixCache(ctx.params, config)


class TgvRadixCache(BasePrefixCache):
    """This class only speaks SGLang: what happens to a request is in :mod:`tgvkv_sglang.request.lifecycle`.

    Physical and logical lengths differ once spans are reclaimed: sizes (evictable, protected) count slots, prefix
    lengths count tokens, and a reclaimed token's page-table entry is 0.
    """

    def __init__(self, params: Any, config: TgvConfig):
        self.disable = False
        self.config = config
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.disable_finished_insert = params.disable_finished_insert
        pool = self.token_to_kv_pool_allocator.get_kvcache()
        if not isinstance(pool, TgvKVPool):
            raise UnsupportedServerError(f"tgvkv: the KV pool is {type(pool).__name__}, not ours.")
        self.device = pool.store.device
        self.capacity = self.token_to_kv_pool_allocator.size
        self.tree = SpanTree(pool.store, self.token_to_kv_pool_allocator.free)
        self.evictor = Evictor(self.tree)
        share = config.reclaimable_share
        limit = int(share * self.capacity) if share < 1.0 else None
        self.selections = Selections()
        self.lifecycle = Lifecycle(self.tree, self.evictor, self.selections, self._allocate, limit)
        self._checked: tuple[int, int, int] | None = None
        if params.enable_metrics:
            self.init_metrics_collector()

    def _allocate(self, slots: int) -> torch.Tensor | None:
        """For views that own KV from the start."""
        missing = slots - self.token_to_kv_pool_allocator.available_size()
        if missing > 0:
            self.evict(EvictParams(num_tokens=missing))
        return self.token_to_kv_pool_allocator.alloc(slots)

    # -- small parts of the interface ----------------------------------------------------------------------------

    @property
    def root_node(self) -> Node:
        return self.tree.root

    def reset(self) -> None:
        self.tree.reset()

    def evictable_size(self) -> int:
        return self.evictor.evictable

    def protected_size(self) -> int:
        return self.evictor.protected

    def total_size(self) -> int:
        return self.tree.total

    def full_evictable_size(self) -> int:
        return self.evictable_size()

    def full_protected_size(self) -> int:
        return self.protected_size()

    def pretty_print(self) -> None:
        for node in self.tree.nodes():
            held = "reclaimed" if node.value is None else f"{len(node.value)} slots"
            print(f"[{node.start}, {node.end}) {'vision' if node.atom else 'text'} {held} lock={node.lock_ref}")

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        return IncLockRefResult(delta=self.tree.lock(node))

    def dec_lock_ref(self, node: Node, params: Any = None) -> DecLockRefResult:
        return DecLockRefResult(delta=self.tree.unlock(node))

    def evict(self, params: EvictParams) -> EvictResult:
        start = time.perf_counter()
        freed = self.evictor.evict(params.num_tokens)
        self.update_eviction_metrics(freed, start)
        return EvictResult(num_tokens_evicted=freed)

    def check_ownership(self) -> None:
        """Every slot is free or owned by exactly one node or view. Only called while no request runs.

        Slot by slot where SGLang checks its memory strictly, unless nothing has changed since the last check; otherwise
        only the sums, as stock.

        Raises:
            IntegrityError: with the numbers.
        """
        allocator = self.token_to_kv_pool_allocator
        if not envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            check_sums(self.tree, allocator.available_size(), self.capacity)
            return
        stamp = (self.tree.clock, self.tree.total, allocator.available_size())
        if stamp != self._checked:
            check(self.evictor, torch.cat([allocator.free_pages, allocator.release_pages]), self.capacity)
            self._checked = stamp

    # -- a request's life (see request/lifecycle.py) -------------------------------------------------------------

    def _hold(self, req: Req) -> HeldRequest:
        return HeldRequest(req, facts_of(req, self.config), self.req_to_token_pool)

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        key, req = params.key, params.req
        if req is not None:
            facts = facts_of(req, self.config)
        else:  # nobody says whose pictures these are: only text can match
            facts = Facts(Namespace.of(self.config, key.extra_key), (), None)
        ids = facts.tree_ids(key.token_ids)
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        match = self.lifecycle.admit(facts.namespace, facts.state, ids, limit)
        return MatchResult(
            device_indices=match.slots,
            last_device_node=match.node,
            last_host_node=match.node,
            best_match_node=match.node,
        )

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        """A middle chunk was scheduled, or the last one has run."""
        held = self._hold(req)
        if chunked:
            end = req.extend_range.end
            self.lifecycle.chunk(held, held.facts.tree_ids(req.full_untruncated_fill_ids), end)
        else:
            ids = held.facts.tree_ids(req.get_fill_ids())
            end = len(ids)
            self.lifecycle.end_prefill(held, ids)
        req.prefix_indices = held.page_row[:end].to(torch.int64, copy=True)

    def cache_finished_req(self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """The request leaves, answered (its tokens go to the tree) or not (they are freed)."""
        held = self._hold(req)
        if is_insert and not self.disable_finished_insert:
            ids = req.origin_input_ids + req.output_ids
            self.lifecycle.finish(held, held.facts.tree_ids(ids[:kv_len_to_handle]))
        else:
            self.lifecycle.drop(held, kv_len_to_handle)


def check_when_idle(result: Any, checker: Any) -> None:
    """Runs where SGLang checks its pools on an idle server."""
    if isinstance(checker.tree_cache, TgvRadixCache):
        checker.tree_cache.check_ownership()
