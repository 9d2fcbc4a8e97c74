"""SGLang's prefix-cache interface on top of the span tree: requests in, slots out."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)

from ..attention.plan import plan_prefill
from ..config import TgvConfig
from ..errors import UnsupportedServerError
from ..kv.evictor import Evictor
from ..kv.integrity import check, check_sums
from ..kv.matching import whole_prefix
from ..kv.nodes import Node
from ..kv.radix import Inserted, SpanTree
from ..namespace import Namespace
from . import active
from .pool import TgvKVPool
from .requests import Facts, facts_of, state_of
from .selection import select_views
from .server_args import config_of

logger = logging.getLogger(__name__)


def create_radix_cache(ctx: Any) -> "TgvRadixCache":
    """Factory registered as radix cache backend ``tgvkv``."""
    active.require("the radix cache")
    config = config_of(ctx.server_args)
    if config is None or ctx.disable_radix_cache or ctx.params.disable:
        raise UnsupportedServerError("tgvkv: --radix-cache-backend tgvkv works with --attention-backend tgvkv only.")
    return TgvRadixCache(ctx.params, config)


class TgvRadixCache(BasePrefixCache):
    """See :class:`tgvkv_sglang.kv.radix.SpanTree` for the rules; this class only speaks SGLang.

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
        self.device = pool.units.device
        self.capacity = self.token_to_kv_pool_allocator.size
        self.tree = SpanTree(pool.units, self.token_to_kv_pool_allocator.free)
        self.evictor = Evictor(self.tree)
        self._checked: tuple[int, int, int] | None = None
        if params.enable_metrics:
            self.init_metrics_collector()

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

    # -- match ---------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        key, req = params.key, params.req
        if req is not None:
            facts = facts_of(req, self.config)
        else:  # nobody says whose pictures these are: only text can match
            facts = Facts(Namespace.of(self.config, key.extra_key), (), None)
        ids = facts.tree_ids(key.token_ids)
        limit = len(ids) if key.limit is None else min(key.limit, len(ids))
        match = self.tree.match(facts.namespace, ids, limit, facts.namespace.evicts)
        if facts.state is not None:
            facts.state.begin(plan_prefill(facts.state, match))
        return MatchResult(
            device_indices=match.slots,
            last_device_node=match.node,
            last_host_node=match.node,
            best_match_node=match.node,
        )

    # -- insert --------------------------------------------------------------------------------------------------

    def _insert(self, req: Any, ids: Any, length: int) -> Inserted:
        """Give the request's slots of ``ids[:length]`` to the tree and point its row at the tree's slots."""
        facts = facts_of(req, self.config)
        state, namespace = facts.state, facts.namespace
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :length].to(torch.int64)
        grounding = (state.plan.start, state.prompt_len) if state is not None else None
        inserted = self.tree.insert(
            namespace, ids[:length], row, req.cache_protected_len, namespace.evicts, grounding
        )
        fresh = slice(req.cache_protected_len, length)
        self.req_to_token_pool.write((req.req_pool_idx, fresh), inserted.slots[fresh].to(torch.int32))
        req.cache_protected_len = max(req.cache_protected_len, length)
        return inserted

    def _relock(self, req: Any, node: Node) -> None:
        """Hold ``node`` instead of what the request held, unless that is deeper: the views it replays hang there."""
        if req.last_node.is_below(node):
            return
        self.tree.lock(node)
        self.tree.unlock(req.last_node)
        req.last_node = node

    def _insert_prompt(self, req: Any, ids: Any, length: int) -> tuple[Inserted, list]:
        """Insert a finished prefill; returns the views decode will use (selected here if a selection was planned)."""
        state = state_of(req)
        if state is None:
            return self._insert(req, ids, length), []
        inserted = self._insert(req, ids, min(length, state.prompt_len))
        gone_before_last_chunk = length < state.prompt_len  # the one reason for scores to be missing
        chosen = [] if gone_before_last_chunk else select_views(self.tree, state, inserted, req)
        views = [*state.plan.kept_views, *chosen]
        if length > state.prompt_len:
            inserted = self._insert(req, ids, length)
        return inserted, views

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """After a middle chunk: insert its whole spans, keep the tail private. After the last: insert and select."""
        facts = facts_of(req, self.config)
        if chunked:
            ids = facts.tree_ids(req.full_untruncated_fill_ids)
            end = req.extend_range.end
            length = whole_prefix(ids, end, facts.namespace.evicts)
            if length > req.cache_protected_len:
                self._relock(req, self._insert(req, ids, length).node)
        else:
            ids = facts.tree_ids(req.get_fill_ids())
            end = len(ids)
            inserted, views = self._insert_prompt(req, ids, end)
            self._relock(req, inserted.node)
            self._decode_through(req, views)
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :end]
        req.prefix_indices = row.to(torch.int64, copy=True)
        self._trim()

    def _decode_through(self, req: Any, views: list) -> None:
        state = state_of(req)
        if state is None:
            return
        rows, index = self.req_to_token_pool.req_to_token, req.req_pool_idx

        def zero_row(start: int, end: int) -> None:
            rows[index, start:end] = 0

        state.zero_row = zero_row
        state.decode_through(views)
        self.tree.use(views, state)

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """The request leaves: its tokens go to the tree (or are freed), its views stay with the conversation."""
        facts = facts_of(req, self.config)
        state = facts.state
        if is_insert and not self.disable_finished_insert:
            ids = facts.tree_ids((req.origin_input_ids + req.output_ids)[:kv_len_to_handle])
            if state is not None and not state.settled:  # finished with its first token
                _, views = self._insert_prompt(req, ids, len(ids))
                state.decode_through(views)
                state.views = []  # a decode step may be under way and needs its table, but holds nothing in use
            else:
                self._insert(req, ids, len(ids))
        else:
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx, req.cache_protected_len : kv_len_to_handle]
            if row.numel():
                self.token_to_kv_pool_allocator.free(row.to(torch.int64))
        if state is not None:
            self.tree.disuse(state.stop(), state)
        if req.last_node is not None:
            self.tree.unlock(req.last_node)
        self._trim()

    def _trim(self) -> None:
        share = self.config.reclaimable_share
        if share < 1.0:
            self.evictor.trim(int(share * self.capacity))


def check_when_idle(result: Any, checker: Any) -> None:
    """Runs where SGLang checks its pools on an idle server."""
    if isinstance(checker.tree_cache, TgvRadixCache):
        checker.tree_cache.check_ownership()
